"""The optimisers beside torch's AdamW: each goes on bit for bit; what schedule-free trains is used by its averages."""

import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from davae.data.pictures import read_png
from davae.errors import SettingsError
from davae.run.record import read_metrics
from davae.seeds import generator
from davae.training.devices import lay_out
from davae.training.interruption import Interrupted
from davae.training.optimizers import LIBRARIES
from davae.training.recipes import OptimisationRecipe, OptimizerName
from davae.training.stage_one_run import train_autoencoder
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune
from davae.training.state import TrainingState
from forks import exit_code, forked
from rank_forks import FSDP2, run_ranks
from rank_program import STEPS as RANK_STEPS
from rank_program import signalled, train
from stages import autoencoder_recipe, finetune_recipe, outcome

STEPS, WARMUP, PEAK = 12, 3, 1e-2
BETAS, DECAY = (0.9, 0.99), 0.01


def needs(name: str) -> None:
    pytest.importorskip(LIBRARIES[name].partition(".")[0], reason="the extra is not installed")


@pytest.fixture(params=["AdamW8bit", "AdamWScheduleFree"])
def name(request: pytest.FixtureRequest) -> OptimizerName:
    needs(request.param)
    return request.param


def tiny_model() -> nn.Module:
    """Its first layer has 5120 weights, which AdamW8bit quantises; the other tensors have less than 4096."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(64, 80), nn.Unflatten(1, (2, 5, 8)), nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(72, 1)
        return lay_out(nn.Sequential(*layers), torch.channels_last)


def loss_of(model: nn.Module, step: int) -> Tensor:
    rows = torch.randn(8, 64, generator=generator(0, "rows", step))
    return (model(rows) - rows.sum(1, keepdim=True)).square().mean()


def tiny_state(folder: Path, model: nn.Module, name: OptimizerName, **changes: object) -> TrainingState:
    settings = {"steps": STEPS, "log_every": 1, "checkpoint_every": 4, "precision": "float32"}
    settings |= {"optimizer": name, "betas": BETAS, "weight_decay": DECAY, "clip_norm": 1e9, "ema_decay": 0.0}
    settings |= {"learning_rate": PEAK, "warmup_steps": WARMUP}
    if name != "AdamWScheduleFree":
        settings["final_learning_rate"] = PEAK
    return TrainingState(OptimisationRecipe(**(settings | changes)), folder, {"model": model}, model.parameters())


def run(folder: Path, name: OptimizerName, *, stop_at: int | None = None, **changes: object) -> TrainingState:
    model = tiny_model()
    state = tiny_state(folder, model, name, **changes)
    for step in state.steps():
        if step == stop_at:
            signal.raise_signal(signal.SIGTERM)
        state.update(loss_of(model, step))
    return state


def copies(state: TrainingState) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in state.weights.whole("model").parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------------------------ going on


def test_a_run_that_is_stopped_anywhere_goes_on_bit_for_bit(name: OptimizerName, tmp_path: Path) -> None:
    run(tmp_path / "whole", name, ema_decay=0.9)
    for stop_at in range(STEPS - 1):
        folder = tmp_path / str(stop_at)
        with pytest.raises(Interrupted):
            run(folder, name, stop_at=stop_at, ema_decay=0.9)
        run(folder, name, ema_decay=0.9)
        assert outcome(folder) == outcome(tmp_path / "whole")
    adamw = run(tmp_path / "adamw", "AdamW", ema_decay=0.9)
    assert not same(copies(adamw), copies(run(tmp_path / "whole", name, ema_decay=0.9)))


@pytest.mark.parametrize("stage", ["stage 1", "stage 2"])
def test_both_stages_take_it_and_go_on_bit_for_bit(
    name: OptimizerName, stage: str, base_folder, autoencoder_folder, picture_folder, tmp_path: Path
) -> None:
    changes = {"optimizer": name, "steps": 4, "checkpoint_every": 2, "learning_rate": 1e-2}
    if stage == "stage 1":
        recipe, program = autoencoder_recipe(base_folder, picture_folder, **changes), train_autoencoder
    else:
        changes |= {"trained": "full", "cache": str(tmp_path / "cache")}
        recipe, program = finetune_recipe(base_folder, autoencoder_folder, picture_folder, **changes), finetune
    program(recipe, tmp_path / "run")
    expected = outcome(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    program(recipe, tmp_path / "run")
    assert outcome(tmp_path / "run") == expected
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert len(rates) == 4
    assert (rates[-1] == 1e-2) == (name == "AdamWScheduleFree")


def test_moments_of_eight_bits_take_a_quarter_of_the_room(tmp_path: Path) -> None:
    needs("AdamW8bit")
    sizes = {}
    for name in ("AdamW", "AdamW8bit"):
        run(tmp_path / name, name)
        kept = load_file(tmp_path / name / "checkpoints" / f"step-{STEPS:08d}" / "optimizer.safetensors")
        moments = {key.rpartition("/")[2]: value for key, value in kept.items() if key.startswith("model.0.weight/")}
        sizes[name] = sum(value.nbytes for key, value in moments.items() if not key.startswith("qmap"))
    assert {moments["state1"].dtype, moments["state2"].dtype} == {torch.uint8}
    assert kept["model.0.bias/state1"].dtype == torch.float32
    assert sizes["AdamW8bit"] / sizes["AdamW"] == pytest.approx((2 + 8 / 256) / 8, rel=1e-3)


# ------------------------------------------------------------------------------------------------ schedule-free


def test_schedule_free_is_what_its_library_makes_of_the_same_steps(tmp_path: Path) -> None:
    """With its own warm-up. With an EMA that is the last update alone, both are its averages."""
    needs("AdamWScheduleFree")
    from schedulefree import AdamWScheduleFree

    model = tiny_model()
    optimizer = AdamWScheduleFree(model.parameters(), lr=PEAK, betas=BETAS, weight_decay=DECAY, warmup_steps=WARMUP)
    optimizer.train()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    trained = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.eval()
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    assert not same(trained, expected)

    state = run(tmp_path, "AdamWScheduleFree")
    before = copies(state)
    torch.testing.assert_close(before, trained, rtol=1e-5, atol=1e-6)
    for context in (state.weights.evaluated, state.ema_weights):
        with context():
            torch.testing.assert_close(copies(state), expected, rtol=1e-5, atol=1e-6)
        assert same(copies(state), before), "what is trained comes back exactly"


def test_looking_at_the_averages_changes_nothing(tmp_path: Path) -> None:
    needs("AdamWScheduleFree")
    model = tiny_model()
    state = tiny_state(tmp_path / "seen", model, "AdamWScheduleFree")
    for step in state.steps():
        with state.weights.evaluated():
            loss_of(model, step)
        state.update(loss_of(model, step))
    run(tmp_path / "unseen", "AdamWScheduleFree")
    assert outcome(tmp_path / "seen") == outcome(tmp_path / "unseen")


def test_with_adamw_weights_are_used_as_they_are(tmp_path: Path) -> None:
    state = run(tmp_path, "AdamW")
    before = copies(state)
    with state.weights.evaluated():
        assert same(copies(state), before)


def test_validation_pictures_are_of_the_averages(
    base_folder, autoencoder_folder, picture_folder, tmp_path: Path
) -> None:
    """With an EMA that is the last update alone, raw and EMA weights are the same, but for the
    rounding of its update, s - (s - x) in float32.
    """
    needs("AdamWScheduleFree")
    settings = {"steps": 3, "batch_size": 4, "learning_rate": 1e-1, "warmup_steps": 0, "ema_decay": 0.0}
    settings |= {"optimizer": "AdamWScheduleFree", "validation_every": 3, "validation_steps": 2}
    finetune(finetune_recipe(base_folder, autoencoder_folder, picture_folder, **settings), tmp_path)
    start, end = (read_png(path).int() for path in sorted((tmp_path / "pictures").iterdir()))
    assert (end[:, :64] - end[:, 64:]).abs().max() <= 1
    assert (end - start).abs().max() > 10


@pytest.mark.parametrize("settings", [{}, FSDP2], ids=["DDP", "FSDP2"])
def test_schedule_free_on_two_ranks_then_one_is_what_one_makes(settings: dict[str, str], tmp_path: Path) -> None:
    needs("AdamWScheduleFree")
    optimizer: OptimizerName = "AdamWScheduleFree"
    assert exit_code(forked(lambda: train(tmp_path / "one", optimizer=optimizer))) == 0
    stop = signalled(signal.SIGTERM, 20, 1)
    assert run_ranks(lambda: train(tmp_path / "two", before=stop, optimizer=optimizer), 2, settings) == [143, 143]
    assert exit_code(forked(lambda: train(tmp_path / "two", optimizer=optimizer))) == 0
    for file in ("mlp", "ema", "optimizer"):
        place = Path("checkpoints") / f"step-{RANK_STEPS:08d}" / f"{file}.safetensors"
        ours, theirs = load_file(tmp_path / "two" / place), load_file(tmp_path / "one" / place)
        assert ours.keys() == theirs.keys()
        assert all((tensor - theirs[key]).abs().max() < 1e-5 for key, tensor in ours.items())


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamWScheduleFree"])
def test_a_missing_extra_is_named_before_anything_is_done(
    name: OptimizerName, base_folder, picture_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = LIBRARIES[name].partition(".")[0]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SettingsError, match=rf"{name}.* needs {package}: .*pip install 'davae\[{package}\]'"):
        train_autoencoder(autoencoder_recipe(base_folder, picture_folder, optimizer=name), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_eight_bits_in_parts_are_refused(base_folder, picture_folder, tmp_path: Path) -> None:
    recipe = autoencoder_recipe(base_folder, picture_folder, optimizer="AdamW8bit")

    def program() -> None:
        with pytest.raises(SettingsError, match=r"AdamW8bit.* with FSDP2: .*ddp\.yaml, or take AdamW"):
            train_autoencoder(recipe, tmp_path / "run")

    assert run_ranks(program, 2, FSDP2) == [0, 0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"final_learning_rate": 1e-6}, "leave it out"), ({"betas": (0.0, 0.9)}, "must be above 0")],
)
def test_settings_that_schedule_free_has_no_use_for_are_refused(settings: dict, message: str) -> None:
    FinetuneRecipe(**settings)
    with pytest.raises(ValidationError, match=message):
        FinetuneRecipe(optimizer="AdamWScheduleFree", **settings)


def test_the_default_is_adamw_and_has_the_digest_of_before() -> None:
    recipe = FinetuneRecipe()
    assert (recipe.optimizer, recipe.betas, recipe.weight_decay) == ("AdamW", (0.9, 0.99), 0.0)
    assert FinetuneRecipe().digest() == FinetuneRecipe(optimizer="AdamW").digest()
    assert FinetuneRecipe().digest() != FinetuneRecipe(optimizer="AdamW8bit").digest()
