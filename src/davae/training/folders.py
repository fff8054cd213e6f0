"""The folder of one run: one process group at a time, one recipe, the same inputs at every start."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from davae.data.order import ORDER
from davae.data.sources import PictureSet, open_pictures
from davae.data.split import SPLIT
from davae.errors import CheckpointError, SettingsError
from davae.run.ranks import Ranks
from davae.run.recipe import load_recipe
from davae.run.record import alone
from davae.run.storage import read_json, remove_temporaries, write_json
from davae.training.optimizers import check_optimizer
from davae.training.recipes import OptimisationRecipe, PicturesRecipe

logger = logging.getLogger(__name__)

# Digests, by name, of all that a run starts from.
INPUTS = "inputs.json"


@contextmanager
def claim_folder(recipe: OptimisationRecipe, folder: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the folder's lock, after refusing a folder in which a run of another recipe has begun.

    Settings that take effect only after the run's end are logged.

    Raises:
        CheckpointError: one has; the message names the settings that differ.
        SettingsError: another process trains there, or the ranks cannot use the optimiser or share the batch.
        StorageError: the folder cannot be written.
        RankError: a process of this run is missing, now or before the end.
    """
    check_optimizer(recipe.optimizer, ranks)
    ranks.check_divides("batch_size", recipe.batch_size)
    with ExitStack() as stack, ranks.together("a step"):

        def enter() -> None:
            stack.enter_context(alone(folder))
            remove_temporaries(folder)
            check_same_recipe(recipe, folder)
            for sentence in recipe.late_settings():
                logger.warning("%s in the %d steps of this run", sentence, recipe.steps)

        ranks.on_first(enter)
        yield


def check_same_recipe(recipe: OptimisationRecipe, folder: Path) -> None:
    """Refuse a folder in which a run of another recipe has begun."""
    path = folder / "recipe.toml"
    if not path.is_file() or not has_begun(folder):
        return

    try:
        # The file may be older: a setting that it lacks has its default.
        theirs = load_recipe(type(recipe), path)
    except SettingsError as error:
        raise CheckpointError(
            f"{folder} holds a run of the other stage, or of a newer davae, see {path}. Give a new folder"
        ) from error

    # Settings that may change during a run are not compared; nor are places, where the content at them is.
    is_recorded, free = (folder / INPUTS).is_file(), recipe.free_beside(theirs)
    differences = []
    for name in type(recipe).model_fields:
        before, now = getattr(theirs, name), getattr(recipe, name)
        if name in recipe.places:
            is_same = is_recorded or before.rstrip("/") == now.rstrip("/")
        else:
            is_same = name in free or before == now
        if not is_same:
            differences.append(f"{name} = {before!r}")
    if differences:
        raise CheckpointError(
            f"{folder} holds a run of another recipe, see {path}, where {', '.join(differences)}. "
            f"{_advise(recipe, theirs)}Give that recipe to go on with it, or a new folder"
        )


def _advise(recipe: OptimisationRecipe, theirs: OptimisationRecipe) -> str:
    """How a run of the recipe `theirs` gets more steps, or ""."""
    if recipe.steps <= theirs.steps or "steps" in recipe.free_beside(theirs):
        return ""
    restarts = json.dumps([*theirs.restarts, theirs.steps])
    return (
        f"Its learning rate falls until step {theirs.steps}, so with more steps it would have been another one. To let "
        f"warm-up and fall begin anew there: --set steps={recipe.steps} --set 'restarts={restarts}'. "
    )


def open_training_pictures(
    recipe: PicturesRecipe,
    folder: Path | None,
    *,
    captions: bool = True,
    classes: bool = False,
    begun: Path | None = None,
) -> PictureSet:
    """The training split, every image decoded once; refused images are listed in `folder`/refused.json.

    A run that has `begun` in a folder keeps its order, its split and its class numbers, and its images if none of them
    was held out, which former versions did with some small sets.
    """
    record: dict[str, Any] = {"order": ORDER, "split": SPLIT}
    numbers: dict[str, int] = {}
    if begun is not None and has_begun(begun):
        record = read_record(begun)
        numbers = read_json(begun / "classes.json") if (begun / "classes.json").is_file() else {}

    def read(split: str | None) -> PictureSet:
        kind: dict[str, Any] = {
            "captions": captions,
            "classes": classes,
            "class_names": sorted(numbers, key=lambda name: numbers[name]),
            "keys_alone": record["split"] == 1,
        }
        pictures = open_pictures(
            recipe.source, size=recipe.size, split=split, limit=recipe.limit, buckets=recipe.buckets, **kind
        )
        pictures.order = record["order"]
        report = None if folder is None else folder / "refused.json"
        return pictures.sound(report, max_unreadable=recipe.max_unreadable)

    pictures = read("train")
    names = record.get("sha256_of_names")
    if names and names != _digest_lines(pictures.keys) and names == _digest_lines((whole := read(None)).keys):
        logger.warning("this run began without a held-out image, and goes on so: it trains on all %d", len(whole))
        return whole
    return pictures


def read_record(folder: Path) -> dict[str, Any]:
    """What a run that has begun noted about its images: the versions of order and split, their number and names."""
    path = folder / "pictures.json"
    # Runs of versions 1 noted none, the first ones nothing at all.
    record = {"order": 1, "split": 1} | (read_json(path) if path.is_file() else {})
    for name, newest in (("order", ORDER), ("split", SPLIT)):
        if record[name] not in range(1, newest + 1):
            raise CheckpointError(f"{path} has the {name} {record[name]}, davae knows 1 to {newest}: update davae")
    return record


def has_begun(folder: Path) -> bool:
    """Whether a run has left something in the folder that its next start goes on with."""
    return any((folder / name).exists() for name in ("start", "checkpoints", "result.json"))


def digest_pictures(pictures: PictureSet, *, captions: bool) -> dict[str, str]:
    """Digests of the images' bytes, of their order and, with `captions`, of their captions and classes."""
    contents = list(map(pictures.fingerprint, range(len(pictures))))
    digests = {"pictures": _digest_lines(sorted(contents)), "order of the pictures": _digest_lines(contents)}
    if captions:
        # In an order of their own, so that rows in another order have the same captions.
        texts: list[str] = []
        for entry, content in zip(pictures.entries, contents, strict=True):
            texts.append(json.dumps([content, entry.caption, entry.label]))
        digests["captions or classes"] = _digest_lines(sorted(texts))
    return digests


def check_same_inputs(folder: Path, inputs: Mapping[str, str], pictures: PictureSet, ranks: Ranks) -> None:
    """Refuse to go on with a run in `folder` that began with other inputs, and ranks that see different ones.

    Inputs that only one of the two records names are not compared: those of older runs, and those that are gone and no
    longer needed.
    """
    # The ranks learn from each other who differs from rank 0, so that all of them stop.
    first = ranks.on_first(lambda: dict(inputs))
    differs = torch.tensor([[name in inputs and inputs[name] != first[name] for name in first]]).long()
    problems = []
    for rank, flags in enumerate(ranks.gather(differs).tolist()):
        names = [name for name, flag in zip(first, flags, strict=True) if flag]
        if names:
            problems.append(f"rank {rank} differs from rank 0 in: {', '.join(names)}")
    if problems:
        raise CheckpointError(
            f"the processes of this run do not start from the same: {'; '.join(problems)}. Let all of them see the "
            "same files, whole, and run again"
        )
    ranks.on_first(lambda: _check_record(folder, inputs, pictures))


def _check_record(folder: Path, inputs: Mapping[str, str], pictures: PictureSet) -> None:
    if not has_begun(folder):
        return

    # Names come first: of pictures that were added or removed the number says more.
    before, facts = read_record(folder), _describe_pictures(pictures)
    if before != facts and "count" in before:
        raise CheckpointError(
            f"the run in {folder} has trained on {before['count']} pictures, and there are {facts['count']} now, "
            "of other names: their order would change midway. Bring the set back to what it was, or give a new folder"
        )

    record = read_json(folder / INPUTS) if (folder / INPUTS).is_file() else {}
    changed = [name for name, digest in inputs.items() if record.get(name, digest) != digest]
    if changed:
        raise CheckpointError(
            f"the run in {folder} began with other inputs. Changed since then: {', '.join(changed)}. Bring back what "
            f"was there, or give a new folder ({folder / INPUTS} has a digest of each input)"
        )


def note_inputs(folder: Path, inputs: Mapping[str, str], pictures: PictureSet) -> None:
    """Write the record of the inputs, once they are checked; that of an older run gains what it lacks."""
    record = read_json(folder / INPUTS) if has_begun(folder) and (folder / INPUTS).is_file() else {}
    write_json(folder / INPUTS, {**record, **inputs})
    write_json(folder / "pictures.json", _describe_pictures(pictures))


def _describe_pictures(pictures: PictureSet) -> dict[str, int | str]:
    versions = {"order": pictures.order, "split": pictures.split}
    return {**versions, "count": len(pictures), "sha256_of_names": _digest_lines(pictures.keys)}


def _digest_lines(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
