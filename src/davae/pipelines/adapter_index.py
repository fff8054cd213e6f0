"""`adapter.json`, the index of an adapter folder; docs/formats.md describes the others of its files."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from davae.errors import CheckpointError
from davae.run.storage import read_json

FORMAT_VERSION: Literal[2] = 2
INDEX = "adapter.json"
VAE_FOLDER = "vae"


class LoraFacts(BaseModel):
    """What peft needs to know to put the LoRA tensors back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    alpha: float
    targets: tuple[str, ...]  # ends of the layers' dotted names


class AdapterIndex(BaseModel):
    """The contents of `adapter.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1, 2] = FORMAT_VERSION
    base: str  # name or path of the base pipeline, for people
    base_sha256: str  # `digest_base` of its transformer
    # `digest_tensors` of the frozen half that `vae/` lacks; None in version 1, where `vae/` has it.
    base_encoder_sha256: str | None = None
    transformer: str  # class name
    base_channels: int
    detail_channels: int
    lora: LoraFacts | None
    layers: tuple[str, ...] = ()  # ends of the names of layers that were trained without LoRA

    @property
    def changed(self) -> tuple[str, ...]:
        """The layers, other than the ports, that differ from the base's."""
        return self.layers + (self.lora.targets if self.lora else ())


def read_index(folder: Path) -> AdapterIndex:
    """Read `adapter.json`; refuses an adapter that is missing, damaged or newer than this code."""
    path = folder / INDEX
    values = read_json(path)
    if "format_version" not in values:
        raise CheckpointError(f"{path} is damaged: it has no format_version. Copy it anew")

    # The version first: a newer index may have fields that this code does not know.
    version = values["format_version"]
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {version}, davae reads up to {FORMAT_VERSION}: update davae"
        )
    try:
        return AdapterIndex.model_validate(values)
    except ValidationError as error:
        raise CheckpointError(f"{path} is damaged: {error}. Copy it anew") from error
