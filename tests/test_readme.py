"""The measured numbers of README.md and docs/results.md are those of the record."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_results_are_those_of_the_record() -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "experiments" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for name, text in tables.render().items():
        page = (ROOT / name).read_text()
        assert page.split(tables.START)[1].split(tables.END)[0] == text, "run python experiments/tables.py"


def test_the_readme_is_short() -> None:
    """A first page is read to its end: about a thousand words, as `wc -w` counts them."""
    assert len((ROOT / "README.md").read_text().split()) < 1250
