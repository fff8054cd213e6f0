"""DiT: conditions are class numbers, noise and its variance are predicted, one size, timestep 0 to 999."""

from functools import partial

from davae.backbones.backbone import (
    Backbone,
    Condition,
    LatentPorts,
    Latents,
    Model,
    Timestep,
    encode_classes,
    split_variance,
)


def noise(
    transformer: Model, latents: Latents, timestep: Timestep, condition: Condition
) -> tuple[Latents, Latents | None]:
    from diffusers.models.embeddings import LabelEmbedding

    # In training mode the label embeddings would drop classes at random, which `caption_dropout` does already.
    for module in transformer.modules():
        if isinstance(module, LabelEmbedding):
            module.eval()
    return split_variance(transformer(latents, timestep, **condition, return_dict=False)[0], latents.shape[1])


BACKBONE = Backbone(
    LatentPorts("pos_embed.proj", "d c p q", "proj_out_2", "(p q k c) d"),
    partial(encode_classes, class_setting="num_embeds_ada_norm"),
    noise=noise,
    class_setting="num_embeds_ada_norm",  # 1000 in the published models
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "norm1.linear"),
    one_size=True,
    condition_shapes=lambda model, tokens: {"class_labels": ()},
    carried=("labels",),  # the names of the classes
)
