import hashlib
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from davae.errors import CheckpointError, NumericsError, SettingsError, StorageError
from davae.run import faults
from davae.run.checkpoint import latest_checkpoint
from davae.run.record import alone, read_metrics
from davae.seeds import generator
from davae.training.interruption import Interrupted
from davae.training.optimizers import OptimizerSettings
from davae.training.recipes import warmup_cosine
from davae.training.state import TrainingState, computes_bfloat16
from forks import exit_code, forked
from hashes import digests
from trials import Trials

DIGEST = "a" * 64
STEPS = 40
QUIET = Console(quiet=True)


def tiny_model() -> nn.Sequential:
    """Linear layers around a buffer that training moves, dropout from the global generator, and a frozen layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 4), nn.Linear(4, 1))
    model[4].requires_grad_(False)
    return model


def tiny_state(folder: Path, model: nn.Module, **changes: object) -> TrainingState:
    settings = {
        "total_steps": STEPS,
        "learning_rate": warmup_cosine(1e-2, floor=1e-3, warmup_steps=5, total_steps=STEPS),
        "seed": 7,
        "recipe_digest": DIGEST,
        "optimizer": OptimizerSettings(weight_decay=0.01),
        "ema_decay": 0.9,
        "checkpoint_every": 5,
        "log_every": 1,
        "console": QUIET,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    return TrainingState(folder, {"mlp": model}, trained, **(settings | changes))


def loss_of(state: TrainingState, model: nn.Module, step: int) -> Tensor:
    batch = torch.randn(8, 4, generator=generator(7, "batch", step)).to(state.device)
    with state.autocast():
        prediction = model(batch)
    return (prediction.float() - batch.sum(1, keepdim=True)).square().mean()


def train(folder: Path, **changes: object) -> TrainingState:
    """The program that is killed and started again: bfloat16, an evaluation every ten steps."""
    model = tiny_model()
    state = tiny_state(folder, model, mixed_precision="bf16", **changes)
    for step in state.steps():
        if step % 10 == 0:
            with state.ema_weights():
                state.log({"heldout_norm": model[0].weight.norm()})
        state.update(loss_of(state, model, step), {"weight": model[0].weight.norm()})
    return state


def snapshot(state: TrainingState, model: nn.Module) -> dict[str, Tensor]:
    """Copies of weights, optimiser tensors and EMA."""
    tensors = {f"model.{name}": p for name, p in model.named_parameters()}
    for position, values in state.weights.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{position}.{key}": value for key, value in values.items()}
    with state.ema_weights():
        tensors |= {f"ema.{name}": p.detach().clone() for name, p in model.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def outcome(folder: Path) -> tuple[dict[str, str], list[dict]]:
    """SHA-256 of every tensor file of the last checkpoint, and the metrics without their wall times."""
    last = folder / "checkpoints" / f"step-{STEPS:08d}"
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in last.glob("*.safetensors")}
    lines = read_metrics(folder / "metrics.jsonl")
    return digests, [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[dict[str, str], list[dict]], float]:
    """The outcome of a run that nothing disturbs, and how long it took."""
    folder = tmp_path_factory.mktemp("reference")
    began = time.monotonic()
    assert exit_code(forked(lambda: train(folder))) == 0
    took = time.monotonic() - began
    digests, lines = outcome(folder)
    assert set(digests) == {"mlp.safetensors", "ema.safetensors", "optimizer.safetensors"}
    assert len(lines) == STEPS + 4
    return (digests, lines), took


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path, reference):
    expected, took = reference
    chance = random.Random(3)
    kills = 0
    for trial in range(5):
        folder = tmp_path / str(trial)
        for attempt in range(8):
            pid = forked(lambda folder=folder: train(folder))
            if attempt < 7:
                time.sleep(chance.uniform(0.0, 0.5 * took))
                os.kill(pid, signal.SIGKILL)
            code = exit_code(pid)
            if code == 0:
                break
            assert code == -signal.SIGKILL
            kills += 1
        assert outcome(folder) == expected
        assert not list((folder / "checkpoints").glob("*.tmp-*"))
    assert kills >= 10, "the runs were over before they could be killed"


def test_a_run_killed_before_any_file_operation_of_a_save_ends_with_the_same_bits(tmp_path, reference):
    expected, _ = reference
    start = tmp_path / "start"
    code = exit_code(forked(lambda: stop_at(start, 20)))
    assert code == 143

    def killed_at(folder: Path, operation: int) -> None:
        seen = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "open")
            if writes and "checkpoints" in str(arguments[0]) and "step-00000025" in str(arguments):
                seen += 1
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        train(folder)

    for operation in range(1, 100):
        folder = tmp_path / str(operation)
        shutil.copytree(start, folder)
        code = exit_code(forked(lambda folder=folder, operation=operation: killed_at(folder, operation)))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert exit_code(forked(lambda folder=folder: train(folder))) == 0
        assert outcome(folder) == expected
    assert operation > 12, f"a save has only {operation - 1} operations?"


def stop_at(folder: Path, step_to_stop: int, **changes: object) -> None:
    """Train, and get SIGTERM in the middle of the step before `step_to_stop`."""

    def learning_rate(step: int) -> float:
        if step == step_to_stop - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return warmup_cosine(1e-2, floor=1e-3, warmup_steps=5, total_steps=STEPS)(step)

    train(folder, learning_rate=learning_rate, **changes)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_the_step_boundary_and_leaves(tmp_path, signum):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    model = tiny_model()
    state = tiny_state(tmp_path, model)

    def run() -> None:
        for step in state.steps():
            if step == 7:
                os.kill(os.getpid(), signum)
            state.update(loss_of(state, model, step))

    with pytest.raises(Interrupted, match="saved after 8 steps") as caught:
        run()
    assert caught.value.exit_code == 128 + signum
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    again = tiny_model()
    resumed = tiny_state(tmp_path, again)
    assert resumed.step == 8
    assert same(snapshot(resumed, again), snapshot(state, model))


def test_a_signal_during_the_last_save_stops_the_program(tmp_path):
    def learning_rate(step: int) -> float:
        if step == STEPS:  # asked for by the last save alone
            os.kill(os.getpid(), signal.SIGTERM)
        return 1e-2

    with pytest.raises(Interrupted, match=f"saved after {STEPS} steps") as caught:
        train(tmp_path, learning_rate=learning_rate)
    assert caught.value.exit_code == 143
    assert tiny_state(tmp_path, tiny_model()).step == STEPS


def test_a_run_stopped_by_a_signal_and_started_again_ends_with_the_same_bits(tmp_path, reference):
    assert exit_code(forked(lambda: stop_at(tmp_path, 13))) == 128 + signal.SIGTERM
    assert exit_code(forked(lambda: train(tmp_path))) == 0
    assert outcome(tmp_path) == reference[0]


def test_the_second_signal_acts_as_before(tmp_path):
    def program() -> None:
        model = tiny_model()
        state = tiny_state(tmp_path, model)
        for step in state.steps():
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            state.update(loss_of(state, model, step))

    assert exit_code(forked(program)) == -signal.SIGTERM


def test_handlers_come_back_when_the_loop_is_left(tmp_path):
    def former(_signum: int, _frame: FrameType | None) -> None:
        raise AssertionError("never sent")

    original = signal.signal(signal.SIGTERM, former)
    try:
        model = tiny_model()
        state = tiny_state(tmp_path, model)
        for step in state.steps():
            assert signal.getsignal(signal.SIGTERM) is not former
            state.update(loss_of(state, model, step))
            if step == 1:
                break
        assert signal.getsignal(signal.SIGTERM) is former
    finally:
        signal.signal(signal.SIGTERM, original)


class GradientOf(torch.autograd.Function):
    """The identity, with a gradient of one's choice: a finite loss with a gradient that is not."""

    @staticmethod
    def forward(ctx, loss, gradient):
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.gradient, None


BAD_LOSSES = {
    "loss nan": lambda loss: loss * math.nan,
    "loss inf": lambda loss: loss + math.inf,
    "loss overflows": lambda loss: loss * 1e30 * 1e30,
    "gradient nan": lambda loss: GradientOf.apply(loss, math.nan),
    "gradient inf": lambda loss: GradientOf.apply(loss, math.inf),
    "gradient norm overflows": lambda loss: GradientOf.apply(loss, 1e30),
}


@pytest.mark.parametrize("bad", list(BAD_LOSSES))
def test_numbers_that_are_not_finite_never_reach_the_weights(tmp_path, bad):
    model = tiny_model()
    state = tiny_state(tmp_path, model, total_steps=8, log_every=100)
    for step in state.steps():
        loss = loss_of(state, model, step)
        before = snapshot(state, model)
        state.update(BAD_LOSSES[bad](loss) if step in (3, 5) else loss)
        assert same(snapshot(state, model), before) == (step in (3, 5))
    assert state.skipped == 2
    skipped = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if "skipped" in line]
    assert skipped == [3, 5]


def test_five_skipped_steps_in_a_row_end_the_run_even_across_a_restart(tmp_path):
    model = tiny_model()
    state = tiny_state(tmp_path, model, checkpoint_every=1)
    for step in state.steps():
        if step == 5:
            break
        state.update(loss_of(state, model, step) * (math.nan if step > 1 else 1.0))
    model = tiny_model()
    state = tiny_state(tmp_path, model, checkpoint_every=1)
    assert (state.step, state.skipped) == (5, 3)

    def run() -> None:
        for step in state.steps():
            state.update(loss_of(state, model, step) * math.nan)

    with pytest.raises(NumericsError, match="5 steps in a row") as caught:
        run()
    assert caught.value.exit_code == 6
    assert state.skipped == 5
    assert tiny_state(tmp_path, tiny_model()).step == 6, "the last sound checkpoint stays"


def test_a_run_that_ends_on_skipped_steps_has_no_result(tmp_path):
    model = tiny_model()
    state = tiny_state(tmp_path, model)

    def run(state) -> None:
        for step in state.steps():
            state.update(loss_of(state, model, step) * (math.nan if step >= state.total_steps - 2 else 1.0))

    for _ in range(2):  # the same command again does not pass it off as done
        with pytest.raises(NumericsError, match="the last 2 steps of"):
            run(state)
        model = tiny_model()
        state = tiny_state(tmp_path, model)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = tiny_model()
    state = tiny_state(tmp_path, model)

    def run() -> None:
        for step in state.steps():
            if step == 9:
                model[1].running_mean.fill_(math.nan)
            state.update(loss_of(state, model, 0))

    with pytest.raises(NumericsError, match="running_mean"):
        run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]


def test_ema_weights_are_the_average_and_the_trained_weights_come_back_exactly(tmp_path):
    model = tiny_model()
    state = tiny_state(tmp_path, model, total_steps=30)
    average: dict[str, Tensor] = {}
    for step in state.steps():
        state.update(loss_of(state, model, step))
        decay = min(0.9, 1 - (1 + step) ** -0.75) if step else 0.0
        for name, weight in model.named_parameters():
            average[name] = decay * average.get(name, weight) + (1 - decay) * weight.detach()
    trained = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with state.ema_weights():
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight.detach(), average[name])
        assert not torch.equal(model[0].weight, trained["0.weight"])
    assert same(dict(model.named_parameters()), trained)

    def evaluation_that_fails() -> None:
        with state.ema_weights():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluation_that_fails()
    assert same(dict(model.named_parameters()), trained)


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_usual_ema_warmup_in_numpy(tmp_path, decay):
    """Decay n = min(decay, (1 + n) / (10 + n)), n the updates before; the first copies the weights."""
    model = nn.Linear(2, 1, bias=False)
    state = tiny_state(tmp_path, model, total_steps=30, ema_decay=decay, ema_warmup=True)
    weights = []
    for step in state.steps():
        state.update((model(torch.randn(4, 2, generator=generator(7, "batch", step))) - 3).square().mean())
        weights.append(model.weight.detach().numpy().astype(np.float64))
    average = weights[0]
    for n, weight in enumerate(weights[1:], 1):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * weight
    with state.ema_weights():
        np.testing.assert_allclose(model.weight.detach().numpy(), average, rtol=1e-5)


def test_accumulated_batches_are_one_large_batch_in_numpy(tmp_path):
    """The gradient and the loss of a step are the means over its batches: least squares, two steps of AdamW by hand."""
    rows = torch.randn(2, 3, 4, 2, generator=generator(7, "rows"), dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False).double()
    weight = model.weight.detach().numpy()[0].copy()
    settings = {"learning_rate": lambda step: 1e-2, "optimizer": OptimizerSettings(betas=(0.9, 0.99)), "clip_norm": 1e9}
    state = tiny_state(tmp_path, model, total_steps=2, gradient_accumulation=3, **settings)
    numbers = []
    for step in state.steps():
        for batch, inputs in zip(state.batches(), rows[step], strict=True):
            numbers.append((batch, state.batch))
            state.update((model(inputs) - 3).square().mean(), {"first": inputs[0, 0].item(), "second": inputs[0, 1]})
    assert numbers == [(n, n) for n in range(6)]

    first, second, losses = np.zeros(2), np.zeros(2), []
    for step, inputs in enumerate(rows.numpy().reshape(2, 12, 2), 1):
        errors = inputs @ weight - 3
        losses.append((errors**2).mean())
        gradient = 2 * (errors[:, None] * inputs).mean(0)
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        weight -= 1e-2 * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.99**step)) + 1e-8)
    np.testing.assert_allclose(model.weight.detach().numpy()[0], weight, rtol=1e-10)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-6)
    for column, name in enumerate(("first", "second")):
        means = rows[:, :, 0, column].numpy().mean(1)
        assert [line[name] for line in lines] == pytest.approx(means, rel=1e-12)


def test_a_step_with_a_batch_that_is_not_finite_is_skipped_whole(tmp_path):
    model = tiny_model()
    state = tiny_state(tmp_path, model, total_steps=3, gradient_accumulation=2)
    for step in state.steps():
        before = snapshot(state, model)
        for batch in state.batches():
            state.update(loss_of(state, model, batch) * (math.nan if batch == 2 else 1.0))
        assert same(snapshot(state, model), before) == (step == 1)
    assert state.skipped == 1


def test_a_step_with_too_few_batches_is_an_error(tmp_path):
    model = tiny_model()
    state = tiny_state(tmp_path, model, gradient_accumulation=2)

    def run() -> None:
        for step in state.steps():
            state.update(loss_of(state, model, step))

    with pytest.raises(AssertionError, match="once for every batch"):
        run()


def accumulate(folder: Path, *, stop: int | None = None) -> None:
    """8 steps of 3 batches with the usual EMA warm-up; SIGTERM in the second batch of step `stop`."""
    model = tiny_model()
    state = tiny_state(folder, model, total_steps=8, gradient_accumulation=3, ema_warmup=True)
    for step in state.steps():
        for batch in state.batches():
            if step == stop and batch == 3 * step + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            state.update(loss_of(state, model, batch))


def test_a_run_stopped_between_two_batches_of_a_step_ends_with_the_same_bits(tmp_path):
    accumulate(tmp_path / "whole")
    with pytest.raises(Interrupted, match="after 4 steps"):
        accumulate(tmp_path / "parts", stop=3)
    accumulate(tmp_path / "parts")
    last = Path("checkpoints") / "step-00000008"
    assert digests(tmp_path / "parts" / last) == digests(tmp_path / "whole" / last)
    plain = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert [line["loss_hex"] for line in plain[0]] == [line["loss_hex"] for line in plain[1]]


def test_bfloat16_is_chosen_where_the_processor_has_it(tmp_path):
    flags = Path("/proc/cpuinfo").read_text().split()
    assert computes_bfloat16(torch.device("cpu")) == bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))
    assert not computes_bfloat16(torch.device("meta"))
    model = tiny_model()
    for chosen in ("auto", "bf16", None):
        state = tiny_state(tmp_path, model, mixed_precision=chosen)
        expected = chosen if chosen != "auto" else "bf16" if computes_bfloat16(state.device) else None
        assert state.mixed_precision == expected
        loss_dtype = torch.bfloat16 if expected else torch.float32
        with state.autocast():
            assert model(torch.zeros(2, 4, device=state.device)).dtype == loss_dtype


def test_gradients_are_clipped_and_frozen_weights_stay(tmp_path):
    model = tiny_model()
    frozen = model[4].weight.clone()
    state = tiny_state(tmp_path, model, total_steps=3, clip_norm=1e-3, optimizer=OptimizerSettings(betas=(0.0, 0.0)))
    norms = []
    for step in state.steps():
        loss = loss_of(state, model, step)
        expected = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], retain_graph=True)
        norms.append(torch.linalg.vector_norm(torch.cat([g.flatten() for g in expected])).item())
        state.update(loss)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms)
    moments = [values["exp_avg"] for values in state.weights.optimizer.state.values()]
    assert torch.linalg.vector_norm(torch.cat([m.flatten() for m in moments])).item() == pytest.approx(1e-3, rel=1e-3)
    assert torch.equal(model[4].weight, frozen)


def test_learning_rates_are_functions_of_the_step(tmp_path):
    cosine = warmup_cosine(1.0, floor=0.1, warmup_steps=4, total_steps=104)
    assert [cosine(step) for step in (0, 3, 4)] == [0.25, 1.0, 1.0]
    assert cosine(54) == pytest.approx(0.55)
    assert cosine(104) == cosine(1000) == pytest.approx(0.1)
    assert warmup_cosine(1.0, floor=0.1, warmup_steps=0, total_steps=0)(0) == 1.0
    model = tiny_model()
    state = tiny_state(tmp_path, model, total_steps=6, learning_rate=cosine)
    for step in state.steps():
        state.update(loss_of(state, model, step))
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert rates == [cosine(step) for step in range(6)]


def test_another_recipe_or_another_model_is_refused_with_the_way_out(tmp_path):
    model = tiny_model()
    state = tiny_state(tmp_path, model, total_steps=5)
    for step in state.steps():
        state.update(loss_of(state, model, step))
    with pytest.raises(CheckpointError, match=r"aaaaaaaaaaaa.*bbbbbbbbbbbb.*new folder"):
        tiny_state(tmp_path, tiny_model(), recipe_digest="b" * 64)
    with pytest.raises(CheckpointError, match=r"0\.weight is \(16, 4\)"):
        tiny_state(tmp_path, nn.Sequential(nn.Linear(5, 16), *tiny_model()[1:]))
    with pytest.raises(CheckpointError, match=r"has a tensor 4\.bias"):
        tiny_state(tmp_path, tiny_model().requires_grad_(True))


def test_parameters_of_no_model_and_reserved_names_are_refused(tmp_path):
    model = tiny_model()
    settings = dict(total_steps=1, learning_rate=lambda step: 1.0, seed=0, recipe_digest=DIGEST)
    with pytest.raises(SettingsError, match="belong to the models"):
        TrainingState(tmp_path, {"mlp": model}, nn.Linear(2, 3).parameters(), **settings)
    with pytest.raises(SettingsError, match="cannot be called ema"):
        TrainingState(tmp_path, {"ema": model}, model.parameters(), **settings)


def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
    def train() -> None:
        model = tiny_model()
        state = tiny_state(tmp_path, model)
        for step in state.steps():
            state.update(loss_of(state, model, step))

    with alone(tmp_path), alone(tmp_path):
        assert exit_code(forked(train)) == SettingsError.exit_code
    assert not (tmp_path / "metrics.jsonl").exists()
    assert exit_code(forked(train)) == 0


def test_a_damaged_newest_checkpoint_falls_back_and_the_outcome_is_the_same(tmp_path, reference, caplog):
    assert exit_code(forked(lambda: stop_at(tmp_path, 23))) == 143
    victim = tmp_path / "checkpoints" / "step-00000023" / "optimizer.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    assert tiny_state(tmp_path, tiny_model()).step == 20
    assert "optimizer.safetensors is damaged: its SHA-256" in caplog.text
    assert exit_code(forked(lambda: train(tmp_path))) == 0
    assert outcome(tmp_path) == reference[0]


def with_a_small_disk(chance: random.Random, program: Callable[[], object]) -> Callable[[], object]:
    """A program whose files cannot grow beyond some size, or whose file operations fail once or from once on."""
    limit, nth = chance.randrange(3000), chance.randint(1, 40)
    what = chance.choice(["limit", f"save:enospc:{nth}", f"save:eio:{nth}", "save.write:enospc:*", "save.fsync:eio:*"])

    def run() -> None:
        if what == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        else:
            faults.arm(what)
        program()

    return run


@pytest.mark.soak("R4", ci=20, full=200)
def test_a_full_or_failing_disk_keeps_the_last_good_checkpoint(tmp_path, reference, trials: Trials):
    start = tmp_path / "start"
    assert exit_code(forked(lambda: stop_at(start, 20, log_every=100))) == 143
    assert max(path.stat().st_size for path in start.glob("checkpoints/step-00000020/*")) > 2800
    for chance in trials:
        folder = tmp_path / "run"
        shutil.copytree(start, folder)
        plain = partial(train, folder, log_every=100)
        program = with_a_small_disk(chance, plain)
        for _ in range(2):  # a supervisor that starts it again does no harm either
            code = exit_code(forked(program))
            assert code in (0, StorageError.exit_code)
            newest = latest_checkpoint(folder / "checkpoints")
            assert newest >= folder / "checkpoints" / "step-00000020"
            assert not list(folder.rglob("damaged-*"))
            if newest.name == "step-00000020":  # nothing failed while the old ones were removed
                assert not list(folder.rglob("*.tmp-*"))
        assert exit_code(forked(plain)) == 0
        assert outcome(folder)[0] == reference[0][0]
        assert not list(folder.rglob("*.tmp-*"))
        shutil.rmtree(folder)


def test_a_folder_that_is_read_only_is_a_storage_error(tmp_path_factory):
    folder = Path(tempfile.mkdtemp())  # not pytest's, which only its owner may enter

    def train_as_somebody() -> None:
        if os.getuid() == 0:  # who may write everywhere
            os.setresuid(65534, 65534, 65534)
        train(folder)

    try:
        train(folder, total_steps=5)
        folder.chmod(0o555)
        (folder / "checkpoints").chmod(0o555)
        assert exit_code(forked(train_as_somebody)) == StorageError.exit_code
        assert latest_checkpoint(folder / "checkpoints").name == "step-00000005"
    finally:
        folder.chmod(0o755)
        (folder / "checkpoints").chmod(0o755)
        shutil.rmtree(folder)


def resources() -> tuple[int, int, int]:
    """Resident bytes, open files and threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize(), *(len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))


@pytest.mark.soak("R18", ci=1, full=10)
def test_nothing_leaks(tmp_path, trials: Trials):
    """2,000 steps a trial: after 500, memory grows by less than 0.5 MiB per 100 steps, files and threads not at all."""
    steps = 2000 * trials.count

    def run() -> None:
        model, seen = tiny_model(), []
        state = tiny_state(tmp_path, model, total_steps=steps, log_every=1, checkpoint_every=100)
        for step in state.steps():
            state.update(loss_of(state, model, step % 7), samples=["same"])
            if step % 100 == 99:
                seen.append(resources())
        memory, files, threads = zip(*seen[5:], strict=True)
        slope = np.polyfit(range(len(memory)), memory, 1)[0]
        assert slope < 0.5 * 2**20, memory
        assert len(set(files)) == len(set(threads)) == 1

    assert exit_code(forked(run)) == 0
    trials.done = trials.count
