"""Portable pipelines: folders that diffusers alone loads, because the autoencoder's code lies beside its weights."""

import json
import re
from importlib.resources import files
from pathlib import Path

from davae import __version__
from davae.errors import SettingsError
from davae.run.storage import write_json

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


def portable_source() -> str:
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
    (folder / "vae" / f"{MODULE}.py").write_text(portable_source(), encoding="utf-8")
    write_json(path, {**index, "vae": ENTRY})
