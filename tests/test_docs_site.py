"""The site builds without a warning and names all that is public; code in README and docs is of this version."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer

import davae
from davae.cli import app, verbs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Code(HTMLParser):
    """The text of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.text = ""
        self.feed(page.read_text())

    def handle_data(self, data: str) -> None:
        self.text += data


def fences(page: Path, language: str) -> list[str]:
    blocks = []
    for indent, found, text in FENCE.findall(page.read_text()):
        if found == language:
            blocks.append("\n".join(line.removeprefix(indent) for line in text.splitlines()))
    return blocks


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `davae` command in bash fences and indented blocks."""
    indented = [line.strip() for line in page.read_text().splitlines() if line.startswith("    davae ")]
    lines = []
    for block in [*fences(page, "bash"), *indented]:
        lines += block.replace("\\\n", " ").splitlines()

    words = [shlex.split(line, comments=True) for line in lines]
    return [line[line.index("davae") + 1 :] for line in words if "davae" in line]


@pytest.mark.timeout(600)
def test_the_site_names_all_that_is_public(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "sphinx", "-W", "-q", "-c", "docs", "-d", tmp_path / "trees", ".", tmp_path / "site"]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    reference = tmp_path / "site" / "docs" / "reference"

    command_line = Code(reference / "command_line.html").text
    for verb in [*verbs["Use"], *verbs["Research"], "data inspect", "cache prune"]:
        assert f"davae {verb}" in command_line

    recipes = (reference / "recipes.html").read_text()
    fields = [*davae.AutoencoderRecipe.model_fields, *davae.FinetuneRecipe.model_fields]
    for key in [*(set(fields) - {"loss"}), "loss.lpips", "guidance_scale"]:
        assert f'<span class="pre">{key}</span>' in recipes

    api = (reference / "api.html").read_text()
    for name in davae.__all__:
        assert f'id="davae.{name}"' in api


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page: Path) -> None:
    """By the parser of the command line itself: verbs, options, numbers and required arguments."""
    for arguments in commands(page):
        command = typer.main.get_command(app)
        context = command.make_context("davae", list(arguments))
        while hasattr(command, "commands"):
            name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            context = command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_compiles_and_imports(page: Path) -> None:
    for block in fences(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "davae":
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_toml_parses(page: Path) -> None:
    for block in fences(page, "toml"):
        tomllib.loads(block)


def test_code_is_found() -> None:
    """Or the tests above would hold of nothing."""
    assert sum(len(commands(page)) for page in PAGES) > 30
    assert sum(len(fences(page, "python")) for page in PAGES) > 15
    assert sum(len(fences(page, "toml")) for page in PAGES) > 3
