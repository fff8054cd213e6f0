"""The transformer's condition for each image: its caption, encoded once or at every step, or its class."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils.data import default_collate

from davae.backbones import Backbone
from davae.data.cache import Entry, TensorCache
from davae.data.sources import PictureSet
from davae.errors import SettingsError
from davae.run.ranks import Ranks
from davae.training.caching import fill_cache
from davae.training.fingerprints import digest_text, digest_text_encoding

BLOCK = 64
"""Captions that are encoded together."""
ROWS = ".rows"
"""Suffix of a tensor's name: its number of rows, if the cache holds fewer of them (`trim_repeats`)."""

ReadConditions = Callable[[Sequence[int]], dict[str, Tensor]]
"""Rows -> the transformer's keyword arguments beside latents and time, each [B, ...], on any device.

Row 0 is the empty caption or the null class, row 1 + i belongs to image i.
"""


def cache_conditions(
    pipeline: DiffusionPipeline,
    backbone: Backbone,
    pictures: PictureSet,
    folder: Path,
    *,
    tokens: int,
    ranks: Ranks | None = None,
) -> ReadConditions:
    """Encode the captions that the cache in `folder` lacks, and return a function that reads conditions from it.

    A cache belongs to the text encoders and tokenizers to the last bit, to `tokens`, the length of the longest text
    encoder's output, and to the versions of diffusers and transformers.
    """
    cache = TensorCache(folder, "text", {"encoders": digest_text_encoding(pipeline), "tokens": tokens})
    captions = ["", *pictures.captions]
    keys = list(map(digest_text, captions))

    def encode_block(rows: list[int]) -> list[Entry]:
        encoded = encode_captions(pipeline, backbone, [captions[row] for row in rows], tokens)
        entries = []
        for place in range(len(rows)):
            entries.append(trim_repeats({name: values[place] for name, values in encoded.items()}))
        return entries

    fill_cache(cache, keys, encode_block, block=BLOCK, unit="captions", ranks=ranks or Ranks())

    def read(rows: Sequence[int]) -> dict[str, Tensor]:
        # Several rows may have one caption, which is read once.
        entries: dict[str, Entry] = {}
        for key in {keys[row] for row in rows}:
            entries[key] = restore_repeats(cache[key])
        return default_collate([entries[keys[row]] for row in rows])

    return read


def encode_captions_online(
    pipeline: DiffusionPipeline, backbone: Backbone, pictures: PictureSet, tokens: int
) -> ReadConditions:
    """A function that encodes captions when they are asked for, on the text encoders' device."""
    captions = ["", *pictures.captions]
    return lambda rows: encode_captions(pipeline, backbone, [captions[row] for row in rows], tokens)


def read_classes(pipeline: DiffusionPipeline, backbone: Backbone, pictures: PictureSet) -> ReadConditions:
    """A function that reads classes, which need no encoder."""
    classes = [backbone.null_class(pipeline.transformer), *pictures.classes]
    conditions = {name: values.cpu() for name, values in backbone.condition(pipeline, classes).items()}
    return lambda rows: {name: values[torch.as_tensor(rows)] for name, values in conditions.items()}


def trim_repeats(condition: Entry) -> Entry:
    """Drop the last rows that repeat the one before them bit for bit, such as a mask's zeros."""
    trimmed: dict[str, Tensor] = {}
    for name, values in condition.items():
        trimmed[name] = values
        if not values.dim():
            continue

        # The rows up to the last one that differs from the final row, and one of the repeats.
        bits = values.contiguous().reshape(len(values), -1).view(torch.uint8)
        differs = (bits != bits[-1]).any(dim=1).nonzero()
        length = int(differs.max()) + 2 if len(differs) else 1
        if length < len(values):
            trimmed[name], trimmed[name + ROWS] = values[:length].clone(), torch.tensor(len(values))
    return trimmed


def restore_repeats(trimmed: Entry) -> Entry:
    """The inverse of `trim_repeats`."""
    condition = {name: values for name, values in trimmed.items() if not name.endswith(ROWS)}
    for name, values in condition.items():
        if name + ROWS in trimmed:
            missing = int(trimmed[name + ROWS]) - len(values)
            condition[name] = torch.cat([values, values[-1:].expand(missing, *values.shape[1:])])
    return condition


@torch.no_grad()
def encode_captions(
    pipeline: DiffusionPipeline, backbone: Backbone, captions: Sequence[str], tokens: int
) -> dict[str, Tensor]:
    """The transformer's conditions for all captions, each [N, ...], on the CPU.

    Rows of `encoder_hidden_states` that its mask hides from the transformer are zero.
    """
    # In blocks, so that memory does not depend on how many there are.
    batches = []
    for start in range(0, len(captions), BLOCK):
        block = list(captions[start : start + BLOCK])
        batches.append(backbone.condition(pipeline, block, max_sequence_length=tokens))

    condition = {name: torch.cat([batch[name] for batch in batches]).cpu() for name in batches[0]}
    if "encoder_attention_mask" in condition:
        # The transformer does not see them; as zeros they take no room in a cache.
        is_seen = condition["encoder_attention_mask"].bool()[..., None]
        condition["encoder_hidden_states"] = condition["encoder_hidden_states"].masked_fill(~is_seen, 0)
    return condition


def move_frozen(pipeline: DiffusionPipeline, device: torch.device) -> None:
    """Move all parts but the transformer."""
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name != "transformer":
            component.to(device)


def check_classes(pictures: PictureSet, null_class: int) -> None:
    """Refuse images of classes that the transformer does not have, `null_class` or above."""
    for key, number in zip(pictures.keys, pictures.classes, strict=True):
        if number >= null_class:
            raise SettingsError(
                f"the picture {key} has class {number}: allowed are the transformer's classes, 0 to {null_class - 1}"
            )
