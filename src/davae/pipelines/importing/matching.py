"""Keys of a file matched to the tensors of a model, and the account of it: used, left, missing."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor

from davae.errors import CheckpointError
from davae.pipelines.importing.reading import DTYPES, Checkpoint, Statistics


@dataclass(frozen=True)
class Source:
    """Where in the file a tensor of the result comes from."""

    key: str
    change: Callable[[Tensor], Tensor] | None = None
    """What is done to it."""
    said: str = ""
    """The change in words."""
    shape: tuple[int, ...] | None = None
    """Its shape in the file, where that is not the result's."""


@dataclass
class ImportReport:
    """What became of every key; `import.json` holds it."""

    kind: str
    file: str
    sha256: str
    opened: tuple[str, ...]
    prefixes: tuple[str, ...]
    used: list[dict[str, Any]] = field(default_factory=list)
    """key, target, shape, dtype, change."""
    left: list[dict[str, str]] = field(default_factory=list)
    """key, reason."""
    missing: list[dict[str, str]] = field(default_factory=list)
    """What the result has and the file has not: target, reason."""
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"format_version": 1, **asdict(self)}

    def to_text(self) -> str:
        """A table for people."""
        inside = " > ".join(self.opened) or "the top level"
        rows = [f"{self.kind} from {self.file}, {inside}; prefixes taken off: {', '.join(self.prefixes) or 'none'}"]
        width = max((len(entry["key"]) for entry in (*self.used, *self.left)), default=0)
        for entry in self.used:
            kind = f"{entry['shape']} {entry['dtype']}"
            change = f"  ({entry['change']})" if entry["change"] else ""
            rows.append(f"used     {entry['key']:<{width}}  {kind:<26} -> {entry['target']}{change}")
        rows += [f"left     {entry['key']:<{width}}  {entry['reason']}" for entry in self.left]
        rows += [f"missing  {entry['target']:<{width}}  {entry['reason']}" for entry in self.missing]
        rows += [f"note     {note}" for note in self.notes]
        rows.append(f"{len(self.used)} used, {len(self.left)} left, {len(self.missing)} missing")
        return "\n".join(rows)


def new_report(kind: str, checkpoint: Checkpoint) -> ImportReport:
    """An empty account; entries of the file that were not opened are left."""
    report = ImportReport(kind, checkpoint.path.name, checkpoint.sha256, checkpoint.opened, checkpoint.prefixes)
    taken = checkpoint.opened[0] if checkpoint.opened else "the tensors"
    report.left = [{"key": name, "reason": f"beside {taken}, not opened"} for name in checkpoint.beside]
    return report


def build_empty(model_class: type[ModelMixin], config: Mapping[str, Any], checkpoint: Checkpoint) -> ModelMixin:
    """A model of this config whose parameters have shapes and no values.

    Raises:
        CheckpointError: the class refuses the config, which was read from the file's shapes.
    """
    try:
        with init_empty_weights(include_buffers=False):
            return model_class.from_config(dict(config))
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: no {model_class.__name__} has such shapes: {error}") from error


def match(
    checkpoint: Checkpoint, wanted: Mapping[str, Tensor], sources: Mapping[str, Source], report: ImportReport
) -> dict[str, Tensor]:
    """The file's tensors under the names of `wanted`, shapes checked, changes made, dtypes kept.

    Args:
        checkpoint: the file.
        wanted: tensors of the result, for their shapes only.
        sources: by the names of `wanted`; names without one are not looked for.
        report: gets a row in `used` for each.

    Raises:
        CheckpointError: naming the first key that is missing, of another shape or of no floating-point dtype.
    """
    found: dict[str, Tensor] = {}
    for target, source in sources.items():
        shape = source.shape or tuple(wanted[target].shape)
        if source.key not in checkpoint.tensors:
            raise CheckpointError(
                f"{checkpoint.path}: the first mismatch is {source.key}: found none, wanted {list(shape)} for {target}"
            )
        tensor = checkpoint.tensors[source.key]
        if tuple(tensor.shape) != shape or tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{checkpoint.path}: the first mismatch is {source.key}: found {list(tensor.shape)} {name_of(tensor)}, "
                f"wanted {list(shape)} for {target}, floating-point"
            )
        found[target] = (source.change(tensor) if source.change else tensor).contiguous()
        report.used.append(
            {
                "key": source.key,
                "target": target,
                "shape": list(shape),
                "dtype": name_of(tensor),
                "change": source.said,
            }
        )
    return found


def leave_rest(
    checkpoint: Checkpoint, report: ImportReport, reasons: Mapping[str, str], owned: Sequence[str] = ()
) -> None:
    """Account for the keys that were not used.

    Args:
        checkpoint: the file.
        report: gets a row in `left` for each.
        reasons: by regular expression; the first one that matches the start of a key tells why it is left.
        owned: prefixes under which every key without such a reason must have been used.

    Raises:
        CheckpointError: a key under an `owned` prefix is of no known layer, so that the result would not be the model.
    """
    used = {entry["key"] for entry in report.used}
    for key in sorted(checkpoint.tensors.keys() - used):
        reason = next((said for pattern, said in reasons.items() if re.match(pattern, key)), None)
        if reason is None and key.startswith(tuple(owned)):
            shape = list(checkpoint.tensors[key].shape)
            raise CheckpointError(
                f"{checkpoint.path}: the first mismatch is {key}: found {shape}, wanted none: its layout has none there"
            )
        report.left.append({"key": key, "reason": reason or "no part of this layout"})


def name_of(tensor: Tensor) -> str:
    """Its dtype, without torch's prefix."""
    return str(tensor.dtype).removeprefix("torch.")


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
