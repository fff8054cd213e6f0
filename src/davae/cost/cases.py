"""What is timed: one pipeline at one size, taken apart into the work of text encoding, a step, decoding and leaving."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from davae.backbones import Backbone, backbone_of
from davae.cost.geometry import META
from davae.cost.workload import condition_of, counting, decode_flops, in_half, meta
from davae.errors import SettingsError
from davae.method.widen import patch_side
from davae.models.base_autoencoders import downsample_factor
from davae.pipelines.class_conditional import ClassConditionalFlowPipeline
from davae.pipelines.sampling import draw_shared_noise
from davae.seeds import generator

PARTS = ("text", "step", "decode", "to-cpu", "whole")
"""text: the prompts through the text encoders, both of guidance. step: the transformer's work for a guided step in one
call, a batch of 2 for each picture, or of 1 where guidance is an input. decode: the autoencoder's. to-cpu: from decoded
pictures on the device to Pillow's. whole: the stock pipeline, from prompts to Pillow's pictures."""
PROMPT = "a red apple on a wooden table"
GUIDANCE = 4.0
DECODING = ("decoder", "post_quant_conv", "joint_", "detail_upsample")
"""How the names of an autoencoder's parts begin that decode."""


@dataclass(frozen=True)
class Case:
    """One pipeline at one size."""

    name: str
    pipeline: DiffusionPipeline
    size: int
    """Side of the pictures in pixels."""
    batch: int = 1
    """Pictures at a time."""
    steps: int = 28
    """Of the sampler, all guided; only "whole" and what is counted for it depend on them."""
    prompt_tokens: int = 256
    """Length that T5, or what stands in its place, pads to."""
    seed: int = 0
    """Of latents and conditions."""

    @property
    def backbone(self) -> Backbone:
        """The transformer's row of `BACKBONES`."""
        return backbone_of(self.pipeline.transformer)

    @property
    def rows(self) -> int:
        """Of the transformer's batch in a guided step."""
        return self.batch * self.backbone.guided_rows

    @property
    def latent_side(self) -> int:
        """Side of the latents."""
        return self.size // downsample_factor(self.pipeline.vae.config)

    @property
    def tokens(self) -> int:
        """Picture tokens of the transformer."""
        return (self.latent_side // patch_side(self.pipeline.transformer, self.backbone.ports)) ** 2

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """By component name; none in a class-conditional pipeline, or in one that was built without."""
        parts = self.pipeline.components.items()
        return {name: part for name, part in parts if name.startswith("text_encoder") and part is not None}


def sizes_against(candidate: Case, base: DiffusionPipeline) -> list[int]:
    """The sizes at which a base is worth comparing: the same pixels, and the same tokens.

    Only the second for a backbone whose positions fit one token grid.
    """
    factor, base_factor = (downsample_factor(pipeline.vae.config) for pipeline in (candidate.pipeline, base))
    equal_tokens = candidate.size * base_factor // factor
    return [equal_tokens] if candidate.backbone.one_size else list(dict.fromkeys([candidate.size, equal_tokens]))


def parts_of(case: Case, wanted: Sequence[str]) -> list[str]:
    """The wanted parts in the order of `PARTS`; all that the case has if none is named.

    Raises:
        SettingsError: an unknown part, text or the whole of a pipeline without its text encoders, or a size that the
            pipeline cannot make.
    """
    case.backbone.picture_side(case.pipeline, case.size)
    if unknown := [part for part in wanted if part not in PARTS]:
        raise SettingsError(f"part {unknown[0]!r}: allowed are {', '.join(PARTS)}")
    lacking, why = set(), "has no text encoders to time"
    if not case.text_encoders:
        lacking = {"text"} if case.backbone.classes else {"text", "whole"}
    elif not case.backbone.padded_text:
        lacking, why = (
            {"text", "whole"},
            "has a text encoder whose tokens only its tokenizer knows, so none are counted",
        )
    if lacking & set(wanted):
        raise SettingsError(f"{case.name} {why}: leave out {' and '.join(sorted(lacking))}")
    return [part for part in PARTS if part in (wanted or set(PARTS) - lacking)]


def runs_of(case: Case, parts: Sequence[str]) -> dict[str, Callable[[], object]]:
    """A function without arguments for each part; its inputs, random and never zero, are made here, on the device."""
    pipeline, where = case.pipeline, case.pipeline.device
    dtype, batch, rows = pipeline.transformer.dtype, case.batch, case.rows
    pipeline.set_progress_bar_config(disable=True)

    def random(purpose: str, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator(case.seed, purpose)).to(where, dtype)

    channels, side = pipeline.vae.config.latent_channels, case.latent_side
    made: dict[str, Callable[[], object]] = {}
    if "text" in parts:
        prompts = [PROMPT] * batch + [""] * (rows - batch)
        made["text"] = lambda: case.backbone.condition(pipeline, prompts, max_sequence_length=case.prompt_tokens)
    if "step" in parts:
        latents = random("bench latents", rows, channels, side, side)
        sigma = torch.full((rows,), 0.5, device=where, dtype=dtype)
        condition = {  # masks are of ones, and the class is the first but one
            name: random(f"bench {name}", rows, *like.shape[1:])
            if like.is_floating_point()
            else torch.ones(rows, *like.shape[1:], dtype=like.dtype, device=where)
            for name, like in _condition(case, pipeline.transformer).items()
        }
        made["step"] = lambda: case.backbone.predict(pipeline.transformer, latents, sigma, condition)
    if "decode" in parts:
        codes = random("bench codes", batch, channels, side, side)
        made["decode"] = lambda: pipeline.vae.decode(codes, return_dict=False)[0]
    if "to-cpu" in parts:
        pictures = random("bench pictures", batch, 3, case.size, case.size).clamp(-1, 1)
        made["to-cpu"] = lambda: pipeline.image_processor.postprocess(pictures, output_type="pil")
    if "whole" in parts:
        made["whole"] = lambda: _whole(case)
    return made


def _condition(case: Case, transformer: ModelMixin) -> dict[str, Tensor]:
    """Shapes of what the transformer is told of a picture; the CLIPs pad as the pipeline's tokenizers say."""
    clip = case.pipeline.tokenizer_max_length if case.backbone.clip_tokens else 0
    return condition_of(transformer, case.backbone, case.prompt_tokens, clip)


def _whole(case: Case) -> object:
    settings: dict[str, Any] = {"num_inference_steps": case.steps}
    if case.backbone.classes:
        settings |= {"guidance_scale": GUIDANCE, "generator": torch.Generator().manual_seed(case.seed)}
        if isinstance(case.pipeline, ClassConditionalFlowPipeline):
            settings |= {"height": case.size, "width": case.size, "guidance_interval": (0.0, 1.0)}
        return case.pipeline([0] * case.batch, **settings)
    noise = draw_shared_noise(
        case.pipeline, range(case.batch), seed=case.seed, height=case.latent_side, width=case.latent_side
    )
    noise = noise.to(case.pipeline.device, case.pipeline.transformer.dtype)
    told = {
        "noise": noise,
        "height": case.size,
        "width": case.size,
        "guidance_scale": GUIDANCE,
        "prompt_tokens": case.prompt_tokens,
    }
    return case.pipeline(**case.backbone.call_arguments(case.pipeline, [PROMPT] * case.batch, **told), **settings)


def parameters_of(case: Case) -> dict[str, int]:
    """Parameters of transformer, autoencoder and all text encoders."""
    groups = {
        "transformer": [case.pipeline.transformer],
        "autoencoder": [case.pipeline.vae],
        "text encoders": list(case.text_encoders.values()),
    }
    return {name: sum(p.numel() for part in parts for p in part.parameters()) for name, parts in groups.items()}


def weight_bytes(case: Case) -> dict[str, int]:
    """Bytes of the weights that each part must read at least once; the autoencoder's encoder is not the decoder's."""
    vae = case.pipeline.vae
    decoder = [part for name, part in vae.named_children() if name.startswith(DECODING)]
    groups = {"text": list(case.text_encoders.values()), "step": [case.pipeline.transformer], "decode": decoder}
    return {name: sum(p.nbytes for part in parts for p in part.parameters()) for name, parts in groups.items()}


def flops_of(case: Case) -> dict[str, int]:
    """Operations of each part, for all pictures of a batch, counted on models without weights; attention included.

    A multiplication and its addition are two. "whole" is text, all steps and decode.
    """
    pipeline, side = case.pipeline, case.latent_side
    with META:
        transformer = type(pipeline.transformer).from_config(pipeline.transformer.config)
        encoders = [in_half(type(encoder)(encoder.config)) for encoder in case.text_encoders.values()]
    in_half(transformer)
    latents = meta(1, pipeline.vae.config.latent_channels, side, side)
    condition = _condition(case, transformer)
    with torch.no_grad(), counting() as text:
        for encoder in encoders if case.backbone.padded_text else []:
            # A CLIP pads to all of its positions, a T5 to the length that it is told.
            tokens = getattr(encoder.config, "max_position_embeddings", case.prompt_tokens)
            encoder(meta(1, tokens, dtype=torch.long))
    with torch.no_grad(), counting() as step:
        case.backbone.predict(transformer, latents, meta(1), condition)
    found = {
        "text": case.rows * text.flops,
        "step": case.rows * step.flops,
        "decode": case.batch * decode_flops(pipeline.vae, side),
    }
    return {**found, "whole": found["text"] + case.steps * found["step"] + found["decode"]}
