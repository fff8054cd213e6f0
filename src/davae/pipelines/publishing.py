"""Model cards, and uploads of saved folders to the Hugging Face Hub."""

import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from davae.errors import SettingsError, StorageError
from davae.pipelines.adapter_index import INDEX
from davae.pipelines.places import fetch_files, find_on_hub
from davae.run.markdown import markdown_table
from davae.run.recipe import Recipe
from davae.run.record import environment
from davae.run.storage import write_atomically

logger = logging.getLogger(__name__)

CARD = "README.md"
# Settings that may be paths on this machine: the card has only the last part of such a path.
PATH_SETTINGS = ("base", "autoencoder", "adapter", "pictures")
# The picture beside a card, and its longest side in pixels.
CARD_PICTURE, LONGEST_SIDE = "card.webp", 4096
# What a card says about its licence; the last two where the licence is none of the Hub's list.
LICENCE_FIELDS = ("license", "license_name", "license_link")

# Every folder of a pipeline, an adapter or a model has one of these files.
RESULTS = ("model_index.json", INDEX, "config.json")

TEMPLATE = """---
{{ card_data }}
---

# {{ name }}, upgraded with davae
{% if picture %}
![{{ picture.caption }}]({{ file }})

*{{ picture.caption }}*
{% endif %}
DA-VAE (arXiv 2603.22125) doubles the side length of the base model's images at the same number of tokens.

Base model: {{ name }}. Licence: {{ licence }}.

{{ data }}

```python
{{ usage }}
```

In float32, leave out `dtype`.

{{ details }}
"""
LOAD = """import torch
from davae import load_pipeline

pipe = load_pipeline("this folder", dtype=torch.bfloat16)"""
LOAD_PORTABLE = """import torch
from diffusers import DiffusionPipeline

# No davae is needed.
pipe = DiffusionPipeline.from_pretrained("this folder", trust_remote_code=True, dtype=torch.bfloat16)"""


@dataclass(frozen=True)
class CardPicture:
    """A picture for cards, from a file of any format, and a sentence about it."""

    source: Path
    caption: str

    @cached_property
    def webp(self) -> bytes:
        """The bytes of a WebP file, at most `LONGEST_SIDE` pixels long; made once for all cards."""
        buffer = io.BytesIO()
        with Image.open(self.source) as image:
            image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            image.save(buffer, format="WEBP", quality=90)
        return buffer.getvalue()


def make_model_card(
    recipe: Recipe,
    *,
    usage: str,
    base: str,
    licence: Mapping[str, str],
    data: str,
    metrics: Mapping[str, Any],
    counts: Mapping[str, int],
    evaluation: str = "",
    picture: CardPicture | None = None,
) -> str:
    """A card of a training run's result.

    `usage` is Python that loads the result, `base` the base pipeline's folder or Hub name, `licence` what
    `find_licence` says of it, `data` the training data in words; `metrics` are of the last step, and `counts` tells how
    many samples they stand on; `evaluation` is Markdown.
    """
    # Paths of this machine mean nothing to others.
    shortened = {}
    for name in PATH_SETTINGS:
        path = Path(getattr(recipe, name, ""))
        if path.is_absolute():
            shortened[name] = path.name
    settings = recipe.model_copy(update=shortened).to_toml().strip()

    details = [f"## Evaluation\n\n{evaluation}"] if evaluation else []
    rows = []
    for name, value in metrics.items():
        rows.append([name.replace("_", " "), "-" if value is None else f"{value:.4g}"])
    amounts = ", ".join(f"{name} {count:,}" for name, count in counts.items()).replace("_", " ")
    made_in = environment()
    details += [
        "## How it was made",
        markdown_table(["metric, of the last step", ""], rows),
        f"Counts: {amounts}.",
        f"Command: `{' '.join(made_in['command'])}`, {_describe_versions(made_in)}",
        f"```toml\n{settings}\n```",
    ]
    contents = {"details": "\n\n".join(details), "picture": picture, "file": CARD_PICTURE}
    return _make_card(base, licence, data=f"Data: {data}.", usage=usage, **contents)


def make_upgrade_card(base: str, *, portable: bool) -> str:
    """A card of a pipeline that was upgraded and not trained since."""
    data = "Not trained since the upgrade: its base latents are the base model's, its detail latents need fine-tuning."
    usage, details = LOAD_PORTABLE if portable else LOAD, f"Made at {_describe_versions(environment())}"
    return _make_card(base, find_licence(base), data=data, usage=usage, details=details)


def _make_card(base: str, licence: Mapping[str, str], **contents: Any) -> str:
    """`base` is a folder or a name on the Hub, `licence` its own."""
    is_folder = Path(base).is_dir()
    facts = ModelCardData(
        base_model=None if is_folder else base.partition("@")[0],  # without its revision
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["davae", "da-vae"],
        license=licence.get("license"),
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
    )
    contents["name"] = Path(base).name if is_folder else base
    contents["licence"] = _describe_licence(licence)
    return f"{ModelCard.from_template(facts, template_str=TEMPLATE, **contents)}\n"


def _describe_licence(licence: Mapping[str, str]) -> str:
    """A licence in words; derived models are under their base's."""
    name = licence.get("license_name", licence.get("license"))
    if name is None:
        return "see the base model, whose licence holds for derived models"
    link = licence.get("license_link", "")
    return f"{name}, the base model's" + (f" ({link})" if link else "")


def _describe_versions(made_in: Mapping[str, Any]) -> str:
    versions = [f"{package} {version}" for package, version in made_in["versions"].items() if version]
    return f"commit {made_in['commit'] or 'unknown'}; {', '.join(versions)}."


def find_licence(base: str) -> dict[str, str]:
    """Some of `LICENCE_FIELDS`, from the card of a folder, or of a name on the Hub where it can be asked.

    Without a card, or without a licence in it, there are none: no run fails because of its card.
    """
    try:
        hub = find_on_hub(base)
        folder = Path(base) if hub is None else fetch_files(hub, (CARD,))
        if not (folder / CARD).is_file():
            return {}
        data = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data
        licence = {name: str(data.get(name)) for name in LICENCE_FIELDS if data.get(name)}
    except Exception as error:  # of the network, the Hub, or YAML
        reason = str(error).partition("\n")[0]
        logger.warning("the licence of %s is not known (%s): the model card points to the base model", base, reason)
        return {}

    # A link is often a file beside the card; in another folder it leads nowhere.
    link = licence.get("license_link", "")
    if link and "://" not in link:
        del licence["license_link"]
        if hub is not None:
            licence["license_link"] = f"https://huggingface.co/{hub.repository}/blob/{hub.revision or 'main'}/{link}"
    return licence


def write_card(folder: Path, text: str, picture: CardPicture | None = None) -> None:
    """Write a card into the folder of a result, and its picture beside it."""
    if picture is not None:
        write_atomically(folder / CARD_PICTURE, picture.webp)
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
