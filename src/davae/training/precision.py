"""What a device computes in."""

from collections.abc import Mapping
from typing import Any

import torch


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 by itself: where it is emulated, it only costs time and digits."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # older versions of torch cannot be asked
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one is ARM's
