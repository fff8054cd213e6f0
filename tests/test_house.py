"""What keeps the source readable, counted by `house.py`."""

from pathlib import Path

import pytest

from house import PACKAGE, closure_lines


@pytest.mark.parametrize(
    ("file", "bound"),
    [
        ("method/stage_one_loss.py", 2000),
        ("training/stage_one.py", 6000),
        ("training/stage_two.py", 6000),
    ],
)
def test_a_file_pulls_in_few_lines(file: str, bound: int) -> None:
    """A reader of the loss or of a trainer's step has to read no more than this."""
    assert closure_lines(PACKAGE / Path(file)) < bound
