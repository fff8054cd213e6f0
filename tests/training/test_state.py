"""The training state: its loop, EMA, accumulation, precision, and what it refuses."""

import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from davae.errors import CheckpointError, SettingsError
from davae.run.record import alone, read_metrics
from davae.seeds import generator
from davae.training.devices import computes_bfloat16
from davae.training.interruption import Interrupted
from davae.training.recipes import warmup_cosine
from davae.training.state import TrainingState
from forks import exit_code, forked
from hashes import digests
from tiny_training import constant_rate, loss_of, same, tiny_model, tiny_recipe, tiny_state
from trials import Trials


def test_ema_weights_are_the_average_and_the_trained_weights_come_back_exactly(tmp_path):
    model = tiny_model()
    state = tiny_state(tmp_path, model, steps=30)
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
    state = tiny_state(tmp_path, model, steps=30, ema_decay=decay, ema_warmup=True)
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
    settings = {**constant_rate(1e-2), "betas": (0.9, 0.99), "weight_decay": 0.0, "clip_norm": 1e9}
    state = tiny_state(tmp_path, model, steps=2, gradient_accumulation=3, **settings)
    numbers = []
    for step in state.steps():
        for batch, inputs in zip(state.batches(), rows[step], strict=True):
            numbers.append(batch)
            state.update((model(inputs) - 3).square().mean(), {"first": inputs[0, 0].item(), "second": inputs[0, 1]})
    assert numbers == list(range(6))

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
    state = tiny_state(folder, model, steps=8, gradient_accumulation=3, ema_warmup=True)
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
    for chosen in ("auto", "bf16", "float32"):
        state = tiny_state(tmp_path, model, precision=chosen)
        expected = computes_bfloat16(state.device) if chosen == "auto" else chosen == "bf16"
        assert state.bfloat16 == expected
        loss_dtype = torch.bfloat16 if expected else torch.float32
        with state.autocast():
            assert model(torch.zeros(2, 4, device=state.device)).dtype == loss_dtype


def test_gradients_are_clipped_and_frozen_weights_stay(tmp_path):
    model = tiny_model()
    frozen = model[4].weight.clone()
    state = tiny_state(tmp_path, model, steps=3, clip_norm=1e-3, betas=(0.0, 0.0))
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
    settings = {"steps": 6, "learning_rate": 1.0, "final_learning_rate": 0.1, "warmup_steps": 4}
    cosine = warmup_cosine(1.0, floor=0.1, warmup_steps=4, total_steps=6)
    state = tiny_state(tmp_path, model, **settings)
    for step in state.steps():
        state.update(loss_of(state, model, step))
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert rates == [cosine(step) for step in range(6)]


def test_another_recipe_or_another_model_is_refused_with_the_way_out(tmp_path):
    model = tiny_model()
    state = tiny_state(tmp_path, model, steps=5)
    for step in state.steps():
        state.update(loss_of(state, model, step))
    ours, theirs = (tiny_recipe(steps=5, **changes).run_digest()[:12] for changes in ({}, {"seed": 8}))
    with pytest.raises(CheckpointError, match=rf"{ours}.*{theirs}.*new folder"):
        tiny_state(tmp_path, tiny_model(), steps=5, seed=8)
    with pytest.raises(CheckpointError, match=r"0\.weight is \(16, 4\)"):
        tiny_state(tmp_path, nn.Sequential(nn.Linear(5, 16), *tiny_model()[1:]), steps=5)
    with pytest.raises(CheckpointError, match=r"has a tensor 4\.bias"):
        tiny_state(tmp_path, tiny_model().requires_grad_(True), steps=5)


def test_parameters_of_no_model_and_reserved_names_are_refused(tmp_path):
    model = tiny_model()
    with pytest.raises(SettingsError, match="belong to the models"):
        TrainingState(tiny_recipe(), tmp_path, {"mlp": model}, nn.Linear(2, 3).parameters())
    with pytest.raises(SettingsError, match="cannot be called ema"):
        TrainingState(tiny_recipe(), tmp_path, {"ema": model}, model.parameters())


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
        state = tiny_state(tmp_path, model, steps=steps, log_every=1, checkpoint_every=100)
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
