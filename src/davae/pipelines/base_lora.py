"""LoRAs of a base model on its upgraded one: what touches the latent ports grows by zeros, as the ports did.

A LoRA of other layers fits as it is: the upgrade leaves them alone. One of the ports is a pair of matrices on the old
channels. The first of the input port's and the second of the output port's have the channel axis, in the port's own
layout. Padded, the pair adds to the base channels what it added in the base model, and nothing to the others.
"""

import inspect
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import save_file
from torch import Tensor

from davae.backbones import backbone_of
from davae.errors import CheckpointError, SettingsError
from davae.method.widen import bracket_sizes, pad_channels, patch_side
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.loading import LOADING_ERRORS

FILE = "pytorch_lora_weights.safetensors"


def load_base_lora(
    pipeline: DiffusionPipeline, lora: str | Path, *, weight_name: str | None = None, adapter_name: str | None = None
) -> None:
    """`pipeline.load_lora_weights` of a LoRA that was trained on the base of an upgraded pipeline, or on itself.

    Args:
        pipeline: upgraded or not, of a class that can load LoRA.
        lora: a folder, a file or a name on the Hub, in any layout that diffusers reads for this pipeline.
        weight_name: the file in it; it is found if there is one only.
        adapter_name: as in `load_lora_weights`; then `set_adapters` sets its strength, and that of others.

    Raises:
        SettingsError: the pipeline's class has no LoRA, or this one is of a model with other latent channels.
        CheckpointError: there is no LoRA at `lora`, or none that diffusers can read.
    """
    if not hasattr(pipeline, "load_lora_weights"):
        raise SettingsError(f"a {type(pipeline).__name__} loads no LoRA in diffusers; pipelines with LoRA do")
    where = {"weight_name": weight_name} if weight_name else {}
    source, told = str(lora), {"adapter_name": adapter_name} if adapter_name else {}
    if Path(lora).is_file():
        source, where = str(Path(lora).parent), {"weight_name": Path(lora).name}
    elif Path(lora).is_dir() and not where and len(files := list(Path(lora).glob("*.safetensors"))) == 1:
        where = {"weight_name": files[0].name}  # which older versions of diffusers find on the Hub only
    try:
        _load(pipeline, source, where, told)
    except SettingsError:  # also a ValueError, as what diffusers raises
        raise
    except (*LOADING_ERRORS, RuntimeError) as error:  # the last of tensors of other sizes
        there = "" if Path(lora).exists() else "there is no such file or folder, and as a name on the Hub: "
        raise CheckpointError(f"{lora} cannot be loaded as a LoRA of this pipeline: {there}{error}") from error


def _load(pipeline: DiffusionPipeline, source: str, where: Mapping[str, str], told: Mapping[str, str]) -> None:
    if isinstance(pipeline.vae, AutoencoderDA):
        tensors, metadata = _read(pipeline, source, where)
        padded = pad_lora(tensors, pipeline)
        if padded:
            with tempfile.TemporaryDirectory() as folder:  # a dict would lose the metadata, and with it LoRA's alpha
                header = {"format": "pt"} | ({LORA_ADAPTER_METADATA_KEY: json.dumps(metadata)} if metadata else {})
                save_file({**tensors, **padded}, Path(folder) / FILE, metadata=header)
                return pipeline.load_lora_weights(folder, weight_name=FILE, **told)
    return pipeline.load_lora_weights(source, **where, **told)


def pad_lora(tensors: Mapping[str, Tensor], pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """Those of a LoRA's tensors, under diffusers' names, that a port of an upgraded pipeline needs wider; widened.

    Raises:
        SettingsError: a LoRA of a port that has neither the base's channels nor all.
    """
    transformer, config = pipeline.transformer, pipeline.vae.config
    ports = backbone_of(transformer).ports
    layers = {name: transformer.get_submodule(name) for name in (ports.input, ports.output)}
    whole = {name: getattr(layer, "base_layer", layer).weight for name, layer in layers.items()}
    patch = patch_side(transformer, ports)
    predictions = whole[ports.output].shape[0] // (patch * patch * config.latent_channels)
    layouts = {  # of what has the channel axis
        f"transformer.{ports.input}.lora_A.weight": (ports.input_layout, 1, whole[ports.input].shape[1]),
        f"transformer.{ports.output}.lora_B.weight": (ports.output_layout, 0, whole[ports.output].shape[0]),
        f"transformer.{ports.output}.lora_B.bias": (
            ports.output_layout.removesuffix(" d"),
            0,
            whole[ports.output].shape[0],
        ),
    }
    padded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in layouts:
            continue
        layout, axis, width = layouts[name]
        if tensor.shape[axis] == width:
            continue
        if tensor.shape[axis] * config.latent_channels != width * config.base_channels:
            raise SettingsError(
                f"the LoRA's {name} is of a port of width {tensor.shape[axis]}; this pipeline's is {width}, and its "
                f"base's {width * config.base_channels // config.latent_channels}: it is of another model"
            )
        sizes = bracket_sizes(layout, patch=patch, predictions=predictions)
        padded[name] = pad_channels(tensor, layout, config.detail_channels, **sizes)
    return padded


def _read(pipeline: DiffusionPipeline, source: str, where: Mapping[str, str]) -> tuple[dict[str, Tensor], dict | None]:
    """The tensors under diffusers' names, alphas among them, and the metadata."""
    settings = {**where, "return_lora_metadata": True}
    if "return_alphas" not in inspect.signature(pipeline.lora_state_dict).parameters:
        tensors, metadata = pipeline.lora_state_dict(source, **settings)
        return dict(tensors), metadata
    tensors, alphas, metadata = pipeline.lora_state_dict(source, return_alphas=True, **settings)
    return {**tensors, **{name: torch.as_tensor(alpha) for name, alpha in (alphas or {}).items()}}, metadata
