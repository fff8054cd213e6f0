"""What differs between transformers: one table, and one small file for each family that can be trained.

To add a family, add its row; `tests/backbones/test_table.py` then checks that its warm start is exact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from davae.backbones import fixed_size, lightningdit, sd3
from davae.errors import SettingsError
from davae.widen import LatentPorts, Transformer, widen_ports


def _ports_only(*arguments: Any, **keywords: Any) -> NoReturn:
    raise SettingsError(
        "this family can be widened and upgraded, but not trained here yet; Stable Diffusion 3 and LightningDiT can"
    )


@dataclass(frozen=True)
class Backbone:
    """All that davae knows of a transformer's family."""

    ports: LatentPorts
    """Where latents enter and leave."""
    condition: Callable[..., dict[str, Tensor]] = _ports_only
    """(pipeline, prompts, ...) -> the keyword arguments that the transformer wants besides latents and time."""
    velocity: Callable[[Any, Tensor, Tensor, dict[str, Tensor]], Tensor] = _ports_only
    """(transformer, latents [B,C+D,h,w], sigma [B] in [0, 1], condition) -> velocity [B,C+D,h,w]."""
    lora_targets: tuple[str, ...] = ()
    """Names of the layers that get LoRA by default, as peft matches them."""
    classes: bool = False
    """Conditions are class numbers, not captions: `condition` is (pipeline, class numbers) -> class_labels [B]."""
    null_class: Callable[[Any], int] = _ports_only
    """(transformer) -> the class number that means none; the classes are those below it. Only with `classes`."""
    picture_side: Callable[[Any, int | None], int] = _ports_only
    """(pipeline, pixels or None for the default) -> side in pixels; raises SettingsError for one it cannot make."""


BACKBONES: dict[str, Backbone] = {
    "SD3Transformer2DModel": Backbone(
        sd3.PORTS, sd3.condition, sd3.velocity, sd3.LORA_TARGETS, picture_side=sd3.picture_side
    ),
    "FluxTransformer2DModel": Backbone(
        LatentPorts("x_embedder", "d (c p q)", "proj_out", "(c p q) d", packed=2),
    ),
    "QwenImageTransformer2DModel": Backbone(
        LatentPorts("img_in", "d (c p q)", "proj_out", "(c p q) d", packed=2),
    ),
    "Flux2Transformer2DModel": Backbone(
        LatentPorts("x_embedder", "d (c p q)", "proj_out", "(c p q) d", packed=2),
    ),
    "SanaTransformer2DModel": Backbone(LatentPorts("patch_embed.proj", "d c p q", "proj_out", "(p q c) d")),
    "PixArtTransformer2DModel": Backbone(LatentPorts("pos_embed.proj", "d c p q", "proj_out", "(p q k c) d")),
    "DiTTransformer2DModel": Backbone(LatentPorts("pos_embed.proj", "d c p q", "proj_out_2", "(p q k c) d")),
    "HunyuanDiT2DModel": Backbone(LatentPorts("pos_embed.proj", "d c p q", "proj_out", "(p q k c) d")),
    "AuraFlowTransformer2DModel": Backbone(LatentPorts("pos_embed.proj", "d (c p q)", "proj_out", "(p q c) d")),
    "CogView4Transformer2DModel": Backbone(LatentPorts("patch_embed.proj", "d (c p q)", "proj_out", "(c p q) d")),
    "Lumina2Transformer2DModel": Backbone(LatentPorts("x_embedder", "d (p q c)", "norm_out.linear_2", "(p q c) d")),
    "ZImageTransformer2DModel": Backbone(
        LatentPorts("all_x_embedder.2-1", "d (p q c)", "all_final_layer.2-1.linear", "(p q c) d", patch=2),
    ),
    "LightningDiT2DModel": Backbone(
        lightningdit.PORTS,
        lightningdit.condition,
        lightningdit.velocity,
        classes=True,
        null_class=lightningdit.null_class,
        picture_side=fixed_size.picture_side,
    ),
}
"""By the class name of the transformer."""


def backbone_of(transformer: ModelMixin) -> Backbone:
    """The row of `BACKBONES` for a transformer.

    Raises:
        SettingsError: if its class is not in the table.
    """
    name = type(transformer).__name__
    if name not in BACKBONES:
        raise SettingsError(f"{name} is of no family that davae knows: {', '.join(BACKBONES)}")
    return BACKBONES[name]


def check_parts(pipeline: DiffusionPipeline) -> None:
    """Refuse a pipeline without a transformer or without an autoencoder.

    Raises:
        SettingsError: one of them is missing.
    """
    if missing := {"vae", "transformer"} - pipeline.components.keys():
        raise SettingsError(
            f"{type(pipeline).__name__} has no {' and no '.join(sorted(missing))}: it cannot be upgraded"
        )


def widen_transformer(transformer: Transformer, *, base_channels: int, detail_channels: int) -> Transformer:
    """Widen a transformer of a known family by `detail_channels` latent channels; see `davae.widen.widen_ports`.

    The result is of the same stock class; on the base channels its output is the base's, on the others zero. All
    tensors but the two ports are shared with `transformer`.

    Raises:
        SettingsError: if the family is unknown, or `base_channels` is not the transformer's.
    """
    ports = backbone_of(transformer).ports
    return widen_ports(transformer, ports, base_channels=base_channels, detail_channels=detail_channels)
