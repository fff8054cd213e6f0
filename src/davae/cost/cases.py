"""One pipeline at one size, timed and counted in parts: text encoding, a step, decoding, leaving the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from davae.backbones import Backbone, backbone_of
from davae.cost import workload
from davae.cost.geometry import META
from davae.errors import SettingsError
from davae.method.widen import patch_side
from davae.models.base_autoencoders import base_facts, decode_latents, downsample_factor
from davae.pipelines.class_conditional import ClassConditionalFlowPipeline
from davae.pipelines.sampling import draw_shared_noise
from davae.seeds import generator

PARTS = ("text", "step", "decode", "to-cpu", "whole")
"""text: the prompts through the text encoders, both of guidance. step: a guided step's work of the transformer in one
call, a batch of 2 for each image, or of 1 where guidance is an input. decode: the autoencoder's work. to-cpu: from
decoded images on the device to Pillow's. whole: the stock pipeline, from prompts to Pillow's images."""
PROMPT = "a red apple on a wooden table"
GUIDANCE = 4.0
# How the names of an autoencoder's decoding parts begin.
DECODING = ("decoder", "post_quant_conv", "joint_", "detail_upsample")


@dataclass(frozen=True)
class Case:
    """One pipeline at one size."""

    name: str
    pipeline: DiffusionPipeline
    size: int  # side of the images in pixels
    batch: int = 1
    steps: int = 28  # sampling steps, all guided; they matter to "whole" only
    prompt_tokens: int = 256  # length to which the longest text encoder pads
    seed: int = 0  # of latents and conditions

    @property
    def backbone(self) -> Backbone:
        """The transformer's row of `BACKBONES`."""
        return backbone_of(self.pipeline.transformer)

    @property
    def rows(self) -> int:
        """Rows of the transformer's batch in a guided step."""
        return self.batch * self.backbone.guided_rows

    @property
    def latent_side(self) -> int:
        """Side of the latents."""
        return self.size // downsample_factor(self.pipeline.vae.config)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels and sides of an image's latents."""
        return base_facts(self.pipeline.vae.config).latent_channels, self.latent_side, self.latent_side

    @property
    def tokens(self) -> int:
        """Image tokens of the transformer."""
        return (self.latent_side // patch_side(self.pipeline.transformer, self.backbone.ports)) ** 2

    @property
    def text_encoders(self) -> list[nn.Module]:
        """Empty for class-conditional pipelines, and for those that were built without."""
        encoders = []
        for name, part in self.pipeline.components.items():
            if name.startswith("text_encoder") and part is not None:
                encoders.append(part)
        return encoders

    def make_condition(self) -> dict[str, Tensor]:
        """A condition without values; CLIPs pad as the pipeline's own tokenizers do."""
        clip_tokens = self.pipeline.tokenizer_max_length if self.backbone.clip_tokens else 0
        return workload.make_condition(self.pipeline.transformer, self.prompt_tokens, clip_tokens)


def choose_sizes(candidate: Case, base: DiffusionPipeline) -> list[int]:
    """The sizes at which a base is compared: at equal pixels, if its positions allow that, and at equal tokens."""
    factor = downsample_factor(candidate.pipeline.vae.config)
    equal_tokens = candidate.size * downsample_factor(base.vae.config) // factor
    if candidate.backbone.one_size or equal_tokens == candidate.size:
        return [equal_tokens]
    return [candidate.size, equal_tokens]


def choose_parts(case: Case, names: Sequence[str]) -> list[str]:
    """The named parts in the order of `PARTS`, or all parts of the case if none is named."""
    case.backbone.picture_side(case.pipeline, case.size)
    if unknown := sorted(set(names) - set(PARTS)):
        raise SettingsError(f"part {unknown[0]!r}: allowed are {', '.join(PARTS)}")

    # Without text encoders, or with some that cannot be counted, only the other parts are left.
    missing, reason = set(), "has no text encoders to time"
    if not case.text_encoders:
        missing = {"text"} if case.backbone.classes else {"text", "whole"}
    elif not case.backbone.padded_text:
        missing = {"text", "whole"}
        reason = "has a text encoder whose tokens only its tokenizer knows, so none are counted"
    if missing & set(names):
        raise SettingsError(f"{case.name} {reason}: leave out {' and '.join(sorted(missing))}")
    return [part for part in PARTS if part in (names or set(PARTS) - missing)]


def make_runs(case: Case, parts: Sequence[str]) -> dict[str, Callable[[], object]]:
    """A function without arguments for each part. Its inputs are made here on the device, random and never zero."""
    pipeline, device, dtype = case.pipeline, case.pipeline.device, case.pipeline.transformer.dtype
    rows = case.rows
    pipeline.set_progress_bar_config(disable=True)

    def draw(purpose: str, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator(case.seed, purpose)).to(device, dtype)

    runs: dict[str, Callable[[], object]] = {}
    if "text" in parts:
        prompts = [PROMPT] * case.batch + [""] * (rows - case.batch)
        runs["text"] = lambda: case.backbone.condition(pipeline, prompts, max_sequence_length=case.prompt_tokens)

    if "step" in parts:
        latents = draw("bench latents", rows, *case.latent_shape)
        sigma = torch.full((rows,), 0.5, device=device, dtype=dtype)
        condition = {}
        for name, blank in case.make_condition().items():
            shape = (rows, *blank.shape[1:])
            # Masks and class numbers are ones.
            is_real = blank.is_floating_point()
            condition[name] = draw(f"bench {name}", *shape) if is_real else blank.new_ones(shape, device=device)
        runs["step"] = lambda: case.backbone.predict(pipeline.transformer, latents, sigma, condition)

    if "decode" in parts:
        codes = draw("bench codes", case.batch, *case.latent_shape)
        runs["decode"] = lambda: decode_latents(pipeline.vae, codes)

    if "to-cpu" in parts:
        images = draw("bench pictures", case.batch, 3, case.size, case.size).clamp(-1, 1)
        runs["to-cpu"] = lambda: pipeline.image_processor.postprocess(images, output_type="pil")

    if "whole" in parts:
        runs["whole"] = lambda: _sample(case)
    return runs


def _sample(case: Case) -> object:
    """One call of the stock pipeline."""
    pipeline, size = case.pipeline, case.size
    settings: dict[str, Any] = {"num_inference_steps": case.steps, "guidance_scale": GUIDANCE}

    # Classes have no captions, and their pipelines draw the noise themselves.
    if case.backbone.classes:
        if isinstance(pipeline, ClassConditionalFlowPipeline):
            settings |= {"height": size, "width": size, "guidance_interval": (0.0, 1.0)}
        return pipeline([0] * case.batch, generator=torch.Generator().manual_seed(case.seed), **settings)

    side = case.latent_side
    noise = draw_shared_noise(pipeline, range(case.batch), seed=case.seed, height=side, width=side)
    arguments = case.backbone.call_arguments(
        [PROMPT] * case.batch,
        noise=noise.to(pipeline.device, pipeline.transformer.dtype),
        height=size,
        width=size,
        guidance_scale=GUIDANCE,
        prompt_tokens=case.prompt_tokens,
    )
    return pipeline(**arguments, num_inference_steps=case.steps)


def count_part_parameters(case: Case) -> dict[str, int]:
    """Parameters of transformer, autoencoder and all text encoders."""
    return {
        "transformer": workload.count_parameters(case.pipeline.transformer),
        "autoencoder": workload.count_parameters(case.pipeline.vae),
        "text encoders": workload.count_parameters(*case.text_encoders),
    }


def count_weight_bytes(case: Case) -> dict[str, int]:
    """Bytes of the weights that each part must read at least once; decoding does not read the encoder."""
    vae = case.pipeline.vae
    decoder = [part for name, part in vae.named_children() if name.startswith(DECODING)]
    modules = {"text": case.text_encoders, "step": [case.pipeline.transformer], "decode": decoder}
    sizes = {}
    for part, own in modules.items():
        sizes[part] = sum(parameter.nbytes for parameter in nn.ModuleList(own).parameters())
    return sizes


def count_flops(case: Case) -> dict[str, int]:
    """FLOPs of each part for a whole batch, counted on models without weights, attention included.

    A multiplication and its addition count as two. "whole" is text, all steps and decode.
    """
    pipeline = case.pipeline
    with META:
        transformer = type(pipeline.transformer).from_config(pipeline.transformer.config)
    step = workload.count_transformer_flops(transformer, case.latent_shape, case.make_condition())

    # Text encoders that pad, each for one prompt.
    text = 0
    for encoder in case.text_encoders if case.backbone.padded_text else []:
        with META:
            copy = workload.to_half(type(encoder)(encoder.config))
        # A CLIP pads to all of its positions, a T5 to the length that it is told.
        tokens = getattr(encoder.config, "max_position_embeddings", case.prompt_tokens)
        with torch.no_grad(), workload.counting() as work:
            copy(workload.meta(1, tokens, dtype=torch.long))
        text += work.flops

    flops = {
        "text": case.rows * text,
        "step": case.rows * step,
        "decode": case.batch * workload.count_decode_flops(pipeline.vae, case.latent_side),
    }
    return {**flops, "whole": flops["text"] + case.steps * flops["step"] + flops["decode"]}
