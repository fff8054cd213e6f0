"""Write requirements.txt, -cpu and -cuda anew, from pyproject.toml and constraints.txt.

    python tests/lock_requirements.py uv WHEEL

`uv` is the program of that name; it asks the package index for every file of the pinned versions. WHEEL is torch's
build for CPUs. To be run with Python 3.11 on Linux x86-64.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).parents[1]
EXTRAS = ("eval", "dev")
BACKEND = ("hatchling==1.27.0", "editables")
"""What builds davae."""
CUDA = re.compile(r"nvidia-|cuda-|triton$|torch$")
HEADS = {
    "requirements.txt": """\
# What `make` installs on Linux x86-64 with Python 3.11: the versions of constraints.txt, each file by its SHA-256.
# torch is in requirements-cpu.txt or, if that is not found, in requirements-cuda.txt. By tests/lock_requirements.py.
""",
    "requirements-cuda.txt": """\
# torch's build for CUDA, which PyPI has, and all that it needs beside requirements.txt.
""",
    "requirements-cpu.txt": """\
# torch's build for CPUs, where a package index or a folder that pip looks into has it.
""",
}


def find_dependencies(project: dict[str, Any], extras: tuple[str, ...]) -> set[str]:
    """The requirements of the extras, with those of the extras that they name."""
    found: set[str] = set()
    for extra in extras:
        for requirement in project["optional-dependencies"][extra]:
            inner = re.fullmatch(r"davae\[(\w+)\]", requirement)
            found |= find_dependencies(project, (inner[1],)) if inner else {requirement}
    return found


def lock(uv: str) -> list[dict[str, Any]]:
    """Every package that is needed, with all of its files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = sorted({*project["dependencies"], *find_dependencies(project, EXTRAS), *BACKEND})
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pyproject.toml").write_text(
            f"[project]\nname = 'locked'\nversion = '0'\nrequires-python = '==3.11.*'\ndependencies = {needed}\n"
            f"[tool.uv]\nconstraint-dependencies = {pins}\nenvironments = [\"sys_platform == 'linux'\"]\n"
        )
        subprocess.run([uv, "lock"], cwd=folder, check=True)
        packages = tomllib.loads((Path(folder) / "uv.lock").read_text())["package"]
    return [package for package in packages if package["name"] != "locked"]


def choose_hashes(package: dict[str, Any]) -> list[str]:
    """The hashes of the wheels that fit Python and machine of this process; of torch also those for other machines."""
    fitting = set(sys_tags())
    hashes = []
    for wheel in package["wheels"]:
        tags = parse_wheel_filename(wheel["url"].rpartition("/")[2])[3]
        is_other_torch = package["name"] == "torch" and any(tag.abi == "cp311" for tag in tags)
        if tags & fitting or is_other_torch:
            hashes.append(wheel["hash"])
    if not hashes:
        raise SystemExit(f"{package['name']} has no wheel for this machine")
    return hashes


def main(uv: str, wheel: str) -> None:
    """Write the three files."""
    lines: dict[str, list[str]] = {name: [] for name in HEADS}
    for package in lock(uv):
        file = "requirements-cuda.txt" if CUDA.match(package["name"]) else "requirements.txt"
        hashes = map("--hash={}".format, choose_hashes(package))
        lines[file].append(" ".join([f"{package['name']}=={package['version']}", *hashes]))

    # The build for CPUs has a version of its own.
    name, version, *_ = parse_wheel_filename(Path(wheel).name)
    digest = hashlib.sha256(Path(wheel).read_bytes()).hexdigest()
    lines["requirements-cpu.txt"].append(f"{name}=={version} --hash=sha256:{digest}")
    for file, head in HEADS.items():
        (ROOT / file).write_text(head + "\n".join(lines[file]) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
