"""Base pipelines made from their configs: without weights, to count on; or with random weights, to time.

Neither speed nor a count depends on what the weights are.
"""

import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from transformers import CLIPTokenizer, T5Tokenizer

from davae import assets
from davae.backbones import BACKBONES
from davae.errors import CheckpointError, SettingsError
from davae.models.base_autoencoders import BASE_AUTOENCODERS
from davae.pipelines.places import fetch_files, find_on_hub
from davae.pipelines.vetting import find_classes, find_part_class
from davae.run.storage import read_json

META = torch.device("meta")

# Folders in `assets.geometry()` by their short names.
GEOMETRIES = {
    "sd35m": "stable-diffusion-3.5-medium",
    "flux": "FLUX.1-dev",
    "sana": "Sana_1600M_1024px_diffusers",
    "lightningdit-xl": "vavae-lightningdit-xl",
}
# The configs' keys for the number of blocks, or of blocks of one kind.
DEPTHS = ("num_layers", "num_single_layers", "num_hidden_layers")


@dataclass(frozen=True)
class Geometry:
    """A base pipeline's autoencoder and transformer on the meta device."""

    source: str  # the folder or the Hub's name where the configs come from
    vae: ModelMixin
    transformer: ModelMixin


def read_geometry(base: str, beside: Path) -> Geometry:
    """The models of a base pipeline from its configs; `base` is a folder or a name on the Hub, "" the shipped one.

    If it is no folder, its configs are looked for in the folder of the same name in `geometry/` beside the recipe, then
    among the shipped ones, then on the Hub.
    """
    local = beside.parent / "geometry" / Path(base).name.partition("@")[0]
    source = base or str(assets.base_pipeline())
    if not Path(source).is_dir():
        places = (local, assets.geometry() / local.name)
        source = str(next((folder for folder in places if folder.is_dir()), source))

    # Only classes that davae knows are made.
    try:
        hub, folder = find_on_hub(source), Path(source)
        if hub is not None:
            folder = fetch_files(hub, ("model_index.json", "*/config.json"))
        index = read_json(folder / "model_index.json")
        (_, vae), (library, transformer) = index["vae"], index["transformer"]
        if vae not in BASE_AUTOENCODERS or transformer not in BACKBONES:
            raise SettingsError(
                f"{source} has a {vae} and a {transformer}; allowed are {', '.join(BASE_AUTOENCODERS)} and "
                f"{', '.join(BACKBONES)}"
            )
        transformer_class = find_part_class(library, transformer, f"the transformer of {source}")
        with META:
            return Geometry(
                source,
                vae=_make_part(BASE_AUTOENCODERS[vae].load_class(), folder, "vae"),
                transformer=_make_part(transformer_class, folder, "transformer"),
            )
    except SettingsError:  # a ValueError, too, as diffusers' errors are
        raise
    except Exception as error:  # hostile configs raise nearly everything
        raise CheckpointError(
            f"the configs of {source} cannot be read ({error}). Give a pipeline's folder, with or without weights "
            f"(--set base=FOLDER), or put its configs into {local}"
        ) from error


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
    index = read_json(folder / "model_index.json")
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
            with torch.random.fork_rng(), device:
                torch.manual_seed(0)
                kind = find_part_class(library, class_name, f"the {part} of {folder}")
                parts[part] = _make_part(kind, folder, part, layers)
                if isinstance(parts[part], nn.Module):
                    _settle(parts[part], dtype)

    return find_classes(folder, index)[0](**parts)


def _make_part(kind: type[Any], source: Path, part: str, layers: int | None = None) -> Any:
    """A model with at most `layers` blocks of a kind; or a scheduler."""
    where = f"{source.name}'s {part}"
    if not hasattr(kind, "config_class"):  # of diffusers
        config = kind.load_config(source, subfolder=part)
        return kind.from_config({**config, **_cut_depth(config, layers, where)})
    config = kind.config_class.from_pretrained(source, subfolder=part)
    config.update(_cut_depth(config.to_dict(), layers, where))
    return kind(config)


def _cut_depth(config: dict[str, Any], layers: int | None, where: str) -> dict[str, Any]:
    """The changes of a config that leave `layers` blocks of each kind."""
    depths = [name for name in DEPTHS if name in config]
    if layers is None or not depths:
        return {}

    # A model of several kinds of blocks keeps as many of each.
    least = min(config[name] for name in depths)
    if not 1 <= layers <= least:
        raise SettingsError(f"layers={layers}: {where} has 1 to {least}")

    changes: dict[str, Any] = dict.fromkeys(depths, layers)
    if "dual_attention_layers" in config:
        changes["dual_attention_layers"] = [layer for layer in config["dual_attention_layers"] if layer < layers]
    return changes


@torch.no_grad()
def _settle(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring the model to `dtype` and evaluation mode; no parameter stays zero, since zeros could be faster."""
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
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0)]
    for letter in "\u2581" + string.ascii_lowercase:
        vocabulary.append((letter, -1.0))
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


# By class: a tokenizer that knows only single letters. It pads prompts to the same length as the true one.
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "CLIPTokenizer": _make_clip_tokenizer,
    "T5Tokenizer": _make_t5_tokenizer,
    "T5TokenizerFast": _make_t5_tokenizer,
}
