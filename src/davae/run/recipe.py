"""Typed, strict settings that are read from TOML: an unknown key, a wrong type or a value out of range is an error.

A file holds one recipe, plainly; or one for each of several stages, in a table that is named after the stage.
"""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pydantic

from davae.errors import SettingsError

SECTIONS = ("autoencoder", "finetune")
"""The tables of a file that holds the recipes of both stages."""
SHARED = ("base", "pictures", "limit", "size", "seed")
"""What may stand above the sections, for both of them: keys that both stages have and mean the same by."""


class Recipe(pydantic.BaseModel):
    """The settings of one run: frozen, strict, without unknown keys; tables nest one level deep at most.

    Subclasses declare typed fields, each with a docstring under it; a table is a field whose type is a `Recipe`.
    """

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    section: ClassVar[str] = ""
    """The one of `SECTIONS` that holds recipes of this type; "" if these have files of their own only."""
    free_to_change: ClassVar[frozenset[str]] = frozenset()
    """Settings of how a run computes, not of what: they are in no digest, and a run may go on with others."""

    def to_toml(self) -> str:
        """This recipe as TOML that `load_recipe` reads back as an equal recipe; fields that are None are left out."""
        values = self.model_dump(mode="json")
        tables = {key: value for key, value in values.items() if isinstance(value, dict)}
        lines = _toml_lines({key: value for key, value in values.items() if key not in tables})
        for key, table in tables.items():
            lines += ["", f"[{key}]", *_toml_lines(table)]
        return "\n".join(lines).lstrip("\n") + "\n"

    def digest(self) -> str:
        """SHA-256 (hex) of the settings that are not the defaults, in a canonical form: equal recipes, equal digests.

        A setting that a later version adds so changes no digest; a default that it changes shows in recipe.toml. Those
        that are `free_to_change` are left out, too.
        """
        values = self.model_dump(mode="json", exclude_defaults=True, exclude=set(self.free_to_change))
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


R = TypeVar("R", bound=Recipe)


def load_recipe(cls: type[R], path: Path, overrides: Mapping[str, Any] | None = None) -> R:
    """The recipe in the TOML file `path`, with `overrides` (dotted keys: `{"optimizer.betas": [0.9, 0.99]}`) on top.

    If the file has sections, the recipe is that of `cls.section`, with the `SHARED` keys that stand above the
    sections; `overrides` name the recipe's keys, not sections.

    Raises:
        SettingsError: the file is missing or no TOML, a section is unknown or missing, a key is unknown, missing or
            given twice, a value has the wrong type or is out of range. The message names the file, the key path, the
            value given and what is allowed.
    """
    path = Path(path)
    values = read_toml(path)
    if has_sections(cls, values):
        values = _of_section(cls, values, path)
    for dotted, value in (overrides or {}).items():
        *tables, key = dotted.split(".")
        table = values
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise SettingsError(f"override {dotted}: {name} in recipe {path} is a value, not a table")
        table[key] = value
    try:
        # JSON mode: strict about types, yet an array may fill a tuple and a string a path.
        return cls.model_validate_json(json.dumps(values, default=str))
    except pydantic.ValidationError as error:
        problems = "\n".join(f"  {_explain(cls, problem)}" for problem in error.errors(include_url=False))
        raise SettingsError(f"recipe {path} does not fit:\n{problems}") from error


def parse_overrides(settings: Sequence[str]) -> dict[str, Any]:
    """`["steps=10", "data=pictures"]` -> `{"steps": 10, "data": "pictures"}`: values are TOML, or else bare strings.

    Raises:
        SettingsError: a setting is not KEY=VALUE.
    """
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise SettingsError(f"--set {setting}: give it as KEY=VALUE, for instance --set steps=100")
        try:
            overrides[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            overrides[key.strip()] = text
    return overrides


def run_folder(cls: type[Recipe], path: Path, out: Path | None = None) -> Path:
    """Where a run of the recipe in the file `path` goes: `out`, or else runs/NAME, and for a section runs/NAME/SECTION.

    Raises:
        SettingsError: the file is missing or no TOML, or the run would write its own recipe.toml over it.
    """
    folder = Path("runs") / path.stem
    folder = out or (folder / cls.section if has_sections(cls, read_toml(path)) else folder)
    own = path.resolve() == (folder / "recipe.toml").resolve()
    if own and not (folder / "environment.json").is_file():  # which a run's folder has, whose recipe.toml may be given
        raise SettingsError(f"the run in {folder} would write over {path}: give another --out, or rename the recipe")
    return folder


def has_sections(cls: type[Recipe], values: Mapping[str, Any]) -> bool:
    """Whether a file with these values holds recipes in sections; only those types of recipe do that have one."""
    return bool(cls.section) and any(isinstance(values.get(name), dict) for name in SECTIONS)


def read_toml(path: Path) -> dict[str, Any]:
    """The values in a TOML file.

    Raises:
        SettingsError: it is missing or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"recipe {path} cannot be read: {error.strerror}; give the path of a TOML file") from error
    except (ValueError, RecursionError) as error:  # no TOML, no text, a number of thousands of digits, a deep nest
        raise SettingsError(f"recipe {path} is no valid TOML: {error}") from error


def _of_section(cls: type[Recipe], values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The values of the section of `cls`, with the shared ones."""
    sections = {name: value for name, value in values.items() if isinstance(value, dict)}
    shared = {name: value for name, value in values.items() if name not in sections}
    for name in sections:
        if name not in SECTIONS:
            nearest = difflib.get_close_matches(name, SECTIONS, n=1, cutoff=0.5)
            hint = f"did you mean [{nearest[0]}]? " if nearest else ""
            allowed = ", ".join(f"[{section}]" for section in SECTIONS)
            raise SettingsError(
                f"recipe {path}: unknown section [{name}]: {hint}allowed are {allowed}, and tables inside them, "
                "such as [autoencoder.loss]"
            )
    if cls.section not in sections:
        raise SettingsError(
            f"recipe {path} has no section [{cls.section}], only {', '.join(f'[{name}]' for name in sections)}: "
            "add it, or give another recipe"
        )
    own = sections[cls.section]
    for name in shared:
        if name not in SHARED:
            raise SettingsError(
                f'recipe {path}: key "{name}" stands above the sections, where only {", ".join(SHARED)} may: '
                f"move it into {' or '.join(f'[{section}]' for section in sections)}"
            )
        if name in own:
            raise SettingsError(
                f'recipe {path}: key "{name}" is given above the sections and in [{cls.section}]: leave one of them out'
            )
    return {**shared, **own}


def _explain(cls: type[Recipe], problem: Mapping[str, Any]) -> str:
    """One line about one pydantic problem: key path, value given, allowed, nearest known name."""
    location = problem["loc"]
    dotted = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(cls, location[:-1])
        nearest = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f'did you mean "{nearest[0]}"? ' if nearest else ""
        return f'unknown key "{dotted}": {hint}known keys here: {", ".join(known)}'
    if problem["type"] == "missing" and isinstance(location[-1], int):
        return f'key "{dotted.rpartition(".")[0]}" = {problem["input"]!r}: too few values'
    if problem["type"] == "missing":
        return f'missing key "{dotted}": it has no default, so the recipe must give it'
    message = problem["msg"].removeprefix("Value error, ")
    return f'key "{dotted}" = {problem["input"]!r}: {message[0].lower()}{message[1:]}' if dotted else message


def _known_keys(cls: type[Recipe], location: tuple[str | int, ...]) -> list[str]:
    """The keys of the table at `location` inside a recipe of type `cls`."""
    for part in location:
        annotation = cls.model_fields[str(part)].annotation
        assert isinstance(annotation, type), "a table of a recipe is declared with a plain Recipe type"
        assert issubclass(annotation, Recipe), "a table of a recipe is itself a Recipe"
        cls = annotation
    return list(cls.model_fields)


def _toml_lines(values: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_toml_value(value)}" for key, value in values.items() if value is not None]


def _toml_value(value: str | bool | int | float | list[Any]) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, str):  # TOML's basic strings are JSON's, except that DEL must be escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    assert isinstance(value, int | float), f"a recipe holds scalars, lists and one level of tables, not {value!r}"
    return repr(value)
