"""What the transformer is told about each picture: its caption, encoded once and kept on disk, or its class."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from davae.backbones import Backbone
from davae.data.cache import Entry, TensorCache
from davae.data.sources import PictureSet
from davae.errors import SettingsError
from davae.run.ranks import Ranks
from davae.training.caching import fill
from davae.training.fingerprints import sha256_of, text_digest

BLOCK = 64
"""Captions that are encoded together."""
ROWS = ".rows"
"""Behind a tensor's name: how many rows it has, if the cache holds less of them (`trimmed`)."""


class CachedConditions:
    """Of captions that lie in a cache, and are read when they are asked for; made by `cached_conditions`."""

    def __init__(self, cache: TensorCache, keys: Sequence[str]) -> None:
        self._cache, self._keys = cache, keys

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """On the CPU, each value [B, ...]; row 0 is no caption, row 1 + i that of picture i."""
        read = {key: padded(self._cache[key]) for key in {self._keys[row] for row in rows}}
        found = [read[self._keys[row]] for row in rows]
        return {name: torch.stack([each[name] for each in found]) for name in found[0]}


class OnlineConditions:
    """Of captions that are encoded when they are asked for, by text encoders on whatever device they are."""

    def __init__(self, pipeline: DiffusionPipeline, backbone: Backbone, pictures: PictureSet, tokens: int) -> None:
        self._pipeline, self._backbone, self._tokens = pipeline, backbone, tokens
        self._captions = ["", *pictures.captions]

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """On the CPU, each value [B, ...]; row 0 is no caption, row 1 + i that of picture i."""
        return encode_captions(self._pipeline, self._backbone, [self._captions[row] for row in rows], self._tokens)


class ClassConditions:
    """Of classes, which need no encoder."""

    def __init__(self, pipeline: DiffusionPipeline, backbone: Backbone, pictures: PictureSet) -> None:
        null = backbone.null_class(pipeline.transformer)
        found = backbone.condition(pipeline, [null, *pictures.classes])
        self._values = {name: values.cpu() for name, values in found.items()}

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """On the CPU, each value [B, ...]; row 0 is the null class, row 1 + i that of picture i."""
        return {name: values[torch.as_tensor(rows)] for name, values in self._values.items()}


Conditions = CachedConditions | OnlineConditions | ClassConditions
"""The keyword arguments that the transformer wants besides latents and time, for the rows of a set."""


def cached_conditions(
    pipeline: DiffusionPipeline,
    backbone: Backbone,
    pictures: PictureSet,
    folder: Path,
    *,
    tokens: int,
    ranks: Ranks | None = None,
) -> CachedConditions:
    """The conditions of all captions and of none, those that the cache in `folder` lacks encoded first.

    An entry is found by the caption, by text encoders and tokenizers to the last bit, by `tokens`, and by the versions
    of diffusers and transformers.

    Args:
        pipeline: with the frozen text encoders.
        backbone: its row of `BACKBONES`.
        pictures: N of them, with captions.
        folder: of caches, made if it is not there.
        tokens: length of the longest text encoder's output.
        ranks: the processes that share the encoding; by default those of the environment.
    """
    cache = TensorCache(folder, "text", {"encoders": text_digest(pipeline), "tokens": tokens})
    captions = ["", *pictures.captions]
    keys = [sha256_of(caption) for caption in captions]

    def entries(rows: list[int]) -> list[Entry]:
        found = encode_captions(pipeline, backbone, [captions[row] for row in rows], tokens)
        return [trimmed({name: values[index] for name, values in found.items()}) for index in range(len(rows))]

    fill(cache, keys, entries, block=BLOCK, unit="captions", ranks=ranks or Ranks())
    return CachedConditions(cache, keys)


def trimmed(condition: Entry) -> Entry:
    """Without the rows at the end that repeat the one before them bit for bit, such as a mask's zeros; see `padded`."""
    kept: dict[str, Tensor] = {}
    for name, values in condition.items():
        kept[name] = values
        if values.dim():
            bits = values.contiguous().reshape(len(values), -1).view(torch.uint8)
            differs = (bits != bits[-1]).any(dim=1).nonzero()
            length = int(differs.max()) + 2 if len(differs) else 1
            if length < len(values):
                kept[name], kept[name + ROWS] = values[:length].clone(), torch.tensor(len(values))
    return kept


def padded(kept: Entry) -> dict[str, Tensor]:
    """What `trimmed` was given."""
    condition = {name: values for name, values in kept.items() if not name.endswith(ROWS)}
    for name, values in condition.items():
        if name + ROWS in kept:
            rest = int(kept[name + ROWS]) - len(values)
            condition[name] = torch.cat([values, values[-1:].expand(rest, *values.shape[1:])])
    return condition


@torch.no_grad()
def encode_captions(
    pipeline: DiffusionPipeline, backbone: Backbone, captions: Sequence[str], tokens: int
) -> dict[str, Tensor]:
    """The transformer's conditions for all captions, each value [N, ...], by the frozen text encoders.

    Rows of `encoder_hidden_states` that its mask hides from the transformer are zero.
    """
    batches = [
        backbone.condition(pipeline, list(captions[start : start + BLOCK]), max_sequence_length=tokens)
        for start in range(0, len(captions), BLOCK)
    ]
    found = {name: torch.cat([batch[name] for batch in batches]).cpu() for name in batches[0]}
    if "encoder_attention_mask" in found:
        shown = found["encoder_attention_mask"].bool()[..., None]
        found["encoder_hidden_states"] = found["encoder_hidden_states"].masked_fill(~shown, 0)
    return found


def move_frozen(pipeline: DiffusionPipeline, device: torch.device) -> None:
    """Move everything but the transformer."""
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name != "transformer":
            component.to(device)


def check_classes(pictures: PictureSet, null_class: int) -> None:
    """Refuse pictures of classes that the transformer has not.

    Raises:
        SettingsError: a class number is `null_class` or above.
    """
    for key, number in zip(pictures.keys, pictures.classes, strict=True):
        if number >= null_class:
            raise SettingsError(
                f"the picture {key} has class {number}: allowed are the transformer's classes, 0 to {null_class - 1}"
            )
