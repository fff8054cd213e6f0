"""What stage 2 computes once for all pictures: their latents, and what the transformer is told about each."""

import hashlib
import logging
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from davae import faults
from davae.adapter import tensors_digest
from davae.autoencoder_da import AutoencoderDA
from davae.backbones import Backbone
from davae.data.sources import PictureSet
from davae.errors import SettingsError
from davae.seeds import generator
from davae.storage import write_atomically

logger = logging.getLogger(__name__)


def move_frozen(pipeline: DiffusionPipeline, device: torch.device) -> None:
    """Move everything but the transformer."""
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name != "transformer":
            component.to(device)


@torch.no_grad()
def expect_noise(autoencoder: AutoencoderDA, noise: float) -> None:
    """Make the detail latents' deviations those of latents with noise: std^2 becomes std^2 + noise^2, in place.

    So noisy detail latents have unit variance for the transformer, as the reference's, which measures them with the
    noise on them (METHOD 1.4). Decoding undoes it.
    """
    if noise:
        autoencoder.detail_std.copy_((autoencoder.detail_std.double().square() + noise**2).sqrt())


@torch.no_grad()
def cached_latents(
    autoencoder: AutoencoderDA, pictures: PictureSet, path: Path, *, detail_noise: float = 0.0, seed: int = 0
) -> Tensor:
    """Latents of all pictures in the transformer's units [N, C + D, h, w]: the posterior's mode, kept in `path`.

    They are used again only for the same pictures, size, autoencoder and noise; another is a miss, and so is a damaged
    file.

    Args:
        autoencoder: on the device where it is to run.
        pictures: N of them.
        path: of the cache.
        detail_noise: deviation of Gaussian noise on the detail latents, before standardisation; see `expect_noise`.
        seed: of the noise, which each picture has by its index, the same in every epoch.
    """
    parts = f"{pictures.digest} {pictures.size} {tensors_digest(autoencoder.state_dict())}"
    if detail_noise:
        parts += f" noise {detail_noise} {seed}"
    key = hashlib.sha256(parts.encode()).hexdigest()
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("key") == key:
                    return file.get_tensor("latents")
        except (OSError, SafetensorError) as error:
            logger.warning("%s is damaged (%s); the pictures are encoded again", path, error)
    autoencoder.eval()
    latents = []
    for indices in track(torch.arange(len(pictures)).split(16), "encoding pictures", console=Console(stderr=True)):
        faults.at("cache")
        image = pictures.batch(indices.tolist()).to(autoencoder.device)
        base, detail = autoencoder.split(autoencoder.standardise(autoencoder.encode(image).latent_dist.mode()))
        if detail_noise:
            noise = [
                torch.randn(detail.shape[1:], generator=generator(seed, "noise on detail latents", index))
                for index in indices.tolist()
            ]
            detail = detail + detail_noise * torch.stack(noise).to(detail) / autoencoder.detail_std.view(-1, 1, 1)
        latents.append(torch.cat([base, detail], dim=1))
    tensors = {"latents": torch.cat(latents).cpu().contiguous()}
    write_atomically(path, save(tensors, metadata={"key": key}))
    return tensors["latents"]


def encode_conditions(
    pipeline: DiffusionPipeline, backbone: Backbone, pictures: PictureSet, tokens: int
) -> dict[str, Tensor]:
    """The transformer's conditions, each value [1 + N, ...]: of no caption or the null class first, then the pictures'.

    Args:
        pipeline: with the frozen text encoders, where the family has any.
        backbone: the family.
        pictures: N of them, with captions or with classes, as the family wants.
        tokens: length of the longest text encoder's output; of no account for classes.
    """
    if not backbone.classes:
        return encode_captions(pipeline, backbone, ["", *pictures.captions], tokens)
    found = backbone.condition(pipeline, [backbone.null_class(pipeline.transformer), *pictures.classes])
    return {name: values.cpu() for name, values in found.items()}


@torch.no_grad()
def encode_captions(
    pipeline: DiffusionPipeline, backbone: Backbone, captions: list[str], tokens: int
) -> dict[str, Tensor]:
    """The transformer's conditions for all captions, each value [N, ...], by the frozen text encoders."""
    batches = [
        backbone.condition(pipeline, captions[start : start + 64], max_sequence_length=tokens)
        for start in range(0, len(captions), 64)
    ]
    return {name: torch.cat([batch[name] for batch in batches]).cpu() for name in batches[0]}


def check_classes(pictures: PictureSet, null_class: int) -> None:
    """Refuse pictures of classes that the transformer has not.

    Raises:
        SettingsError: a class number is `null_class` or above.
    """
    for key, number in zip(pictures.keys, pictures.classes, strict=True):
        if number >= null_class:
            raise SettingsError(
                f"the picture {key} has class {number}: allowed are the transformer's classes, 0 to {null_class - 1}"
            )
