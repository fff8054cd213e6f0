"""Double the resolution of a latent diffusion pipeline at the same token count.

The names below are public and stay. They are looked up on first use, so that `import davae` stays light: it is also
what makes a saved pipeline loadable, because `model_index.json` names its autoencoder `["davae", "AutoencoderDA"]` and
diffusers then looks for that class, and for `ModelMixin`, in this module.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import ModelMixin as ModelMixin

    from davae.autoencoder_da import AutoencoderDA
    from davae.autoencoder_taef2 import AutoencoderTAEF2
    from davae.backbones import widen_transformer
    from davae.class_conditional import ClassConditionalFlowPipeline
    from davae.flow import detail_weight, scheduled_flow_matching_loss
    from davae.lightningdit import LightningDiT2DModel
    from davae.losses import channel_group_mean, detail_alignment_loss
    from davae.upgrade import load_pipeline, upgrade

__version__ = "0.1.0"

__all__ = [
    "AutoencoderDA",
    "AutoencoderTAEF2",
    "ClassConditionalFlowPipeline",
    "LightningDiT2DModel",
    "channel_group_mean",
    "detail_alignment_loss",
    "detail_weight",
    "load_pipeline",
    "scheduled_flow_matching_loss",
    "upgrade",
    "widen_transformer",
]

_HOME = {
    "AutoencoderDA": "davae.autoencoder_da",
    "AutoencoderTAEF2": "davae.autoencoder_taef2",
    "ClassConditionalFlowPipeline": "davae.class_conditional",
    "LightningDiT2DModel": "davae.lightningdit",
    "ModelMixin": "diffusers",
    "channel_group_mean": "davae.losses",
    "detail_alignment_loss": "davae.losses",
    "detail_weight": "davae.flow",
    "load_pipeline": "davae.upgrade",
    "scheduled_flow_matching_loss": "davae.flow",
    "upgrade": "davae.upgrade",
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


class _Package(ModuleType):
    """Keeps `davae.upgrade` the function: importing the submodule of that name would bind the module over it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
