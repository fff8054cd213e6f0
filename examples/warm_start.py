"""See the warm start: python examples/warm_start.py BASE.

Widens the transformer of a Stable Diffusion 3 pipeline and compares: the base channels come out bit for bit as the
base's, whatever the detail channels hold, and the detail output is zero.
"""

import sys

import torch
from diffusers import SD3Transformer2DModel

from davae import widen_transformer


@torch.no_grad()
def main(base: str) -> None:
    transformer = SD3Transformer2DModel.from_pretrained(base, subfolder="transformer")
    channels, side = transformer.config.in_channels, transformer.config.sample_size
    widened = widen_transformer(transformer, base_channels=channels, detail_channels=channels)
    latents, detail = torch.randn(2, 1, channels, side, side)
    condition = {
        "encoder_hidden_states": torch.randn(1, 8, transformer.config.joint_attention_dim),
        "pooled_projections": torch.randn(1, transformer.config.pooled_projection_dim),
        "timestep": torch.tensor([500.0]),
    }
    expected = transformer(latents, **condition).sample

    # Any detail goes in; the base channels of the output must not notice.
    widened_output = widened(torch.cat([latents, 5 * detail], dim=1), **condition).sample
    print("base output, largest difference:", (widened_output[:, :channels] - expected).abs().max().item())
    print("detail output, largest value:   ", widened_output[:, channels:].abs().max().item())


if __name__ == "__main__":
    main(*sys.argv[1:])
