"""A look at this machine: devices, precision, extras, disk, the Hub, and which models fit."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
from huggingface_hub import HfApi, get_token
from packaging.requirements import Requirement

from davae import __version__, assets
from davae.cost.budget import estimate_stage_two_memory, make_autoencoder
from davae.cost.geometry import read_geometry
from davae.errors import DavaeError
from davae.job.estimate import size_in_words
from davae.job.plan import USABLE
from davae.models.base_autoencoders import base_facts
from davae.run.markdown import markdown_table
from davae.run.storage import free_bytes
from davae.training.devices import computes_bfloat16
from davae.training.stage_one_recipe import AutoencoderRecipe
from davae.training.stage_two_recipe import FinetuneRecipe

# Extras whose packages are for working on davae itself.
INTERNAL = ("dev",)
# What is counted for each base: its name, a size in pixels, and the hint where nothing fits.
JOBS = (("", 256), ("stabilityai/stable-diffusion-3.5-medium", 1024), ("black-forest-labs/FLUX.1-dev", 1024))
# Bytes from which training a model without a GPU takes weeks.
LARGE = 2 << 30


def examine() -> dict[str, Any]:
    """All facts, as JSON holds them."""
    devices = list_devices()
    best = devices[-1]
    facts = {
        "davae": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "devices": devices,
        "extras": list_extras(),
        "disk": list_disks(),
        "hub": ask_hub(),
        "fits": list_fits(best["memory_bytes"]),
    }
    facts["summary"] = f"training runs on {best['name']} in {best['precision']}"
    return facts


def list_devices() -> list[dict[str, Any]]:
    """The CPU, then each GPU that davae can use; the last one is the fastest."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    devices = [_describe("cpu", f"{platform.machine()} CPU, {os.cpu_count()} cores", memory)]
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        devices.append(_describe(f"cuda:{number}", properties.name, properties.total_memory))
    return devices


def _describe(device: str, name: str, memory: int) -> dict[str, Any]:
    precision = "bfloat16" if computes_bfloat16(torch.device(device)) else "float32"
    return {"device": device, "name": name, "memory_bytes": memory, "precision": precision}


def list_extras() -> list[dict[str, Any]]:
    """Each extra of the installed package: whether all of its packages are here, and the command that installs it."""
    try:
        requirements = list(map(Requirement, importlib.metadata.requires("davae") or []))
    except importlib.metadata.PackageNotFoundError:
        return []

    packages: dict[str, list[str]] = {}
    for extra in importlib.metadata.metadata("davae").get_all("Provides-Extra") or []:
        packages[extra] = []
        for requirement in requirements:
            if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
                if requirement.name != "davae" and not requirement.marker.evaluate({"extra": ""}):
                    packages[extra].append(requirement.name)

    rows = []
    for extra, names in sorted(packages.items()):
        missing = [name for name in names if not _is_installed(name)]
        if extra not in INTERNAL and names:
            rows.append({"extra": extra, "missing": missing, "command": f"pip install 'davae[{extra}]'"})
    return rows


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def list_disks() -> list[dict[str, Any]]:
    """Free bytes where runs go, and where the Hub's files go."""
    places = {"runs": Path("runs"), "Hub's cache": Path(huggingface_hub.constants.HF_HUB_CACHE)}
    return [{"for": name, "free_bytes": free_bytes(place)} for name, place in places.items()]


def ask_hub() -> dict[str, Any]:
    """Whether there is a login, which gated bases such as SD3.5 need; a token is tried, unless the Hub is offline."""
    advice = "run hf auth login, or set HF_TOKEN, for gated bases such as Stable Diffusion 3.5 and FLUX.1"
    if get_token() is None:
        return {"login": None, "says": f"no login: {advice}"}
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return {"login": None, "says": "a token is there, and not tried: HF_HUB_OFFLINE is set"}
    try:
        name = HfApi().whoami()["name"]
    except Exception as error:  # the Hub's library has many kinds for a bad token, no network, a proxy
        return {
            "login": None,
            "says": f"a token is there, and the Hub does not take it ({type(error).__name__}): {advice}",
        }
    return {"login": name, "says": f"logged in as {name}"}


def list_fits(memory: int) -> list[dict[str, Any]]:
    """By base: the memory that stage 2 needs with LoRA, one image at a time, and whether the device has it."""
    rows = []
    for base, size in JOBS:
        name = Path(base).name or "the shipped pair"
        row: dict[str, Any] = {"base": f"{name} at {size} px", "needed_bytes": None, "fits": False, "note": ""}

        try:
            geometry = read_geometry(base, assets.geometry())
            channels = base_facts(geometry.vae.config).latent_channels
            autoencoder = make_autoencoder(AutoencoderRecipe(base=base, detail_channels=channels), geometry)
            recipe = FinetuneRecipe(base=base, size=size, batch_size=1)
            row["needed_bytes"] = estimate_stage_two_memory(recipe, geometry, autoencoder).total
            row["fits"] = row["needed_bytes"] <= USABLE * memory
        except DavaeError as error:
            row["note"] = str(error)

        rows.append(row)
    return rows


def to_text(facts: dict[str, Any]) -> str:
    """One screen."""
    lines = [f"davae {facts['davae']}, Python {facts['python']}, torch {facts['torch']}", ""]
    rows = []
    for device in facts["devices"]:
        rows.append([device["device"], device["name"], size_in_words(device["memory_bytes"]), device["precision"]])
    lines += [markdown_table(["device", "name", "memory", "precision"], rows), ""]

    rows, is_cpu = [], len(facts["devices"]) == 1
    for row in facts["fits"]:
        needed = row["note"] if row["needed_bytes"] is None else size_in_words(row["needed_bytes"])
        slow = ", but is too slow without a GPU" if is_cpu and (row["needed_bytes"] or 0) > LARGE else ""
        rows.append([row["base"], needed, f"fits{slow}" if row["fits"] else "does not fit"])
    lines += [markdown_table(["stage 2 with LoRA, one image at a time", "needs", "here"], rows), ""]

    rows = []
    for row in facts["extras"]:
        missing = f"missing {', '.join(row['missing'])}: {row['command']}"
        rows.append([row["extra"], missing if row["missing"] else "installed"])
    lines += [markdown_table(["extra", "state"], rows), ""]

    for disk in facts["disk"]:
        lines.append(f"disk for {disk['for']}: {size_in_words(disk['free_bytes'])} free")
    return "\n".join([*lines, f"Hub: {facts['hub']['says']}"])
