"""AuraFlow: one T5 whose padding is zero, learned positions, timestep = sigma."""

import math

from davae.backbones.backbone import Backbone, Condition, LatentPorts, Latents, Model, Sigma, encode_texts


def velocity(transformer: Model, latents: Latents, sigma: Sigma, condition: Condition) -> Latents:
    return transformer(latents, timestep=sigma, **condition, return_dict=False)[0]


BACKBONE = Backbone(
    LatentPorts("pos_embed.proj", "d (c p q)", "proj_out", "(p q c) d"),
    encode_texts("encoder_hidden_states", do_classifier_free_guidance=False),
    velocity,
    # Attention, MLP output and modulation of the image stream.
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ff.out_projection", "norm1.linear"),
    pipelines=("AuraFlowPipeline",),
    learned_positions=True,
    longest_grid=lambda config: math.isqrt(config["pos_embed_max_size"]),  # the number of all positions
    padded_text=True,
    advice="in half precision use bfloat16: in float16 its pipeline asks for a setting that only AutoencoderKL has",
)
