"""Adapter folders: what fine-tuning adds to a base pipeline, without the base: ports, LoRA or layers, autoencoder.

An adapter folder holds

- `adapter.json`, an `AdapterIndex`;
- `transformer_ports.safetensors`, both latent ports in full, base channels included;
- `transformer_lora.safetensors`, the LoRA tensors under peft's names, if there are any;
- `transformer_layers.safetensors`, the weights of the layers that were trained themselves, if there are any;
- `vae/`, the AutoencoderDA as it saves itself, but for its frozen half, which is the base autoencoder's encoder.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from davae.backbones import backbone_of
from davae.errors import CheckpointError, SettingsError
from davae.run.storage import check_replaceable, replaced_whole

FORMAT_VERSION: Literal[2] = 2
INDEX = "adapter.json"
PORTS = "transformer_ports.safetensors"
LORA = "transformer_lora.safetensors"
LAYERS = "transformer_layers.safetensors"
VAE = "vae"
FROZEN_HALF = {"base_encoder": "encoder", "base_quant_conv": "quant_conv"}
"""Parts of an AutoencoderDA that are its base autoencoder's, by their names there."""


class LoraFacts(BaseModel):
    """What peft needs to know to put the LoRA tensors back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    """Inner width of each pair of matrices."""
    alpha: float
    """The product of a pair is scaled by alpha / rank."""
    targets: tuple[str, ...]
    """The layers, named as peft matches them."""


class AdapterIndex(BaseModel):
    """What `adapter.json` says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1, 2] = FORMAT_VERSION
    """Of the folder's layout; in version 1 `vae/` held the frozen half, too."""
    base: str
    """Name or path of the base pipeline, for people."""
    base_sha256: str
    """`digest_base` of the base transformer, for the check."""
    base_encoder_sha256: str | None = None
    """`digest_tensors` of the base autoencoder's `select_frozen_half`, which `vae/` leaves out; None in version 1."""
    transformer: str
    """Class name of the transformer."""
    base_channels: int
    """C."""
    detail_channels: int
    """D."""
    lora: LoraFacts | None
    """None if there is no LoRA."""
    layers: tuple[str, ...] = ()
    """The layers, other than the ports, whose weights were trained themselves; named as `lora.targets` are."""

    @property
    def changed(self) -> tuple[str, ...]:
        """The layers that are not the base's, ports apart."""
        return self.layers + (self.lora.targets if self.lora else ())


def digest_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values, these in bfloat16: the same for weights loaded in float32 and bfloat16.

    In float16, too, if float16 can hold them: others are rounded twice.
    """
    sha256 = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"{name} {list(tensor.shape)}\n".encode())
        sha256.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return sha256.hexdigest()


def select_frozen_half(vae: nn.Module) -> dict[str, Tensor]:
    """The tensors that an AutoencoderDA has from its base autoencoder `vae` and keeps frozen, under its own names."""
    return {
        f"{ours}.{name}": tensor
        for ours, theirs in FROZEN_HALF.items()
        if isinstance(part := getattr(vae, theirs, None), nn.Module)
        for name, tensor in part.state_dict().items()
    }


def digest_base(transformer: ModelMixin) -> str:
    """`digest_tensors` of everything but the two latent ports, which an adapter replaces.

    So a base transformer and its widened form have the same.
    """
    ports = backbone_of(transformer).ports
    return digest_tensors(
        {
            name: tensor
            for name, tensor in transformer.state_dict().items()
            if not name.startswith((f"{ports.input}.", f"{ports.output}."))
        }
    )


def find_target_layers(transformer: ModelMixin, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers whose dotted names end in one of `targets`, by name.

    Raises:
        SettingsError: if a target is a port or no layer at all.
    """
    ports = backbone_of(transformer).ports
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    found: dict[str, nn.Linear] = {}
    for target in targets:
        matched = {name: layer for name, layer in layers.items() if name == target or name.endswith(f".{target}")}
        if not matched:
            ends = sorted({".".join(part for part in name.split(".")[-2:] if part) for name in layers})
            raise SettingsError(f"target {target!r} is no linear layer of this model; it has, for example, {ends[:12]}")
        if any(port == target or port.endswith(f".{target}") for port in (ports.input, ports.output)):
            raise SettingsError(f"target {target!r} is a latent port, and those are trained in full: leave it out")
        found |= matched
    return found


def add_lora(
    transformer: ModelMixin, rank: int, alpha: float, targets: Sequence[str], *, seed: int = 0
) -> list[nn.Parameter]:
    """Freeze a widened transformer but for new LoRA layers on `targets` and both ports in full.

    Args:
        transformer: of a known family; changed in place.
        rank: inner width of each LoRA pair, 1 or more.
        alpha: the pair's product is scaled by alpha / rank.
        targets: ends of the dotted names of linear layers; `BACKBONES[...].lora_targets` has the reference's.
        seed: of the first matrix of each pair; the second is zero, so that nothing changes at the start.

    Returns:
        The trainable parameters, all float32. If the transformer is in half precision, run it under autocast.

    Raises:
        SettingsError: if `rank` is below 1, a target is a port or no layer at all, or the class has no LoRA.
    """
    ports = backbone_of(transformer).ports
    if rank < 1:
        raise SettingsError(f"rank={rank} must be 1 or more")
    if not isinstance(transformer, PeftAdapterMixin):
        raise SettingsError(
            f'a {type(transformer).__name__} has no LoRA in diffusers: train the layers themselves, trained="layers", '
            '"full" or "ports"'
        )
    find_target_layers(transformer, targets)
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")
        )
    for name in (ports.input, ports.output):
        transformer.get_submodule(name).requires_grad_(True)
    trainable = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.float()
    return trainable


def save_adapter(
    folder: Path, pipeline: DiffusionPipeline, *, base: str, base_sha256: str, layers: Sequence[str] = ()
) -> None:
    """Write what training added to the base as an adapter folder: wholly, or not at all.

    Args:
        folder: where; an adapter folder there is replaced.
        pipeline: upgraded, its transformer with LoRA as `add_lora` makes it, not fused; or with trained `layers` and
            ports; or with trained ports only.
        base: name or path of the base pipeline, kept for people to read.
        base_sha256: `digest_base` of its transformer, from before the training.
        layers: ends of the names of layers whose weights were trained themselves, as `find_target_layers` takes them.

    Raises:
        SettingsError: if `folder` holds something else than an adapter.
        StorageError: if it cannot be written.
    """
    transformer, config = pipeline.transformer, pipeline.vae.config
    ports = backbone_of(transformer).ports
    lora = getattr(transformer, "peft_config", {}).get("default")
    index = AdapterIndex(
        base=base,
        base_sha256=base_sha256,
        base_encoder_sha256=digest_tensors(
            {name: tensor for name, tensor in pipeline.vae.state_dict().items() if _is_frozen(name)}
        ),
        transformer=type(transformer).__name__,
        base_channels=config.base_channels,
        detail_channels=config.detail_channels,
        lora=lora and LoraFacts(rank=lora.r, alpha=lora.lora_alpha, targets=tuple(sorted(lora.target_modules))),
        layers=tuple(layers),
    )
    check_replaceable(folder, holds=INDEX)
    with replaced_whole(folder) as partial:
        (partial / INDEX).write_text(index.model_dump_json(indent=2) + "\n")
        save_file(_contiguous(_of_layers(transformer.state_dict(), ports.input, ports.output)), partial / PORTS)
        if lora:
            save_file(_contiguous(get_peft_model_state_dict(transformer)), partial / LORA)
        if layers:
            save_file(_contiguous(_weights_of(transformer, layers)), partial / LAYERS)
        pipeline.vae.save_pretrained(partial / VAE)
        (weights,) = (partial / VAE).glob("*.safetensors")
        kept = {name: tensor for name, tensor in load_file(weights).items() if not _is_frozen(name)}
        save_file(kept, weights, metadata={"format": "pt"})


def read_index(folder: Path) -> AdapterIndex:
    """What the adapter in `folder` says about itself.

    Raises:
        CheckpointError: if there is no adapter, or one that is damaged or newer than this code.
    """
    try:
        text = (folder / INDEX).read_bytes()
        version = json.loads(text)["format_version"]
    except OSError as error:
        raise CheckpointError(f"{folder} is no adapter folder: {INDEX} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged: it has no format_version. Copy it anew") from error
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {version}, davae reads up to {FORMAT_VERSION}: update davae"
        )
    try:
        return AdapterIndex.model_validate_json(text)
    except ValidationError as error:
        raise CheckpointError(f"{folder / INDEX} is damaged: {error}. Copy it anew") from error


def check_base(digest: str, folder: Path) -> None:
    """Refuse the adapter in `folder` unless it was trained on the transformer with this `digest_base`.

    Raises:
        CheckpointError: if there is no adapter, or another base's.
    """
    index = read_index(folder)
    if digest != index.base_sha256:
        raise CheckpointError(
            f"the adapter {folder} was trained on another base than this one: on {index.base} with SHA-256 "
            f"{index.base_sha256}, but this transformer's is {digest}. Load it on {index.base}, in float32 or bfloat16"
        )


def load_adapter(transformer: ModelMixin, folder: Path, *, fuse: bool) -> None:
    """Put all that an adapter has into a widened base transformer, in place; `check_base` says if it is the one.

    Args:
        transformer: widened by the adapter's `detail_channels`, otherwise its base; with LoRA layers of the adapter's
            rank, alpha and targets on it (`add_lora`), these are filled.
        folder: the adapter.
        fuse: add the LoRA to the weights, so that a plain transformer results; otherwise LoRA layers stay.

    Raises:
        CheckpointError: if a file is missing, damaged or does not fit.
    """
    ports, index = backbone_of(transformer).ports, read_index(folder)
    here = _of_layers(transformer.state_dict(), ports.input, ports.output)
    transformer.load_state_dict(_read_tensors(folder / PORTS, like=here), strict=False)
    if index.layers:
        weights = _read_tensors(folder / LAYERS, like=_weights_of(transformer, index.layers))
        for name, layer in find_target_layers(transformer, index.layers).items():
            # Not copied into place: the base may share the old one.
            weight = weights[f"{name}.weight"].to(layer.weight)
            layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    if index.lora is None:
        return
    facts = index.lora
    if not getattr(transformer, "peft_config", None):
        targets = list(facts.targets)
        transformer.add_adapter(
            LoraConfig(r=facts.rank, lora_alpha=facts.alpha, target_modules=targets, init_lora_weights=False)
        )
    elif (alpha := transformer.peft_config["default"].lora_alpha) != facts.alpha:
        raise CheckpointError(f"{folder} has LoRA of alpha {facts.alpha}, and {alpha} was asked for: ask for its own")
    tensors = _read_tensors(folder / LORA, like=get_peft_model_state_dict(transformer))
    set_peft_model_state_dict(transformer, tensors)
    if fuse:
        transformer.fuse_lora(safe_fusing=True)  # "safe" also leaves the tensors alone that a base pipeline shares
        transformer.unload_lora()
        transformer.requires_grad_(True)


def _is_frozen(name: str) -> bool:
    return name.partition(".")[0] in FROZEN_HALF


def _of_layers(tensors: dict[str, Tensor], *layers: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in layers}


def _weights_of(transformer: ModelMixin, layers: Sequence[str]) -> dict[str, Tensor]:
    return {f"{name}.weight": layer.weight.detach() for name, layer in find_target_layers(transformer, layers).items()}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _read_tensors(path: Path, *, like: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}") from error
    want = {name: tuple(tensor.shape) for name, tensor in like.items()}
    have = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if want != have:
        name, shape = sorted(want.items() ^ have.items())[0]
        raise CheckpointError(
            f"{path} does not fit this transformer, first at {name} {list(shape)}: "
            "it is of another rank, of other targets or of other detail channels"
        )
    return tensors
