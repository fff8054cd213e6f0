"""Trials: one test, repeated with other random numbers. And the table of `make soak`."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


class Trials:
    """The random numbers of one trial after the other, until enough are done.

    A turn of the loop that holds several trials, or none, corrects `done`. Seed and number of a trial decide its random
    numbers, so that any trial can be replayed alone.
    """

    def __init__(self, item: pytest.Item) -> None:
        marker = item.get_closest_marker("soak")
        assert marker, "trials are for tests that are marked soak"
        usual = marker.kwargs["full" if item.config.getoption("--soak") else "ci"]
        chosen = item.config.getoption("--trials")
        self.only = item.config.getoption("--trial")
        self.count = max(1, round(item.config.getoption("--part") * (usual if chosen is None else chosen)))
        self.seed = item.config.getoption("--seed")
        self.number = self.done = 0
        self._id = item.nodeid

    def __iter__(self) -> Iterator[random.Random]:
        if self.only is not None:
            self.number, self.count = self.only, 1
        while self.done < self.count:
            assert self.number < (self.only or 0) + 10 * self.count + 10, "most turns held no trial"
            yield random.Random(f"{self.seed} {self.number}")
            self.done += 1
            self.number += 1

    @property
    def replay(self) -> str:
        """The command that repeats the trial that runs, or ran last."""
        return f"python -m pytest '{self._id}' --seed {self.seed} --trial {self.number}"


class SoakTable:
    """Adds up the tests by promise and function; prints the table at the end and writes it to a file."""

    def __init__(self, config: pytest.Config) -> None:
        self.path: Path = config.getoption("--soak")
        self.seed: int = config.getoption("--seed")
        self.rows: dict[tuple[str, str], dict[str, object]] = {}
        self.began = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped or (report.when != "call" and report.passed):
            return
        facts = dict(report.user_properties)
        test = report.nodeid.split("[")[0].removeprefix("tests/")
        promise = str(facts.get("promise") or "slow")
        row = self.rows.setdefault((promise, test), {"trials": 0, "failures": 0, "seconds": 0.0, "replay": []})
        row["trials"] += int(facts.get("trials", 1))
        row["failures"] += report.failed
        row["seconds"] = round(row["seconds"] + report.duration, 1)
        row["replay"] += [facts.get("replay", f"python -m pytest '{report.nodeid}'")] if report.failed else []

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        from rich.console import Console
        from rich.table import Table

        from davae.run.record import environment
        from davae.run.storage import write_json

        # One row for each promise and test.
        table = Table("promise", "test", "trials", "failures", "seconds", "seed", title="soak")
        rows = [{"promise": key[0], "test": key[1], **row} for key, row in sorted(self.rows.items())]
        for row in rows:
            table.add_row(*(str({**row, "seed": self.seed}[str(column.header)]) for column in table.columns))
        console = Console(width=120)
        with console.capture() as capture:
            console.print(table)
        terminalreporter.write(capture.get())

        # What failed, and the file of the numbers.
        for row in rows:
            for command in row["replay"]:
                terminalreporter.write_line(f"replay: {command}")
        where = {key: value for key, value in environment().items() if key != "command"}
        seconds = round(time.monotonic() - self.began)
        write_json(self.path, {"seed": self.seed, "seconds": seconds, "rows": rows, "environment": where})
