"""Stable Diffusion 3 and 3.5: three text encoders, latents in patches of 2, timestep = 1000 sigma."""

from collections.abc import Sequence

from diffusers import DiffusionPipeline, ModelMixin

from davae.backbones.backbone import Backbone, Condition, LatentPorts, Latents, Sigma


def condition(pipeline: DiffusionPipeline, prompts: Sequence[str], *, max_sequence_length: int = 256) -> Condition:
    """`encoder_hidden_states` [B, 77 + T5 tokens, width] and `pooled_projections` [B, width]."""
    # Differentiable, so call it without gradients where the text encoders are frozen.
    embeds, _, pooled, _ = pipeline.encode_prompt(
        list(prompts), None, None, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
    )
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def velocity(transformer: ModelMixin, latents: Latents, sigma: Sigma, condition: Condition) -> Latents:
    return transformer(hidden_states=latents, timestep=1000 * sigma, **condition, return_dict=False)[0]


BACKBONE = Backbone(
    LatentPorts("pos_embed.proj", "d c p q", "proj_out", "(p q c) d"),
    condition,
    velocity,
    # The reference's: attention, MLP output and modulation of the image stream.
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "norm1.linear"),
    pipelines=("StableDiffusion3Pipeline",),
    longest_grid=lambda config: config.get("pos_embed_max_size") or 0,
    condition_shapes=lambda model, tokens: {
        "encoder_hidden_states": (tokens, model.config.joint_attention_dim),
        "pooled_projections": (model.config.pooled_projection_dim,),
    },
    clip_tokens=77,
    padded_text=True,
)
