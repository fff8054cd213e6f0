"""`track`, the one bar of loops outside training; `StepProgress` itself is tested with training."""

import pytest

from davae.run.progress import track


def test_items_come_in_order_and_the_end_is_a_line_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(["a", "b", "c"], "reading", unit="files")) == ["a", "b", "c"]
    assert capsys.readouterr().err.startswith("reading: 3/3 files, ")


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(2), "reading", visible=False)) == [0, 1]
    assert capsys.readouterr().err == ""
