"""The scripts beside the package go with it: what they import is there."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for folder in ("recipes", "benchmarks", "experiments") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_script_finds_what_it_imports(script: Path) -> None:
    assert callable(runpy.run_path(str(script), run_name="imported")["main"])
