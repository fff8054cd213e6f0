"""One import: the file, what was given beside it, and the account of its keys: used, left, missing."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor

from davae.errors import CheckpointError
from davae.pipelines.importing.reading import DTYPES, ForeignCheckpoint

# LDM's attention projections are 1x1 convolutions, diffusers' are linear layers.
PROJECTIONS = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")

# Writes a converted checkpoint into a folder that exists.
Save = Callable[[Path], object]


@dataclass
class Import:
    """A file, what was given beside it, and the account of every key, as `import.json` holds it."""

    kind: str
    checkpoint: ForeignCheckpoint
    stats: Tensor | None = None  # means and deviations of latent channels [2, C], base first
    base: str | None = None  # the base pipeline, folder or Hub name
    autoencoder: Path | None = None  # folder of an AutoencoderDA
    lora: Path | None = None  # file of the LoRA tensors
    used: list[dict[str, Any]] = field(default_factory=list)  # key, target, shape, dtype and change
    left: list[dict[str, str]] = field(default_factory=list)  # key and reason
    missing: list[dict[str, str]] = field(default_factory=list)  # target and reason: the file lacks it
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The account as JSON holds it."""
        file = self.checkpoint
        origin = {"kind": self.kind, "file": file.path.name, "sha256": file.sha256}
        keys = {"used": self.used, "left": self.left, "missing": self.missing, "notes": self.notes}
        return {"format_version": 1, **origin, "opened": file.opened, "prefixes": file.prefixes, **keys}

    def to_text(self) -> str:
        """The account as a table for people."""
        inside = " > ".join(self.checkpoint.opened) or "the top level"
        prefixes = ", ".join(self.checkpoint.prefixes) or "none"
        rows = [f"{self.kind} from {self.checkpoint.path.name}, {inside}; prefixes taken off: {prefixes}"]

        # One width for all keys, so that the columns line up.
        width = max((len(row["key"]) for row in (*self.used, *self.left)), default=0)
        for row in self.used:
            tensor = f"{row['shape']} {row['dtype']}"
            change = f"  ({row['change']})" if row["change"] else ""
            rows.append(f"used     {row['key']:<{width}}  {tensor:<26} -> {row['target']}{change}")
        for row in self.left:
            rows.append(f"left     {row['key']:<{width}}  {row['reason']}")
        for row in self.missing:
            rows.append(f"missing  {row['target']:<{width}}  {row['reason']}")
        for note in self.notes:
            rows.append(f"note     {note}")
        rows.append(f"{len(self.used)} used, {len(self.left)} left, {len(self.missing)} missing")
        return "\n".join(rows)

    def build(
        self, model_class: type[ModelMixin], config: Mapping[str, Any], spell: Callable[[str], str] = str
    ) -> ModelMixin:
        """Make a model whose parameters are the file's tensors, by the names that `spell` gives them."""
        # Shapes without values at first; a config that was read from impossible shapes is refused.
        try:
            with init_empty_weights(include_buffers=False):
                model = model_class.from_config(dict(config))
        except ValueError as error:
            path, name = self.checkpoint.path, model_class.__name__
            raise CheckpointError(f"{path}: no {name} has such shapes: {error}") from error

        model.load_state_dict(self.match(dict(model.named_parameters()), spell), strict=False, assign=True)
        return model

    def match(
        self, targets: Mapping[str, Tensor], spell: Callable[[str], str], file: ForeignCheckpoint | None = None
    ) -> dict[str, Tensor]:
        """Take a tensor of the file, `spell(name)`, for each name in `targets`: of that shape, dtype kept."""
        file, tensors = file or self.checkpoint, {}
        for name, target in targets.items():
            key, shape = spell(name), tuple(target.shape)
            is_projection = len(shape) == 2 and key.endswith(PROJECTIONS)
            if is_projection:
                shape += (1, 1)

            wanted = f"wanted {list(shape)} for {name}"
            tensor = file.tensors.get(key)
            if tensor is None:
                raise file.mismatch(key, f"found none, {wanted}")
            dtype = str(tensor.dtype).removeprefix("torch.")
            if tensor.shape != shape or tensor.dtype not in DTYPES:
                raise file.mismatch(key, f"found {list(tensor.shape)} {dtype}, {wanted}, floating-point")

            tensors[name] = tensor.reshape(target.shape).contiguous()
            change = "a linear layer" if is_projection else ""
            self.used.append({"key": key, "target": name, "shape": list(shape), "dtype": dtype, "change": change})
        return tensors

    def leave_rest(self, reasons: Mapping[str, str], owned: Sequence[str] = ()) -> None:
        """Account for the keys that were not used, as `left` with a reason.

        `reasons` is by regular expressions of the starts of keys. A key without a reason under an `owned` prefix is
        refused: it is of a layer that the result lacks.
        """
        file = self.checkpoint
        opened = file.opened[0] if file.opened else "the tensors"
        for name in file.beside:
            self.left.append({"key": name, "reason": f"beside {opened}, not opened"})

        used = {row["key"] for row in self.used}
        for key in sorted(file.tensors.keys() - used):
            reason = next((reasons[pattern] for pattern in reasons if re.match(pattern, key)), None)
            if reason is None and key.startswith(tuple(owned)):
                shape = list(file.tensors[key].shape)
                raise file.mismatch(key, f"found {shape}, wanted none: its layout has none there")
            self.left.append({"key": key, "reason": reason or "no part of this layout"})
