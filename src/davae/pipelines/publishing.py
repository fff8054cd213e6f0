"""Model cards, and uploads of saved folders to the Hugging Face Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from davae.errors import SettingsError, StorageError
from davae.pipelines.adapter import INDEX
from davae.run.recipe import Recipe
from davae.run.record import environment
from davae.run.storage import write_atomically

CARD = "README.md"
PATHS = ("base", "autoencoder", "adapter", "pictures")
"""The settings of a recipe that may be paths of this machine: only their last part is for others."""


def make_model_card(
    recipe: Recipe, *, usage: str, base: str, data: str, metrics: Mapping[str, Any], counts: Mapping[str, int]
) -> str:
    """A card: base model, licence, data, hyper-parameters, command and metrics.

    Args:
        recipe: of the run.
        usage: lines of Python that load the result.
        base: folder or Hub name of the base pipeline. Its licence is read from the card in that folder; the Hub is not
            asked, and then the card says that the base's licence holds.
        data: what it was trained on, for people.
        metrics: measured at the end of the run, by name.
        counts: how many samples they stand on, by name.
    """
    head = _head(base)
    where = environment()
    given = recipe.model_dump()
    settings = recipe.model_copy(
        update={key: Path(given[key]).name for key in PATHS if Path(given.get(key, "")).is_absolute()}
    )
    numbers = [f"| {key.replace('_', ' ')} | {_number(value)} |" for key, value in metrics.items()]
    amounts = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in counts.items())
    return f"""{head}
Data: {data}.

```python
{usage.strip()}
```

| metric, of the last step | |
|---|---:|
{chr(10).join(numbers)}

Counts: {amounts}.

## How it was made

Command: `{" ".join(where["command"])}`, commit {where["commit"] or "unknown"}; {_versions(where)}.

```toml
{settings.to_toml().strip()}
```
"""


PLAIN = """from davae import load_pipeline

pipe = load_pipeline("this folder")"""
PORTABLE = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("this folder", trust_remote_code=True)  # no davae needed"""


def make_upgrade_card(base: str, *, portable: bool) -> str:
    """A card of a pipeline that was upgraded and not trained since: base model, licence, and how it loads."""
    where = environment()
    return f"""{_head(base)}
Not trained since the upgrade: its base latents are the base model's, its detail latents come with fine-tuning.

```python
{PORTABLE if portable else PLAIN}
```

Commit {where["commit"] or "unknown"}; {_versions(where)}.
"""


def _head(base: str) -> str:
    """What the Hub reads, and what the result was made of; `base` is a folder, whose card has a licence, or a name."""
    local = Path(base).is_dir()
    licence = read_licence(Path(base)) if local else None
    facts = ModelCardData(
        base_model=None if local else base,
        license=licence,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["davae", "da-vae"],
    )
    name = Path(base).name if local else base
    return f"""---
{facts.to_yaml()}
---

# {name}, upgraded with davae

Base model: {name}. Licence: {licence or "that of the base model, which holds for what is derived from it"}."""


def _versions(where: Mapping[str, Any]) -> str:
    return ", ".join(f"{package} {version}" for package, version in where["versions"].items() if version)


def read_licence(folder: Path) -> str | None:
    """The licence that the card in a folder names; None without a card, or without one in it."""
    if not (folder / CARD).is_file():
        return None
    licence = ModelCard((folder / CARD).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("license")
    return None if licence is None else str(licence)


def write_card(folder: Path, text: str) -> None:
    """Write a card into the folder of a result.

    Raises:
        StorageError: it cannot be written.
    """
    write_atomically(folder / CARD, text.encode())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


MARKS = ("model_index.json", INDEX, "config.json")
"""What a folder of a pipeline, an adapter or a model has."""


def check_repository_name(name: str) -> None:
    """Refuse a name that the Hub cannot have, before any work is done.

    Raises:
        SettingsError: it is none.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise SettingsError(f"{name!r} is no name of a repository: {error} Give OWNER/NAME") from error


def push_folder(folder: Path, name: str, *, private: bool = False) -> str:
    """Upload a pipeline, portable or not, an adapter or a model to `name` on the Hub, and return its address.

    The repository is made if there is none. huggingface_hub knows the token (`hf auth login`, or HF_TOKEN) and the
    address (HF_ENDPOINT). A pipeline's own `push_to_hub` does as much for a plain one, and cannot know of a portable
    folder's code or an adapter's files.

    Raises:
        SettingsError: `folder` holds none of these, or `name` is no name.
        StorageError: the Hub cannot be reached, or refuses.
    """
    check_repository_name(name)
    if not any((folder / mark).is_file() for mark in MARKS):
        raise SettingsError(f"{folder} holds no pipeline, adapter or model: it has none of {', '.join(MARKS)}")
    api = HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True).repo_id
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload with davae")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise StorageError(f"{folder} was not uploaded to {name}: {error}. It is still there; push it again") from error
    return f"{api.endpoint}/{repository}"
