"""Load autoencoders, bare, of a pipeline or of an adapter, whole or not at all; tell whose encoder they have."""

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch
from diffusers import ModelMixin
from packaging.version import Version
from torch import Tensor, nn

from davae.errors import CheckpointError, SettingsError
from davae.models.autoencoder_da import AutoencoderDA
from davae.models.base_autoencoders import find_base
from davae.pipelines.adapter_index import INDEX, VAE_FOLDER, read_index
from davae.pipelines.folders import check_autoencoder
from davae.pipelines.places import fetch_files, find_on_hub, loading
from davae.pipelines.sizes import check_finite
from davae.pipelines.vetting import check_files
from davae.run.storage import read_json

# The argument of `from_pretrained` for the precision of the weights.
DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"

# The files of a pipeline's autoencoder: fetched from the Hub for it alone.
WEIGHTS = "vae/diffusion_pytorch_model"
SHARDS = (f"{WEIGHTS}.safetensors.index.json", f"{WEIGHTS}-*-of-*.safetensors")
VAE_FILES = ("model_index.json", "vae/config.json", f"{WEIGHTS}.safetensors", *SHARDS)

# Weights of a variant, such as fp16, whose name is the group; shards have their numbers before or behind it.
VARIANT = re.compile(r"(?:diffusion_pytorch_)?model(?:-\d+-of-\d+)?\.([\w-]+?)(?:-\d+-of-\d+)?\.safetensors")

# Parts of an AutoencoderDA that it takes from its base autoencoder -> their names there.
FROZEN_HALF = {"base_encoder": "encoder", "base_quant_conv": "quant_conv"}


def load_autoencoder(
    folder: Path,
    *,
    base: ModelMixin | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> AutoencoderDA:
    """Load the AutoencoderDA of a folder that `save_pretrained` wrote, or of an adapter folder, in evaluation mode.

    `base` is the base pipeline's VAE, whose encoder is the frozen half of an adapter's autoencoder. The weights are
    loaded in `dtype` (float32 if None) onto `device`.

    Raises:
        CheckpointError: the folder is damaged or holds something else, or the adapter belongs to another base.
        SettingsError: an adapter without its base.
    """
    frozen: dict[str, Tensor] = {}
    if (folder / INDEX).is_file():
        expected = read_index(folder).base_encoder_sha256
        if expected is not None:  # format 1 has the whole autoencoder
            if base is None:
                raise SettingsError(f"{folder} is an adapter, with half an autoencoder: give the base pipeline's, too")
            frozen = select_frozen_half(base)
            digest = digest_tensors(frozen)
            if digest != expected:
                raise CheckpointError(
                    f"the autoencoder of {folder} was made from another base: from an encoder with SHA-256 {expected}, "
                    f"and this one's is {digest}. Give the base pipeline that the adapter names"
                )
        folder = folder / VAE_FOLDER
    elif (folder / "config.json").is_file():
        check_autoencoder(folder)

    return load_model(AutoencoderDA, folder, frozen=frozen, dtype=dtype, device=device)


def load_model(
    model_class: type[ModelMixin],
    folder: Path,
    *,
    frozen: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> ModelMixin:
    """Load a diffusers model from its own folder, in `dtype` (float32 if None) and evaluation mode.

    The folder may lack the weights in `frozen`; these are copied into the model, and frozen.
    """
    if not (folder / "config.json").is_file():  # diffusers would take "runs/autoencoder" for a name on the Hub
        name = model_class.__name__
        raise CheckpointError(f"{folder} has no config.json: give the folder of an {name} on this machine")
    check_files(folder, model_class)
    frozen, dtype = frozen or {}, dtype or torch.float32

    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    if frozen:
        logger.setLevel(logging.ERROR)  # no advice to train the weights that the file lacks
    try:
        settings = {"use_safetensors": True, "output_loading_info": True, DTYPE: dtype, "variant": find_variant(folder)}
        with loading(folder, f"an {model_class.__name__}"):
            model, loading_info = model_class.from_pretrained(folder, **settings)
    finally:
        logger.setLevel(level)

    missing = sorted(set(loading_info["missing_keys"]) - frozen.keys())
    if missing:
        advice = "copy it anew"
        if (folder.parent / INDEX).is_file():
            advice = f"it is an adapter's: give {folder.parent} and the base pipeline, or, if they are given, {advice}"
        raise CheckpointError(f"{folder} lacks the weights {', '.join(missing[:3])}: {advice}")

    # Assigned, because diffusers may have left these parameters on "meta".
    copies = {name: tensor.to(dtype, copy=True) for name, tensor in frozen.items()}
    model.load_state_dict(copies, strict=False, assign=True)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    check_finite(model, f"{model_class.__name__} of {folder}")
    return model.to(device).eval()


def load_base_vae(base: str, *, device: torch.device | str = "cpu") -> ModelMixin:
    """Load the autoencoder of a base pipeline (folder, or OWNER/NAME[@REVISION]), in float32 and evaluation mode.

    A folder with a `config.json` and no `model_index.json` is the autoencoder itself.
    """
    hub = find_on_hub(base)
    folder = Path(base) if hub is None else fetch_files(hub, VAE_FILES)
    is_autoencoder = (folder / "config.json").is_file() and not (folder / "model_index.json").exists()
    with loading(base, "a pipeline"):
        if is_autoencoder:
            class_name = read_json(folder / "config.json")["_class_name"]
        else:
            class_name = read_json(folder / "model_index.json")["vae"][1]
            folder = folder / "vae"
        vae_class = load_base_class(class_name, f"the VAE of {base}")
        check_files(folder, vae_class)
        settings = {"use_safetensors": True, DTYPE: torch.float32, "variant": find_variant(folder)}
        vae = vae_class.from_pretrained(folder, **settings)

    check_whole(vae, f"VAE of {base}")
    return vae.to(device).eval()


def find_variant(folder: Path) -> str | None:
    """The variant ("fp16") of the weights in a folder of a model or pipeline, where a model has weights of it only.

    Raises:
        CheckpointError: there are several to choose from.
    """
    variants: set[str] = set()
    for place in (folder, *folder.glob("*/")):
        files = [path.name for path in place.glob("*.safetensors")]
        found = [match[1] for match in map(VARIANT.fullmatch, files) if match]
        if len(found) == len(files):
            variants.update(found)
    if len(variants) > 1:
        choice = ", ".join(sorted(variants))
        raise CheckpointError(f"{folder} has weights of the variants {choice}: say which one, variant=...")
    return next(iter(variants), None)


def load_base_class(class_name: str, whose: str) -> type[ModelMixin]:
    """The class of a base autoencoder by its name; refuses one that davae cannot upgrade."""
    try:
        return find_base(class_name).load_class()
    except ValueError as error:
        raise SettingsError(f"{whose}: {error}") from error


def check_whole(module: nn.Module, name: str) -> None:
    """Refuse a model some of whose weights were not in its file (diffusers leaves them on "meta") or are not finite."""
    missing = [key for key, parameter in module.named_parameters() if parameter.is_meta]
    if missing:
        raise CheckpointError(f"the {name} lacks the weights {', '.join(missing[:3])}: copy the folder anew")
    check_finite(module, name)


def check_present(module: nn.Module, name: str, advice: str) -> None:
    """Refuse a model whose weights are elsewhere: on "meta", or in files of group offloading."""
    is_away = any(tensor.is_meta for tensor in module.state_dict().values())
    for part in module.modules():
        registry = getattr(part, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook("group_offloading")
        is_away = is_away or (hook is not None and hook.group.offload_to_disk_path is not None)
    if is_away:
        raise SettingsError(f"the {name}'s weights are offloaded: {advice}")


def check_base_encoder(autoencoder: AutoencoderDA, vae: ModelMixin) -> None:
    """Refuse an autoencoder whose frozen half is not `vae`'s encoder."""
    ours, theirs = digest_tensors(find_frozen_half(autoencoder)), digest_tensors(select_frozen_half(vae))
    if ours != theirs:
        raise SettingsError(
            f"the autoencoder's frozen base encoder is not this pipeline's (SHA-256 {ours} against {theirs}). "
            "Use the pipeline that it was made from, or train one on this pipeline's VAE"
        )


def digest_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bfloat16 values: weights loaded in float32 and in bfloat16 have the same digest.

    Weights loaded in float16 have it, too, where float16 can hold them: other values are rounded twice.
    """
    sha256 = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"{name} {list(tensor.shape)}\n".encode())
        sha256.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return sha256.hexdigest()


def select_frozen_half(vae: nn.Module) -> dict[str, Tensor]:
    """The tensors that an AutoencoderDA takes from its base autoencoder `vae`, under the AutoencoderDA's names."""
    tensors: dict[str, Tensor] = {}
    for ours, theirs in FROZEN_HALF.items():
        part = getattr(vae, theirs, None)
        if isinstance(part, nn.Module):
            tensors |= part.state_dict(prefix=f"{ours}.")
    return tensors


def find_frozen_half(autoencoder: AutoencoderDA) -> dict[str, Tensor]:
    """The tensors of an AutoencoderDA that are its base's."""
    tensors = autoencoder.state_dict()
    return {name: tensors[name] for name in tensors if name.partition(".")[0] in FROZEN_HALF}
