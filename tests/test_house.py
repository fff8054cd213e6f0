"""What keeps the source readable, counted by `house.py`."""

from pathlib import Path

import pytest

from house import PACKAGE, closure_lines, inspect_house


@pytest.mark.parametrize(
    ("file", "bound"),
    [
        ("method/stage_one_loss.py", 2000),
        ("training/stage_one.py", 6000),
        ("training/stage_two.py", 6000),
        ("training/stage_one_run.py", 9700),
        ("training/stage_two_run.py", 11700),
    ],
)
def test_a_file_pulls_in_few_lines(file: str, bound: int) -> None:
    """A reader of the loss, of a trainer's step or of a whole run has to read no more than this."""
    assert closure_lines(PACKAGE / Path(file)) < bound


def test_the_source_has_air(capsys: pytest.CaptureFixture[str]) -> None:
    """Paragraphs, comments, short functions and files; the table of today's tree is printed either way."""
    house = inspect_house(sorted(PACKAGE.rglob("*.py")))
    with capsys.disabled():
        print(f"\n{house.table()}")  # noqa: T201

    assert house.share_of_walls < 15, house.walls
    assert house.share_of_comments >= 2.9
    assert house.comprehensions_per_100_lines < 2
    assert not house.long_functions
    assert not house.long_files
    assert house.lines <= 25_060, "the package only gets smaller; new features bring their own lines here"
