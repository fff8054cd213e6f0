"""The page of a job: how far it is, its losses, its pictures over the steps, and what the numbers say."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from davae.evaluation.report import Curves, draw_curves, read_series
from davae.job.estimate import in_words
from davae.job.numbers import BASE, REAL, UPGRADE, make_numbers
from davae.job.recipe import STAGE_ONE, STAGE_TWO, JobRecipe
from davae.job.record import PAGE, JobRecord
from davae.job.steps import STEPS
from davae.job.verdicts import judge_distance, judge_reconstruction
from davae.run.record import read_metrics
from davae.run.storage import write_atomically
from davae.training.recipes import OptimisationRecipe

# Pictures in a strip; of more, the first, the last and others between them are shown.
MOST_IN_A_STRIP = 6


@dataclass
class PageState:
    """What the page needs beside the files of the job."""

    recipe: JobRecipe
    folder: Path
    record: JobRecord
    running: str = ""
    """The step that is going on."""
    problem: str = ""
    """Why it stopped."""

    def __post_init__(self) -> None:
        self.stages: dict[str, tuple[Path, OptimisationRecipe]] = {
            "stage 1": (self.folder / STAGE_ONE, self.recipe.stage_one),
            "stage 2": (self.folder / STAGE_TWO, self.recipe.stage_two),
        }


def write_job_page(state: PageState) -> None:
    """Write index.html of the job's folder, whole or not at all; its pictures are the files of the steps."""
    loader = ChoiceLoader([PackageLoader("davae.job"), PackageLoader("davae.evaluation")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    # matplotlib has escaped the names of the curves.
    environment.filters["svg"] = lambda curves: Markup(draw_curves(curves))

    facts = {name: step["facts"] for name, step in state.record.steps.items()}
    page = environment.get_template("run.html").render(
        title=f"davae run: {state.folder.name}",
        lead=describe_progress(state),
        problem=state.problem,
        running=bool(state.running) and not state.problem,
        steps=list_steps(state),
        images=facts.get("inspect", {}).get("inspection"),
        estimate=state.record.values["estimate"].get("text", ""),
        numbers=make_numbers(facts.get("evaluate", {})),
        verdicts=judge(facts.get("evaluate", {})),
        columns=(BASE, UPGRADE, REAL),
        shown=facts.get("generate", {}).get("shown", []),
        upgrade=facts.get("upgrade", {}),
        curves=make_curves(state),
        strips=make_strips(state),
        finished="model card" in facts and not state.running,
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    )
    write_atomically(state.folder / PAGE, page.encode())


def describe_progress(state: PageState) -> str:
    """One sentence: what is going on, how far, how long it still takes."""
    names, finished = list(STEPS), state.record.steps
    if not state.running:
        is_done = all(name in finished for name in names)
        return "Finished: the upgraded pipeline is in finetune/pipeline." if is_done else "Not finished yet."
    place = f"Step {names.index(state.running) + 1} of {len(names)}, {state.running}"
    if state.running in state.stages:
        done, total, _ = read_progress(*state.stages[state.running])
        place += f": {done:,} of {total:,} steps"
    left = estimate_left(state)
    verb = "stopped" if state.problem else "running"
    return f"{place}; {verb}" + ("." if left is None else f", about {in_words(left)} left.")


def estimate_left(state: PageState) -> float | None:
    """Seconds that are left, by the speed of the running stage and by the estimate for what comes after it."""
    estimated: dict[str, float] = state.record.values["estimate"].get("seconds", {})
    names = list(STEPS)
    left, is_known = 0.0, bool(estimated)
    for name in names[names.index(state.running) :]:
        seconds = estimated.get(name, 0.0)
        if name == state.running and name in state.stages:
            done, total, spent = read_progress(*state.stages[name])
            if done and spent:
                seconds, is_known = (total - done) * spent / done, True
        left += seconds
    return left if is_known else None


def read_progress(folder: Path, recipe: OptimisationRecipe) -> tuple[int, int, float]:
    """Steps that are done, all steps, and the seconds of those that are done."""
    path, done, seconds = folder / "metrics.jsonl", 0, 0.0
    for line in read_metrics(path) if path.is_file() else ():
        done, seconds = max(done, line["step"]), line.get("seconds", seconds)
    is_finished = (folder / "result.json").is_file()
    return (recipe.steps if is_finished else min(done, recipe.steps)), recipe.steps, seconds


def list_steps(state: PageState) -> list[dict[str, Any]]:
    """A row for each step: its state in words, its share that is done, how long it took or may take."""
    rows = []
    estimated = state.record.values["estimate"].get("seconds", {})
    for name, step in STEPS.items():
        row = {"name": name, "purpose": step.purpose, "state": "to do", "share": 0.0, "time": ""}
        if name == state.running:
            row["state"] = "stopped" if state.problem else "running"
        elif name in state.record.steps:
            row |= {"state": "done", "share": 1.0, "time": in_words(state.record.steps[name]["seconds"])}
        elif name in estimated:
            row["time"] = f"about {in_words(estimated[name])}"

        # A stage tells how far it is.
        if name in state.stages and row["state"] in ("running", "stopped"):
            done, total, seconds = read_progress(*state.stages[name])
            row |= {"share": done / max(1, total), "time": f"{in_words(seconds)} so far"}
        rows.append(row)
    return rows


def judge(facts: dict[str, Any]) -> list[str]:
    """The numbers in words."""
    if "reconstruction" not in facts:
        return []
    sentences = [judge_reconstruction(facts["reconstruction"], facts["heldout"])]
    if facts["kid"]:
        sentences.append(judge_distance(facts["kid"], facts["count"]))
    else:
        sentences.append(facts["no_kid"])
    return sentences


def make_curves(state: PageState) -> list[tuple[str, Curves]]:
    """The losses of each stage that has some."""
    drawn = []
    for name, names in (("stage 1", ("l1", "lpips", "alignment")), ("stage 2", ("base_loss", "detail_loss"))):
        series = read_series(state.stages[name][0], names)
        if series and len(series[0].steps) > 1:
            drawn.append((name, Curves(series, smoothing=5, logarithmic=name == "stage 1")))
    return drawn


def make_strips(state: PageState) -> list[dict[str, Any]]:
    """The validation pictures of each stage over the steps, with their paths from the page."""
    captions = {
        "stage 1": "Held-out images above, their reconstructions below.",
        "stage 2": "A column for each prompt: the trained weights above, their moving average below.",
    }

    strips = []
    for name, (folder, _) in state.stages.items():
        paths = sorted((folder / "pictures").glob("????????.png"))
        pictures = []
        for path in spread(paths, MOST_IN_A_STRIP):
            # A file that is written anew has the same name: the time keeps browsers from showing the old one.
            source = f"{path.relative_to(state.folder).as_posix()}?{path.stat().st_mtime_ns // 10**9}"
            pictures.append({"source": source, "step": int(path.stem), "stage": name})

        if pictures:
            strips.append({"stage": name, "caption": captions[name], "pictures": pictures, "count": len(paths)})
    return strips


def spread(items: Sequence[Path], most: int) -> list[Path]:
    """At most so many items, evenly spread, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[place * (len(items) - 1) // (most - 1)] for place in range(most)]
