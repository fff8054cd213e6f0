"""The run of a job: its steps in order, each once, with a page that says how far it is."""

import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from davae.backbones import backbone_of
from davae.errors import DavaeError
from davae.job.estimate import check_disk, estimate_job
from davae.job.page import PageState, write_job_page
from davae.job.recipe import STAGE_ONE, STAGE_TWO, JobRecipe
from davae.job.record import PAGE, JobRecord, combine
from davae.job.steps import STEPS, Job, Step
from davae.job.trial import try_job
from davae.pipelines.loading import load_pipeline
from davae.run.progress import announce
from davae.run.ranks import TIMEOUT, Ranks
from davae.run.record import alone
from davae.training.folders import check_same_recipe, has_begun, open_training_pictures
from davae.training.stage_two_run import name_base
from davae.training.trackers import check_trackers

# Below the job's folder, for the steps that are timed; removed after them.
TRIAL = "trial"


def run_job(recipe: JobRecipe, folder: Path, *, report_to: Sequence[str] = (), rank_timeout: float = TIMEOUT) -> Path:
    """Do all steps of a job that are not done yet, and return the path of its page. Called again, a job goes on.

    A finished step is not done again. Each stage goes on at its last checkpoint, and refuses a folder in which a run
    of another recipe has begun.

    Args:
        recipe: the three parts of the job (`davae.job.recipe.load_job`).
        folder: the job's folder, which every rank must see.
        report_to: trackers that get the metrics of both stages, too.
        rank_timeout: seconds that a rank waits for another.

    Raises:
        SettingsError: the folder is not the job's to write to, or another process runs a job in it.
        CheckpointError: the folder has a job of another recipe.
        StorageError: the disk is too small for the job, or full.
        DavaeError: errors of the steps.
    """
    check_trackers(report_to)
    ranks = Ranks(rank_timeout)
    with alone(folder) if ranks.first else nullcontext():
        # Both stages refuse what another recipe has begun, before anything is timed or trained.
        for name, stage in ((STAGE_ONE, recipe.stage_one), (STAGE_TWO, recipe.stage_two)):
            ranks.on_first(partial(check_same_recipe, stage, folder / name))
        record = ranks.first_then_all(lambda: JobRecord(folder, writes=ranks.first))
        state = PageState(recipe, folder, record)

        job = Job(recipe, folder, ranks, report_to, rank_timeout, lambda: ranks.on_first(lambda: write_job_page(state)))
        ranks.on_first(record.write)
        note_estimate(job, record)
        for name, step in STEPS.items():
            _take(name, step, job, record, state)
    return folder / PAGE


def note_estimate(job: Job, record: JobRecord) -> None:
    """Time three steps of each stage before the first step, and say how long the job takes; later, say it again."""
    if not record.values["estimate"] and not any(has_begun(job.folder / name) for name in (STAGE_ONE, STAGE_TWO)):
        announce("estimate: three steps of each stage are timed")
        base = load_pipeline(name_base(job.recipe.stage_two))
        pictures = open_training_pictures(job.recipe.stage_two, None, classes=backbone_of(base.transformer).classes)

        # All ranks write below the same folder, and rank 0 removes it.
        trial = try_job(job.recipe, base, job.folder / TRIAL)
        estimate = estimate_job(job.recipe, trial, base, len(pictures))
        job.ranks.on_first(lambda: shutil.rmtree(job.folder / TRIAL, ignore_errors=True))
        job.ranks.on_first(lambda: check_disk(job.folder, estimate.disk_bytes))
        record.note_estimate(estimate.to_json())
    if record.values["estimate"]:
        announce(f"the job takes {record.values['estimate']['text']}")


def _take(name: str, step: Step, job: Job, record: JobRecord, state: PageState) -> None:
    """Do one step, unless it is done; the page shows what is going on, and why it stopped."""
    key = combine(job.recipe, *step.parts)
    if job.ranks.on_first(lambda: record.is_finished(name, key, job.folder / step.leaves)):
        return

    announce(f"{list(STEPS).index(name) + 1} of {len(STEPS)}: {name}: {step.purpose}")
    state.running, began = name, time.monotonic()
    job.show()
    try:
        facts = step.work(job)
    except (DavaeError, KeyboardInterrupt) as error:
        # Not by all ranks together: they may not all be there any more.
        state.problem = str(error) or "stopped"
        if job.ranks.first:
            write_job_page(state)
        raise

    record.finish(name, key, time.monotonic() - began, facts)
    state.running = ""
    job.show()
