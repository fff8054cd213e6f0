"""Save a pipeline, whole or not at all; a portable one loads without davae, from code that lies beside its weights."""

import json
import re
from importlib.resources import files
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import nn

from davae import __version__
from davae.errors import SettingsError, StorageError
from davae.run.storage import check_replaceable, replaced_whole, write_json

MODULE = "davae_autoencoder"
ENTRY = [MODULE, "AutoencoderDA"]
"""What `model_index.json` says of the autoencoder: a file beside its weights, and a class in it."""
SOURCES = (
    "tiled_decoder",
    "blended_tiles",
    "slim_decoder",
    "detail_blocks",
    "autoencoder_taef2",
    "base_autoencoders",
    "autoencoder_da",
)
"""The modules that the file is made of, in that order: diffusers fetches one file, so they become one."""
OWN_IMPORT = re.compile(r"^ *from davae\.[\w.]+ import (\([^)]*\)|[^(\n]*)\n", re.MULTILINE)
HEAD = f"""# AutoencoderDA of davae {__version__} (Apache-2.0) in one file, so that a folder loads without davae:
#   DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
# Made by `davae upgrade --portable`; davae itself loads the folder with its own code.
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
    """`pipeline.save_pretrained(folder)`, whole or not at all; a pipeline that is there already is replaced.

    With `portable` the autoencoder's code goes along, and the folder loads without davae (`make_portable`).

    Raises:
        SettingsError: `folder` holds something else than a pipeline, `pipeline` has a LoRA that is not fused, or it
            cannot be portable.
        StorageError: it cannot be written.
    """
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and any(".base_layer." in tensor for tensor in part.state_dict()):
            raise SettingsError(
                f"the {name} has a LoRA beside its weights, and no folder with it could be loaded: fuse it and unload "
                "it first (pipeline.fuse_lora(), then pipeline.unload_lora_weights()), or unload it only"
            )
    check_replaceable(folder, holds="model_index.json")
    with replaced_whole(folder) as partial:
        try:
            pipeline.save_pretrained(partial)
        except OSError:
            raise
        except Exception as error:  # tokenizers raise no other class, on a full disk, too
            raise StorageError(f"{folder} was not written: {error}. Free space, or choose another folder") from error
        if portable:
            make_portable(partial)


def make_portable_source() -> str:
    """The autoencoder's code as one file that imports torch, diffusers and the standard library only."""
    texts = [HEAD, "from pathlib import Path\n"]
    for name in SOURCES:
        texts.append(OWN_IMPORT.sub("", files("davae.models").joinpath(f"{name}.py").read_text(encoding="utf-8")))
    return "\n".join(texts) + TAIL


def make_portable(folder: Path) -> None:
    """Let a saved upgraded pipeline load without davae: the code beside the weights, and the entry that names it.

    Raises:
        SettingsError: its autoencoder is no AutoencoderDA, or something else in it is davae's.
        StorageError: it cannot be written.
    """
    path = folder / "model_index.json"
    index = json.loads(path.read_bytes())
    davaes = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] == "davae"]
    if davaes != ["vae"] or index["vae"][1] != ENTRY[1] or index["_class_name"] == "ClassConditionalFlowPipeline":
        raise SettingsError(
            "only an upgraded pipeline whose other parts are all stock can be portable: this is a "
            f"{index['_class_name']} with {', '.join(davaes) or 'nothing'} of davae's. Save it plainly"
        )
    (folder / "vae" / f"{MODULE}.py").write_text(make_portable_source(), encoding="utf-8")
    write_json(path, {**index, "vae": ENTRY})
