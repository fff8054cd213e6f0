"""LightningDiT: conditions are class numbers; time and sign run the other way there, and are turned here."""

from collections.abc import Sequence

from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from davae.backbones import fixed_size
from davae.backbones.class_labels import class_labels
from davae.backbones.family import Backbone
from davae.method.widen import LatentPorts
from davae.models.lightningdit import LightningDiT2DModel

PORTS = LatentPorts("x_embedder.proj", "d c p q", "final_layer.linear", "(p q c) d")


def null_class(transformer: LightningDiT2DModel) -> int:
    """The class number that means no class: the embedding's last row."""
    return transformer.config.num_classes


def condition(pipeline: DiffusionPipeline, labels: Sequence[int]) -> dict[str, Tensor]:
    """Class numbers as the transformer wants them: `class_labels` [B], int64.

    Raises:
        SettingsError: a number that is no class and not the null class.
    """
    return class_labels(pipeline.transformer, labels, null=null_class(pipeline.transformer))


def velocity(
    transformer: LightningDiT2DModel,
    latents: Float[Tensor, "b latent h w"],
    sigma: Float[Tensor, " b"],
    condition: dict[str, Tensor],
) -> Float[Tensor, "b latent h w"]:
    """Predict noise - latents at (1 - sigma) latents + sigma noise; its t is 1 - sigma, its sign the other."""
    return -transformer(hidden_states=latents, timestep=1 - sigma, **condition, return_dict=False)[0]


BACKBONE = Backbone(
    PORTS, condition, velocity, classes=True, null_class=null_class, picture_side=fixed_size.picture_side
)
