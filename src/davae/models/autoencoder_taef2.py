"""AutoencoderTAEF2: the tiny autoencoder of the FLUX.2 latent space, which diffusers' AutoencoderTiny cannot hold."""

from diffusers import AutoencoderTiny
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import Tensor, nn


class MiddleBlock(AutoencoderTinyBlock):
    """AutoencoderTiny's block behind a pointwise middle part: block(x + middle(x)).

    The middle part is called `pool`, as in the original weights; its normalisation sees the whole image.
    """

    def __init__(self, channels: int, act_fn: str) -> None:
        super().__init__(channels, channels, act_fn)
        inner = 4 * channels
        self.pool = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            nn.GroupNorm(4, inner),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The block on `x` plus its middle part."""
        return super().forward(x + self.pool(x))


class AutoencoderTAEF2(AutoencoderTiny):
    """AutoencoderTiny whose blocks at the latents' resolution are of `MiddleBlock`: TAEF2 (madebyollin/taesd, MIT).

    Images are [B, 3, H, W] in [-1, 1], H and W multiples of 8; latents are [B, 32, H/8, W/8], unscaled. Weights have
    diffusers' names `encoder.layers.N` and `decoder.layers.N`; the original's decoder counts its clamp as layer 0.
    Settings are AutoencoderTiny's; all stages of a network have the same width.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        encoder_block_out_channels: tuple[int, ...] | list[int] = (64, 64, 64, 64),
        decoder_block_out_channels: tuple[int, ...] | list[int] = (64, 64, 64, 64),
        act_fn: str = "relu",
        upsample_fn: str = "nearest",
        latent_channels: int = 32,
        num_encoder_blocks: tuple[int, ...] | list[int] = (1, 3, 3, 3),
        num_decoder_blocks: tuple[int, ...] | list[int] = (3, 3, 3, 1),
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        # diffusers has them in the config by now.
        super().__init__(**{name: value for name, value in self.config.items() if not name.startswith("_")})

        # The encoder's last stage: one convolution is behind it.
        encoder, decoder = self.encoder.layers, self.decoder.layers
        last = len(encoder) - 1 - num_encoder_blocks[-1]
        for index in range(last, last + num_encoder_blocks[-1]):
            encoder[index] = MiddleBlock(encoder_block_out_channels[-1], act_fn)

        # The decoder's first stage: a convolution and its activation are before it.
        for index in range(2, 2 + num_decoder_blocks[0]):
            decoder[index] = MiddleBlock(decoder_block_out_channels[0], act_fn)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode, without AutoencoderTiny's rounding of the latents to bytes within +-3."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)


if __name__ == "davae.models.autoencoder_taef2":
    # A pipeline's model_index.json stores the module path: "davae" is the frozen public one (docs/formats.md).
    AutoencoderTAEF2.__module__ = "davae"
