"""Reading files: what is opened, what is refused, and that a pickle is never trusted."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from davae.errors import CheckpointError
from davae.pipelines.importing.reading import EMA_WRAPPERS, WRAPPERS, read_checkpoint, read_statistics
from davae.pipelines.importing.unpickling import open_wrappers


def test_a_torch_file_is_opened_in_its_wrapper(tmp_path: Path) -> None:
    weight = torch.arange(12.0).view(3, 4)
    average = {"module.a": weight.t(), "module.b": weight.bfloat16(), "module.model.c": weight[0].half()}
    raw = {name: torch.zeros_like(tensor) for name, tensor in average.items()}
    torch.save(
        {"model": raw, "ema": average, "opt": {"step": torch.ones(1)}, "config": {"lr": 1e-4}}, tmp_path / "f.pt"
    )
    read = read_checkpoint(tmp_path / "f.pt")

    assert (read.opened, read.beside, read.prefixes) == (("ema",), ("model", "opt", "config"), ("model.", "module."))
    assert torch.equal(read.tensors["a"], weight.t())  # a view, in another order
    assert {name: tensor.dtype for name, tensor in read.tensors.items()} == {
        "a": torch.float32,
        "b": torch.bfloat16,
        "c": torch.float16,
    }


def test_wrappers_are_opened_by_preference_and_in_depth() -> None:
    one, two = {"a": torch.ones(1)}, {"a": torch.zeros(1), "b": 3}
    assert open_wrappers({"state_dict": one, "model": two}, WRAPPERS) == (["state_dict"], one)
    both = {"model": one, "ema": two}
    assert open_wrappers(both, WRAPPERS) == (["model"], one)
    assert open_wrappers(both, (*EMA_WRAPPERS, *WRAPPERS)) == (["ema"], {"a": two["a"]})
    assert open_wrappers({"state_dict": {}, "model": one}, WRAPPERS) == (["model"], one)
    assert open_wrappers({"model": {"state_dict": one}}, WRAPPERS) == (["model", "state_dict"], one)
    assert open_wrappers({**one, "b": 1, 2: torch.ones(1)}, WRAPPERS) == ([], one)


class Hostile:
    """Runs a command when it is unpickled by a loader that trusts it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def test_a_hostile_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}, "callbacks": Hostile(tmp_path / "ran")}, tmp_path / "f.ckpt")
    with pytest.raises(CheckpointError, match=r"f\.ckpt cannot be read as tensors only \(it asks for \w+\.system\)"):
        read_checkpoint(tmp_path / "f.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["f.ckpt"]


def test_a_small_file_that_asks_for_much_memory_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(2**33)}, tmp_path / "f.pt")  # 32 GiB in a kilobyte
    with pytest.raises(CheckpointError, match=r"cannot be read as tensors only .*34359738368 bytes"):
        read_checkpoint(tmp_path / "f.pt")


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "f.safetensors").write_bytes(b"not one")
    (tmp_path / "f.txt").write_bytes(b"")
    for name, message in (
        ("f.safetensors", "damaged"),
        ("f.txt", r"allowed are files in \.safetensors, \.bin"),
        ("none.pt", "is not there"),
        (".", "is a folder"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(number: float, tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.tensor([1.0, number])}, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match="b holds numbers that are not finite"):
        read_checkpoint(tmp_path / "f.safetensors")


def test_a_name_with_and_without_its_prefix_is_refused(tmp_path: Path) -> None:
    save_file({"model.a": torch.ones(3), "a": torch.ones(3)}, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match="has a twice"):
        read_checkpoint(tmp_path / "f.safetensors")


def test_statistics(tmp_path: Path) -> None:
    save_file({"mean": torch.ones(1, 2, 1, 1), "std": torch.full((1, 2, 1, 1), 0.5)}, tmp_path / "s.safetensors")
    assert read_statistics(tmp_path / "s.safetensors").tolist() == [[1.0, 1.0], [0.5, 0.5]]

    for wrong in (
        {"mean": [0, 1]},
        {"mean": [0], "std": [1, 1]},
        {"mean": [0], "std": [0]},
        {"mean": [float("nan")], "std": [1]},
        {"mean": [0], "std": [float("inf")]},
        {"mean": ["x"], "std": [1]},
        [],
    ):
        (tmp_path / "s.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=r"s\.json"):
            read_statistics(tmp_path / "s.json")
