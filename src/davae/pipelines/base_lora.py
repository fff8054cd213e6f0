"""Load LoRAs of a base model on its upgraded model.

A LoRA of most layers fits as it is, because an upgrade leaves those alone. A LoRA of a port has one matrix with a
channel axis: the first one (A) of the input port, the second one (B) of the output port. Padded with zeros, the LoRA
changes the base channels as in the base model, and the others not at all.
"""

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import save_file
from torch import Tensor

from davae.backbones import backbone_of
from davae.errors import CheckpointError, SettingsError
from davae.method.widen import pad_channels, patch_side
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.adapter_index import INDEX
from davae.pipelines.places import find_on_hub, loading
from davae.pipelines.sizes import is_finite

FILE = "pytorch_lora_weights.safetensors"
logger = logging.getLogger(__name__)


def load_base_lora(
    pipeline: DiffusionPipeline, lora: str | Path, *, weight_name: str | None = None, adapter_name: str | None = None
) -> None:
    """Load a LoRA that was trained on the base of an upgraded pipeline, or on the pipeline itself.

    `lora` is a folder, a file or OWNER/NAME[@REVISION] on the Hub, in any layout that diffusers reads for this
    pipeline, and `weight_name` the file in it, found if there is only one. After it, `set_adapters` sets the strength
    of the LoRA `adapter_name` and of others.

    Raises:
        SettingsError: the pipeline's class has no LoRA, or this one is of a model with other latent channels.
        CheckpointError: there is no LoRA at `lora`, none that diffusers can read, or one that fits only in part.
    """
    if not hasattr(pipeline, "load_lora_weights"):
        raise SettingsError(f"a {type(pipeline).__name__} loads no LoRA in diffusers; pipelines with LoRA do")

    # Older versions of diffusers find the only file of a folder on the Hub, and not on this machine.
    hub, path = find_on_hub(lora), Path(lora)
    source = str(lora) if hub is None else hub.repository
    files = list(path.glob("*.safetensors"))
    if (path / INDEX).is_file():
        raise SettingsError(f"{lora} is no LoRA but an adapter of davae's: davae.load_pipeline(base, adapter=...)")
    if path.is_file():
        source, weight_name = str(path.parent), path.name
    elif weight_name is None and len(files) == 1:
        weight_name = files[0].name

    # Safetensors only: with another `weight_name` diffusers would unpickle it.
    name = weight_name or FILE
    if not name.endswith(".safetensors"):
        raise CheckpointError(f"{lora}: {name} is no .safetensors file, and nothing else is read; convert it")
    place = {"weight_name": weight_name, "revision": hub and hub.revision, "use_safetensors": True}
    with loading(lora, "a LoRA of this pipeline"):
        _load(pipeline, source, place, adapter_name)


def load_base_loras(pipeline: DiffusionPipeline, loras: Sequence[tuple[str, float]]) -> None:
    """Load LoRAs as `load_base_lora` does, each with the weight that scales it."""
    names = []
    for number, (lora, _) in enumerate(loras, 1):
        names.append(f"lora_{number}")
        load_base_lora(pipeline, lora, adapter_name=names[-1])
    if names:
        pipeline.set_adapters(names, [weight for _, weight in loras])


def _load(pipeline: DiffusionPipeline, source: str, place: dict[str, Any], adapter_name: str | None) -> None:
    """Load a LoRA by the stock call, padded if the pipeline is upgraded and the LoRA is of its base's ports."""
    # Tensors under diffusers' names, and from some pipelines LoRA's alphas.
    settings: dict[str, Any] = {"return_alphas": True, "return_lora_metadata": True}
    tensors, *alphas, metadata = pipeline.lora_state_dict(source, **place, **settings)
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise CheckpointError(f"{name} holds numbers that are not finite: copy the LoRA anew, or train it again")
    is_upgraded = isinstance(getattr(pipeline.vae, "_orig_mod", pipeline.vae), AutoencoderDA)  # compiled or not
    padded = pad_lora(tensors, pipeline) if is_upgraded else {}

    before = _list_adapters(pipeline)
    try:
        if padded:
            _load_padded(pipeline, {**tensors, **padded}, alphas, metadata, adapter_name)
        else:
            pipeline.load_lora_weights(source, **place, adapter_name=adapter_name)
        _check_used(pipeline, tensors, _list_adapters(pipeline) - before)
    except Exception:
        added = {name for _, name in _list_adapters(pipeline) - before}
        if added and before:
            pipeline.delete_adapters(list(added))
        elif added:
            pipeline.unload_lora_weights()
        raise


def _list_adapters(pipeline: DiffusionPipeline) -> set[tuple[str, str]]:
    """Every LoRA in a pipeline: the name of the part that has it, and its own."""
    adapters: set[tuple[str, str]] = set()
    for part, module in pipeline.components.items():
        adapters.update((part, name) for name in getattr(module, "peft_config", ()))
    return adapters


def _check_used(pipeline: DiffusionPipeline, tensors: Mapping[str, Tensor], adapters: set[tuple[str, str]]) -> None:
    """Refuse a LoRA whose tensors are not all in the pipeline now: diffusers passes over layers that it cannot find."""
    expected = {name for name in tensors if "lora" in name and not name.endswith(".alpha")}
    used: set[str] = set()
    for part, adapter in adapters:
        for name in pipeline.components[part].state_dict():
            if ".lora_" in name and f".{adapter}." in name:
                used.add(f"{part}.{name.replace(f'.{adapter}.', '.')}")

    # The names in text encoders are diffusers' older ones.
    unused = sorted(expected - used)
    if unused and len(expected) != len(used):
        raise CheckpointError(
            f"{len(unused)} of its {len(expected)} tensors fit no layer, such as {unused[0]}: it is of another model, "
            "or its names are not diffusers', which begin with that of a part, as in transformer.transformer_blocks"
        )


def _load_padded(
    pipeline: DiffusionPipeline, tensors: dict[str, Tensor], alphas: list[Any], metadata: Any, adapter_name: str | None
) -> None:
    for values in alphas:
        for name, alpha in (values or {}).items():
            tensors[name] = torch.as_tensor(alpha)

    # By way of a file: from a dict, diffusers would not take the metadata, and with it LoRA's alpha.
    header = {"format": "pt"}
    if metadata:
        header[LORA_ADAPTER_METADATA_KEY] = json.dumps(metadata)
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / FILE, metadata=header)
        pipeline.load_lora_weights(folder, weight_name=FILE, adapter_name=adapter_name)


def pad_lora(tensors: Mapping[str, Tensor], pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """Those of a LoRA's tensors, under diffusers' names, that the ports of an upgraded pipeline need wider: widened."""
    transformer, config = pipeline.transformer, pipeline.vae.config
    ports = backbone_of(transformer).ports
    input_width = _find_weight(transformer, ports.input).shape[1]
    output_width = _find_weight(transformer, ports.output).shape[0]
    patch = patch_side(transformer, ports)
    sizes = {"patch": patch, "predictions": output_width // (patch * patch * config.latent_channels)}

    # Name of a tensor with a channel axis -> its layout, that axis and its length once padded.
    bias_layout = ports.output_layout.removesuffix(" d")
    channel_axes = {
        f"transformer.{ports.input}.lora_A.weight": (ports.input_layout, 1, input_width),
        f"transformer.{ports.output}.lora_B.weight": (ports.output_layout, 0, output_width),
        f"transformer.{ports.output}.lora_B.bias": (bias_layout, 0, output_width),
    }

    # Magnitudes of DoRA are absolute: those of the base's rows.
    magnitudes = [name for name in tensors if "lora_magnitude_vector" in name]
    if magnitudes:
        message = "a DoRA gives %d layers the base's magnitudes, also where the upgrade was trained: %s"
        logger.warning(message, len(magnitudes), ", ".join(name.partition(".lora_")[0] for name in magnitudes))

    padded: dict[str, Tensor] = {}
    for name, (layout, axis, width) in channel_axes.items():
        if name not in tensors or tensors[name].shape[axis] == width:
            continue
        length, base_width = tensors[name].shape[axis], width * config.base_channels // config.latent_channels
        if length != base_width:
            raise SettingsError(
                f"the LoRA's {name} is of a port of width {length}; this pipeline's is {width}, and its base's "
                f"{base_width}: it is of another model"
            )
        padded[name] = pad_channels(tensors[name], layout, config.detail_channels, **sizes)

    # The magnitudes of the output port's new rows.
    factor, port = f"transformer.{ports.output}.lora_B.weight", _find_weight(transformer, ports.output)
    for name in magnitudes if factor in padded else ():
        if name.startswith(f"transformer.{ports.output}."):
            is_old = pad_channels(torch.ones(len(tensors[factor])), bias_layout, config.detail_channels, **sizes)
            magnitude = pad_channels(tensors[name], bias_layout, config.detail_channels, **sizes)
            padded[name], padded[factor] = keep_rows(magnitude, padded[factor], port, is_old.bool())
    return padded


def keep_rows(magnitude: Tensor, factor: Tensor, weight: Tensor, is_old: Tensor) -> tuple[Tensor, Tensor]:
    """DoRA's magnitude and B with which the rows of a weight that are not old stay what they are.

    DoRA scales a row of W + BA to its magnitude: that of W, where B is zero. A row of an upgrade that was not trained
    is zero, which has no direction: it gets one from B, and the magnitude zero.
    """
    norms = torch.linalg.norm(weight.detach().flatten(1), dim=1).to(magnitude)
    is_empty = ~is_old & (norms == 0)
    return torch.where(is_old, magnitude, norms), torch.where(is_empty[:, None], torch.ones_like(factor), factor)


def _find_weight(transformer: Any, name: str) -> Tensor:
    layer = transformer.get_submodule(name)
    return getattr(layer, "base_layer", layer).weight  # below a LoRA that is there already
