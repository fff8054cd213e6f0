"""AutoencoderDA: a frozen base autoencoder with a detail encoder beside it and a joint decoder behind both."""

import copy
import inspect
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from davae.models.base_autoencoders import BaseAutoencoder, base_facts, find_base
from davae.models.construction import DOWNSAMPLE_FILTERS, check_settings, refuse_newer, start_from
from davae.models.detail_blocks import DetailDownsample, DetailUpsample
from davae.models.latent_statistics import LatentStatistics, measure_channels
from davae.models.precision import at_least_float32
from davae.models.slim_decoder import slim_decoder
from davae.models.stock_names import EncodedImages, StockNames
from davae.models.tiling import TileSettings, decode_pixels, run_in_pieces

DETERMINISTIC = -30.0
"""Log-variance of the base latents: the floor of diffusers' Gaussian, a standard deviation of 3e-7."""


class AutoencoderDA(StockNames, TileSettings, LatentStatistics, ModelMixin, AutoencoderMixin, ConfigMixin):
    """Base latents of the image at 1/s of its size, and detail latents of the image itself, on one grid.

    Images are [B, 3, H, W] in [-1, 1], H and W multiples of s * f (resolution factor, base downsample factor);
    latents are [B, C + D, H / (s f), W / (s f)], base first. A stock pipeline brings them to the transformer's units
    with the base's own two scalars, (latents - shift_factor) * scaling_factor. In units each detail channel has mean 0
    and deviation 1, by statistics in two buffers; where the base has `latents_mean` and `latents_std`, its half is
    (z - mean) / std * scaling_factor. Networks, losses and the methods below see both halves *before standardisation*.

    Args:
        base_config: the config of the base autoencoder, which may be an AutoencoderDA: an upgrade of an upgrade.
        base_channels: C, the base's latent channels; 0 if all latents are the detail encoder's: no base half.
        detail_channels: D, a multiple of the base's latent channels.
        latent_channels: C + D; img2img pipelines read it.
        block_out_channels: the base's, with one entry more for s = 2, two for s = 4: stock pipelines count it.
        resolution_factor: s, 2 or 4.
        base_downsample: the filter that makes the base image, a key of `DOWNSAMPLE_FILTERS`.
        scaling_factor: the base's, as in diffusers; like `shift_factor`, which is 0 where the base has none.
        linear_blocks: whether the two new blocks work on latents through 1x1 shortcuts (the closed-form start);
            otherwise they skip the base's last encoder and first decoder layer, as in the paper.
        base_in_detail: whether a 1x1 convolution of the base latents is added to the detail latents' mean.
        encoder_block_out_channels: `block_out_channels` again, for SANA's pipelines; see `BaseAutoencoder.contract`.
        z_dim: `latent_channels` again, for Qwen-Image's pipelines, as `latents_mean` and `latents_std`: zeros and ones.
        batch_norm_eps: of `bn`, the base's statistics of 2x2 patches of latents, which FLUX.2's pipelines read.
        decoder_block_out_channels: widths of a slim joint decoder, the outermost stage first; None for the base's.
        decoder_layers_per_block: residual blocks of each of its stages less one; None for the base's.
    """

    @register_to_config
    def __init__(
        self,
        base_config: dict,
        base_channels: int,
        detail_channels: int,
        latent_channels: int,
        block_out_channels: tuple[int, ...] | list[int],
        resolution_factor: int = 2,
        base_downsample: str = "bicubic-antialias",
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        linear_blocks: bool = True,
        base_in_detail: bool = False,
        encoder_block_out_channels: tuple[int, ...] | list[int] | None = None,
        z_dim: int | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        batch_norm_eps: float | None = None,
        decoder_block_out_channels: tuple[int, ...] | list[int] | None = None,
        decoder_layers_per_block: tuple[int, ...] | list[int] | None = None,
    ) -> None:
        super().__init__()
        check_settings(self.config)

        # The base's architecture; `from_base` or a state dict brings its weights.
        self._build_from_base(self.base.load_class().from_config(dict(base_config)))

        # Statistics that bring the latents to the transformer's units.
        self.register_buffer("detail_mean", torch.zeros(detail_channels))
        self.register_buffer("detail_std", torch.ones(detail_channels))
        self.bn: nn.BatchNorm2d | None = None
        if batch_norm_eps is not None:
            self.bn = nn.BatchNorm2d(4 * latent_channels, eps=batch_norm_eps, affine=False)
            self.bn.running_var.fill_(1 - batch_norm_eps)  # standardising then leaves detail latents as they are
        if z_dim is not None:
            self.temperal_downsample = [False] * (len(block_out_channels) - 1)  # stock pipelines count it

    def _build_from_base(self, vae: ModelMixin) -> None:
        """The parts with weights, in the order of the state dict and of an optimiser's states."""
        config, linear = self.config, self.config.linear_blocks
        s, base_channels, detail_channels = config.resolution_factor, config.base_channels, config.detail_channels
        quant_conv = getattr(vae, "quant_conv", None)

        # Two encoders, the base's frozen; and the base's decoder, or a slim one.
        self.detail_encoder = copy.deepcopy(vae.encoder)
        self.base_encoder = vae.encoder.requires_grad_(False).eval() if base_channels else None
        self.base_quant_conv = quant_conv if base_channels else None
        self.detail_quant_conv = copy.deepcopy(quant_conv) if linear else None
        if self.base_quant_conv is not None:
            self.base_quant_conv.requires_grad_(False)
        self.joint_post_quant_conv = getattr(vae, "post_quant_conv", None) if linear else None
        self.joint_decoder = slim_decoder(
            vae.decoder, vae.config, config.decoder_block_out_channels, config.decoder_layers_per_block
        )

        # The two new blocks read and write latents of the full image, or skip the layers that make and take them.
        into_down = out_of_up = base_facts(vae.config).latent_channels
        if not linear:
            assert self.base.drop_latent_layers is not None, "check_settings has seen to it"
            into_down, out_of_up = self.base.drop_latent_layers(self.detail_encoder, self.joint_decoder)
        self.detail_downsample = DetailDownsample(into_down, 2 * detail_channels, factor=s, linear_shortcut=linear)
        self.detail_upsample = DetailUpsample(config.latent_channels, out_of_up, factor=s, linear_shortcut=linear)
        self.detail_from_base: nn.Conv2d | None = None
        if config.base_in_detail:
            self.detail_from_base = nn.Conv2d(base_channels, detail_channels, 1, bias=False)

    @classmethod
    def from_base(
        cls,
        vae: ModelMixin,
        *,
        detail_channels: int,
        resolution_factor: int = 2,
        base_downsample: str = "bicubic-antialias",
        linear_blocks: bool = True,
        all_new: bool = False,
        base_in_detail: bool = False,
    ) -> "AutoencoderDA":
        """An untrained AutoencoderDA on a pretrained autoencoder, whose weights all three of its parts start from.

        With `linear_blocks` the decoder sees the base latents, each repeated on s x s positions, and no detail latents,
        until `fit_closed_form` or training sets them; without, the new blocks start as in the paper, the 3x3
        convolutions at random. With `all_new` there is no base half: the detail encoder makes all `detail_channels`
        latents, and with linear blocks the full image's latents, averaged over s x s positions, stand for the base's.

        Raises:
            ValueError: an autoencoder of another class, or `detail_channels` no multiple of the base's channels.
        """
        name = type(vae).__name__
        base, facts = find_base(name), base_facts(vae.config)
        settings = inspect.signature(type(vae).__init__).parameters.keys() & vae.config.keys()
        base_channels = 0 if all_new else facts.latent_channels
        stages = facts.stages + (resolution_factor.bit_length() - 1) * facts.stages[-1:]

        autoencoder = cls(
            base_config={"_class_name": name, **{setting: vae.config[setting] for setting in sorted(settings)}},
            base_channels=base_channels,
            detail_channels=detail_channels,
            latent_channels=base_channels + detail_channels,
            block_out_channels=stages,
            resolution_factor=resolution_factor,
            base_downsample=base_downsample,
            scaling_factor=facts.scaling_factor,
            shift_factor=facts.shift_factor,
            linear_blocks=linear_blocks,
            base_in_detail=base_in_detail,
            **base.contract(vae.config, base_channels + detail_channels, stages),
        )
        start_from(autoencoder, vae)
        nn.Module.to(autoencoder, dtype=vae.dtype, device=vae.device)  # diffusers' own `to` warns without a reason
        return autoencoder.train(vae.training)

    @classmethod
    def from_config(cls, config: dict, return_unused_kwargs: bool = False, **kwargs: object) -> "AutoencoderDA":
        """As every model's, but a setting of a newer version is a ValueError, where others ignore it."""
        refuse_newer(cls, config)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def base_picture(self, sample: Tensor) -> Tensor:
        """The image at 1/s of its size, [B, 3, H/s, W/s], in [-1, 1] except with the filter "bicubic-unclamped"."""
        small = F.interpolate(
            at_least_float32(sample),  # CPUs cannot filter in less
            scale_factor=1 / self.config.resolution_factor,
            mode="bicubic",
            align_corners=False,
            antialias=DOWNSAMPLE_FILTERS[self.config.base_downsample],
        )
        if self.config.base_downsample != "bicubic-unclamped":
            small = small.clamp(-1, 1)
        return small.to(sample.dtype)

    @torch.no_grad()
    def encode_base(self, sample: Tensor) -> Tensor:
        """Base latents of the small image before standardisation, [B, C, h, w]: the posterior's mode, no gradient."""
        if self.base_encoder is None:
            height, width = sample.shape[-2] // self.downsample_factor, sample.shape[-1] // self.downsample_factor
            return sample.new_zeros(len(sample), 0, height, width)
        return self.encode_pretrained(self.base_picture(sample))

    def encode_pretrained(self, sample: Tensor) -> Tensor:
        """The base encoder on an image as it is, scaled as by `encode_base`: [B, base's channels, H / f, W / f]."""
        if self.base_encoder is None:  # all new: the detail encoder is the base's until it is trained
            return self._encode_linear(sample)
        return self.to_units(self.base.encode(self.base_encoder, self.base_quant_conv, sample))

    def _encode_linear(self, sample: Tensor) -> Tensor:
        return self.to_units(self.base.encode(self.detail_encoder, self.detail_quant_conv, sample))

    def encode_detail(self, sample: Tensor, base: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the detail latents before standardisation, each [B, D, h, w].

        With `base_in_detail` the base latents are needed; give them as `base` where they are known already.
        """
        if self.config.linear_blocks:
            hidden = self._encode_linear(sample)
        else:
            hidden = self.base.run_encoder(self.detail_encoder, sample)

        # Space to channel, onto the base's grid: mean and log-variance of the posterior.
        mean, log_variance = self.detail_downsample(hidden).chunk(2, dim=1)
        if self.detail_from_base is not None:
            mean = mean + self.detail_from_base(self.encode_base(sample) if base is None else base)
        return mean, log_variance.clamp(-30.0, 20.0)

    def reconstruct(self, base: Tensor, detail: Tensor) -> Tensor:
        """The joint decoder: base and detail latents, both before standardisation -> [B, 3, H, W]."""
        hidden = self.detail_upsample(torch.cat([base, detail], dim=1))
        return self.decode_full(hidden) if self.config.linear_blocks else decode_pixels(self, hidden, None)

    def decode_full(self, latents: Tensor) -> Tensor:
        """The joint decoder behind its first block: latents of the full image before standardisation -> [B, 3, H, W].

        Before training this is the base autoencoder's own decoder. Only with linear blocks.
        """
        return decode_pixels(self, self.base.saturate(self.from_units(latents)), self.joint_post_quant_conv)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> EncodedImages | tuple[DiagonalGaussianDistribution]:
        """Posterior over the C + D latents; the base half is deterministic.

        Raises:
            ValueError: several frames, no batch of floats, or a side that is no multiple of the downsample factor.
        """
        frames, x = x.ndim == 5, self._check_sample(_single_frame(x))
        channels = 2 * self.config.latent_channels
        moments = run_in_pieces(self, self._encode_moments, x, channels=channels, up=1, down=self.downsample_factor)
        posterior = DiagonalGaussianDistribution(moments.unsqueeze(2) if frames else moments)
        return EncodedImages(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Images [B, 3, H, W], about [-1, 1], of latents [B, C + D, h, w]; `generator` is unused, as in diffusers.

        Raises:
            ValueError: several frames, or other channels than C + D.
        """
        frames, z = z.ndim == 5, _single_frame(z)
        c, d = self.config.base_channels, self.config.detail_channels
        if z.shape[1] != c + d:
            raise ValueError(f"latents of {z.shape[1]} channels; this decoder reads {c + d} ({c} base + {d} detail).")

        sample = run_in_pieces(self, self._decode_latents, z, channels=3, up=self.downsample_factor, down=1)
        sample = sample.unsqueeze(2) if frames else sample
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode, with the posterior's mode or a sample of it."""
        posterior = self.encode(sample).latent_dist
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode(), return_dict)

    def split(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Base and detail half of the channel axis, in the units of `latents`."""
        return latents[:, : self.config.base_channels], latents[:, self.config.base_channels :]

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Measure mean and deviation of every detail channel over batches of images, in float64, and keep them.

        Raises:
            ValueError: no batches, images that `encode` refuses, or a channel that does not vary or is not finite.
        """
        images = (self._check_sample(batch).to(self.device, self.dtype) for batch in batches)
        mean, deviation = measure_channels(self.encode_detail(image)[0] for image in images)
        self.detail_mean.copy_(mean)
        self.detail_std.copy_(deviation)

    def detail_parameters(self) -> list[nn.Parameter]:
        """What stage 1 trains: detail encoder, joint decoder and the two new blocks; not the base encoder."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @property
    def base(self) -> BaseAutoencoder:
        """The row of this base in the table."""
        return find_base(self.config.base_config["_class_name"])

    def train(self, mode: bool = True) -> "AutoencoderDA":
        """Training mode for all but the frozen base encoder."""
        super().train(mode)
        if self.base_encoder is not None:
            self.base_encoder.eval()
        return self

    def _encode_moments(self, sample: Tensor) -> Tensor:
        base = self.encode_base(sample)
        base, mean, log_variance = self._to_outside(base, *self.encode_detail(sample, base))
        return torch.cat([base, mean, torch.full_like(base, DETERMINISTIC), log_variance], dim=1)

    def _decode_latents(self, latents: Tensor) -> Tensor:
        return self.reconstruct(*self._to_inside(*self.split(latents)))

    def _check_sample(self, sample: Tensor) -> Tensor:
        if sample.ndim != 4 or not sample.is_floating_point():
            raise ValueError(f"images {list(sample.shape)} of {sample.dtype}: give floats [B, 3, H, W] in [-1, 1].")
        height, width = sample.shape[-2:]
        if height % self.downsample_factor or width % self.downsample_factor:
            raise ValueError(
                f"an image of {width}x{height} px: both sides must be multiples of {self.downsample_factor}, the "
                "downsample factor. Crop or resize it."
            )
        return sample


def _single_frame(tensor: Tensor) -> Tensor:
    """The one frame of a video [B, channels, 1, height, width], or an image as it is."""
    if tensor.ndim == 5 and tensor.shape[2] != 1:
        raise ValueError(f"a video of {tensor.shape[2]} frames: this autoencoder is for images, one frame.")
    return tensor.squeeze(2) if tensor.ndim == 5 else tensor


if __name__ == "davae.models.autoencoder_da":
    # model_index.json stores the module path: "davae" is the frozen public one (docs/formats.md).
    AutoencoderDA.__module__ = "davae"
