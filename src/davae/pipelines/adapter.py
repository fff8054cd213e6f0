"""Write the results of fine-tuning into an adapter folder, and put an adapter's weights into a transformer."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from davae.backbones import backbone_of
from davae.errors import CheckpointError, SettingsError
from davae.pipelines.adapter_index import INDEX, VAE_FOLDER, AdapterIndex, LoraFacts, read_index
from davae.pipelines.autoencoders import digest_tensors, find_frozen_half
from davae.pipelines.sizes import is_finite
from davae.run.storage import check_replaceable, replaced_whole

PORTS_FILE = "transformer_ports.safetensors"
LORA_FILE = "transformer_lora.safetensors"
LAYERS_FILE = "transformer_layers.safetensors"


def digest_base(transformer: ModelMixin) -> str:
    """`digest_tensors` of all but the two latent ports: a base transformer and its widened form have the same."""
    ports = backbone_of(transformer).ports
    prefixes = (f"{ports.input}.", f"{ports.output}.")
    tensors = transformer.state_dict()
    return digest_tensors({name: tensors[name] for name in tensors if not name.startswith(prefixes)})


def find_target_layers(transformer: ModelMixin, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers whose dotted names end in one of `targets`; refuses a target that is a port or no layer."""
    ports = backbone_of(transformer).ports
    linear = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}

    layers: dict[str, nn.Linear] = {}
    for target in targets:
        suffix = f".{target}"
        matches = {name: layer for name, layer in linear.items() if f".{name}".endswith(suffix)}
        if not matches:
            examples = sorted({".".join(name.split(".")[-2:]) for name in linear})[:12]
            raise SettingsError(f"target {target!r} is no linear layer of this model; it has, for example, {examples}")
        if f".{ports.input}".endswith(suffix) or f".{ports.output}".endswith(suffix):
            raise SettingsError(f"target {target!r} is a latent port, and those are trained in full: leave it out")
        layers |= matches
    return layers


def add_lora(
    transformer: ModelMixin, rank: int, alpha: float, targets: Sequence[str], *, seed: int = 0
) -> list[nn.Parameter]:
    """Freeze a widened transformer except for new LoRA layers on `targets` and for both ports in full.

    `seed` is for the first matrix of each LoRA pair; the second starts at zero, so nothing changes yet. The trainable
    parameters are returned, all in float32: run a transformer in half precision under autocast.
    """
    if rank < 1:
        raise SettingsError(f"rank={rank} must be 1 or more")
    if not isinstance(transformer, PeftAdapterMixin):
        name = type(transformer).__name__
        raise SettingsError(f'a {name} has no LoRA in diffusers: allowed are trained="layers", "full" and "ports"')
    find_target_layers(transformer, targets)  # refuses unknown ones

    # LoRA layers, their random numbers apart from the global ones.
    transformer.requires_grad_(False)
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(settings)

    # The ports are trained in full.
    ports = backbone_of(transformer).ports
    for name in (ports.input, ports.output):
        transformer.get_submodule(name).requires_grad_(True)

    trainable = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.float()
    return trainable


def save_adapter(
    folder: Path, pipeline: DiffusionPipeline, *, base: str, base_sha256: str, layers: Sequence[str] = ()
) -> None:
    """Write the results of fine-tuning as an adapter folder, whole or not at all.

    `folder` may hold an older adapter, which is replaced; any other folder is refused. The transformer of the upgraded
    `pipeline` has LoRA from `add_lora`, not fused, or trained `layers`, or neither. `base_sha256` is the `digest_base`
    from before the training; `base` is a name for people.
    """
    transformer, vae = pipeline.transformer, pipeline.vae
    frozen = find_frozen_half(vae)
    config = getattr(transformer, "peft_config", {}).get("default")
    lora = None
    if config is not None:
        lora = LoraFacts(rank=config.r, alpha=config.lora_alpha, targets=tuple(sorted(config.target_modules)))
    index = AdapterIndex(
        base=base,
        base_sha256=base_sha256,
        base_encoder_sha256=digest_tensors(frozen),
        transformer=type(transformer).__name__,
        base_channels=vae.config.base_channels,
        detail_channels=vae.config.detail_channels,
        lora=lora,
        layers=tuple(layers),
    )

    # Files in one go: a failure leaves an older adapter as it was.
    check_replaceable(folder, holds=INDEX)
    with replaced_whole(folder) as partial:
        (partial / INDEX).write_text(index.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for name, tensors in _select_tensors(transformer, index).items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial / name)

        # The autoencoder as it saves itself, then without the base's half.
        vae.save_pretrained(partial / VAE_FOLDER)
        (weights,) = (partial / VAE_FOLDER).glob("*.safetensors")
        tensors = load_file(weights)
        for name in frozen:
            del tensors[name]
        save_file(tensors, weights, metadata={"format": "pt"})


def _select_tensors(transformer: ModelMixin, index: AdapterIndex) -> dict[str, dict[str, Tensor]]:
    """An adapter's tensors as they are in the transformer, by the names of the files that hold them."""
    files: dict[str, dict[str, Tensor]] = {PORTS_FILE: {}}
    ports = backbone_of(transformer).ports
    for name, tensor in transformer.state_dict().items():
        if name.rpartition(".")[0] in (ports.input, ports.output):
            files[PORTS_FILE][name] = tensor

    if index.lora is not None:
        files[LORA_FILE] = get_peft_model_state_dict(transformer)
    if index.layers:
        layers = find_target_layers(transformer, index.layers)
        files[LAYERS_FILE] = {f"{name}.weight": layer.weight.detach() for name, layer in layers.items()}
    return files


def check_base(digest: str, folder: Path) -> None:
    """Refuse the adapter in `folder` unless it was trained on the transformer with this `digest_base`."""
    index = read_index(folder)
    if digest != index.base_sha256:
        raise CheckpointError(
            f"the adapter {folder} was trained on another base: on {index.base} with SHA-256 {index.base_sha256}, but "
            f"this transformer's is {digest}. Load it on {index.base}, in float32 or bfloat16"
        )


def load_adapter(transformer: ModelMixin, folder: Path, *, fuse: bool) -> None:
    """Put all weights of an adapter into a widened base transformer, in place; call `check_base` first.

    LoRA layers that are there already (`add_lora`) are filled, others are added. With `fuse` they are then added to the
    weights, so that a plain transformer results.
    """
    index = read_index(folder)
    if index.lora is not None:
        _prepare_lora(transformer, index.lora, folder)
    for name, like in _select_tensors(transformer, index).items():
        tensors = _read_tensors(folder / name, like=like)
        if name == LORA_FILE:
            set_peft_model_state_dict(transformer, tensors)
        else:  # new parameters, not copies in place: a base pipeline may share the old ones
            transformer.load_state_dict(tensors, strict=False, assign=True)

    if fuse and index.lora is not None:
        # "Safe" makes new tensors, for the same reason.
        transformer.fuse_lora(safe_fusing=True)
        transformer.unload_lora()
        transformer.requires_grad_(True)


def _prepare_lora(transformer: ModelMixin, facts: LoraFacts, folder: Path) -> None:
    """Add LoRA layers for an adapter's tensors; refuses layers of another alpha that are there already."""
    configs = getattr(transformer, "peft_config", None)
    if not configs:
        settings = {"r": facts.rank, "lora_alpha": facts.alpha, "target_modules": list(facts.targets)}
        transformer.add_adapter(LoraConfig(**settings, init_lora_weights=False))
    elif configs["default"].lora_alpha != facts.alpha:
        alpha = configs["default"].lora_alpha
        raise CheckpointError(f"{folder} has LoRA of alpha {facts.alpha}, and {alpha} was asked for: ask for its own")


def _read_tensors(path: Path, *, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file that must have the names and shapes of `like`, in their precision and place."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}") from error

    for name in sorted(like.keys() | tensors.keys()):
        if name not in like or name not in tensors or like[name].shape != tensors[name].shape:
            shape = list((like if name in like else tensors)[name].shape)
            causes = "its rank, its targets or its number of detail channels differ"
            raise CheckpointError(f"{path} does not fit this transformer, first at {name} {shape}: {causes}")
        if not is_finite(tensors[name]):
            raise CheckpointError(f"{path} has numbers that are not finite in {name}: copy it anew, or train it again")
        tensors[name] = tensors[name].to(like[name])
    return tensors
