"""The errors that davae raises at its border, and the exit code that each one means on the command line."""


class DavaeError(Exception):
    """A mistake or mishap; the message says what was given, what is allowed and how to mend it."""

    exit_code = 1


class SettingsError(DavaeError, ValueError):
    """A recipe, an argument or a model that does not fit."""

    exit_code = 2


class DataError(DavaeError, ValueError):
    """An image, a caption or a folder of them that cannot be used."""

    exit_code = 3


class CheckpointError(DavaeError):
    """A checkpoint or a weights file that is damaged, missing or foreign."""

    exit_code = 4


class StorageError(DavaeError):
    """A disk that is full, read-only or failing."""

    exit_code = 5


class NumericsError(DavaeError, ArithmeticError):
    """Numbers that are not finite, too often to go on."""

    exit_code = 6


class RankError(DavaeError):
    """A process of several that stopped, died or fell out of step: the others cannot go on without it."""

    exit_code = 7
