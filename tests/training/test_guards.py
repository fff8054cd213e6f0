"""Numbers that are not finite never reach weights or checkpoints."""

import math

import pytest
import torch

from davae.errors import NumericsError
from davae.run.record import read_metrics
from tiny_training import loss_of, same, snapshot, tiny_model, tiny_state


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
    state = tiny_state(tmp_path, model, steps=8, log_every=100)
    for step in state.steps():
        loss = loss_of(state, model, step)
        before = snapshot(state, model)
        state.update(BAD_LOSSES[bad](loss) if step in (3, 5) else loss)
        assert same(snapshot(state, model), before) == (step in (3, 5))
    assert state.guard.skipped == 2
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
    assert (state.step, state.guard.skipped) == (5, 3)

    def run() -> None:
        for step in state.steps():
            state.update(loss_of(state, model, step) * math.nan)

    with pytest.raises(NumericsError, match="5 steps in a row") as caught:
        run()
    assert caught.value.exit_code == 6
    assert state.guard.skipped == 5
    assert tiny_state(tmp_path, tiny_model(), checkpoint_every=1).step == 6, "the last sound checkpoint stays"


def test_a_run_that_ends_on_skipped_steps_has_no_result(tmp_path):
    model = tiny_model()
    state = tiny_state(tmp_path, model)

    def run(state) -> None:
        for step in state.steps():
            state.update(loss_of(state, model, step) * (math.nan if step >= state.recipe.steps - 2 else 1.0))

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


def test_a_step_with_a_batch_that_is_not_finite_is_skipped_whole(tmp_path):
    model = tiny_model()
    state = tiny_state(tmp_path, model, steps=3, gradient_accumulation=2)
    for step in state.steps():
        before = snapshot(state, model)
        for batch in state.batches():
            state.update(loss_of(state, model, batch) * (math.nan if batch == 2 else 1.0))
        assert same(snapshot(state, model), before) == (step == 1)
    assert state.guard.skipped == 1
