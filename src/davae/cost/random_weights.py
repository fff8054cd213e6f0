"""A pipeline of true size with random weights, from its configs: speed does not depend on what the weights say."""

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
"""By short name: the folder in `assets.geometry()`."""
DEPTHS = ("num_layers", "num_single_layers", "num_hidden_layers")
"""What configs call the number of blocks, or of those of one kind."""


def build(name: str, *, layers: int | None, text: bool, dtype: torch.dtype, device: torch.device) -> DiffusionPipeline:
    """The base pipeline that a folder of configs describes, its weights random and none all zero.

    Args:
        name: a key of `GEOMETRIES`, or a folder of configs as `save_pretrained` lays them, without weights.
        layers: blocks of each kind that the transformer and each text encoder keep; all of them if None.
        text: whether to build the text encoders, which may be the larger part.
        dtype: of the weights.
        device: where they are made.

    Raises:
        SettingsError: an unknown name, or more layers than there are, or none.
    """
    folder = assets.geometry() / GEOMETRIES[name] if name in GEOMETRIES else Path(name)
    if not (folder / "model_index.json").is_file():
        raise SettingsError(
            f"geometry {name!r}: allowed are {', '.join(GEOMETRIES)}, or a folder of a pipeline's configs"
        )
    index = DiffusionPipeline.load_config(folder)
    own = index["_class_name"] in davae.__all__
    kind = getattr(davae if own else importlib.import_module("diffusers"), index["_class_name"])
    parts: dict[str, Any] = {}
    for part, (library, class_name) in ((key, entry) for key, entry in index.items() if isinstance(entry, list)):
        if class_name is None or (library == "transformers" and not text):
            parts[part] = None
        elif class_name in TOKENIZERS:
            parts[part] = TOKENIZERS[class_name]()
        else:
            cls = getattr(davae if library == "davae" else importlib.import_module(library), class_name)
            with torch.random.fork_rng(), device:
                torch.manual_seed(0)
                made = _from_config(cls, folder / part, layers)
                parts[part] = _settled(made, dtype) if isinstance(made, nn.Module) else made
    return kind(**parts)


def _from_config(kind: type[Any], folder: Path, layers: int | None) -> Any:
    """A model, its depth cut to `layers`; or a scheduler."""
    if not hasattr(kind, "config_class"):  # of diffusers
        config = kind.load_config(folder)
        return kind.from_config({**config, **_cut(config, layers, folder)})
    config = kind.config_class.from_pretrained(folder)
    config.update(_cut(config.to_dict(), layers, folder))
    return kind(config)


def _cut(config: dict[str, Any], layers: int | None, folder: Path) -> dict[str, Any]:
    depths = [name for name in DEPTHS if name in config]
    if layers is None or not depths:
        return {}
    if layers not in range(1, (least := min(config[name] for name in depths)) + 1):
        raise SettingsError(f"layers={layers}: {folder.parent.name}'s {folder.name} has 1 to {least}")
    changed: dict[str, Any] = dict.fromkeys(depths, layers)
    if "dual_attention_layers" in config:
        changed["dual_attention_layers"] = [layer for layer in config["dual_attention_layers"] if layer < layers]
    return changed


@torch.no_grad()
def _settled(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In `dtype` and evaluation mode; whatever a new model of its class has all zero is random, too."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    return nn.Module.to(model, dtype=dtype).eval().requires_grad_(False)


def _clip_tokenizer() -> CLIPTokenizer:
    letters = string.ascii_lowercase
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def _t5_tokenizer() -> T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0)]
    return T5Tokenizer(vocab=[*special, *((letter, -1.0) for letter in "\u2581" + string.ascii_lowercase)], extra_ids=0)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "CLIPTokenizer": _clip_tokenizer,
    "T5Tokenizer": _t5_tokenizer,
    "T5TokenizerFast": _t5_tokenizer,
}
"""By class: one that knows single letters only. Prompts are padded to the same length as with the true one."""
