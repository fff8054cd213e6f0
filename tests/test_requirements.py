"""What `make` installs is listed with hashes, in the versions of constraints.txt, and built by a pinned backend.

Where the first tests fail after a change of the dependencies, tests/lock_requirements.py writes the lists anew.
"""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINE = re.compile(r"([a-z0-9-]+)==(\S+)((?: --hash=sha256:[0-9a-f]{64})+)")


def read_pins(file: str) -> dict[str, str]:
    """Versions by names, as pip compares names."""
    pins = {}
    for line in (ROOT / file).read_text().splitlines():
        name, equal, version = line.partition(" ")[0].partition("==")
        if equal and not line.startswith("#"):
            pins[re.sub(r"[-_.]+", "-", name).lower()] = version
    return pins


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-cpu.txt", "requirements-cuda.txt"])
def test_every_requirement_has_its_version_and_its_hashes(file: str) -> None:
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    assert lines
    assert not [line for line in lines if not LINE.fullmatch(line)]


def test_the_versions_are_those_of_the_constraints() -> None:
    hashed, constraints = read_pins("requirements.txt"), read_pins("constraints.txt")
    assert {name: hashed[name] for name in hashed.keys() & constraints.keys()}.items() <= constraints.items()
    # What is not in both: the build backend and what torch alone needs; and what is in no environment of `make`.
    assert hashed.keys() - constraints.keys() <= {"hatchling", "trove-classifiers", "editables", "setuptools"}
    assert constraints.keys() - hashed.keys() <= {"bitsandbytes", "torch", "torchao"}
    assert "lightning" not in hashed


def test_torch_has_a_build_for_cpus_and_one_for_cuda() -> None:
    version = read_pins("constraints.txt")["torch"]
    assert read_pins("requirements-cpu.txt") == {"torch": f"{version}+cpu"}
    assert read_pins("requirements-cuda.txt")["torch"] == version
    assert "torch" not in read_pins("requirements.txt")


def test_the_build_backend_is_pinned_and_hashed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (backend,) = project["build-system"]["requires"]
    name, _, version = backend.partition("==")
    assert read_pins("requirements.txt")[name] == version


def test_make_installs_nothing_else() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "install --require-hashes --only-binary :all: --no-deps --requirement" in makefile
    assert "$(HASHED) requirements-cpu.txt || $(HASHED) requirements-cuda.txt" in makefile
    assert "install --no-deps --no-build-isolation --editable ." in makefile
