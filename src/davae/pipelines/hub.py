"""Uploads to the Hugging Face Hub: a saved folder as it is, with its card."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from davae.errors import SettingsError, StorageError
from davae.pipelines.adapter import INDEX

MARKS = ("model_index.json", INDEX, "config.json")
"""What a folder of a pipeline, an adapter or a model has."""


def check_name(name: str) -> None:
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
    check_name(name)
    if not any((folder / mark).is_file() for mark in MARKS):
        raise SettingsError(f"{folder} holds no pipeline, adapter or model: it has none of {', '.join(MARKS)}")
    api = HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True).repo_id
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload with davae")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise StorageError(f"{folder} was not uploaded to {name}: {error}. It is still there; push it again") from error
    return f"{api.endpoint}/{repository}"
