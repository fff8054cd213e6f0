"""What differs between transformers: one table, and one small file for each backbone that can be trained.

To add a backbone, add its row; `tests/backbones/test_table.py` then checks that its warm start is exact.
"""

from collections.abc import Collection

from torch import nn

from davae.backbones import (
    auraflow,
    chroma,
    dit,
    flux,
    flux2,
    krea2,
    lightningdit,
    longcat_image,
    lumina2,
    ovis_image,
    pixart,
    qwen_image,
    sana,
    sd3,
    z_image,
)
from davae.backbones.backbone import Backbone as Backbone
from davae.backbones.backbone import Pipeline
from davae.errors import SettingsError
from davae.method.widen import LatentPorts, Transformer, widen_ports

BUFFERS = ("pos_embed.pos_embed", "running_mean", "running_var", "num_batches_tracked", "detail_mean", "detail_std")

BACKBONES: dict[str, Backbone] = {
    "SD3Transformer2DModel": sd3.BACKBONE,
    "FluxTransformer2DModel": flux.BACKBONE,
    "Flux2Transformer2DModel": flux2.BACKBONE,
    "ChromaTransformer2DModel": chroma.BACKBONE,
    "OvisImageTransformer2DModel": ovis_image.BACKBONE,
    "LongCatImageTransformer2DModel": longcat_image.BACKBONE,
    "Krea2Transformer2DModel": krea2.BACKBONE,
    "QwenImageTransformer2DModel": qwen_image.BACKBONE,
    "QwenImage21Transformer2DModel": Backbone(
        LatentPorts("img_in", "d (c p q)", "proj_out", "(c p q) d"),
        refusal="QwenImage21Pipeline has a downsample factor of 16 in its code, whatever its VAE's is",
    ),
    "SanaTransformer2DModel": sana.BACKBONE,
    "PixArtTransformer2DModel": pixart.BACKBONE,
    "DiTTransformer2DModel": dit.BACKBONE,
    "HunyuanDiT2DModel": Backbone(
        LatentPorts("pos_embed.proj", "d c p q", "proj_out", "(p q k c) d"),
        refusal="HunyuanDiTPipeline computes positions for a downsample factor of 8, whatever its VAE's is",
    ),
    "AuraFlowTransformer2DModel": auraflow.BACKBONE,
    "CogView4Transformer2DModel": Backbone(LatentPorts("patch_embed.proj", "d (c p q)", "proj_out", "(c p q) d")),
    "Lumina2Transformer2DModel": lumina2.BACKBONE,
    "ZImageTransformer2DModel": z_image.BACKBONE,
    "LightningDiT2DModel": lightningdit.BACKBONE,
}
"""By the class name of the transformer."""


def backbone_of(transformer: nn.Module) -> Backbone:
    """The row of `BACKBONES` for a transformer, compiled or not, whose parameters FSDP2 may have spread over ranks."""
    # torch.compile wraps a model; FSDP2 makes a class of its own for it, with FSDP before the name.
    transformer = getattr(transformer, "_orig_mod", transformer)
    return find_backbone(next(kind.__name__ for kind in type(transformer).__mro__ if kind.__name__[:4] != "FSDP"))


def buffer_names(kind: str) -> tuple[str, ...]:
    """Ends of the names of tensors in the weights of a class of models that are no parameters."""
    return () if kind in BACKBONES and BACKBONES[kind].learned_positions else BUFFERS


def find_backbone(name: str) -> Backbone:
    """The row of `BACKBONES` for a class of transformers."""
    if name not in BACKBONES:
        raise SettingsError(
            f"{name} is no backbone that davae knows: {', '.join(BACKBONES)}. To add it, add a row there with the "
            "names and layouts of its two latent ports (docs/backbones.md)"
        )
    return BACKBONES[name]


def check_parts(pipeline: Pipeline) -> None:
    """Refuse a pipeline without an autoencoder or without a transformer of the table."""
    check_part_names(type(pipeline).__name__, {name for name, part in pipeline.components.items() if part is not None})
    backbone_of(pipeline.transformer)


def check_part_names(kind: str, parts: Collection[str]) -> None:
    """Refuse a kind of pipeline without an autoencoder or without a transformer."""
    if missing := {"vae", "transformer"} - set(parts):
        raise SettingsError(
            f"{kind} has no {' and no '.join(sorted(missing))}: it cannot be upgraded. It has "
            f"{', '.join(sorted(parts)) or 'no parts'}; allowed are pipelines with a transformer of "
            f"{', '.join(BACKBONES)}, and a VAE"
        )


def widen_transformer(transformer: Transformer, *, base_channels: int, detail_channels: int) -> Transformer:
    """Widen a transformer by `detail_channels` latent channels; see `davae.method.widen.widen_ports`.

    The result is of the same stock class; on the base channels its output is the base's, on the others zero. All
    tensors but the two ports are shared with `transformer`.

    Raises:
        SettingsError: if it is not in the table, or `base_channels` is not the number of its latent channels.
    """
    ports = backbone_of(transformer).ports
    return widen_ports(transformer, ports, base_channels=base_channels, detail_channels=detail_channels)
