"""What a conversion is given and what it gives."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from davae.errors import CheckpointError
from davae.pipelines.importing.matching import ImportReport
from davae.pipelines.importing.reading import Statistics


@dataclass(frozen=True)
class Options:
    """Beside the checkpoint; None where it was not given."""

    stats: Statistics | None = None
    """Of the latents."""
    base: str | None = None
    """Base pipeline, folder or Hub name."""
    autoencoder: Path | None = None
    """Folder of an AutoencoderDA."""
    lora: Path | None = None
    """A file with the LoRA tensors."""


@dataclass(frozen=True)
class Conversion:
    """A checkpoint, converted and not yet written."""

    save: Callable[[Path], object]
    """Writes it into a folder that exists."""
    report: ImportReport


def check_statistics(statistics: Statistics | None, channels: int, whose: str) -> None:
    """Refuse statistics of another number of channels.

    Raises:
        CheckpointError: there are some, of another number.
    """
    if statistics is not None and len(statistics.mean) != channels:
        raise CheckpointError(
            f"the statistics are of {len(statistics.mean)} channels, and {whose} has {channels}: give its own, or none"
        )
