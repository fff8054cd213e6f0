"""DiT: conditions are class numbers, noise and its variance are predicted, one size, timestep 0 to 999."""

from collections.abc import Sequence

from diffusers import DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from jaxtyping import Float, Int
from torch import Tensor

from davae.backbones import fixed_size
from davae.backbones.class_labels import class_labels
from davae.backbones.family import Backbone
from davae.backbones.variance import split_variance
from davae.method.widen import LatentPorts

PORTS = LatentPorts("pos_embed.proj", "d c p q", "proj_out_2", "(p q k c) d")

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "norm1.linear")


def null_class(transformer: DiTTransformer2DModel) -> int:
    """The class number that means no class: the embedding's last row, 1000 in the published models."""
    return transformer.config.num_embeds_ada_norm


def condition(pipeline: DiTPipeline, labels: Sequence[int]) -> dict[str, Tensor]:
    """Class numbers as the transformer wants them: `class_labels` [B], int64.

    Raises:
        SettingsError: a number that is no class and not the null class.
    """
    return class_labels(pipeline.transformer, labels, null=null_class(pipeline.transformer))


def noise(
    transformer: DiTTransformer2DModel,
    latents: Float[Tensor, "b latent h w"],
    timestep: Int[Tensor, " b"],
    condition: dict[str, Tensor],
) -> tuple[Float[Tensor, "b latent h w"], Float[Tensor, "b latent h w"] | None]:
    """Predict the noise in latents at `timestep`, and its variance where that is learned.

    The label embeddings are put into evaluation mode: in training they would drop classes at random, which the recipe's
    `caption_dropout` does already.
    """
    for module in transformer.modules():
        if isinstance(module, LabelEmbedding):
            module.eval()
    return split_variance(transformer(latents, timestep, **condition, return_dict=False)[0], latents.shape[1])


BACKBONE = Backbone(
    PORTS,
    condition,
    noise=noise,
    lora_targets=LORA_TARGETS,
    classes=True,
    null_class=null_class,
    picture_side=fixed_size.picture_side,
)
