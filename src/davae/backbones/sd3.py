"""Stable Diffusion 3 and 3.5: three text encoders, latents in patches of 2, timestep = 1000 sigma."""

from davae.backbones.backbone import Backbone, Condition, LatentPorts, Latents, Model, Sigma, encode_texts

# Differentiable, so call it without gradients where the text encoders are frozen.
condition = encode_texts(
    "encoder_hidden_states", "", "pooled_projections", prompt_2=None, prompt_3=None, do_classifier_free_guidance=False
)


def velocity(transformer: Model, latents: Latents, sigma: Sigma, condition: Condition) -> Latents:
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
