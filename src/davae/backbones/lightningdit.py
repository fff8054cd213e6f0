"""LightningDiT: conditions are class numbers. Its time and sign run the other way, and are turned here."""

from collections.abc import Sequence

from diffusers import DiffusionPipeline, ModelMixin

from davae.backbones.backbone import Backbone, Condition, Latents, Sigma, class_condition
from davae.method.widen import LatentPorts


def null_class(transformer: ModelMixin) -> int:
    """The class number that means no class: the embedding's last row."""
    return transformer.config.num_classes


def condition(pipeline: DiffusionPipeline, labels: Sequence[int]) -> Condition:
    """`class_labels` [B], int64; see `class_condition`."""
    return class_condition(pipeline.transformer, labels, null=null_class(pipeline.transformer))


def velocity(transformer: ModelMixin, latents: Latents, sigma: Sigma, condition: Condition) -> Latents:
    """Predict noise - latents at (1 - sigma) latents + sigma noise; the model's t is 1 - sigma, its sign the other."""
    return -transformer(hidden_states=latents, timestep=1 - sigma, **condition, return_dict=False)[0]


BACKBONE = Backbone(
    LatentPorts("x_embedder.proj", "d c p q", "final_layer.linear", "(p q c) d"),
    condition,
    velocity,
    null_class=null_class,
    one_size=True,
    condition_shapes=lambda model, tokens: {"class_labels": ()},
)
