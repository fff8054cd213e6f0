"""Typed, strict settings that are read from TOML: an unknown key, a wrong type or a value out of range is an error.

A file holds one recipe, plainly, or one for each of several stages, in a table that is named after the stage.
"""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pydantic
import tomli_w

from davae.errors import SettingsError

# The tables of a file that holds the recipes of both stages and, for `davae run`, of what is made and measured then.
SECTIONS = ("autoencoder", "finetune", "results")
# Keys that all of them have with the same meaning, and that may stand above the sections.
SHARED = ("base", "pictures", "limit", "size", "seed")


class Recipe(pydantic.BaseModel):
    """The settings of one run: frozen, strict, without unknown keys; tables nest one level deep at most.

    Subclasses declare typed fields, each with a docstring under it; a table is a field whose type is a `Recipe`.
    """

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    section: ClassVar[str] = ""
    """The one of `SECTIONS` that holds recipes of this type; "" if they always have a file of their own."""
    free_to_change: ClassVar[frozenset[str]] = frozenset()
    """Settings that change how a run computes and not its result: in no digest, and a run may go on with others."""
    places: ClassVar[frozenset[str]] = frozenset()
    """Where things lie that a run starts from: in no digest, and free to change where their content is on record."""

    def to_toml(self) -> str:
        """This recipe as TOML that `load_recipe` reads back as an equal recipe; fields that are None are left out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def digest(self) -> str:
        """SHA-256 (hex) of the settings that are not the defaults, so that a setting added later changes no digest.

        Settings that are `free_to_change` and `places` are left out, too.
        """
        values = self.model_dump(mode="json", exclude_defaults=True, exclude={*self.free_to_change, *self.places})
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


R = TypeVar("R", bound=Recipe)


def load_recipe(cls: type[R], path: Path, overrides: Mapping[str, Any] | None = None) -> R:
    """The recipe in the TOML file `path`, with `overrides` (dotted keys: `{"optimizer.betas": [0.9, 0.99]}`) on top.

    If the file has sections, the recipe is the section `cls.section`, with the `SHARED` keys above the sections;
    `overrides` name the recipe's keys, not sections. Every mistake is a SettingsError, which names the file, the key
    path, the value given and what is allowed.
    """
    path = Path(path)
    values = read_toml(path)
    if has_sections(cls, values):
        values = _read_section(cls, values, path)

    # Overrides go into their tables, which need not be in the file.
    for dotted, value in (overrides or {}).items():
        *tables, key = dotted.split(".")
        table = values
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise SettingsError(f"override {dotted}: {name} in recipe {path} is a value, not a table")
        table[key] = value

    try:
        # JSON mode is strict about types, yet takes an array for a tuple and a string for a path.
        return cls.model_validate_json(json.dumps(values, default=str))
    except pydantic.ValidationError as error:
        problems = "\n".join(f"  {_explain(cls, problem)}" for problem in error.errors(include_url=False))
        raise SettingsError(f"recipe {path} does not fit:\n{problems}") from error


def parse_overrides(settings: Sequence[str]) -> dict[str, Any]:
    """`["steps=10", "data=pictures"]` -> `{"steps": 10, "data": "pictures"}`: values are TOML, or else bare strings."""
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

    A run that would write its own recipe.toml over the file is refused.
    """
    folder = Path("runs") / path.stem
    if has_sections(cls, read_toml(path)):
        folder /= cls.section
    folder = out or folder

    # The recipe.toml of a run may be given to go on with it: its folder has environment.json, too.
    own = path.resolve() == (folder / "recipe.toml").resolve()
    if own and not (folder / "environment.json").is_file():
        raise SettingsError(f"the run in {folder} would write over {path}: give another --out, or rename the recipe")
    return folder


def has_sections(cls: type[Recipe], values: Mapping[str, Any]) -> bool:
    """Whether a file with these values holds recipes in sections; only types of recipe with a section can."""
    return bool(cls.section) and any(isinstance(values.get(name), dict) for name in SECTIONS)


def read_toml(path: Path) -> dict[str, Any]:
    """The values in a TOML file, or a SettingsError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"recipe {path} cannot be read: {error.strerror}; give the path of a TOML file") from error
    except (ValueError, RecursionError) as error:  # no TOML, no text, a number of thousands of digits, a deep nest
        raise SettingsError(f"recipe {path} is no valid TOML: {error}") from error


def _read_section(cls: type[Recipe], values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The values of the section of `cls`, with the shared ones."""
    file = f"recipe {path}"
    sections = {name: value for name, value in values.items() if isinstance(value, dict)}
    shared = {name: value for name, value in values.items() if name not in sections}
    for name in sections:
        if name not in SECTIONS:
            hint = _suggest(name, SECTIONS, "[{}]")
            allowed = f"{_bracketed(SECTIONS)}, and tables in them, such as [autoencoder.loss]"
            raise SettingsError(f"{file}: unknown section [{name}]: {hint}allowed are {allowed}")
    if cls.section not in sections:
        raise SettingsError(f"{file} has no section [{cls.section}], only {_bracketed(sections)}: add it")

    # Each key above the sections is shared by both, and given once.
    own = sections[cls.section]
    for name in shared:
        if name not in SHARED:
            mend = f"where only {', '.join(SHARED)} may: move it into {_bracketed(sections, ' or ')}"
            raise SettingsError(f'{file}: key "{name}" stands above the sections, {mend}')
        if name in own:
            raise SettingsError(f'{file}: key "{name}" is given above the sections and in [{cls.section}]: choose one')
    return {**shared, **own}


def _bracketed(sections: Iterable[str], separator: str = ", ") -> str:
    return separator.join(f"[{section}]" for section in sections)


def _suggest(name: str, known: Sequence[str], form: str) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {form.format(nearest[0])}? " if nearest else ""


def _explain(cls: type[Recipe], problem: Mapping[str, Any]) -> str:
    """One line about one pydantic problem: key path, value given, allowed, nearest known name."""
    location = problem["loc"]
    dotted = ".".join(map(str, location))
    if problem["type"] == "extra_forbidden":
        # The table that holds the key is a field whose type is a Recipe.
        table: Any = cls
        for part in location[:-1]:
            table = table.model_fields[part].annotation
        known = list(table.model_fields)
        hint = _suggest(location[-1], known, '"{}"')
        keys = "" if hint else f"known keys here: {', '.join(known)}"
        return f'unknown key "{dotted}": {hint.strip()}{keys}'

    if problem["type"] == "missing" and isinstance(location[-1], int):
        return f'key "{dotted.rpartition(".")[0]}" = {problem["input"]!r}: too few values'
    if problem["type"] == "missing":
        return f'missing key "{dotted}": it has no default, so the recipe must give it'

    message = problem["msg"].removeprefix("Value error, ")
    return f'key "{dotted}" = {problem["input"]!r}: {message[0].lower()}{message[1:]}' if dotted else message
