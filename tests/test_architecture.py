"""docs/architecture.md is up to date: its drawing, the names in it, and how to add something."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc import locate

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
BLOCKS = re.findall(r"^```(python|diff)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
DIFFS = [text for kind, text in BLOCKS if kind == "diff"]
QUOTES = [text for kind, text in BLOCKS if kind == "python" and text.startswith("# src/")]
PROGRAMS = [text for kind, text in BLOCKS if kind == "python" and not text.startswith("# src/")]


def test_the_drawing_shows_the_imports() -> None:
    path = ROOT / "docs" / "architecture.py"
    spec = importlib.util.spec_from_file_location("architecture", path)
    assert spec is not None
    architecture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(architecture)
    drawing = architecture.DRAWING.read_text()
    assert drawing == architecture.draw(), "the imports have changed: run python docs/architecture.py"
    assert len(drawing) < 12_000


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(davae(?:\.\w+)+)`", PAGE))))
def test_the_page_names_what_exists(name: str) -> None:
    assert locate(name) is not None


def test_every_room_has_a_paragraph() -> None:
    rooms = [path.parent.name for path in sorted((ROOT / "src" / "davae").glob("*/__init__.py"))]
    assert sorted(re.findall(r"^- \*\*(\w+)\*\*", PAGE, flags=re.MULTILINE)) == [r for r in rooms if r != "assets"]


def without_docstrings(text: str) -> str:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.unparse(tree)


@pytest.mark.parametrize("text", QUOTES)
def test_quoted_files_are_as_in_the_package(text: str) -> None:
    path = ROOT / text.partition("\n")[0].removeprefix("# ")
    assert without_docstrings(text) == without_docstrings(path.read_text())


def test_nothing_takes_more_than_40_lines() -> None:
    for _, text in BLOCKS:
        assert len(text.splitlines()) <= 41, text  # a quote's first line is its path


def apply_diff(text: str, root: Path) -> None:
    """Change the files below `root`: "+++" begins a file, "@@" a further place in it."""
    for change in re.split(r"^\+\+\+ ", text, flags=re.MULTILINE)[1:]:
        name, _, hunks = change.partition("\n")
        content = (root / name).read_text()
        for hunk in re.split(r"^@@\n", hunks, flags=re.MULTILINE):
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            assert content.count(old) == 1, f"{name} has changed; the page shows:\n{old}"
            content = content.replace(old, new)
        (root / name).write_text(content)


@pytest.fixture(scope="module")
def changed_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with all changes of the page; assets are linked."""
    root = tmp_path_factory.mktemp("changed")
    package = root / "src" / "davae"
    shutil.copytree(ROOT / "src" / "davae", package, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (package / "assets").symlink_to(ROOT / "src" / "davae" / "assets")
    for text in DIFFS:
        apply_diff(text, root)
    return root


def test_the_changes_do_what_the_page_says(changed_package: Path) -> None:
    paths = os.pathsep.join([str(changed_package / "src"), str(ROOT / "tests")])
    code = "\n".join(PROGRAMS)
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, check=True, timeout=300)
