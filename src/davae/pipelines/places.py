"""Where a pipeline or a LoRA is: on this machine, or under a name on the Hub, and never one in place of the other."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from davae.errors import CheckpointError, DavaeError, SettingsError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".toml")
ANSWER_SECONDS = 10.0  # that the Hub has to say whether it has a file
DEFAULT_OUT = "runs"  # where all verbs write unless told otherwise


class HubName(NamedTuple):
    """A repository on the Hub, at a revision if one is pinned."""

    repository: str
    revision: str | None


def find_on_hub(source: str | Path) -> HubName | None:
    """The repository that `source` means, OWNER/NAME or OWNER/NAME@REVISION; None if it is on this machine.

    What looks like a path, or whose first part exists, is never a name: a missing folder of a run would be asked of
    the Hub, where somebody else may have put a model under that name. A pinned revision can only mean the Hub.

    Raises:
        CheckpointError: it is neither there nor a name on the Hub.
        SettingsError: a revision of a local folder.
    """
    if os.path.exists(source):
        return None
    name, at, revision = str(source).partition("@")
    if at and os.path.exists(name):
        raise SettingsError(f"{name} is a folder on this machine, which has no revision {revision!r}: leave it out")

    looks_like_name = isinstance(source, str) and NAME.fullmatch(name) and not name.endswith(FILES)
    owner = name.partition("/")[0]
    is_local = not at and (owner == DEFAULT_OUT or os.path.exists(owner))
    if not looks_like_name or is_local or (at and not revision):
        raise CheckpointError(
            f"there is no {source} on this machine, and the Hub is not asked for what looks like a path: give a folder "
            "that is there, or OWNER/NAME of the Hub; with a revision (OWNER/NAME@main) it is always the Hub's"
        )
    return HubName(name, revision or None)


def pin(source: str, revision: str | None) -> str:
    """`source` at a revision, as `find_on_hub` reads it; unchanged without one."""
    return source if revision is None else f"{source}@{revision}"


@contextmanager
def loading(source: str | Path, what: str) -> Iterator[None]:
    """Turn whatever a library raises about a folder or a name that it should load into a CheckpointError."""
    try:
        yield
    except DavaeError:
        raise
    except Exception as error:  # hostile files raise nearly everything
        raise CheckpointError(f"{source} cannot be loaded as {what}: {error or type(error).__name__}") from error


def find_remote(hub: HubName, file: str) -> None:
    """Refuse a repository without this file, and say which of the usual mistakes it is; nothing is fetched.

    The Hub answers the same for a name that does not exist and for one that is private.
    """
    import huggingface_hub
    from huggingface_hub import errors as hub_errors

    if isinstance(huggingface_hub.try_to_load_from_cache(hub.repository, file, revision=hub.revision), str):
        return
    name, page = "@".join(filter(None, hub)), f"https://huggingface.co/{hub.repository}"
    url = huggingface_hub.hf_hub_url(hub.repository, file, revision=hub.revision)
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=ANSWER_SECONDS)
    except hub_errors.GatedRepoError as error:
        reason = f"{name} is gated: accept its licence at {page}, then run hf auth login"
        raise CheckpointError(reason) from error
    except hub_errors.RevisionNotFoundError as error:
        reason = f"{hub.repository} on the Hub has no revision {hub.revision}: give a commit, tag or branch"
        raise CheckpointError(reason) from error
    except hub_errors.RepositoryNotFoundError as error:
        reason = f"the Hub knows no {hub.repository}, or it is private: mend the name, or run hf auth login"
        raise CheckpointError(reason) from error
    except hub_errors.EntryNotFoundError as error:
        raise CheckpointError(f"{name} on the Hub has no {file}: it is no pipeline of diffusers") from error
    except hub_errors.OfflineModeIsEnabled as error:
        reason = "HF_HUB_OFFLINE keeps the Hub from being asked: unset it, or give a folder that is here"
        raise CheckpointError(f"{name} is not in this machine's cache, and {reason}") from error
    except Exception as error:  # of the network, in the classes of whatever library speaks HTTP
        reason = "the Hub cannot be reached: mend the connection, or give a folder that is here"
        raise CheckpointError(f"{name} is not in this machine's cache, and {reason} ({error})") from error


def fetch_files(hub: HubName, patterns: Sequence[str]) -> Path:
    """The folder of a repository's files of these patterns, fetched from the Hub or found where they were fetched."""
    from huggingface_hub import snapshot_download

    with loading("@".join(filter(None, hub)), "a name on the Hub"):
        return Path(snapshot_download(hub.repository, revision=hub.revision, allow_patterns=list(patterns)))


def fetch_shapes(hub: HubName, part: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a part's weights by their names, from the headers of its files on the Hub; no weight is fetched."""
    from huggingface_hub import HfApi

    api = HfApi()
    shapes: dict[str, tuple[int, ...]] = {}
    with loading("@".join(filter(None, hub)), "a pipeline"):
        for path in api.list_repo_files(hub.repository, revision=hub.revision):
            if path.startswith(f"{part}/") and path.endswith(".safetensors"):
                header = api.parse_safetensors_file_metadata(hub.repository, path, revision=hub.revision)
                shapes |= {name: tuple(tensor.shape) for name, tensor in header.tensors.items()}
    return shapes


def fetch_pipeline(hub: HubName, without: Sequence[str], pipeline_class: type[Any], variant: str | None) -> Path:
    """The folder of a pipeline's configs and safetensors files; parts of the names in `without` are left out."""
    with loading("@".join(filter(None, hub)), "a pipeline"):
        parts: dict[str, Any] = dict.fromkeys(without)
        settings: dict[str, Any] = {"revision": hub.revision, "use_safetensors": True, "variant": variant, **parts}
        return Path(pipeline_class.download(hub.repository, **settings))
