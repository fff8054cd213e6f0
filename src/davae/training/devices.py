"""What a device computes fastest in: precision, attention, layout of weights."""

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Model = TypeVar("Model", bound=nn.Module)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 natively: an emulation only costs time and digits."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def attention_on(device: torch.device) -> AbstractContextManager[None]:
    """Attention as plain products on a CPU, whose fused kernel has a slower backward pass (benchmarks/attention.py)."""
    if device.type != "cpu":
        return nullcontext()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # holds for CPUs, too, in spite of its name
    return sdpa_kernel(SDPBackend.MATH)


def fastest_layout(device: torch.device) -> torch.memory_format:
    """The layout of weights with which a device trains an autoencoder fastest.

    It is channels last on a CPU, by a fifth to a half. On a GPU it is contiguous: torch's group norm copies tensors
    with channels last, which takes longer than the convolutions gain (docs/speed.md).
    """
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def lay_out(model: Model, layout: torch.memory_format) -> Model:
    """Give the weights of 2-D convolutions a layout, in place; `nn.Module.to` would fail on those of 3-D ones."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return model


STREAM_CONVOLUTIONS = ("conv_in", "conv_shortcut", "conv", "conv_out")
"""Names in diffusers' encoders and decoders; "conv" belongs to down- and upsamplers."""


class StreamConv2d(nn.Conv2d):
    """A convolution that computes in the precision of its weights, even under autocast."""

    def forward(self, input: Tensor) -> Tensor:
        """The same as `nn.Conv2d`."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


def keep_stream_in_float32(model: Model) -> Model:
    """Let the convolutions that an autoencoder's residual stream passes through ignore autocast, in place.

    All others read the stream through a norm. In bfloat16 pale colours drown in the stream, and an output near 1 has
    steps of 1/256, as large as a good autoencoder's errors: a third of the decoder's gradient was rounding
    (experiments/LOG.md, 2026-11-30). Parameters and their names stay.
    """
    for name, module in model.named_modules():
        if type(module) is nn.Conv2d and name.rpartition(".")[2] in STREAM_CONVOLUTIONS:
            module.__class__ = StreamConv2d
    return model
