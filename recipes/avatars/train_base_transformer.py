"""Train the base pipeline's transformer and text encoders at 128 px (the third of the pair's commands).

    python recipes/avatars/train_base_transformer.py IMAGES RUN --autoencoder AUTOENCODER --out PIPELINE

IMAGES is draw.py's folder, AUTOENCODER a folder of train_base_autoencoder.py. The learning rate rises, then stays, so
that the training can stop at any step: the EMA's weights are what counts. RUN holds latents, checkpoints, metrics and
strips of images of the same 24 held-out prompts; the same command goes on where it stopped.

    python recipes/avatars/train_base_transformer.py IMAGES RUN --autoencoder AUTOENCODER --out PIPELINE --cool-down

lowers the learning rate to nothing, from the weights of RUN's newest checkpoint on. Either command writes PIPELINE at
its end, a stock `StableDiffusion3Pipeline` folder in bfloat16; with `--export` it writes that of the newest
checkpoint at once.
"""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from drawn_images import DrawnImages, halved
from PIL import Image
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel
from word_tokenizers import PROMPT_TOKENS, clip_tokenizer, t5_tokenizer, token_ids

from davae.backbones import sd3
from davae.data import avatar_captions
from davae.data.order import batch_indices
from davae.errors import CheckpointError
from davae.method.flow import interpolate, sample_timesteps, velocity_target
from davae.run.checkpoint import latest_checkpoint
from davae.run.progress import track
from davae.run.recipe import load_recipe
from davae.run.storage import write_json
from davae.seeds import generator
from davae.training.devices import attention_on
from davae.training.recipes import OptimisationRecipe
from davae.training.state import TrainingState

TEXT_WIDTH = 128
SAMPLING_STEPS, GUIDANCE = 20, 2.5


class BaseTransformerRecipe(OptimisationRecipe):
    """Everything that decides the run."""

    width: int = 256
    """Of the transformer; a multiple of the heads."""
    layers: int = 4
    heads: int = 4
    images: int = 24576
    steps: int = 60000
    """More than a session has time for: the training goes on until somebody stops it."""
    cool_down_steps: int = 3000
    batch_size: int = 32
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-3
    """As the peak: it stays. The last phase alone lowers it, on a half cosine to nothing."""
    warmup_steps: int = 200
    precision: Literal["auto", "float32", "bf16"] = "bf16"
    weight_decay: float = 0.01
    shift: float = 1.5
    """The scheduler's static timestep shift, in training and in sampling."""
    caption_dropout: float = 0.1
    ema_decay: float = 0.9995
    evaluate_every: int = 500
    strip_every: int = 1500
    checkpoint_every: int = 500
    compiled: bool = True
    """Compile the transformer for the usual length of prompts. That takes minutes, and a third off every step."""


def text_encoder(words: int) -> CLIPTextModelWithProjection:
    """A small CLIP text encoder; its second-last layer and its projection are what Stable Diffusion 3 reads."""
    width = TEXT_WIDTH // 2
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=PROMPT_TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def build_pipeline(recipe: BaseTransformerRecipe, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """An untrained pipeline around a trained autoencoder."""
    torch.manual_seed(recipe.seed)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    latent_side = vae.config.sample_size // 8

    transformer = SD3Transformer2DModel(
        sample_size=latent_side,
        patch_size=2,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        attention_head_dim=recipe.width // recipe.heads,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=recipe.width,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=latent_side,
        qk_norm="rms_norm",
    )
    t5_config = T5Config(
        vocab_size=len(t5), d_model=TEXT_WIDTH, d_kv=32, num_heads=4, d_ff=256, num_layers=2, dropout_rate=0.0
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=recipe.shift),
        vae=vae,
        text_encoder=text_encoder(len(clip)),
        tokenizer=clip,
        text_encoder_2=text_encoder(len(clip)),
        tokenizer_2=clip,
        text_encoder_3=T5EncoderModel(t5_config),
        tokenizer_3=t5,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encode_words(pipeline: StableDiffusion3Pipeline, prompts: Sequence[str], t5_tokens: int) -> dict[str, Tensor]:
    """The same as `sd3.condition`, whose six calls of tokenizers take longer than the text encoders."""
    clip_ids, t5_ids = token_ids(prompts, t5_tokens)
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    outputs = [encoder(clip_ids, output_hidden_states=True) for encoder in encoders]
    clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    t5 = pipeline.text_encoder_3(t5_ids)[0]
    return {
        "encoder_hidden_states": torch.cat([clip, t5], dim=1),
        "pooled_projections": torch.cat([output[0] for output in outputs], dim=-1),
    }


def t5_tokens(seed: int, step: int) -> int:
    """T5's length differs between steps, since pipelines pad it to 256 by default and the model attends to padding."""
    draw = torch.rand((), generator=generator(seed, "t5 length", step)).item()
    if draw < 0.02:
        return 256
    return 64 if draw < 0.08 else PROMPT_TOKENS


def training_captions(recipe: BaseTransformerRecipe, images: DrawnImages, indices: list[int], step: int) -> list[str]:
    """A new caption for each image in every step; some are empty, for guidance."""
    captions = []
    for place, index in enumerate(indices):
        draw = random.Random(f"caption {recipe.seed} {step} {place}")
        dropped = draw.random() < recipe.caption_dropout
        captions.append("" if dropped else avatar_captions.caption(images.attributes[index], draw))
    return captions


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: DrawnImages, path: Path) -> Tensor:
    """Latents of all images at half size in the transformer's units, [N, C, h, w]; kept in `path`."""
    if path.exists():
        return load_file(path)["latents"]
    vae = vae.to(memory_format=torch.channels_last)
    latents = []
    for part in track(torch.arange(len(images)).split(64), path.name, unit="batches"):
        small = halved(images.batch(part.tolist())).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(vae.encode(small).latent_dist.mode().float().contiguous())

    units = (torch.cat(latents) - vae.config.shift_factor) * vae.config.scaling_factor
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"latents": units.contiguous()}, path)
    return units


@torch.no_grad()
def held_out_loss(
    pipeline: StableDiffusion3Pipeline, latents: Tensor, captions: list[str], recipe: BaseTransformerRecipe
) -> float:
    """The loss on held-out images, with their full captions and with noise that is the same every time."""
    draw = generator(recipe.seed, "held-out noise")
    losses = []
    for start in range(0, len(latents), 64):
        clean = latents[start : start + 64]
        noise = torch.randn(clean.shape, generator=draw)
        sigma = sample_timesteps(len(clean), shift=recipe.shift, generator=draw)
        with torch.autocast("cpu", torch.bfloat16), attention_on(torch.device("cpu")):
            condition = encode_words(pipeline, captions[start : start + 64], PROMPT_TOKENS)
            velocity = sd3.velocity(pipeline.transformer, interpolate(clean, noise, sigma), sigma, condition)
        losses.append((velocity.float() - velocity_target(clean, noise)).square().mean(dim=(1, 2, 3)))
    return torch.cat(losses).mean().item()


@torch.no_grad()
def write_strip(pipeline: StableDiffusion3Pipeline, prompts: Sequence[str], path: Path, *, columns: int = 8) -> None:
    """Images of these prompts, always from the same noise, as one PNG."""
    with torch.autocast("cpu", torch.bfloat16):
        images = pipeline(
            list(prompts),
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=GUIDANCE,
            max_sequence_length=PROMPT_TOKENS,
            generator=generator(0, "strip"),
        ).images

    side = images[0].width
    sheet = Image.new("RGB", (columns * side, -(-len(images) // columns) * side))
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * side, number // columns * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def save_bfloat16(pipeline: StableDiffusion3Pipeline, folder: Path) -> None:
    """Write bfloat16 weights that load as float32 by default, and no path of this machine.

    An adapter knows its base by the bfloat16 values of its weights, so that one of the weights before rounding fits.
    """
    pipeline.to(torch.bfloat16)
    pipeline.save_pretrained(folder)
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        if "dtype" in config:  # transformers (unlike diffusers) loads in the precision that the config names
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n")


def copy_start(run: Path, names: Sequence[str]) -> Path:
    """The folder with the weights that the last phase starts from: a copy of the newest checkpoint's, made once."""
    start = run / "cool_down_start"
    if not start.exists():
        newest = latest_checkpoint(run / "constant/checkpoints")
        if newest is None:
            raise CheckpointError(f"{run / 'constant'} has no checkpoint to cool down from: train first")
        partial = run / "cool_down_start.partial"
        partial.mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copy(newest / f"{name}.safetensors", partial)
        write_json(partial / "checkpoint.json", {"name": newest.name})
        partial.rename(start)
    return start


def main(
    images: Annotated[Path, typer.Argument(help="The folder that draw.py wrote.")],
    run: Annotated[Path, typer.Argument(help="The folder for latents, checkpoints, metrics and strips.")],
    autoencoder: Annotated[Path, typer.Option(help="The trained autoencoder.")],
    out: Annotated[Path, typer.Option(help="The folder for the pipeline.")],
    recipe_file: Annotated[Path | None, typer.Option("--recipe", help="Settings other than the defaults.")] = None,
    cool_down: Annotated[bool, typer.Option("--cool-down", help="Lower the learning rate to nothing.")] = False,
    export: Annotated[bool, typer.Option("--export", help="Write the newest checkpoint's pipeline.")] = False,
) -> None:
    """Train, then write the pipeline."""
    recipe = load_recipe(BaseTransformerRecipe, recipe_file) if recipe_file else BaseTransformerRecipe()
    vae = AutoencoderKL.from_pretrained(autoencoder).eval()
    training = DrawnImages(images, limit=recipe.images)
    held_out = DrawnImages(images, held_out=True, limit=256)
    latents = encode_images(vae, training, run / "latents.safetensors")
    held_out_latents = encode_images(vae, held_out, run / "held_out_latents.safetensors")
    held_out_captions = [avatar_captions.full_caption(attributes) for attributes in held_out.attributes]

    pipeline = build_pipeline(recipe, vae)
    names = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    modules: dict[str, nn.Module] = {name: getattr(pipeline, name) for name in names}
    for module in modules.values():
        module.train().requires_grad_(True)

    # The last phase starts from the weights of the other, with an optimiser and a schedule of its own.
    folder = run / "constant"
    if cool_down:
        folder, start = run / "cool_down", copy_start(run, names)
        recipe = recipe.model_copy(update={"steps": recipe.cool_down_steps, "final_learning_rate": 0.0})
        for name, module in modules.items():
            load_model(module, start / f"{name}.safetensors")

    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    state = TrainingState(recipe, folder, modules, parameters, label="base transformer")
    if export:
        with state.ema_weights():
            save_bfloat16(pipeline, out)
        return

    compiled = torch.compile(pipeline.transformer, dynamic=False) if recipe.compiled else pipeline.transformer
    for step in state.steps():
        if step % recipe.evaluate_every == 0:
            with state.ema_weights():
                state.log({"held_out_loss": held_out_loss(pipeline, held_out_latents, held_out_captions, recipe)})
                if step % recipe.strip_every == 0:
                    write_strip(pipeline, held_out_captions[:24], run / f"strips/{step:06d}.png")

        # A batch of clean latents with their captions, and a point on the straight path from each to noise.
        indices = batch_indices(len(training), recipe.batch_size, seed=recipe.seed, step=step, version=1)
        captions = training_captions(recipe, training, indices, step)
        clean = latents[indices]
        draw = generator(recipe.seed, "flow", step)
        noise = torch.randn(clean.shape, generator=draw)
        sigma = sample_timesteps(len(indices), shift=recipe.shift, generator=draw)
        noisy = interpolate(clean, noise, sigma)

        # The transformer predicts the path's direction, noise - latents.
        length = t5_tokens(recipe.seed, step)
        transformer = compiled if length == PROMPT_TOKENS else pipeline.transformer
        with state.autocast(), attention_on(state.device):
            condition = encode_words(pipeline, captions, length)
            velocity = sd3.velocity(transformer, noisy, sigma, condition)
        state.update(F.mse_loss(velocity.float(), velocity_target(clean, noise)))

    with state.ema_weights():
        save_bfloat16(pipeline, out)


if __name__ == "__main__":
    typer.run(main)
