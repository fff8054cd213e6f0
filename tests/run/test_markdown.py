"""The one writer of tables."""

import pytest

from davae.run.markdown import markdown_table


def test_numbers_are_flush_right_and_text_is_flush_left() -> None:
    table = markdown_table(["case", "tokens", "state"], [["base, 256 px", 256, "stopped"], ["", "", "running at 2"]])
    assert table.splitlines() == [
        "| case         | tokens | state        |",
        "| ------------ | -----: | ------------ |",
        "| base, 256 px |    256 | stopped      |",
        "|              |        | running at 2 |",
    ]


def test_a_table_may_have_no_rows() -> None:
    assert markdown_table(["", "a"], []).splitlines() == ["|     |   a |", "| --- | --: |"]


def test_no_cell_starts_a_column_or_a_row() -> None:
    assert markdown_table(["a|b\nc"], []).splitlines()[0] == "| a\\|b c |"


def test_rows_have_as_many_cells_as_the_header() -> None:
    with pytest.raises(ValueError, match="zip"):
        markdown_table(["a", "b"], [["c"]])
