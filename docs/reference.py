"""Writes the site's generated pages: the command line, the keys of recipes and the Python API."""

import json
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
import typer.cli
from pydantic.fields import FieldInfo

import davae
from davae.cli import app
from davae.job.recipe import ResultsRecipe
from davae.run.recipe import SHARED, Recipe

RECIPES = (
    ("Stage 1: `[autoencoder]`", davae.AutoencoderRecipe),
    ("Stage 2: `[finetune]`", davae.FinetuneRecipe),
    ("Results of a job: `[results]`", ResultsRecipe),
)
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
TYPES = {int: "integer", float: "number", str: "string", bool: "true or false"}


def write(folder: Path) -> None:
    """Write all pages into `folder`; Sphinx does not read those again that have not changed."""
    folder.mkdir(exist_ok=True)
    pages = {"command_line.md": command_line(), "recipes.md": recipes(), "api.md": api()}
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def command_line() -> str:
    """All verbs with their arguments and options."""
    command = typer.main.get_command(app)
    context = command.make_context("davae", [], resilient_parsing=True)
    text = typer.cli.get_docs_for_click(obj=command, ctx=context, name="davae")
    return text.replace("# `davae`", "# The command line", 1)


def recipes() -> str:
    """All keys of all recipes."""
    shared = ", ".join(f"`{name}`" for name in SHARED)
    lines = [
        "# Keys of recipes",
        "",
        "A recipe is a TOML file. It holds the keys of one stage, or a table for each stage. A file for `davae run` "
        f"has both stages and may have `[results]`. The keys {shared} may stand above the tables: they belong to all. "
        "`--set KEY=VALUE` of a verb changes one key.",
        "",
    ]
    for title, recipe in RECIPES:
        lines += [f"## {title}", ""]
        for name, field in recipe.model_fields.items():
            lines += keys(name, field)
    return "\n".join(lines)


def keys(name: str, field: FieldInfo) -> list[str]:
    """The entry of one key, or the entries of all keys of a table."""
    kind = field.annotation
    if isinstance(kind, type) and issubclass(kind, Recipe):
        return [line for key, inner in kind.model_fields.items() for line in keys(f"{name}.{key}", inner)]

    facts = " ".join([type_name(kind), *bounds(field.metadata)])
    default = "none" if field.default is None else f"`{json.dumps(field.default, default=str)}`"
    text = " ".join((field.description or "").split())
    return [f"`{name}`", f": {facts}; default {default}. {text}".rstrip(), ""]


def type_name(kind: Any) -> str:
    """A type in the words of TOML."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return " ".join([type_name(inner[0]), *bounds(getattr(inner[1], "metadata", []))])
    if origin is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(type_name(part) for part in inner if part is not type(None))
    if origin is tuple:
        return f"array of {type_name(inner[0])}"
    return TYPES.get(kind, getattr(kind, "__name__", str(kind)))


def bounds(constraints: list[Any]) -> list[str]:
    """Such as "> 0", from pydantic's constraints."""
    return [
        f"{sign} {getattr(part, key)}" for part in constraints for key, sign in BOUNDS.items() if hasattr(part, key)
    ]


def api() -> str:
    """Every public name, from its docstring; fields of recipes have a page of their own."""
    lines = ["# Python API", "", "These names are public and stay. All of them are imported from `davae`.", ""]
    for title, is_class in (("Functions", False), ("Classes", True)):
        lines += [f"## {title}", ""]
        for name in davae.__all__:
            value = getattr(davae, name)
            if isinstance(value, type) is is_class:
                lines += directive(name, value)
    return "\n".join(lines)


def directive(name: str, value: Any) -> list[str]:
    """What makes autodoc describe one name."""
    lines = ["```{eval-rst}", f".. auto{'class' if isinstance(value, type) else 'function'}:: davae.{name}"]
    if isinstance(value, type) and not issubclass(value, Recipe):
        lines.append("   :members:")
    return [*lines, "```", ""]
