"""Keys of a file matched to the tensors of a model, and the account of them: used, left, missing."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor

from davae.errors import CheckpointError
from davae.pipelines.importing.reading import DTYPES, ForeignCheckpoint, Statistics, mismatch


@dataclass(frozen=True)
class TensorSource:
    """Where in the file a tensor of the result comes from."""

    key: str
    change: Callable[[Tensor], Tensor] | None = None
    change_name: str = ""
    # Its shape in the file, where that differs from the result's.
    shape: tuple[int, ...] | None = None


@dataclass
class ImportReport:
    """The account of every key, as `import.json` holds it."""

    kind: str
    file: str
    sha256: str
    opened: tuple[str, ...]
    prefixes: tuple[str, ...]
    # Key, target, shape, dtype and change of each key that was used.
    used: list[dict[str, Any]] = field(default_factory=list)
    # Key and reason of each key that was left.
    left: list[dict[str, str]] = field(default_factory=list)
    # Target and reason of each tensor that the file lacks.
    missing: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return {"format_version": 1, **asdict(self)}

    def to_text(self) -> str:
        """The report as a table for people."""
        inside = " > ".join(self.opened) or "the top level"
        rows = [f"{self.kind} from {self.file}, {inside}; prefixes taken off: {', '.join(self.prefixes) or 'none'}"]

        # One width for all keys, so that the columns line up.
        width = max((len(entry["key"]) for entry in (*self.used, *self.left)), default=0)
        for entry in self.used:
            tensor = f"{entry['shape']} {entry['dtype']}"
            change = f"  ({entry['change']})" if entry["change"] else ""
            rows.append(f"used     {entry['key']:<{width}}  {tensor:<26} -> {entry['target']}{change}")
        for entry in self.left:
            rows.append(f"left     {entry['key']:<{width}}  {entry['reason']}")
        for entry in self.missing:
            rows.append(f"missing  {entry['target']:<{width}}  {entry['reason']}")
        for note in self.notes:
            rows.append(f"note     {note}")
        rows.append(f"{len(self.used)} used, {len(self.left)} left, {len(self.missing)} missing")
        return "\n".join(rows)


@dataclass(frozen=True)
class Options:
    """What can be given beside the checkpoint."""

    stats: Statistics | None = None
    base: str | None = None  # the base pipeline, folder or Hub name
    autoencoder: Path | None = None  # folder of an AutoencoderDA
    lora: Path | None = None  # file of the LoRA tensors


# Writes a converted checkpoint into a folder that exists.
Save = Callable[[Path], object]


def start_report(kind: str, checkpoint: ForeignCheckpoint) -> ImportReport:
    """A report that has only the entries of the file that were not opened, as left."""
    report = ImportReport(kind, checkpoint.path.name, checkpoint.sha256, checkpoint.opened, checkpoint.prefixes)
    opened = checkpoint.opened[0] if checkpoint.opened else "the tensors"
    for name in checkpoint.beside:
        report.left.append({"key": name, "reason": f"beside {opened}, not opened"})
    return report


def build_empty(model_class: type[ModelMixin], config: Mapping[str, Any], checkpoint: ForeignCheckpoint) -> ModelMixin:
    """A model whose parameters have shapes and no values; refuses a config that was read from impossible shapes."""
    try:
        with init_empty_weights(include_buffers=False):
            return model_class.from_config(dict(config))
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: no {model_class.__name__} has such shapes: {error}") from error


def match(
    file: ForeignCheckpoint, targets: Mapping[str, Tensor], sources: Mapping[str, TensorSource], report: ImportReport
) -> dict[str, Tensor]:
    """The file's tensors under the names of `sources`, shapes checked against `targets`, changes made, dtypes kept."""
    tensors: dict[str, Tensor] = {}
    for target, source in sources.items():
        shape = source.shape or tuple(targets[target].shape)
        wanted = f"wanted {list(shape)} for {target}"
        tensor = file.tensors.get(source.key)
        if tensor is None:
            raise mismatch(file.path, source.key, f"found none, {wanted}")
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tuple(tensor.shape) != shape or tensor.dtype not in DTYPES:
            raise mismatch(file.path, source.key, f"found {list(tensor.shape)} {dtype}, {wanted}, floating-point")

        tensors[target] = (source.change(tensor) if source.change else tensor).contiguous()
        row = {"key": source.key, "target": target, "shape": list(shape), "dtype": dtype, "change": source.change_name}
        report.used.append(row)
    return tensors


def leave_rest(
    checkpoint: ForeignCheckpoint, report: ImportReport, reasons: Mapping[str, str], owned: Sequence[str] = ()
) -> None:
    """Account for the keys that were not used, as `left` with a reason.

    `reasons` is by regular expressions of the starts of keys. A key without a reason under an `owned` prefix is
    refused: it is of a layer that the result lacks.
    """
    used = {entry["key"] for entry in report.used}
    for key in sorted(checkpoint.tensors.keys() - used):
        reason = next((reasons[pattern] for pattern in reasons if re.match(pattern, key)), None)
        if reason is None and key.startswith(tuple(owned)):
            shape = list(checkpoint.tensors[key].shape)
            raise mismatch(checkpoint.path, key, f"found {shape}, wanted none: its layout has none there")
        report.left.append({"key": key, "reason": reason or "no part of this layout"})
