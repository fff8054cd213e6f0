"""Train the small base pipeline's transformer and text encoders at 128 px (the second of the pair's two commands).

    python recipes/small_pair/train_base_transformer.py RUN --autoencoder AUTOENCODER --out PIPELINE

RUN holds checkpoints and metrics; the same command resumes. PIPELINE becomes a stock
`StableDiffusion3Pipeline` folder in half precision. `--start OLD` begins from that pipeline's weights, not at random.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from davae import assets
from davae.backbones import sd3
from davae.data.order import batch_indices
from davae.data.sources import PictureSet, open_pictures
from davae.method.flow import interpolate, sample_timesteps, velocity_target
from davae.pipelines.loading import load_pipeline
from davae.run.recipe import load_recipe
from davae.seeds import generator
from davae.training.devices import attention_on
from davae.training.recipes import OptimisationRecipe
from davae.training.state import TrainingState

PROMPT_TOKENS = 12


class BaseTransformerRecipe(OptimisationRecipe):
    """Everything that decides the run."""

    width: int = 224
    """Of the transformer; a multiple of the heads."""
    layers: int = 4
    heads: int = 4
    steps: int = 5500
    batch_size: int = 32
    learning_rate: float = 1e-3
    final_learning_rate: float = 2e-5
    warmup_steps: int = 200
    precision: Literal["auto", "float32", "bf16"] = "bf16"
    shift: float = 1.5
    """The scheduler's static timestep shift, in training and in sampling."""
    caption_dropout: float = 0.1
    size: int = 128


def build_text_encoder(vocabulary_size: int, width: int) -> CLIPTextModelWithProjection:
    """A small CLIP text encoder; its second-last layer and its projection are what Stable Diffusion 3 reads."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocabulary_size,
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


def train_clip_tokenizer(captions: list[str], size: int = 1000) -> CLIPTokenizer:
    """Byte-level BPE learned on the captions; every string can be written in it."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|startoftext|>", "<|endoftext|>"]
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            special_tokens=[*special, *(f"{letter}</w>" for letter in alphabet)],
            show_progress=False,
        ),
    )

    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=PROMPT_TOKENS)


def train_t5_tokenizer(captions: list[str], size: int = 800) -> T5Tokenizer:
    """A unigram model learned on the captions."""
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.train_from_iterator(
        captions,
        trainers.UnigramTrainer(
            vocab_size=size, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    vocabulary = [tuple(entry) for entry in json.loads(unigram.to_str())["model"]["vocab"]]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def build_pipeline(recipe: BaseTransformerRecipe, vae: AutoencoderKL, captions: list[str]) -> StableDiffusion3Pipeline:
    """An untrained pipeline around a trained autoencoder."""
    torch.manual_seed(recipe.seed)
    tokenizer, t5 = train_clip_tokenizer(captions), train_t5_tokenizer(captions)
    transformer = SD3Transformer2DModel(
        sample_size=recipe.size // 8,
        patch_size=2,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        attention_head_dim=recipe.width // recipe.heads,
        joint_attention_dim=128,
        caption_projection_dim=recipe.width,
        pooled_projection_dim=128,
        pos_embed_max_size=recipe.size // 8,
        qk_norm="rms_norm",
    )

    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=recipe.shift),
        vae=vae,
        text_encoder=build_text_encoder(len(tokenizer), 64),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(len(tokenizer), 64),
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel(
            T5Config(vocab_size=len(t5), d_model=128, d_kv=32, num_heads=4, d_ff=256, num_layers=1, dropout_rate=0.0)
        ),
        tokenizer_3=t5,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: PictureSet, size: int) -> Tensor:
    """Latents of all pictures at `size` in the transformer's units, [N, C, size / 8, size / 8]."""
    latents = []
    for indices in torch.arange(len(pictures)).split(32):
        small = F.interpolate(pictures.batch(indices.tolist()), size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        latents.append(vae.encode(small).latent_dist.mode())
    return (torch.cat(latents) - vae.config.shift_factor) * vae.config.scaling_factor


def draw_t5_length(seed: int, step: int) -> int:
    """T5's length differs between steps, since pipelines pad it to 256 by default and the model attends to padding."""
    draw = torch.rand((), generator=generator(seed, "t5 length", step)).item()
    return 256 if draw < 0.03 else 64 if draw < 0.1 else PROMPT_TOKENS


def save_half(pipeline: StableDiffusion3Pipeline, folder: Path) -> None:
    """Write float16 weights that load as float32 by default, and no path of this machine."""
    pipeline.to(torch.float16)
    pipeline.save_pretrained(folder)
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        if "dtype" in config:  # transformers (unlike diffusers) loads in the precision that the config names
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n")


def main(
    run: Path,
    autoencoder: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()],
    recipe_file: Annotated[Path | None, typer.Option("--recipe")] = None,
    start: Annotated[Path | None, typer.Option(help="A pipeline of this script to go on from.")] = None,
) -> None:
    """Train, then write the pipeline."""
    recipe = load_recipe(BaseTransformerRecipe, recipe_file) if recipe_file else BaseTransformerRecipe()
    vae = AutoencoderKL.from_pretrained(autoencoder).eval()
    pictures = open_pictures(assets.pictures(), size=256, split="train")
    pipeline = load_pipeline(start) if start else build_pipeline(recipe, vae, pictures.captions)
    pipeline.register_modules(vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=recipe.shift))
    latents = encode(vae, pictures, recipe.size)

    # All of it is trained but the autoencoder.
    encoders = {"text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2}
    modules: dict[str, nn.Module] = {
        "transformer": pipeline.transformer,
        **encoders,
        "text_encoder_3": pipeline.text_encoder_3,
    }
    for module in modules.values():
        module.train().requires_grad_(True)
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    state = TrainingState(recipe, run, modules, parameters, label="base transformer")

    for step in state.steps():
        indices = batch_indices(len(pictures), recipe.batch_size, seed=recipe.seed, step=step)
        random = generator(recipe.seed, "flow", step)

        clean = latents[indices]
        noise = torch.randn(clean.shape, generator=random)
        sigma = sample_timesteps(len(indices), shift=recipe.shift, generator=random)

        dropped = torch.rand(len(indices), generator=random) < recipe.caption_dropout
        prompts = ["" if drop else pictures.captions[i] for i, drop in zip(indices, dropped, strict=True)]

        with state.autocast(), attention_on(state.device):
            condition = sd3.condition(pipeline, prompts, max_sequence_length=draw_t5_length(recipe.seed, step))
            velocity = sd3.velocity(pipeline.transformer, interpolate(clean, noise, sigma), sigma, condition)
        state.update((velocity.float() - velocity_target(clean, noise)).square().mean())
    with state.ema_weights():
        save_half(pipeline, out)


if __name__ == "__main__":
    typer.run(main)
