"""DiT: conditions are class numbers, noise and its variance are predicted, one size, timestep 0 to 999."""

from collections.abc import Sequence

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from jaxtyping import Float, Int
from torch import Tensor

from davae.backbones import fixed_size
from davae.backbones.family import Backbone
from davae.backbones.variance import split_variance
from davae.errors import SettingsError
from davae.widen import LatentPorts

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
    null = null_class(pipeline.transformer)
    foreign = [label for label in labels if label not in range(null + 1)]
    if foreign:
        raise SettingsError(f"class {foreign[0]!r}: allowed are 0 to {null - 1}, and {null} for none")
    return {"class_labels": torch.tensor(list(labels), dtype=torch.long, device=pipeline.transformer.device)}


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
