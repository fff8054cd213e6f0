"""Class-conditional sampling: python examples/sample_classes.py OUT.png [PIPELINE] [STEPS].

PIPELINE is the folder of a ClassConditionalFlowPipeline, base or upgraded. Without one a tiny random one stands in,
whose pictures mean nothing.
"""

import sys

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.utils import make_image_grid

from davae import AutoencoderDA, ClassConditionalFlowPipeline, LightningDiT2DModel, load_pipeline, upgrade


def tiny_random_pipeline() -> ClassConditionalFlowPipeline:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 8, 16), norm_num_groups=4).eval()
    shape = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    transformer = LightningDiT2DModel(in_channels=4, num_classes=10, **shape).eval()
    base = ClassConditionalFlowPipeline(transformer, vae, FlowMatchEulerDiscreteScheduler())
    return upgrade(base, AutoencoderDA.from_base(vae, detail_channels=12))


def main(out: str, folder: str = "", steps: str = "249") -> None:
    pipeline = load_pipeline(folder) if folder else tiny_random_pipeline()
    classes = list(range(4))
    # Guidance, interval and timestep shift are the reference's by default.
    images = pipeline(classes, num_inference_steps=int(steps), generator=torch.Generator().manual_seed(0)).images
    make_image_grid(images, rows=2, cols=2).save(out)
    print(f"classes {classes}, {images[0].width} x {images[0].height} px each, in {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
