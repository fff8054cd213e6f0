"""The optimisers that a recipe may name: torch's AdamW, one whose moments have 8 bits, one that needs no schedule."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import torch
from torch import Tensor, nn

from davae.errors import SettingsError
from davae.run.ranks import Ranks

OptimizerName = Literal["AdamW", "AdamW8bit", "AdamWScheduleFree"]

LIBRARIES = {"AdamW": "torch.optim", "AdamW8bit": "bitsandbytes.optim", "AdamWScheduleFree": "schedulefree"}
"""By the name of a class, the module that has it; its package is the name of davae's extra, too."""
STATE_BYTES = {"AdamW": 8.0, "AdamW8bit": 2 + 8 / 256, "AdamWScheduleFree": 8.0}
"""Of each trained number; AdamW8bit has two scales for 256 numbers, and 8 bytes where a tensor has less than 4096."""
COUNTS = ("k", "weight_sum", "lr_max")
"""What schedule-free keeps beside its tensors: steps, the sum of their weights, the largest learning rate."""


@dataclass(frozen=True)
class OptimizerSettings:
    """An optimiser without what it trains and its learning rate."""

    name: OptimizerName = "AdamW"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    """Decoupled."""

    def check(self, ranks: Ranks) -> None:
        """Refuse what is not there or does not go together, before anything is done.

        Raises:
            SettingsError: its package is not installed, or FSDP2 is asked for and it cannot be sharded.
        """
        if self.name == "AdamW8bit" and ranks.sharded:
            raise SettingsError(
                f'optimizer="{self.name}" with FSDP2: its moments share scales in blocks of 256, which would be cut '
                "where tensors are. Launch with recipes/launch/ddp.yaml, or take AdamW, whose moments FSDP2 shards"
            )
        package = LIBRARIES[self.name].partition(".")[0]
        try:
            import_module(package)
        except ImportError as error:
            raise SettingsError(
                f"optimizer=\"{self.name}\" needs {package}: {error}. Install it: pip install 'davae[{package}]'"
            ) from error

    def make(self, weights: list[nn.Parameter], *, learning_rate: float) -> torch.optim.Optimizer:
        """The optimiser of these weights, in training mode if it has one."""
        made = getattr(import_module(LIBRARIES[self.name]), self.name)
        settings = {"fused": True} if self.name == "AdamW" else {}
        if self.name == "AdamW8bit":
            for weight in weights:  # its first step does it, so that a resumed run would differ from one that goes on
                weight.data = weight.data.contiguous()
        optimizer: torch.optim.Optimizer = made(
            weights, lr=learning_rate, betas=self.betas, weight_decay=self.weight_decay, **settings
        )
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer


ADAMW = OptimizerSettings()


@contextmanager
def evaluated(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Its weights as they are to be used; what is trained comes back exactly at the end.

    They are the same, but with schedule-free: it trains at y, between its averages x, which are to be used, and the
    sequence z of its steps (arXiv 2405.15682).
    """
    if not (hasattr(optimizer, "train") and hasattr(optimizer, "eval")):
        yield
        return
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    trained = [weight.detach().clone() for weight in weights]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            torch._foreach_copy_(weights, trained)


def averages(optimizer: torch.optim.Optimizer, weights: Iterable[nn.Parameter]) -> list[Tensor]:
    """Its weights as `evaluated` shows them, bit for bit, for reading only: those of schedule-free are new tensors."""
    if not hasattr(optimizer, "eval"):
        return list(weights)
    toward = 1 - 1 / optimizer.param_groups[0]["betas"][0]  # as its `eval`, which sets them in place
    steps = {weight: state["z"] for weight, state in optimizer.state.items() if "z" in state}
    return [torch.lerp(w.detach(), steps[w], toward).requires_grad_() if w in steps else w for w in weights]


def counts(optimizer: torch.optim.Optimizer) -> dict[str, int | float]:
    """What an optimiser keeps beside its tensors, for a checkpoint: `COUNTS`, or nothing."""
    return {name: value for name, value in optimizer.param_groups[0].items() if name in COUNTS}


def restore_counts(optimizer: torch.optim.Optimizer, saved: Mapping[str, int | float]) -> None:
    """Take back what `counts` gave."""
    for group in optimizer.param_groups:
        group.update(saved)
