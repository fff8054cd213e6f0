"""Numbers that are not finite, put in at any place of both stages' steps, never reach weights or checkpoints."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from davae.errors import NumericsError
from davae.run import faults
from davae.run.record import read_metrics
from davae.training.stage_one_recipe import LossWeights
from davae.training.stage_one_run import train_autoencoder
from davae.training.stage_two_run import finetune
from hashes import digests
from stages import autoencoder_recipe, finetune_recipe, newest_step
from trials import Trials

STEPS = 6
BAD = 4
"""The step with the fault, to which the runs go on from a checkpoint before it."""
SITES = {
    "stage 1": ("encode", "forward", "loss", "grad", "ema"),
    "stage 1, adversarial": ("data", "discriminator"),
    "stage 2": ("encode", "text", "forward", "loss", "grad", "ema"),
}


@pytest.fixture(scope="module", params=SITES)
def run(request, base_folder, autoencoder_folder, picture_folder, tmp_path_factory):
    """A function from a folder and a fault to a run with it; what is slow to make is copied from a run without."""
    changes = {"steps": STEPS, "checkpoint_every": 1}
    if request.param == "stage 2":
        recipe, train = finetune_recipe(base_folder, autoencoder_folder, picture_folder, **changes), finetune
    else:
        changes |= {"evaluate_every": 100, "heldout_pictures": 1, "calibration_pictures": 2}
        if request.param == "stage 1, adversarial":
            changes["loss"] = LossWeights(adversarial=0.1)
        recipe, train = autoencoder_recipe(base_folder, picture_folder, **changes), train_autoencoder
    begun = tmp_path_factory.mktemp("begun")
    train(recipe, begun)
    (begun / "result.json").unlink()
    for name in (
        "autoencoder",
        "pipeline",
        "adapter",
        "pictures",
        "checkpoints/step-00000005",
        "checkpoints/step-00000006",
    ):
        shutil.rmtree(begun / name, ignore_errors=True)
    assert newest_step(begun) == BAD

    def with_fault(folder: Path, fault: str, *, anew: bool = False) -> None:
        shutil.copytree(begun, folder)
        if anew:
            shutil.rmtree(folder / "checkpoints")
        faults.arm(fault)
        try:
            train(recipe, folder)
        finally:
            faults.arm("")

    with_fault.stage = request.param
    return with_fault


def tensors(folder: Path, step: int, *, discriminator: bool) -> dict[str, str]:
    found = digests(folder / "checkpoints" / f"step-{step:08d}")
    return {name: value for name, value in found.items() if name.startswith("discriminator") == discriminator}


def all_finite(folder: Path) -> bool:
    files = list(folder.glob("checkpoints/step-*/*.safetensors"))
    return bool(files) and all(tensor.isfinite().all() for file in files for tensor in load_file(file).values())


@pytest.mark.soak("R7", ci=1, full=1)
def test_one_step(run, trials: Trials, tmp_path: Path) -> None:
    """The step is skipped whole and logged, and the run goes on; where 1e30 overflows nothing, it is clipped."""
    skipped = []
    for site in SITES[run.stage]:
        for action in faults.NUMBERS:
            folder = tmp_path / f"{site} {action}"
            fault = f"{site}:{action}:1"
            if site == "ema":
                with pytest.raises(NumericsError, match=f"step {BAD + 1}: ema tensor"):
                    run(folder, fault)
                assert newest_step(folder) == BAD
            else:
                run(folder, fault)
                lines = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
                assert [line["step"] for line in lines] == list(range(STEPS))
                seen = [line["step"] for line in lines if "skipped" in line]
                assert seen in ([], [BAD])
                if seen:
                    assert lines[BAD]["samples"]
                    skipped.append((site, action))
                before, after, later = (
                    tensors(folder, step, discriminator=site == "discriminator") for step in (BAD, BAD + 1, BAD + 2)
                )
                if seen or (site == "discriminator" and action != "huge"):
                    assert before == after
                assert after != later
            assert all_finite(folder)
            trials.done += 1
    assert {(site, action) for site in SITES[run.stage] for action in ("nan", "inf")} - set(skipped) <= {
        (site, action) for site in ("ema", "discriminator") for action in ("nan", "inf")
    }


@pytest.mark.soak("R7", ci=1, full=1)
def test_every_step(run, trials: Trials, tmp_path: Path) -> None:
    """The run ends after five, with its own exit code; what it has saved is what it began with."""
    for site in SITES[run.stage]:
        folder = tmp_path / site
        with pytest.raises(NumericsError, match=r"5 steps in a row|ema tensor") as caught:
            run(folder, f"{site}:nan:*", anew=True)
        assert caught.value.exit_code == 6
        if site == "ema":
            assert newest_step(folder) == 0
        else:
            assert newest_step(folder) == 4
            assert all_finite(folder)
            first, last = (tensors(folder, step, discriminator=site == "discriminator") for step in (2, 4))
            assert first == last
        trials.done += 1
