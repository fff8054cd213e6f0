"""AutoencoderDA: a frozen base autoencoder with a detail encoder beside it and a joint decoder behind both.

Imports torch, diffusers and other files of this folder only, so that these files can lie beside weights.
"""

import copy
import inspect
from collections.abc import Callable, Iterable
from math import lcm

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import (
    AutoencoderMixin,
    DecoderOutput,
    DecoderTiny,
    DiagonalGaussianDistribution,
)
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from davae.models.base_autoencoders import (
    LINEAR_ONLY,
    base_class,
    base_facts,
    contract,
    decode_pixels,
    drop_latent_layers,
    encode_mode,
    features,
    refuse_newer,
)
from davae.models.blended_tiles import blended_tiles
from davae.models.detail_blocks import DetailDownsample as DetailDownsample  # public names of this file
from davae.models.detail_blocks import DetailUpsample as DetailUpsample
from davae.models.slim_decoder import slim_decoder
from davae.models.tiled_decoder import can_decode_tiles, decode_tiles

DOWNSAMPLE_FILTERS = {"bicubic": False, "bicubic-antialias": True, "bicubic-unclamped": False}
"""`base_downsample` of the config -> torch's `antialias`.

The reference code for SD3 uses "bicubic"; its code for ImageNet "bicubic-unclamped", whose picture may leave [-1, 1].
"""
DETERMINISTIC = -30.0
"""Log-variance of the base latents: the floor of diffusers' Gaussian, a standard deviation of 3e-7."""
RESOLUTION_FACTORS = (2, 4)
DECODING = ("detail_upsample", "joint_post_quant_conv", "joint_decoder")
"""Parts that only decode, in the order in which they run. The others only encode."""


class AutoencoderDA(ModelMixin, AutoencoderMixin, ConfigMixin):
    """Base latents of the picture at 1/s of its size, and detail latents of the picture itself, on one grid.

    Pictures are [B, 3, H, W] in [-1, 1], H and W multiples of s * f (resolution factor, base downsample factor);
    latents are [B, C + D, H / (s f), W / (s f)], base first. A stock pipeline brings them to the transformer's unit
    scale with the base's own two scalars, (latents - shift_factor) * scaling_factor; below, "units" are those.
    Per-channel statistics of the detail latents live in two buffers, so that in units each has mean 0 and deviation 1.
    Those of the base latents, where the base has any, are its own `latents_mean` and `latents_std`, and the base half
    in units is (z - mean) / std * scaling_factor. Networks, losses and the methods below see both halves *before
    standardisation*: without statistics of the base, its half is then in units.

    Args:
        base_config: the config of the base autoencoder; it may hold diffusers' `latents_mean` and `latents_std`, C
            numbers each, or None. An AutoencoderDA can be the base of another: its C + D latents, standardised, are
            then the base latents.
        base_channels: C, the base's latent channels; 0 if all latents are the detail encoder's own ("full" in the
            reference code): then there is no base encoder, no base half and no alignment.
        detail_channels: D, a multiple of the base's latent channels.
        latent_channels: C + D; img2img pipelines read it.
        block_out_channels: the base's, with one entry more for s = 2, two for s = 4; stock pipelines count it to find
            the downsample factor.
        resolution_factor: s, 2 or 4.
        base_downsample: the filter that makes the base picture, a key of DOWNSAMPLE_FILTERS.
        scaling_factor: the base's, as in diffusers.
        shift_factor: the base's, as in diffusers; 0 where the base has none.
        linear_blocks: the two new blocks work on latents through 1x1 shortcuts (the closed-form start), and the base's
            last encoder and first decoder layers stay; otherwise both are skipped, as in the paper.
        base_in_detail: a 1x1 convolution of the base latents is added to the detail latents' mean, so that these can
            hold the base's exactly (the codes "base added" and "zero sum" of the closed-form start).
        encoder_block_out_channels: `block_out_channels` again, for SANA's pipelines; None for others. This and what
            follows is `autoencoder_bases.contract`.
        z_dim: `latent_channels` again, for Qwen-Image's pipelines, which also give and take pictures and latents as
            videos of one frame, [B, channels, 1, height, width].
        latents_mean: C + D zeros, for Qwen-Image's pipelines: `encode` standardises by itself.
        latents_std: C + D ones, likewise.
        batch_norm_eps: of `bn`, which FLUX.2's pipelines read: the base's statistics of 2x2 patches of latents, and for
            the detail latents mean 0 and variance 1.
        decoder_block_out_channels: the joint decoder's stages, the outermost first as in `block_out_channels`; None for
            the base's. This and the next are `slim_decoder`'s.
        decoder_layers_per_block: residual blocks of each of them less one; None for the base's.
    """

    _supports_gradient_checkpointing = False
    _group_offload_block_modules = (
        "base_encoder",
        "base_quant_conv",
        "detail_encoder",
        "detail_quant_conv",
        "detail_downsample",
        "detail_from_base",
        *DECODING,
    )

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
        _check_settings(base_config, base_channels, detail_channels, resolution_factor, base_downsample)
        if base_in_detail and not base_channels:
            raise ValueError("base_in_detail=True: with base_channels=0 (all_new) there are no base latents to add.")
        base = base_class(base_config["_class_name"]).from_config(dict(base_config))
        quant_conv = getattr(base, "quant_conv", None)
        self.detail_encoder = copy.deepcopy(base.encoder)
        self.base_encoder = base.encoder.requires_grad_(False).eval() if base_channels else None
        self.base_quant_conv = quant_conv if base_channels else None
        self.detail_quant_conv = copy.deepcopy(quant_conv) if linear_blocks else None
        self.joint_post_quant_conv = getattr(base, "post_quant_conv", None) if linear_blocks else None
        widths, depths = decoder_block_out_channels, decoder_layers_per_block
        self.joint_decoder = slim_decoder(base.decoder, base.config, widths, depths)
        if self.base_quant_conv is not None:
            self.base_quant_conv.requires_grad_(False)
        into_down = out_of_up = base_facts(base.config).latent_channels
        if not linear_blocks:
            if base_config["_class_name"] in LINEAR_ONLY:
                raise ValueError(f"linear_blocks=False: a {base_config['_class_name']} is upgraded with True only.")
            into_down, out_of_up = drop_latent_layers(self.detail_encoder, self.joint_decoder)
        s, linear = resolution_factor, linear_blocks
        self.detail_downsample = DetailDownsample(into_down, 2 * detail_channels, factor=s, linear_shortcut=linear)
        self.detail_upsample = DetailUpsample(latent_channels, out_of_up, factor=s, linear_shortcut=linear)
        self.detail_from_base = nn.Conv2d(base_channels, detail_channels, 1, bias=False) if base_in_detail else None
        self.register_buffer("detail_mean", torch.zeros(detail_channels))
        self.register_buffer("detail_std", torch.ones(detail_channels))
        self.bn: nn.BatchNorm2d | None = None
        if batch_norm_eps is not None:
            self.bn = nn.BatchNorm2d(4 * latent_channels, eps=batch_norm_eps, affine=False)
            self.bn.running_var.fill_(1 - batch_norm_eps)  # so that standardising leaves detail latents as they are
        if z_dim is not None:
            self.temperal_downsample = [False] * (len(block_out_channels) - 1)  # stock pipelines count it
        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_size = 1024
        """Side of a tile in pixels of the picture; pictures no larger are never tiled."""
        self.tile_overlap = 0.25
        """Part of a tile's side that it shares with its neighbour and that is feathered: in encoding, and in decoding
        with AutoencoderTiny's decoder. AutoencoderKL's needs none: its tiles are exact: `tiled_decoder`."""
        self.tile_storage: torch.device | str = "cpu"
        """Where the layers of the whole picture lie while AutoencoderKL's decoder goes over tiles of them."""

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

        With `linear_blocks` the latents of the full picture are replaced by the base latents, each repeated on s x s
        positions, and the detail latents have no effect, until `closed_form.fit_closed_form` or training sets them;
        without, the new blocks start as in the paper, the 3x3 convolutions at random.
        With `all_new` there is no base half: the detail encoder makes all `detail_channels` latents, and with linear
        blocks the full picture's latents, averaged over s x s positions, stand where the base latents stood.
        With an AutoencoderDA for `vae` this is the upgrade of an upgrade: all that `vae` encodes is the base.

        Raises:
            ValueError: an autoencoder of another class, or `detail_channels` no multiple of the base's channels.
        """
        base_class(type(vae).__name__)
        facts = base_facts(vae.config)
        settings = inspect.signature(type(vae).__init__).parameters.keys() & vae.config.keys()
        base_channels = 0 if all_new else facts.latent_channels
        stages = facts.stages + (resolution_factor.bit_length() - 1) * facts.stages[-1:]
        autoencoder = cls(
            base_config={"_class_name": type(vae).__name__, **{name: vae.config[name] for name in sorted(settings)}},
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
            **contract(vae.config, latent_channels=base_channels + detail_channels, stages=stages),
        )
        autoencoder._start_from(vae)
        nn.Module.to(autoencoder, dtype=vae.dtype, device=vae.device)  # diffusers' own `to` warns without a reason
        return autoencoder.train(vae.training)

    @classmethod
    def from_config(cls, config: dict, return_unused_kwargs: bool = False, **kwargs: object) -> "AutoencoderDA":
        """As every model's, but a setting of a newer version is a ValueError, where others ignore it."""
        refuse_newer(cls, config)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    # ------------------------------------------------------------------------------------------ the method

    def base_picture(self, sample: Tensor) -> Tensor:
        """The picture at 1/s of its size, [B, 3, H/s, W/s] in [-1, 1]; CPUs cannot filter in less than float32.

        Only the filter "bicubic-unclamped" leaves what it overshoots, at edges.
        """
        small = F.interpolate(
            sample.to(torch.promote_types(sample.dtype, torch.float32)),
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
        """Base latents z = E(downsample(picture)) before standardisation, [B, C, h, w]: the mode, no gradient.

        They are (z - shift_factor) * scaling_factor: units, unless the base has statistics of its own.
        """
        if self.base_encoder is None:
            height, width = (side // self.downsample_factor for side in sample.shape[-2:])
            return sample.new_zeros(len(sample), 0, height, width)
        return self.encode_pretrained(self.base_picture(sample))

    def encode_pretrained(self, sample: Tensor) -> Tensor:
        """The base encoder on a picture as it is, scaled as by `encode_base`: [B, base's channels, H / f, W / f]."""
        if self.base_encoder is None:  # all new: the detail encoder is the base's until it is trained
            return self.to_units(encode_mode(self.detail_encoder, self.detail_quant_conv, sample))
        return self.to_units(encode_mode(self.base_encoder, self.base_quant_conv, sample))

    def encode_detail(self, sample: Tensor, base: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the detail latents before standardisation, each [B, D, h, w].

        With `base_in_detail` the base latents are needed; give them as `base` where they are known already.
        """
        if self.config.linear_blocks:
            hidden = self.to_units(encode_mode(self.detail_encoder, self.detail_quant_conv, sample))
        else:
            hidden = features(self.detail_encoder, sample)
        mean, log_variance = self.detail_downsample(hidden).chunk(2, dim=1)
        if self.detail_from_base is not None:
            mean = mean + self.detail_from_base(self.encode_base(sample) if base is None else base)
        return mean, log_variance.clamp(-30.0, 20.0)

    def reconstruct(self, base: Tensor, detail: Tensor) -> Tensor:
        """The joint decoder: base and detail latents, both before standardisation -> [B, 3, H, W]."""
        hidden = self.detail_upsample(torch.cat([base, detail], dim=1))
        return self.decode_full(hidden) if self.config.linear_blocks else self._pixels(hidden, None)

    def decode_full(self, latents: Tensor) -> Tensor:
        """The joint decoder behind its first block: latents of the full picture before standardisation -> [B, 3, H, W].

        Before training this is the base autoencoder's own decoder. Only with linear blocks.
        """
        hidden = self.from_units(latents)
        if isinstance(self.joint_decoder, DecoderTiny):
            hidden = torch.tanh(hidden / 3) * 3
        return self._pixels(hidden, self.joint_post_quant_conv)

    # ------------------------------------------------------------------------------------------ the diffusers contract

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Posterior over the C + D latents; the base half is deterministic.

        Raises:
            ValueError: a side of the picture is no multiple of the downsample factor, there are several frames, or it
                is no batch of floating-point numbers.
        """
        frames, x = x.ndim == 5, _picture(x)
        self._check_sample(x)
        channels = 2 * self.config.latent_channels
        moments = self._in_pieces(self._moments, x, channels=channels, up=1, down=self.downsample_factor)
        posterior = DiagonalGaussianDistribution(moments.unsqueeze(2) if frames else moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Pictures [B, 3, H, W], about [-1, 1], of latents [B, C + D, h, w]; `generator` is unused, as in diffusers.

        Raises:
            ValueError: the latents have not C + D channels, or there are several frames.
        """
        frames, z = z.ndim == 5, _picture(z)
        c, d = self.config.base_channels, self.config.detail_channels
        if z.shape[1] != c + d:
            raise ValueError(f"latents of {z.shape[1]} channels; this decoder reads {c + d} ({c} base + {d} detail).")
        sample = self._in_pieces(self._pictures, z, channels=3, up=self.downsample_factor, down=1)
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

    def to_units(self, latents: Tensor) -> Tensor:
        """(latents - shift_factor) * scaling_factor: from the autoencoder's scale to the transformer's."""
        return (latents - self.config.shift_factor) * self.config.scaling_factor

    def from_units(self, latents: Tensor) -> Tensor:
        """Latents / scaling_factor + shift_factor: the inverse of `to_units`."""
        return latents / self.config.scaling_factor + self.config.shift_factor

    def standardise(self, latents: Tensor) -> Tensor:
        """Latents as `encode` gives them -> as the transformer sees them, by what stock pipelines do in between."""
        if self.bn is None:
            return self.to_units(latents)
        mean, variance = (values.view(1, -1, 1, 1) for values in (self.bn.running_mean, self.bn.running_var))
        return F.pixel_shuffle((F.pixel_unshuffle(latents, 2) - mean) / (variance + self.bn.eps).sqrt(), 2)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Measure mean and deviation of every detail channel over `batches` of pictures (float64) and keep them.

        Raises:
            ValueError: no batches, pictures that `encode` refuses, or a channel that does not vary or is not finite.
        """
        count, total, squares = 0, torch.zeros(()).double(), torch.zeros(()).double()
        for batch in batches:
            self._check_sample(batch)
            mean = self.encode_detail(batch.to(self.device, self.dtype))[0].double().cpu()
            count += mean[:, 0].numel()
            total = total + mean.sum(dim=(0, 2, 3))
            squares = squares + mean.square().sum(dim=(0, 2, 3))
        if count == 0:
            raise ValueError("calibrate() was given no pictures; it needs some hundred of the training set.")
        deviation = (squares / count - (total / count).square()).clamp_min(0).sqrt()
        useless = (~(deviation > 1e-6)).nonzero().flatten().tolist()  # a deviation that is no number compares false
        if useless:
            raise ValueError(f"detail channels {useless} do not vary, or are not finite: train the detail encoder.")
        self.detail_mean.copy_(total / count)
        self.detail_std.copy_(deviation)

    def detail_parameters(self) -> list[nn.Parameter]:
        """What stage 1 trains: detail encoder, joint decoder and the two new blocks; not the base encoder."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @property
    def encoder(self) -> "AutoencoderDA":
        """The encoding half alone, under the name that other autoencoders have for theirs; it shares the weights."""
        return self._half(name for name in self._modules if name not in (*DECODING, "bn"))

    @property
    def decoder(self) -> "AutoencoderDA":
        """The decoding half alone, likewise."""
        return self._half(DECODING)

    @property
    def downsample_factor(self) -> int:
        """Side of the picture / side of the latents: s * f."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def train(self, mode: bool = True) -> "AutoencoderDA":
        """Training mode for all but the frozen base encoder."""
        super().train(mode)
        if self.base_encoder is not None:
            self.base_encoder.eval()
        return self

    # ------------------------------------------------------------------------------------------ the parts

    def _moments(self, sample: Tensor) -> Tensor:
        base = self.encode_base(sample)
        mean, log_variance = self.encode_detail(sample, base)
        scale, shift = self._detail_affine(mean)
        # log|1 / scale| twice, because a variance scales with the square.
        log_variance = log_variance - 2 * (scale * self.config.scaling_factor).log()
        mean = self.from_units((mean - shift) / scale)
        return torch.cat([self._base_outside(base), mean, torch.full_like(base, DETERMINISTIC), log_variance], dim=1)

    def _pictures(self, latents: Tensor) -> Tensor:
        base, detail = self.split(latents)
        scale, shift = self._detail_affine(detail)
        return self.reconstruct(self._base_inside(base), self.to_units(detail) * scale + shift)

    def _pixels(self, hidden: Tensor, post_quant_conv: nn.Module | None) -> Tensor:
        """The decoder's layers, on exact tiles if tiling is on and there are any, and pictures in [-1, 1]."""
        decoder = self.joint_decoder
        if isinstance(decoder, AutoencoderDA):
            for setting in ("use_tiling", "tile_sample_size", "tile_storage"):
                setattr(decoder, setting, getattr(self, setting))
        tile = max(1, self.tile_sample_size * self.config.resolution_factor // self.downsample_factor)
        if self.use_tiling and max(hidden.shape[-2:]) > tile and can_decode_tiles(decoder):
            hidden = hidden if post_quant_conv is None else post_quant_conv(hidden)
            return decode_tiles(decoder, hidden, tile=tile, storage=self.tile_storage)
        return decode_pixels(decoder, post_quant_conv, hidden)

    def _decodes_tiles(self) -> bool:
        decoder = self.joint_decoder
        return decoder._decodes_tiles() if isinstance(decoder, AutoencoderDA) else can_decode_tiles(decoder)

    def _half(self, parts: Iterable[str]) -> "AutoencoderDA":
        half = copy.copy(self)
        kept = {name: self._modules[name] for name in parts if name in self._modules}
        half._modules = kept | dict.fromkeys(name for name in self._modules if name not in kept)
        half._buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        return half

    def _base_outside(self, base: Tensor) -> Tensor:
        """The base half as `encode` gives it: the two scalars then make (z - mean) / std * scaling_factor of it."""
        raw, statistics = self.from_units(base), self._base_affine(base)
        return raw if statistics is None else (raw - statistics[1]) / statistics[0] + self.config.shift_factor

    def _base_inside(self, base: Tensor) -> Tensor:
        """The inverse of `_base_outside`: before standardisation, as `reconstruct` takes it."""
        statistics = self._base_affine(base)
        raw = base if statistics is None else (base - self.config.shift_factor) * statistics[0] + statistics[1]
        return self.to_units(raw)

    def _base_affine(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """The base's own deviations and means, [1, C, 1, 1] each; None without any."""
        std, mean = (self.config.base_config.get(name) for name in ("latents_std", "latents_mean"))
        if std is None or not self.config.base_channels:
            return None
        return like.new_tensor(std).view(1, -1, 1, 1), like.new_tensor(mean).view(1, -1, 1, 1)

    def _detail_affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        # Group offloading moves the model's own buffers for `forward` alone.
        return tuple(b.to(like).view(1, -1, 1, 1) for b in (self.detail_std, self.detail_mean))

    def _in_pieces(self, run: Callable[[Tensor], Tensor], x: Tensor, *, channels: int, up: int, down: int) -> Tensor:
        """Run `run` on single pictures if slicing is on, and on `blended_tiles` if tiling is.

        A latent position is `down` positions of `x` and `up` positions of the output, which has `channels` channels.
        """
        if self.use_slicing and len(x) > 1:
            return torch.cat([self._in_pieces(run, one, channels=channels, up=up, down=down) for one in x.split(1)])
        tile = max(1, self.tile_sample_size // self.downsample_factor)  # in latent positions
        exact = up > 1 and self._decodes_tiles()  # then `_pixels` makes the tiles
        if not self.use_tiling or exact or max(x.shape[-2:]) // down <= tile:
            return run(x)
        return blended_tiles(run, x, tile=tile, overlap=self.tile_overlap, channels=channels, up=up, down=down)

    def _check_sample(self, sample: Tensor) -> None:
        if sample.ndim != 4 or not sample.is_floating_point():
            raise ValueError(f"pictures {list(sample.shape)} of {sample.dtype}: give floats [B, 3, H, W] in [-1, 1].")
        height, width = sample.shape[-2:]
        if height % self.downsample_factor or width % self.downsample_factor:
            raise ValueError(
                f"a picture of {width}x{height} px: both sides must be multiples of {self.downsample_factor}, the "
                "downsample factor. Crop or resize it."
            )

    @torch.no_grad()
    def _start_from(self, vae: ModelMixin) -> None:
        for name, part in self.named_children():  # base_encoder, detail_encoder, joint_decoder are named after theirs
            theirs = getattr(vae, name.partition("_")[2], None)
            if isinstance(theirs, nn.Module):
                part.load_state_dict({k: v for k, v in theirs.state_dict().items() if k in part.state_dict()})
        if self.detail_from_base is not None:
            self.detail_from_base.weight.zero_()
        if self.bn is not None and self.config.base_channels:
            for name in ("running_mean", "running_var"):
                getattr(self.bn, name)[: 4 * self.config.base_channels] = getattr(vae.bn, name)
        if self.config.linear_blocks:
            down, up, channels = self.detail_downsample, self.detail_upsample, base_facts(vae.config).latent_channels
            for parameter in (*down.parameters(), *up.parameters()):
                parameter.zero_()
            down.shortcut.bias[self.config.detail_channels :] = -5.0
            # Every base channel onto its own s^2 places of the pixel shuffle.
            places = self.config.resolution_factor**2
            up.shortcut.weight[:, :channels, 0, 0] = torch.eye(channels).repeat_interleave(places, dim=0)
            if self.base_encoder is None:
                down.shortcut.weight[:channels, :, 0, 0] = torch.eye(channels).repeat_interleave(places, dim=1) / places


def _check_settings(
    base_config: dict, base_channels: int, detail_channels: int, resolution_factor: int, base_downsample: str
) -> None:
    base_class(base_config["_class_name"])
    channels = base_facts(base_config).latent_channels
    groups = base_channels or channels  # all new: as many as base and detail would have
    if resolution_factor not in RESOLUTION_FACTORS:
        allowed = " and ".join(map(str, RESOLUTION_FACTORS))
        raise ValueError(
            f"resolution_factor={resolution_factor}: allowed are {allowed}. For more, upgrade the upgraded again."
        )
    half = resolution_factor**2 // 2  # of what an unshuffle makes of a channel; mean and log-variance are two of each
    unit = lcm(groups, half)
    if detail_channels <= 0 or detail_channels % unit:
        nearest = max(1, round(detail_channels / unit)) * unit
        raise ValueError(
            f"detail_channels={detail_channels} must be a positive multiple of base_channels={groups}, of which the "
            f"alignment loss averages groups, and of {half}, half of resolution_factor^2. The nearest is {nearest}."
        )
    statistics = [base_config.get(name) for name in ("latents_mean", "latents_std")]
    if statistics != [None, None] and (
        any(each is None or len(each) != channels for each in statistics)
        or not all(deviation > 0 for deviation in statistics[1])
    ):
        raise ValueError(
            f"latents_mean and latents_std of base_config must be {channels} numbers each, one for each base channel, "
            f"deviations above 0; or None both. They are {statistics[0]} and {statistics[1]}."
        )
    if base_downsample not in DOWNSAMPLE_FILTERS:
        raise ValueError(f"base_downsample={base_downsample!r}: allowed are {', '.join(DOWNSAMPLE_FILTERS)}.")


def _picture(tensor: Tensor) -> Tensor:
    """The one frame of a video [B, channels, 1, height, width], or what is a picture already."""
    if tensor.ndim == 5 and tensor.shape[2] != 1:
        raise ValueError(f"a video of {tensor.shape[2]} frames: this autoencoder is for pictures, one frame.")
    return tensor.squeeze(2) if tensor.ndim == 5 else tensor


if __name__ == "davae.models.autoencoder_da":
    # model_index.json stores the module path: "davae" is the frozen public one (docs/formats.md).
    AutoencoderDA.__module__ = "davae"
