"""AutoencoderTAEF2: the tiny autoencoder of the FLUX.2 latent space, which diffusers' AutoencoderTiny cannot hold.

Imports torch and diffusers only, so that this one file can lie beside weights.
"""

from diffusers import AutoencoderTiny
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import Tensor, nn

GROUPS = 4
"""Of the middle part's group normalisation, whose statistics run over the whole picture."""
WIDENING = 4
"""Channels inside the middle part, for each channel of its block."""


class MiddleBlock(AutoencoderTinyBlock):
    """AutoencoderTiny's block with a middle part before it: block(x + middle(x)), [B, C, H, W] -> [B, C, H, W].

    The middle part is pointwise but for its normalisation: 1x1 convolution C -> 4 C, GroupNorm of 4 groups, ReLU,
    1x1 convolution 4 C -> C, neither with a bias. Its place among the weights is called `pool`, as in the original.
    """

    def __init__(self, channels: int, act_fn: str) -> None:
        super().__init__(channels, channels, act_fn)
        inner = WIDENING * channels
        self.pool = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            nn.GroupNorm(GROUPS, inner),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The block on `x` plus its middle part."""
        return super().forward(x + self.pool(x))


class AutoencoderTAEF2(AutoencoderTiny):
    """AutoencoderTiny whose blocks at the latents' resolution are `MiddleBlock`s: TAEF2 (madebyollin/taesd, MIT).

    Pictures are [B, 3, H, W] in [-1, 1], H and W multiples of 8; latents are [B, 32, H/8, W/8], unscaled.
    Weights have diffusers' names: `encoder.layers.N` and `decoder.layers.N`, where the original's decoder counts its
    clamp as layer 0.

    Args:
        in_channels: of the picture.
        out_channels: of the reconstruction.
        encoder_block_out_channels: channels of the encoder's stages, from the picture to the latents; all the same.
        decoder_block_out_channels: channels of the decoder's stages, from the latents to the picture; all the same.
        act_fn: the activation between convolutions.
        upsample_fn: how the decoder enlarges.
        latent_channels: C.
        num_encoder_blocks: blocks of each stage; the last stage's have a middle part.
        num_decoder_blocks: blocks of each stage; the first stage's have a middle part.
        scaling_factor: 1, as the original's latents are unscaled.
        shift_factor: 0, likewise.
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
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            encoder_block_out_channels=encoder_block_out_channels,
            decoder_block_out_channels=decoder_block_out_channels,
            act_fn=act_fn,
            upsample_fn=upsample_fn,
            latent_channels=latent_channels,
            num_encoder_blocks=num_encoder_blocks,
            num_decoder_blocks=num_decoder_blocks,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
        )
        encoder, decoder = self.encoder.layers, self.decoder.layers
        last = len(encoder) - 1 - num_encoder_blocks[-1]  # behind these blocks is one convolution
        for index in range(last, last + num_encoder_blocks[-1]):
            encoder[index] = MiddleBlock(encoder_block_out_channels[-1], act_fn)
        for index in range(2, 2 + num_decoder_blocks[0]):  # before these are a convolution and its activation
            decoder[index] = MiddleBlock(decoder_block_out_channels[0], act_fn)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode, without AutoencoderTiny's rounding of the latents to bytes within +-3."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)


if __name__ == "davae.models.autoencoder_taef2":
    # A pipeline's model_index.json stores the module path: "davae" is the frozen public one (docs/formats.md).
    AutoencoderTAEF2.__module__ = "davae"
