"""The queue and the worker without a server: order, batches, bounds, and what happens when a pipeline fails."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
import torch

import tiny_pipelines
from davae.errors import NumericsError, SettingsError
from davae.serving.jobs import (
    CancelledJobError,
    Done,
    FailedJobError,
    ImageJob,
    ImageSettings,
    JobQueue,
    QueueFullError,
    ServerEndsError,
)
from davae.serving.metrics import Metrics
from davae.serving.models import Model
from davae.serving.worker import Worker
from tiny import tiny_sd3_pipeline

# diffusers' own, of the schedulers of SANA and PixArt.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SMALL = ImageSettings("tiny", 32, 32, 2, 1.0)


def job(name: str, settings: ImageSettings = SMALL, count: int = 1) -> ImageJob:
    return ImageJob(settings, "red apple", 0, count, name=name)


def names(jobs: list[Any]) -> list[str]:
    return [job.name for job in jobs]


async def last_event(job: ImageJob) -> Done:
    async for event in job.events():
        last = event
    assert isinstance(last, Done)
    return last


def run(program: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(program, 280))


def test_batches_are_of_equal_settings_and_begin_with_the_oldest() -> None:
    async def program() -> None:
        queue, other = JobQueue(8), SMALL._replace(steps=3)
        for waiting in (job("a"), job("b", other), job("c", count=2), job("d", count=2), job("e"), job("f", other)):
            queue.put(waiting)
        assert names(queue.take(4)) == ["a", "c", "e"]  # "d" would make five images
        assert names(queue.take(4)) == ["b", "f"]
        assert names(queue.take(4)) == ["d"]

    run(program())


def test_a_full_queue_refuses_and_a_cancelled_job_holds_no_place() -> None:
    async def program() -> None:
        queue, leaving = JobQueue(2), job("leaving")
        queue.put(leaving)
        queue.put(job("staying"))
        with pytest.raises(QueueFullError, match="2 requests wait"):
            queue.put(job("late"))
        leaving.cancel()
        queue.put(job("next"))
        assert names(queue.take(8)) == ["staying", "next"]
        with pytest.raises(CancelledJobError):
            await leaving.next_event()

    run(program())


def test_a_closed_queue_ends_what_waits_and_sends_workers_home() -> None:
    async def program() -> None:
        queue, waiting = JobQueue(2), job("waiting")
        queue.put(waiting)
        queue.close()
        assert queue.take(1) == []
        with pytest.raises(ServerEndsError):
            await waiting.next_event()
        with pytest.raises(ServerEndsError):
            queue.put(job("late"))

    run(program())


def test_whoever_ends_a_job_first_decides() -> None:
    async def program() -> None:
        late, early = job("late"), job("early")
        late.send(Done([], 0.0))
        late.cancel()
        assert isinstance(await late.next_event(), Done)
        early.cancel()
        early.send(Done([], 0.0))
        with pytest.raises(CancelledJobError):
            await early.next_event()

    run(program())


def test_numbers_that_are_not_finite_are_no_image_and_the_worker_goes_on() -> None:
    async def program() -> None:
        model, queue = Model("tiny", tiny_sd3_pipeline(), 32), JobQueue(4)
        worker = Worker({"tiny": model}, queue, Metrics(), batch=4)
        worker.start()
        broken, sound = job("broken"), job("sound")
        weight = model.pipeline.transformer.proj_out.weight
        with torch.no_grad():
            kept = weight.clone()
            weight.fill_(float("nan"))
        queue.put(broken)
        with pytest.raises(NumericsError, match="not finite"):
            await last_event(broken)

        with torch.no_grad():
            weight.copy_(kept)
        queue.put(sound)
        done = await last_event(sound)
        assert done.images[0].size == (32, 32)
        queue.close()
        worker.join()

    run(program())


def test_a_worker_whose_warm_up_fails_after_a_failure_ends_and_nothing_waits_for_it() -> None:
    async def program() -> None:
        model, queue = Model("tiny", tiny_sd3_pipeline(), 32), JobQueue(4)
        model.pipeline.transformer.proj_out = torch.nn.Linear(3, 3)  # fits nothing
        worker = Worker({"tiny": model}, queue, Metrics(), batch=1)
        first, second = job("first"), job("second")
        queue.put(first)
        queue.put(second)
        worker.start()
        with pytest.raises(FailedJobError, match="log says why"):
            await last_event(first)
        with pytest.raises(ServerEndsError, match="worker failed"):
            await last_event(second)
        worker.join(60)
        assert not worker.is_alive()

    run(program())


def test_copies_work_at_the_same_time_on_shared_weights() -> None:
    """Tokenizers keep the padding of their last call, and schedulers their step: those are the copy's own."""

    async def program() -> None:
        first = Model("tiny", tiny_sd3_pipeline(), 32)
        models = [first, first.copied(), first.copied()]
        for name, part in first.pipeline.components.items():
            shared = models[1].pipeline.components[name] is part
            assert shared == (part is None or isinstance(part, torch.nn.Module)), name

        jobs = [job(f"{number}", SMALL._replace(steps=number % 3 + 2)) for number in range(12)]
        alone = [first.make_images([waiting])[0][0].tobytes() for waiting in jobs]
        for _ in range(3):
            tasks = [asyncio.to_thread(work, models[number], jobs[number::3]) for number in range(3)]
            made = await asyncio.gather(*tasks)
            for number in range(3):
                assert made[number] == alone[number::3]

    def work(model: Model, jobs: list[ImageJob]) -> list[bytes]:
        return [model.make_images([waiting])[0][0].tobytes() for waiting in jobs]

    run(program())


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart_sigma", "sana"])
def test_what_has_no_previews_says_so_and_makes_images(name: str) -> None:
    """Packed latents, other schedulers, and pipelines that do not tell their steps."""

    async def program() -> None:
        model = Model("tiny", tiny_pipelines.quiet(getattr(tiny_pipelines, name)()), 32)
        model.warm_up()
        assert (model.no_previews == "") == (name == "sd3"), model.no_previews
        settings = SMALL._replace(width=model.side, height=model.side)
        images = model.make_images([job("a", settings, count=2), job("b", settings)])
        assert [len(part) for part in images] == [2, 1]
        assert images[0][0].tobytes() != images[0][1].tobytes()

    run(program())


def test_pipelines_for_classes_are_refused() -> None:
    with pytest.raises(SettingsError, match="class numbers"):
        Model("tiny", tiny_pipelines.dit())
