"""The models of a base pipeline from its configs: on the meta device, without weights."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin

from davae import assets
from davae.backbones import BACKBONES
from davae.errors import CheckpointError, SettingsError
from davae.models.base_autoencoders import BASE_AUTOENCODERS
from davae.pipelines.autoencoders import LOADING_ERRORS

META = torch.device("meta")


@dataclass(frozen=True)
class Geometry:
    """A base pipeline's autoencoder and transformer on the meta device."""

    source: str
    """The folder or the Hub's name where the configs come from."""
    vae: ModelMixin
    transformer: ModelMixin


def read_geometry(base: str, beside: Path) -> Geometry:
    """The models of a base pipeline from its configs; `base` is a folder or a name on the Hub, "" the shipped one.

    If it is no folder, its configs are looked for in the folder of the same name in `geometry/` beside the recipe, then
    among the shipped ones, then on the Hub.
    """
    # The places where configs may be, nearest first.
    local = beside.parent / "geometry" / Path(base).name
    source = base or str(assets.base_pipeline())
    if not Path(source).is_dir():
        shipped = assets.geometry() / Path(base).name
        source = str(next((folder for folder in (local, shipped) if folder.is_dir()), source))

    # Only classes that davae knows are made.
    try:
        index = DiffusionPipeline.load_config(source)
        (_, vae), (library, transformer) = index["vae"], index["transformer"]
        if vae not in BASE_AUTOENCODERS or transformer not in BACKBONES:
            raise SettingsError(
                f"{source} has a {vae} and a {transformer}; allowed are {', '.join(BASE_AUTOENCODERS)} and "
                f"{', '.join(BACKBONES)}"
            )
        kind = getattr(importlib.import_module("davae" if library == "davae" else "diffusers"), transformer)
        vae_class = BASE_AUTOENCODERS[vae].load_class()
        return Geometry(source, _make_blank(vae_class, source, "vae"), _make_blank(kind, source, "transformer"))
    except SettingsError:  # a ValueError, too, as diffusers' errors are
        raise
    except LOADING_ERRORS as error:
        raise CheckpointError(
            f"the configs of {source} cannot be read ({error}). Give a pipeline's folder, with or without weights "
            f"(--set base=FOLDER), or put its configs into {local}"
        ) from error


def _make_blank(kind: type[Any], source: str, subfolder: str) -> Any:
    config = kind.load_config(source, subfolder=subfolder)
    with META:
        return kind.from_config(config)
