"""Folders of the files that ship with the package: the small pair, LPIPS, configs of large bases, recipes."""

from importlib.resources import files
from pathlib import Path

from davae.errors import DataError


def base_pipeline() -> Path:
    """The shipped base pipeline, which `DiffusionPipeline.from_pretrained` loads with diffusers alone."""
    return _folder("base_pipeline")


def upgrade() -> Path:
    """The adapter of the shipped upgrade: `load_pipeline(base_pipeline(), adapter=upgrade())`."""
    return _folder("upgrade")


def geometry() -> Path:
    """Configs of full-size base pipelines, without weights, by the last part of their names on the Hub."""
    return _folder("geometry")


def lpips() -> Path:
    """The weights of LPIPS."""
    return _folder("lpips")


def recipes() -> Path:
    """The recipes at the top of the repository's `recipes/`; a wheel has them in this package."""
    packaged, checkout = Path(str(files(__name__) / "recipes")), Path(__file__).parents[3] / "recipes"
    return checkout if checkout.is_dir() and not packaged.is_dir() else _folder("recipes")


def _folder(name: str) -> Path:
    path = Path(str(files(__name__) / name))
    if not path.is_dir():
        raise DataError(f"{path} is missing: this installation of davae lacks shipped files; install it again whole")
    return path
