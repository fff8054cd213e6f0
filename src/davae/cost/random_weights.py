"""A pipeline of true size with random weights, built from its configs: speed does not depend on the weights."""

import importlib
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import CLIPTokenizer, T5Tokenizer

import davae
from davae import assets
from davae.errors import SettingsError

GEOMETRIES = {
    "sd35m": "stable-diffusion-3.5-medium",
    "flux": "FLUX.1-dev",
    "sana": "Sana_1600M_1024px_diffusers",
    "lightningdit-xl": "vavae-lightningdit-xl",
}
"""Folders in `assets.geometry()` by their short names."""
DEPTHS = ("num_layers", "num_single_layers", "num_hidden_layers")
"""The configs' keys for the number of blocks, or of blocks of one kind."""


def build(name: str, *, layers: int | None, text: bool, dtype: torch.dtype, device: torch.device) -> DiffusionPipeline:
    """The base pipeline of a key of `GEOMETRIES` or a folder of configs, with random weights, none of them all zero.

    The transformer and each text encoder keep `layers` blocks of each kind, or all; without `text` there are no text
    encoders, which may be the larger part.
    """
    folder = assets.geometry() / GEOMETRIES[name] if name in GEOMETRIES else Path(name)
    if not (folder / "model_index.json").is_file():
        raise SettingsError(
            f"geometry {name!r}: allowed are {', '.join(GEOMETRIES)}, or a folder of a pipeline's configs"
        )

    # Tokenizers need files that configs lack, so stand-ins take their place.
    index = DiffusionPipeline.load_config(folder)
    parts: dict[str, Any] = {}
    for part, entry in index.items():
        if not isinstance(entry, list):
            continue
        library, class_name = entry
        if class_name is None or (library == "transformers" and not text):
            parts[part] = None
        elif class_name in TOKENIZERS:
            parts[part] = TOKENIZERS[class_name]()
        else:
            kind = getattr(davae if library == "davae" else importlib.import_module(library), class_name)
            with torch.random.fork_rng(), device:
                torch.manual_seed(0)
                parts[part] = _make_part(kind, folder / part, layers)
                if isinstance(parts[part], nn.Module):
                    _settle(parts[part], dtype)

    name = index["_class_name"]
    return getattr(davae if name in davae.__all__ else importlib.import_module("diffusers"), name)(**parts)


def _make_part(kind: type[Any], folder: Path, layers: int | None) -> Any:
    """A model with at most `layers` blocks of a kind; or a scheduler."""
    if not hasattr(kind, "config_class"):  # of diffusers
        config = kind.load_config(folder)
        return kind.from_config({**config, **_cut_depth(config, layers, folder)})
    config = kind.config_class.from_pretrained(folder)
    config.update(_cut_depth(config.to_dict(), layers, folder))
    return kind(config)


def _cut_depth(config: dict[str, Any], layers: int | None, folder: Path) -> dict[str, Any]:
    """The changes of a config that leave `layers` blocks of each kind."""
    depths = [name for name in DEPTHS if name in config]
    if layers is None or not depths:
        return {}

    # A model of several kinds of blocks keeps as many of each.
    least = min(config[name] for name in depths)
    if not 1 <= layers <= least:
        raise SettingsError(f"layers={layers}: {folder.parent.name}'s {folder.name} has 1 to {least}")

    changes: dict[str, Any] = dict.fromkeys(depths, layers)
    if "dual_attention_layers" in config:
        changes["dual_attention_layers"] = [layer for layer in config["dual_attention_layers"] if layer < layers]
    return changes


@torch.no_grad()
def _settle(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring the model to `dtype` and evaluation mode, and make parameters random that are zero in a new model."""
    # Zeros could be faster than real numbers.
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    nn.Module.to(model, dtype=dtype).eval().requires_grad_(False)


def _make_clip_tokenizer() -> CLIPTokenizer:
    # Each letter stands within a word, and at its end.
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for ending in ("", "</w>"):
        for letter in string.ascii_lowercase:
            vocabulary[letter + ending] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _make_t5_tokenizer() -> T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0)]
    return T5Tokenizer(vocab=[*special, *((letter, -1.0) for letter in "\u2581" + string.ascii_lowercase)], extra_ids=0)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "CLIPTokenizer": _make_clip_tokenizer,
    "T5Tokenizer": _make_t5_tokenizer,
    "T5TokenizerFast": _make_t5_tokenizer,
}
"""By class: one that knows only single letters. It pads prompts to the same length as the true one."""
