"""What stage 2 trains on: latents and conditions, encoded once and kept on disk, or anew at every step."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import default_collate

from davae.backbones import Backbone, backbone_of
from davae.data.cache import Entry, TensorCache
from davae.data.sources import PictureSet
from davae.errors import SettingsError
from davae.models.autoencoder_da import AutoencoderDA
from davae.run import faults
from davae.run.ranks import Ranks
from davae.run.storage import write_json
from davae.seeds import rand, randn, sample_generators
from davae.training.caching import SHARD_BYTES, digest_text_encoding, fill_cache
from davae.training.captions import warn_of_merged_captions
from davae.training.devices import fastest_layout, lay_out
from davae.training.digests import digest_model
from davae.training.folders import open_training_pictures
from davae.training.stage_two import Batch, ReadConditions
from davae.training.stage_two_recipe import FinetuneRecipe

IMAGES_TOGETHER, CAPTIONS_TOGETHER = 16, 64
"""As many are encoded at a time."""
ROWS = ".rows"
"""Suffix of a tensor's name: its number of rows, if the cache holds fewer of them (`trim_repeats`)."""

ReadLatents = Callable[[Sequence[int], int], Tensor]
"""(indices of images, number of the batch in the run) -> latents [B, C + D, h, w] in the transformer's units."""


def load_pictures(recipe: FinetuneRecipe, transformer: ModelMixin, folder: Path, ranks: Ranks) -> PictureSet:
    """The training images with captions, or with classes if the backbone has those."""
    backbone = backbone_of(transformer)
    pictures = open_training_pictures(recipe, folder if ranks.first else None, classes=backbone.classes, begun=folder)
    if not backbone.classes:
        return pictures

    # The null class stands above the transformer's classes.
    null_class = backbone.null_class(transformer)
    for key, number in zip(pictures.keys, pictures.classes, strict=True):
        if number >= null_class:
            raise SettingsError(
                f"the picture {key} has class {number}: allowed are the transformer's classes, 0 to {null_class - 1}"
            )
    return pictures


def find_cache_folder(recipe: FinetuneRecipe, folder: Path) -> Path:
    """The folder of the caches of a run in `folder`."""
    return Path(recipe.cache) if recipe.cache else folder / "cache"


def prepare_inputs(
    recipe: FinetuneRecipe, pipeline: DiffusionPipeline, pictures: PictureSet, folder: Path, ranks: Ranks
) -> tuple[ReadLatents, ReadConditions]:
    """Functions that read an upgraded pipeline's latents and conditions; all ranks first fill what the caches lack.

    The pipeline's frozen parts encode on the ranks' device, and stay there only if every step needs them.
    """
    backbone, autoencoder, tokens = backbone_of(pipeline.transformer), pipeline.vae, recipe.prompt_tokens
    noise, seed = recipe.detail_noise, recipe.seed
    move_frozen(pipeline, ranks.device)
    lay_out(autoencoder, fastest_layout(ranks.device))
    conditions = read_classes(pipeline, backbone, pictures) if backbone.classes else None
    if conditions is None and ranks.first:
        warn_of_merged_captions(pictures.captions, pipeline.components, tokens)
    if pictures.class_names and ranks.first:
        numbers = range(len(pictures.class_names))
        write_json(folder / "classes.json", dict(zip(pictures.class_names, numbers, strict=True)))

    # Every step encodes.
    if recipe.online:
        latents = encode_online(autoencoder, pictures, flips=recipe.flips, detail_noise=noise, seed=seed)
        return latents, conditions or encode_captions_online(pipeline, backbone, pictures, tokens)

    # All is encoded once, and then the frozen parts make room for training.
    caches = find_cache_folder(recipe, folder)
    latents = cache_latents(autoencoder, pictures, caches, detail_noise=noise, seed=seed)
    if conditions is None:
        conditions = cache_conditions(pipeline, backbone, pictures, caches, tokens=tokens)
    move_frozen(pipeline, torch.device("cpu"))
    return latents, conditions


def load_batch(
    recipe: FinetuneRecipe, pictures: PictureSet, read_latents: ReadLatents, ranks: Ranks, number: int
) -> Batch:
    """This rank's share of batch `number`."""
    chosen = pictures.step_indices(recipe.batch_size, seed=recipe.seed, step=number)
    indices = ranks.share(chosen)
    latents = faults.at("encode", read_latents(indices, number).to(ranks.device))
    # An online run may have replaced pictures, whose captions go with them.
    indices = [pictures.stand_ins.get(index, index) for index in indices]
    random = sample_generators(recipe.seed, "flow", ranks.sample_numbers(number, len(indices)))
    return Batch([pictures.keys[index] for index in chosen], indices, latents, random)


def move_frozen(pipeline: DiffusionPipeline, device: torch.device) -> None:
    """Move all parts but the transformer."""
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name != "transformer":
            component.to(device)


@torch.no_grad()
def expect_noise(autoencoder: AutoencoderDA, noise: float) -> None:
    """Add the noise's variance to the detail latents' in place, std^2 + noise^2, so that noisy ones have variance 1.

    Decoding undoes it. The reference measures its statistics on noisy latents.
    """
    if noise:
        autoencoder.detail_std.copy_((autoencoder.detail_std.double().square() + noise**2).sqrt())


@torch.no_grad()
def encode_latents(
    autoencoder: AutoencoderDA, image: Float[Tensor, "b 3 height width"]
) -> Float[Tensor, "b latent h w"]:
    """The posterior's mode in the transformer's units, on the CPU."""
    return autoencoder.standardise(autoencoder.encode(image.to(autoencoder.device)).latent_dist.mode()).cpu()


def cache_latents(
    autoencoder: AutoencoderDA,
    pictures: PictureSet,
    folder: Path,
    *,
    detail_noise: float = 0.0,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> ReadLatents:
    """Encode what the cache in `folder` lacks, and return a function that reads latents from it.

    An entry's key is the image's encoded bytes and crop; a cache belongs to one autoencoder, to the last bit of its
    weights. Noise of standard deviation `detail_noise`, before standardisation, is added to what is read.
    """
    cache = TensorCache(folder, "latents", {"autoencoder": digest_model(autoencoder)})
    keys = list(map(pictures.fingerprint, range(len(pictures))))
    autoencoder.eval()

    def encode_block(indices: list[int]) -> list[Entry]:
        # A block may hold several sizes; images of one size are encoded together.
        entries: dict[int, Entry] = {}
        for chosen in pictures.batches(indices, IMAGES_TOGETHER):
            for index, latents in zip(chosen, encode_latents(autoencoder, pictures.batch(chosen)), strict=True):
                entries[index] = {"latents": latents}
        return [entries[index] for index in indices]

    fill_cache(cache, keys, encode_block, block=IMAGES_TOGETHER, unit="pictures", shard_bytes=shard_bytes)
    add_noise = _fix_detail_noise(autoencoder, detail_noise, seed)

    def read(indices: Sequence[int], _batch: int = 0) -> Tensor:
        return add_noise(torch.stack([cache[keys[index]]["latents"] for index in indices]), indices)

    return read


def encode_online(
    autoencoder: AutoencoderDA, pictures: PictureSet, *, flips: bool, detail_noise: float, seed: int
) -> ReadLatents:
    """A function that encodes latents when they are asked for, of images half of which are mirrored with `flips`."""
    autoencoder.eval()
    add_noise = _fix_detail_noise(autoencoder, detail_noise, seed)

    def read(indices: Sequence[int], batch: int) -> Tensor:
        image = pictures.batch_or_next(indices)
        if flips:
            # Drawn anew for every sample of the run, the same for any number of ranks.
            samples = Ranks().sample_numbers(batch, len(indices))
            mirrored = rand(sample_generators(seed, "flips", samples)) < 0.5
            image = torch.where(mirrored[:, None, None, None], image.flip(-1), image)
        return add_noise(encode_latents(autoencoder, image), indices)

    return read


def _fix_detail_noise(autoencoder: AutoencoderDA, noise: float, seed: int) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """A function that adds to the detail latents the noise that each image keeps in all epochs, by its index."""
    base_channels = autoencoder.config.base_channels
    std = autoencoder.detail_std.detach().cpu().view(-1, 1, 1)

    def add(latents: Tensor, indices: Sequence[int]) -> Tensor:
        if not noise:
            return latents
        # The latents are standardised, so the noise is, too.
        base, detail = latents[:, :base_channels], latents[:, base_channels:]
        drawn = randn(detail.shape, sample_generators(seed, "noise on detail latents", indices))
        return torch.cat([base, detail + noise * drawn / std], dim=1)

    return add


def cache_conditions(
    pipeline: DiffusionPipeline, backbone: Backbone, pictures: PictureSet, folder: Path, *, tokens: int
) -> ReadConditions:
    """Encode the captions that the cache in `folder` lacks, and return a function that reads conditions from it.

    A cache belongs to the text encoders and tokenizers to the last bit, to `tokens`, the length of the longest text
    encoder's output, and to the versions of diffusers and transformers.
    """
    cache = TensorCache(folder, "text", {"encoders": digest_text_encoding(pipeline), "tokens": tokens})
    captions = ["", *pictures.captions]
    keys = [hashlib.sha256(caption.encode()).hexdigest() for caption in captions]

    def encode_block(rows: list[int]) -> list[Entry]:
        encoded = encode_captions(pipeline, backbone, [captions[row] for row in rows], tokens)
        entries = []
        for place in range(len(rows)):
            entries.append(trim_repeats({name: values[place] for name, values in encoded.items()}))
        return entries

    fill_cache(cache, keys, encode_block, block=CAPTIONS_TOGETHER, unit="captions")

    def read(rows: Sequence[int]) -> dict[str, Tensor]:
        # Several rows may have one caption, which is read once.
        entries: dict[str, Entry] = {}
        for key in {keys[row] for row in rows}:
            entries[key] = restore_repeats(cache[key])
        return default_collate([entries[keys[row]] for row in rows])

    return read


def encode_captions_online(
    pipeline: DiffusionPipeline, backbone: Backbone, pictures: PictureSet, tokens: int
) -> ReadConditions:
    """A function that encodes captions when they are asked for, on the text encoders' device."""
    captions = ["", *pictures.captions]
    return lambda rows: encode_captions(pipeline, backbone, [captions[row] for row in rows], tokens)


def read_classes(pipeline: DiffusionPipeline, backbone: Backbone, pictures: PictureSet) -> ReadConditions:
    """A function that reads classes, which need no encoder."""
    classes = [backbone.null_class(pipeline.transformer), *pictures.classes]
    conditions = {name: values.cpu() for name, values in backbone.condition(pipeline, classes).items()}
    return lambda rows: {name: values[torch.as_tensor(rows)] for name, values in conditions.items()}


@torch.no_grad()
def encode_captions(
    pipeline: DiffusionPipeline, backbone: Backbone, captions: Sequence[str], tokens: int
) -> dict[str, Tensor]:
    """The transformer's conditions for all captions, each [N, ...], on the CPU.

    Rows of `encoder_hidden_states` that its mask hides from the transformer are zero.
    """
    # In blocks, so that memory does not depend on how many there are.
    batches = []
    for start in range(0, len(captions), CAPTIONS_TOGETHER):
        block = list(captions[start : start + CAPTIONS_TOGETHER])
        batches.append(backbone.condition(pipeline, block, max_sequence_length=tokens))

    condition = {name: torch.cat([batch[name] for batch in batches]).cpu() for name in batches[0]}
    if "encoder_attention_mask" in condition:
        # The transformer does not see them; as zeros they take no room in a cache.
        is_seen = condition["encoder_attention_mask"].bool()[..., None]
        condition["encoder_hidden_states"] = condition["encoder_hidden_states"].masked_fill(~is_seen, 0)
    return condition


def trim_repeats(condition: Entry) -> Entry:
    """Drop the last rows that repeat the one before them bit for bit, such as a mask's zeros."""
    trimmed: dict[str, Tensor] = {}
    for name, values in condition.items():
        trimmed[name] = values
        if not values.dim():
            continue

        # The rows up to the last one that differs from the final row, and one of the repeats.
        bits = values.contiguous().reshape(len(values), -1).view(torch.uint8)
        differs = (bits != bits[-1]).any(dim=1).nonzero()
        length = int(differs.max()) + 2 if len(differs) else 1
        if length < len(values):
            trimmed[name], trimmed[name + ROWS] = values[:length].clone(), torch.tensor(len(values))
    return trimmed


def restore_repeats(trimmed: Entry) -> Entry:
    """The inverse of `trim_repeats`."""
    condition = {name: values for name, values in trimmed.items() if not name.endswith(ROWS)}
    for name, values in condition.items():
        if name + ROWS in trimmed:
            missing = int(trimmed[name + ROWS]) - len(values)
            condition[name] = torch.cat([values, values[-1:].expand(missing, *values.shape[1:])])
    return condition
