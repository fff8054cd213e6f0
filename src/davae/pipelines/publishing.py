"""Model cards, and uploads of saved folders to the Hugging Face Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from davae.errors import SettingsError, StorageError
from davae.pipelines.adapter_index import INDEX
from davae.run.markdown import markdown_table
from davae.run.recipe import Recipe
from davae.run.record import environment
from davae.run.storage import write_atomically

CARD = "README.md"
# Settings that may be paths on this machine: the card has only the last part of such a path.
PATH_SETTINGS = ("base", "autoencoder", "adapter", "pictures")

# Every folder of a pipeline, an adapter or a model has one of these files.
RESULTS = ("model_index.json", INDEX, "config.json")

TEMPLATE = """---
{{ card_data }}
---

# {{ name }}, upgraded with davae

Base model: {{ name }}. Licence: {{ license or "see the base model, whose licence holds for derived models" }}.

{{ data }}

```python
{{ usage }}
```

{{ details }}
"""
LOAD = """from davae import load_pipeline

pipe = load_pipeline("this folder")"""
LOAD_PORTABLE = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("this folder", trust_remote_code=True)  # no davae needed"""


def make_model_card(
    recipe: Recipe, *, usage: str, base: str, data: str, metrics: Mapping[str, Any], counts: Mapping[str, int]
) -> str:
    """A card of a training run's result.

    `usage` is Python that loads the result, `base` the base pipeline's folder or Hub name, `data` the training data in
    words; `metrics` are of the last step, and `counts` tells how many samples they stand on.
    """
    # Paths of this machine mean nothing to others.
    shortened = {}
    for name in PATH_SETTINGS:
        path = Path(getattr(recipe, name, ""))
        if path.is_absolute():
            shortened[name] = path.name
    settings = recipe.model_copy(update=shortened).to_toml().strip()

    rows = []
    for name, value in metrics.items():
        rows.append([name.replace("_", " "), "-" if value is None else f"{value:.4g}"])
    amounts = ", ".join(f"{name} {count:,}" for name, count in counts.items()).replace("_", " ")
    made_in = environment()
    details = [
        markdown_table(["metric, of the last step", ""], rows),
        f"Counts: {amounts}.",
        "## How it was made",
        f"Command: `{' '.join(made_in['command'])}`, {_describe_versions(made_in)}",
        f"```toml\n{settings}\n```",
    ]
    return _make_card(base, data=f"Data: {data}.", usage=usage, details="\n\n".join(details))


def make_upgrade_card(base: str, *, portable: bool) -> str:
    """A card of a pipeline that was upgraded and not trained since."""
    data = "Not trained since the upgrade: its base latents are the base model's, its detail latents need fine-tuning."
    usage = LOAD_PORTABLE if portable else LOAD
    return _make_card(base, data=data, usage=usage, details=f"Made at {_describe_versions(environment())}")


def _make_card(base: str, **texts: str) -> str:
    """`base` is a folder, whose own card may name a licence, or a name on the Hub, which is not asked."""
    is_folder = Path(base).is_dir()
    facts = ModelCardData(
        base_model=None if is_folder else base.partition("@")[0],  # without its revision
        license=read_licence(Path(base)) if is_folder else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["davae", "da-vae"],
    )
    texts["name"] = Path(base).name if is_folder else base
    return f"{ModelCard.from_template(facts, template_str=TEMPLATE, **texts)}\n"


def _describe_versions(made_in: Mapping[str, Any]) -> str:
    versions = [f"{package} {version}" for package, version in made_in["versions"].items() if version]
    return f"commit {made_in['commit'] or 'unknown'}; {', '.join(versions)}."


def read_licence(folder: Path) -> str | None:
    """The licence in the card of a folder; None without a card, or without a licence in it."""
    if not (folder / CARD).is_file():
        return None
    return ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.get("license")


def write_card(folder: Path, text: str) -> None:
    """Write a card into the folder of a result."""
    write_atomically(folder / CARD, text.encode())


def check_repository_name(name: str) -> None:
    """Refuse a name that the Hub cannot have, before any work is done."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise SettingsError(f"{name!r} is no name of a repository: {error} Give OWNER/NAME") from error


def push_folder(folder: Path, name: str, *, private: bool = False) -> str:
    """Upload the folder of a pipeline, an adapter or a model to `name` on the Hub, and return its address.

    The repository is made if there is none. huggingface_hub knows the token (`hf auth login`, or HF_TOKEN) and the
    address (HF_ENDPOINT). A pipeline's own `push_to_hub` would leave out portable code and adapters' files.

    Raises:
        SettingsError: `folder` holds none of these, or the Hub cannot have a `name` like this.
        StorageError: the Hub cannot be reached, or refuses.
    """
    check_repository_name(name)
    if not any((folder / file).is_file() for file in RESULTS):
        raise SettingsError(f"{folder} holds no pipeline, adapter or model: it has none of {', '.join(RESULTS)}")

    api = HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True).repo_id
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload with davae")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise StorageError(f"{folder} was not uploaded to {name}: {error}. It is still there; push it again") from error
    return f"{api.endpoint}/{repository}"
