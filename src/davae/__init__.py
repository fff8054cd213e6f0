"""Double the resolution of a latent diffusion pipeline at the same token count.

The names below are public and stay. They are looked up on first use, so that `import davae` stays light: it is also
what makes a saved pipeline loadable, because `model_index.json` names its autoencoder `["davae", "AutoencoderDA"]` and
diffusers then looks for that class, and for `ModelMixin`, in this module.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import ModelMixin as ModelMixin

    from davae.backbones import widen_transformer
    from davae.method.flow import detail_weight, scheduled_flow_matching_loss
    from davae.method.losses import channel_group_mean, detail_alignment_loss
    from davae.models.autoencoder_da import AutoencoderDA
    from davae.models.autoencoder_taef2 import AutoencoderTAEF2
    from davae.models.lightningdit import LightningDiT2DModel
    from davae.pipelines.autoencoders import load_autoencoder
    from davae.pipelines.class_conditional import ClassConditionalFlowPipeline
    from davae.pipelines.loading import load_pipeline
    from davae.pipelines.upgrade import upgrade
    from davae.training.stage_one_recipe import AutoencoderRecipe
    from davae.training.stage_one_run import train_autoencoder
    from davae.training.stage_two_recipe import FinetuneRecipe
    from davae.training.stage_two_run import finetune

__version__ = "0.1.0"

__all__ = [
    "AutoencoderDA",
    "AutoencoderRecipe",
    "AutoencoderTAEF2",
    "ClassConditionalFlowPipeline",
    "FinetuneRecipe",
    "LightningDiT2DModel",
    "channel_group_mean",
    "detail_alignment_loss",
    "detail_weight",
    "finetune",
    "load_autoencoder",
    "load_pipeline",
    "scheduled_flow_matching_loss",
    "train_autoencoder",
    "upgrade",
    "widen_transformer",
]

_HOME = {
    "AutoencoderDA": "davae.models.autoencoder_da",
    "AutoencoderRecipe": "davae.training.stage_one_recipe",
    "AutoencoderTAEF2": "davae.models.autoencoder_taef2",
    "ClassConditionalFlowPipeline": "davae.pipelines.class_conditional",
    "FinetuneRecipe": "davae.training.stage_two_recipe",
    "LightningDiT2DModel": "davae.models.lightningdit",
    "ModelMixin": "diffusers",
    "channel_group_mean": "davae.method.losses",
    "detail_alignment_loss": "davae.method.losses",
    "detail_weight": "davae.method.flow",
    "finetune": "davae.training.stage_two_run",
    "load_autoencoder": "davae.pipelines.autoencoders",
    "load_pipeline": "davae.pipelines.loading",
    "scheduled_flow_matching_loss": "davae.method.flow",
    "train_autoencoder": "davae.training.stage_one_run",
    "upgrade": "davae.pipelines.upgrade",
    "widen_transformer": "davae.backbones",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'davae' has no attribute '{name}'")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
