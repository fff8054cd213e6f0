"""DiT: conditions are class numbers, noise and its variance are predicted, one size, timestep 0 to 999."""

from collections.abc import Sequence

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.embeddings import LabelEmbedding

from davae.backbones.backbone import Backbone, Condition, Latents, Timestep, class_condition, split_variance
from davae.method.widen import LatentPorts


def null_class(transformer: ModelMixin) -> int:
    """The class number that means no class: the embedding's last row, 1000 in the published models."""
    return transformer.config.num_embeds_ada_norm


def condition(pipeline: DiffusionPipeline, labels: Sequence[int]) -> Condition:
    """`class_labels` [B], int64; see `class_condition`."""
    return class_condition(pipeline.transformer, labels, null=null_class(pipeline.transformer))


def noise(
    transformer: ModelMixin, latents: Latents, timestep: Timestep, condition: Condition
) -> tuple[Latents, Latents | None]:
    """Predict the noise in latents at `timestep`, and its variance where that is learned."""
    # In training mode the label embeddings would drop classes at random, which `caption_dropout` does already.
    for module in transformer.modules():
        if isinstance(module, LabelEmbedding):
            module.eval()
    return split_variance(transformer(latents, timestep, **condition, return_dict=False)[0], latents.shape[1])


BACKBONE = Backbone(
    LatentPorts("pos_embed.proj", "d c p q", "proj_out_2", "(p q k c) d"),
    condition,
    noise=noise,
    null_class=null_class,
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "norm1.linear"),
    one_size=True,
    condition_shapes=lambda model, tokens: {"class_labels": ()},
    carried=("labels",),  # the names of the classes
)
