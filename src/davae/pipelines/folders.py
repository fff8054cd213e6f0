"""What lies in a folder, told from its files' names and its JSON alone, so that a mistake costs no loading.

Each check accepts what its loader loads, and otherwise says what the folder is and where that belongs.
"""

import json
import os
from pathlib import Path

from davae.errors import CheckpointError, SettingsError
from davae.pipelines.adapter_index import INDEX, VAE_FOLDER, read_index
from davae.pipelines.places import fetch_files, find_on_hub, find_remote
from davae.run.storage import read_json

AUTOENCODER = "AutoencoderDA"
UNKNOWN = "model of unknown class"
PIPELINE_INDEX = "model_index.json"
READING_PARTS = ("text_encoder", "tokenizer", "processor", "scheduler")  # how names of parts that prompts need begin


def describe_place(path: Path) -> str:
    """What a place on this machine holds, in a few words."""
    if not os.path.lexists(path):
        return "nothing"
    if not path.is_dir():
        return f"a {path.suffix or 'plain'} file"

    if (path / PIPELINE_INDEX).is_file():
        return "a pipeline"
    if (path / INDEX).is_file():
        return "an adapter"
    if (path / "config.json").is_file():
        return f"an {read_class(path)}"

    if is_run(path):
        return "the folder of a run"
    if next(path.iterdir(), None) is None:
        return "an empty folder"
    if any(path.glob("*.safetensors")):
        return "a folder of weights without a config, such as a LoRA"
    return "a folder"


def read_class(folder: Path) -> str:
    """The class of the model in a folder, by its config; `UNKNOWN` if that does not say."""
    try:
        name = json.loads((folder / "config.json").read_bytes())["_class_name"]
    except (OSError, ValueError, LookupError, TypeError):  # the loader will say what is wrong with it
        return UNKNOWN
    return str(name)


def is_run(folder: Path) -> bool:
    """Whether a training run left its recipe and its record there."""
    return (folder / "recipe.toml").is_file() and (folder / "environment.json").is_file()


def check_pipeline(source: str) -> None:
    """Refuse a source that is no pipeline; a name is asked of the Hub, where it is not in the cache."""
    hub = find_on_hub(source)
    if hub is not None:
        return find_remote(hub, PIPELINE_INDEX)
    folder = Path(source)
    if (folder / PIPELINE_INDEX).is_file():
        return None

    advice = "give a save_pretrained folder, or OWNER/NAME of the Hub"
    if (folder / INDEX).is_file():
        advice = f"give its base, {read_index(folder).base}, as the pipeline, and --adapter {folder}"
    elif read_class(folder) == AUTOENCODER:
        advice = f"davae upgrade BASE {folder} OUT makes a pipeline with it"
    elif is_run(folder):
        advice = _find_results(folder)
    elif folder.is_file():
        advice = f"davae import {folder} OUT converts a checkpoint to a folder; {advice}"
    raise CheckpointError(
        f"{folder} is no pipeline: it has no {PIPELINE_INDEX} and is {describe_place(folder)}; {advice}"
    )


def check_reads_prompts(source: str | Path) -> None:
    """Refuse, by its index alone, a pipeline that lacks a part that prompts need; SD3 needs no third text encoder."""
    check_pipeline(str(source))
    hub = find_on_hub(source)
    index = read_json((fetch_files(hub, (PIPELINE_INDEX,)) if hub else Path(source)) / PIPELINE_INDEX)

    missing = {name for name, entry in index.items() if entry == [None, None] and name.startswith(READING_PARTS)}
    if str(index.get("_class_name")).startswith("StableDiffusion3") and "text_encoder_3" in missing:
        missing -= {"text_encoder_3", "tokenizer_3"}
    if missing:
        raise CheckpointError(
            f"{source} has no {', '.join(sorted(missing))}: its {PIPELINE_INDEX} says null, and prompts need them. "
            "Save the pipeline again with these parts"
        )


def check_autoencoder(folder: Path) -> None:
    """Refuse a place without an AutoencoderDA and without an adapter, which has one; not a damaged config."""
    has_config = (folder / "config.json").is_file()
    if (folder / INDEX).is_file() or (has_config and read_class(folder) in (AUTOENCODER, UNKNOWN)):
        return
    kind = describe_place(folder)
    advice = f"give the folder of a trained {AUTOENCODER}, such as runs/NAME/autoencoder, or of an adapter"
    if kind == "nothing":
        raise CheckpointError(f"there is no {folder} on this machine: {advice}")

    if kind == "a pipeline":
        part = folder / VAE_FOLDER
        own = read_class(part) == AUTOENCODER
        advice = f"its autoencoder is in {part}" if own else f"its autoencoder is a plain {read_class(part)}; {advice}"
    elif is_run(folder):
        advice = _find_results(folder)
    elif has_config:
        kind = f"a plain {read_class(folder)}"
        advice = f"davae train-autoencoder makes an {AUTOENCODER} from a base's; {advice}"
    raise CheckpointError(f"{folder} is {kind}, not an {AUTOENCODER}: {advice}")


def check_adapter(folder: Path) -> None:
    """Refuse a place without an adapter of davae's."""
    if (folder / INDEX).is_file():
        return
    kind, advice = describe_place(folder), "give the folder of an adapter, such as runs/NAME/adapter"
    if kind == "nothing":
        raise CheckpointError(f"there is no {folder} on this machine: {advice}")
    if folder.suffix == ".safetensors" or kind.endswith("LoRA"):
        advice = f"give a LoRA as --lora {folder}; {advice}"
    elif is_run(folder):
        advice = _find_results(folder)
    elif kind == "a pipeline":
        advice = "give a pipeline as PIPELINE, without --adapter"
    raise CheckpointError(f"{folder} is {kind}, not an adapter: it has no {INDEX}; {advice}")


def check_lora(lora: str) -> None:
    """Refuse what is no LoRA, as far as its place tells."""
    path = Path(lora)
    if find_on_hub(lora) is not None:
        return
    if (path / INDEX).is_file():
        raise SettingsError(f"{lora} is no LoRA but an adapter of davae's: give it as --adapter {lora}")
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files or files[0].suffix != ".safetensors":
        raise CheckpointError(f"{lora} is {describe_place(path)}, not a LoRA: give a .safetensors file, or its folder")


def _find_results(folder: Path) -> str:
    """Advice for the folder of a run: what it has made."""
    uses = {
        "pipeline": "as the pipeline",
        "adapter": "as --adapter, beside its base",
        "autoencoder": "to davae upgrade",
    }
    for name, use in uses.items():
        if (folder / name).is_dir():
            return f"its result is {folder / name}: give that {use}"
    return "it has no result yet: run it to its end"
