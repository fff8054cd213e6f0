"""The folder of one run: one process group at a time, one recipe, one set of pictures."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from davae.data.sources import PictureSet, open_pictures
from davae.errors import CheckpointError, SettingsError
from davae.run.ranks import Ranks
from davae.run.recipe import load_recipe
from davae.run.record import alone
from davae.run.storage import read_json, remove_temporaries, write_json
from davae.training.optimizers import check_optimizer
from davae.training.recipes import OptimisationRecipe, PicturesRecipe

logger = logging.getLogger(__name__)


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
    if not path.is_file() or not any((folder / name).is_dir() for name in ("start", "checkpoints")):
        return

    try:
        # The file may be older: a setting that it lacks has its default.
        theirs = load_recipe(type(recipe), path)
    except SettingsError as error:
        raise CheckpointError(
            f"{folder} holds a run of the other stage, or of a newer davae, see {path}. Give a new folder"
        ) from error

    # Settings that may change during a run are not compared.
    differences = []
    for name in type(recipe).model_fields:
        if name not in recipe.free_to_change and getattr(theirs, name) != getattr(recipe, name):
            differences.append(f"{name} = {getattr(theirs, name)!r}")
    if differences:
        raise CheckpointError(
            f"{folder} holds a run of another recipe, see {path}, where {', '.join(differences)}. "
            "Give that recipe to go on with it, or a new folder"
        )


def open_training_pictures(
    recipe: PicturesRecipe, folder: Path | None, *, captions: bool = True, classes: bool = False
) -> PictureSet:
    """The training split, every image decoded once; refused images are listed in `folder`/refused.json."""
    kind = {"captions": captions, "classes": classes}
    pictures = open_pictures(
        recipe.source, size=recipe.size, split="train", limit=recipe.limit, buckets=recipe.buckets, **kind
    )
    report = None if folder is None else folder / "refused.json"
    return pictures.sound(report, max_unreadable=recipe.max_unreadable)


def check_same_pictures(folder: Path, keys: Sequence[str]) -> None:
    """Note in `folder`/pictures.json which images a run trains on; refuse to resume with images of other names."""
    path = folder / "pictures.json"
    facts = {"count": len(keys), "sha256_of_names": hashlib.sha256("\n".join(keys).encode()).hexdigest()}
    if not path.is_file() or not any((folder / "checkpoints").glob("step-*")):
        write_json(path, facts)
    elif (before := read_json(path)) != facts:
        raise CheckpointError(
            f"the run in {folder} has trained on {before['count']} pictures, and there are {facts['count']} now, "
            "of other names: their order would change midway. Bring the set back to what it was, or give a new folder"
        )
