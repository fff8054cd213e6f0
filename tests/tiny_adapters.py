"""What tests of tiny upgrades do with them: make an image, and pretend to train."""

import torch


def generate(pipeline, **settings):
    pipeline.set_progress_bar_config(disable=True)
    defaults = {"num_inference_steps": 2, "max_sequence_length": 8, "output_type": "np"}
    return pipeline("red apple", generator=torch.Generator().manual_seed(0), **{**defaults, **settings}).images[0]


def disturb(parameters):
    """Stands for training: every trainable parameter moves."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
