"""A verb's arguments are checked before anything is loaded: places by their names and JSON, devices by their kind."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from davae.errors import DataError, SettingsError

# Suffixes that tell at a glance that a folder holds images; davae.data knows all of them.
USUAL = (".jpg", ".jpeg", ".png", ".webp", ".tar", ".tgz", ".gz", ".parquet", ".arrow")
DEVICES = "cpu, cuda (an NVIDIA or AMD GPU; cuda:1 for the second one), mps (Apple)"


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what cannot work of a verb's settings, in the order that a user gave them in."""
    revision = settings.get("revision")
    pipeline = settings.get("pipeline") or settings.get("base")
    if pipeline and revision and os.path.exists(pipeline):
        raise SettingsError(f"--revision {revision}: {pipeline} is on this machine and has none; leave it out")

    for name, check in CHECKS.items():
        value = settings.get(name)
        for each in value if isinstance(value, list) else [value]:
            if each is not None:
                check(f"{each}@{revision}" if revision and name in ("pipeline", "base") else each)


def _check_pipeline(source: str) -> None:
    from davae.pipelines.folders import check_pipeline

    check_pipeline(source)


def _check_base(source: str) -> None:
    """A pipeline, or the folder of its autoencoder alone."""
    if not (Path(source) / "config.json").is_file():
        _check_pipeline(source)


def _check_autoencoder(folder: Path) -> None:
    from davae.pipelines.folders import check_autoencoder

    check_autoencoder(folder)


def _check_adapter(folder: Path) -> None:
    from davae.pipelines.folders import check_adapter

    check_adapter(folder)


def _check_lora(lora: tuple[str, float]) -> None:
    from davae.pipelines.folders import check_lora

    check_lora(lora[0])


def _check_file(path: Path) -> None:
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "is not on this machine"
        raise SettingsError(f"{path} {kind}: give the path of a file")


def check_pictures(source: Any) -> None:
    """Refuse a place without images; what has a scheme, as shards at a URL, is left to davae.data."""
    path = Path(source)
    if ":" in str(source) and not path.exists():
        return
    if not path.exists():
        raise DataError(f"there is no {path} on this machine: give a folder of images, shards or a parquet file")
    if path.is_file() and path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".heic", ".avif", ".gif"):
        raise DataError(f"{path} is one image: give its folder, {path.parent}")
    if path.is_dir() and not _holds_pictures(path):
        raise DataError(f"{path} has no images: give a folder with images, tar shards or parquet files")


def _holds_pictures(folder: Path) -> bool:
    suffixes: set[str] = set()
    for _, _, names in os.walk(folder):
        suffixes.update(os.path.splitext(name)[1].lower() for name in names)
        if not suffixes.isdisjoint(USUAL):
            return True
    if not suffixes:
        return False
    from davae.data.stored import PICTURE_SUFFIXES  # imports torch

    return not suffixes.isdisjoint(PICTURE_SUFFIXES)


def check_device(name: str) -> None:
    """Refuse a device that is not here, and say why; "gpu" is any."""
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps", "gpu") or (number and not number.isdecimal()):
        raise SettingsError(f"--device {name}: allowed are gpu (any that is here), {DEVICES}")
    if kind == "cpu":
        return
    import torch

    # Why each kind is missing.
    reasons = {}
    if not torch.cuda.is_available():
        built = torch.version.cuda or getattr(torch.version, "hip", None)
        reasons["cuda"] = (
            "no GPU is visible to PyTorch: see nvidia-smi, the driver and CUDA_VISIBLE_DEVICES"
            if built
            else f"PyTorch {torch.__version__} is built without CUDA: https://pytorch.org has the others"
        )
    elif number and int(number) >= torch.cuda.device_count():
        raise SettingsError(f"--device {name}: here are cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    if not torch.backends.mps.is_available():
        reasons["mps"] = "this is no Mac with an Apple GPU, or its PyTorch is built without MPS"

    missing = [reason for each, reason in reasons.items() if kind in (each, "gpu")]
    if kind in reasons or (kind == "gpu" and len(reasons) == 2):
        here = ["cpu", *({"cuda", "mps"} - reasons.keys())]
        raise SettingsError(f"--device {name}: {'; '.join(missing)}. Here is {', '.join(here)}: leave --device out")


def has_gpu() -> bool:
    """Whether a verb without --device runs on a GPU."""
    import torch

    return torch.cuda.is_available()


def check_texts(texts: Iterable[str]) -> None:
    """Refuse prompts that are empty or no text."""
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise SettingsError(f"prompt {number} is empty: say what the image shows")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SettingsError(f"prompt {number} is no text in UTF-8: mend {text!a}") from error


CHECKS: dict[str, Callable[[Any], None]] = {
    "pipeline": _check_pipeline,
    "autoencoder": _check_autoencoder,
    "autoencoders": _check_autoencoder,
    "pictures": check_pictures,
    "base": _check_base,
    "against": _check_pipeline,
    "adapter": _check_adapter,
    "lora": _check_lora,
    "image": _check_file,
    "file": _check_file,
    "device": check_device,
}
"""By the name of a verb's setting."""
