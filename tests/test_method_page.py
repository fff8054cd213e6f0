"""Every function that docs/method.md maps an equation to is there under that name."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "method.md").read_text()
NAMES = sorted(set(re.findall(r"`((?:davae|AutoencoderDA)(?:\.\w+)+)", PAGE)))


def resolve(name: str) -> object:
    """The module, or the attribute of one, that a dotted name stands for."""
    parts = name.split(".")
    found: object = importlib.import_module("davae")
    for part in parts if parts[0] == "AutoencoderDA" else parts[1:]:
        if isinstance(found, ModuleType) and not hasattr(found, part):
            found = importlib.import_module(f"{found.__name__}.{part}")
        else:
            found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_name_is_there(name: str) -> None:
    assert resolve(name) is not None


def test_a_name_that_is_not_there_is_found_out() -> None:
    with pytest.raises((AttributeError, ImportError)):
        resolve("davae.method.losses.no_such_loss")


def test_the_page_names_many() -> None:
    assert len(NAMES) > 30
