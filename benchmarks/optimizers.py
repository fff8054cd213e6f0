"""State and step time of the optimisers of stage 2 on the shipped pair, interleaved.

    OMP_NUM_THREADS=1 python benchmarks/optimizers.py

prints MiB of state and milliseconds (median of 20) with their ratios to torch's AdamW, for each kind of training and
each optimiser that is installed.
"""

import statistics
import time
from importlib.util import find_spec

import torch
import typer
from torch import Tensor, nn

from davae.backbones import backbone_of
from davae.training.optimizers import LIBRARIES, make_optimizer
from davae.training.recipes import OptimisationRecipe
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import load_upgraded_base
from davae.training.stage_two_transformer import choose_parameters

REPEATS = 20


def count_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors of its state; a tensor that weights share counts once."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def measure(parameters: list[nn.Parameter]) -> dict[str, tuple[int, float]]:
    """Bytes of state and milliseconds of a step, by the optimiser."""
    names = [name for name, module in LIBRARIES.items() if find_spec(module.partition(".")[0])]
    optimizers, times = {}, {name: [] for name in names}
    for name in names:
        own = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
        optimizers[name] = make_optimizer(OptimisationRecipe(optimizer=name, betas=(0.9, 0.999)), own), own

    # One step of each in turns; the first ones allocate.
    for _ in range(REPEATS + 1):
        for name, (optimizer, own) in optimizers.items():
            for parameter in own:
                parameter.grad = 1e-3 * torch.randn_like(parameter)
            began = time.perf_counter()
            optimizer.step()
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: (count_state_bytes(optimizers[name][0]), statistics.median(times[name][1:])) for name in names}


def main() -> None:
    """Print a line for each kind of training and each optimiser."""
    for trained in ("full", "layers", "lora"):
        recipe = FinetuneRecipe(trained=trained)
        transformer = load_upgraded_base(recipe).transformer
        parameters = choose_parameters(transformer, recipe, backbone_of(transformer).lora_targets, "")
        results = measure(parameters)
        count, first = sum(parameter.numel() for parameter in parameters), results["AdamW"]
        for name, (kept, step) in results.items():
            typer.echo(
                f"{trained:7s}{count:>10,} parameters  {name:18s}{kept / 2**20:7.2f} MiB, {kept / first[0]:.3f}x"
                f"{step:8.1f} ms, {step / first[1]:.2f}x"
            )


if __name__ == "__main__":
    typer.run(main)
