"""Save a pipeline, whole or not at all; a portable one loads without davae, from code that lies beside its weights."""

import re
from importlib.resources import files
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import nn

from davae import __version__
from davae.errors import SettingsError, StorageError
from davae.pipelines.autoencoders import check_present
from davae.run.storage import check_replaceable, read_json, replaced_whole, write_json

MODULE = "davae_autoencoder"
# The autoencoder's entry in `model_index.json`: a file beside its weights, and a class in it.
PORTABLE_ENTRY = [MODULE, "AutoencoderDA"]

# Modules of `davae.models` in the order in which that file joins them: diffusers fetches one file only.
MODULES = (
    "precision",
    "offloading",
    "autoencoder_taef2",
    "base_autoencoders",
    "tiling",
    "slim_decoder",
    "detail_blocks",
    "latent_statistics",
    "construction",
    "stock_names",
    "autoencoder_da",
)
OWN_IMPORT = re.compile(r"^ *from davae\.[\w.]+ import (\([^)]*\)|[^(\n]*)\n", re.MULTILINE)
HEAD = f"""# AutoencoderDA of davae {__version__} (Apache-2.0) in one file, so that a folder loads without davae:
#   DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
# Made by `davae upgrade --portable`; davae itself loads the folder with its own code.

from pathlib import Path

"""
TAIL = f'''

class AutoencoderDA(AutoencoderDA):
    """As above; where it is saved, this file goes with it."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / "{MODULE}.py").write_bytes(_SOURCE)


AutoencoderDA.__module__ = "{MODULE}"
_SOURCE = Path(__file__).read_bytes()
'''


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, *, portable: bool = False) -> None:
    """Save a pipeline whole or not at all; a pipeline that is in `folder` already is replaced, anything else is not.

    With `portable` the autoencoder's code is saved, too, and the folder loads without davae. A LoRA must be fused.
    """
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            _check_saveable(name, part)

    check_replaceable(folder, holds="model_index.json")
    with replaced_whole(folder) as partial:
        try:
            pipeline.save_pretrained(partial)
        except OSError:
            raise
        except Exception as error:  # on a full disk, tokenizers raise nothing more specific
            raise StorageError(f"{folder} was not written: {error}. Free space, or choose another folder") from error
        if portable:
            _make_portable(partial)


def _check_saveable(name: str, part: nn.Module) -> None:
    """Refuse a part of a pipeline whose folder could not be loaded."""
    # diffusers takes off the wrapper of a whole compiled part.
    tensors = list(getattr(part, "_orig_mod", part).state_dict())
    if any(".base_layer." in tensor for tensor in tensors):
        raise SettingsError(
            f"the {name} has a LoRA beside its weights, and no folder with it could be loaded: fuse it and unload "
            "it first (pipeline.fuse_lora(), then pipeline.unload_lora_weights()), or unload it only"
        )
    if any("_orig_mod." in tensor for tensor in tensors):
        raise SettingsError(
            f"a layer of the {name} was replaced by torch.compile(...), and its folder could not be loaded. "
            "Compile layers in place: layer.compile()"
        )
    check_present(part, name, "save the pipeline before you offload it, or load it again and save that")


def make_portable_source() -> str:
    """The autoencoder's code as one file that imports torch, diffusers and the standard library only."""
    source = HEAD
    for name in MODULES:
        text = files("davae.models").joinpath(f"{name}.py").read_text(encoding="utf-8")
        source += OWN_IMPORT.sub("", text) + "\n"
    return source + TAIL


def _make_portable(folder: Path) -> None:
    """Write the autoencoder's code into a saved pipeline, and the entry in its index that names the code."""
    index = read_json(folder / "model_index.json")
    own = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] == "davae"]
    if own != ["vae"] or index["vae"][1] != "AutoencoderDA":
        raise SettingsError(
            f"a {index['_class_name']} with {', '.join(own) or 'nothing'} of davae's cannot be portable: allowed is an "
            "upgraded pipeline whose other parts are all stock. Save it plainly"
        )
    (folder / "vae" / f"{MODULE}.py").write_text(make_portable_source(), encoding="utf-8")
    write_json(folder / "model_index.json", {**index, "vae": PORTABLE_ENTRY})
