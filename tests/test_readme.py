"""The README's numbers are the measured ones."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_results_are_those_of_the_record() -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "experiments" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    readme = (ROOT / "README.md").read_text()
    written = readme.split(tables.START)[1].split(tables.END)[0]
    assert written == tables.render()
    assert "TODO" not in readme
