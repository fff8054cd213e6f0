"""AutoencoderDA under the names that stock code has for the parts of other autoencoders."""

import copy
from collections.abc import Iterable
from typing import Any

from diffusers import AutoencoderKL
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

ENCODING_PARTS = (
    "detail_encoder",
    "base_encoder",
    "base_quant_conv",
    "detail_quant_conv",
    "detail_downsample",
    "detail_from_base",
)
DECODING_PARTS = ("detail_upsample", "joint_post_quant_conv", "joint_decoder")
"""In the order in which they run."""


class EncodedImages(AutoencoderKLOutput):
    """A posterior; and its mode, as AutoencoderDC and AutoencoderTiny give theirs."""

    @property
    def latent(self) -> Tensor:
        """The mode, [B, C + D, h, w]."""
        return self.latent_dist.mode()

    latents = latent


class StockNames(AttentionMixin):
    """The part of AutoencoderDA that stands where stock code expects another autoencoder."""

    config: Any
    bn: Any
    _modules: dict[str, Any]
    _buffers: dict[str, Any]
    _supports_gradient_checkpointing = True
    _no_split_modules = ("ResnetBlock2D", "BasicTransformerBlock")
    _group_offload_block_modules = (*ENCODING_PARTS, *DECODING_PARTS)

    # For diffusers' older class of attention, as in AutoencoderKL.
    fuse_qkv_projections = AutoencoderKL.fuse_qkv_projections
    unfuse_qkv_projections = AutoencoderKL.unfuse_qkv_projections

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse modules that would never run, and compiled ones, which save their weights under other names."""
        parts = (*ENCODING_PARTS, *DECODING_PARTS, "bn")
        if isinstance(value, nn.Module) and name not in parts:
            raise ValueError(
                f"{name} = {type(value).__name__}: an AutoencoderDA does not run it. Its parts are {', '.join(parts)}. "
                "Compile them in place, as in vae.joint_decoder.compile()"
            )
        if isinstance(value, nn.Module) and hasattr(value, "_orig_mod"):
            raise ValueError(
                f"{name} = torch.compile(...): its weights would be saved under names that nothing loads. Compile it "
                f"in place: vae.{name}.compile()"
            )
        if name.startswith("tile_") and not hasattr(type(self), name):
            raise ValueError(f"{name}: an AutoencoderDA does not read it; give a tile's sides to enable_tiling(...)")
        super().__setattr__(name, value)

    @property
    def downsample_factor(self) -> int:
        """Side of the image / side of the latents: s * f."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    spatial_compression_ratio = downsample_factor  # as AutoencoderDC and AutoencoderKLQwenImage call it

    @property
    def encoder(self) -> Any:
        """The encoding half alone, under the name that other autoencoders have for theirs; it shares the weights."""
        return self._take_half(ENCODING_PARTS)

    @property
    def decoder(self) -> Any:
        """The decoding half alone; it shares the weights, too."""
        return self._take_half(DECODING_PARTS)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile each part in place, also of a half: `encode` and `decode` run them, and not `forward`."""
        for part in self._modules.values():
            if part is not None:
                part.compile(*args, **kwargs)

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """As every model's, but the statistics in `bn` stay in memory, because FLUX.2's pipelines read them there."""
        statistics = {} if self.bn is None else {name: buffer.clone() for name, buffer in self.bn._buffers.items()}
        super().enable_group_offload(*args, **kwargs)  # type: ignore[misc]
        if self.bn is not None:
            self.bn._buffers.update(statistics)

    def _take_half(self, parts: Iterable[str]) -> Any:
        # The modules that a half lacks are None there, behind those that it has.
        present = {name: self._modules[name] for name in parts if name in self._modules}
        half = copy.copy(self)
        half._modules = present | dict.fromkeys(name for name in self._modules if name not in present)
        half._buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        return half
