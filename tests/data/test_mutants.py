"""Pictures, shards, texts and tables with bytes changed at random: they are read, or refused by a typed error.

Each case has less than 2 s of processor time; a few hundred of them are run in a process of their own, which may take
1 GiB, must not crash or hang, and must leave no file.
"""

import gzip
import io
import json
import random
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data.corpus import EXACT, LOSSY, WHOLE
from data.stored import peak_memory_below, picture
from davae.data.pictures import read_picture
from davae.data.sources import open_pictures
from davae.errors import DavaeError
from forks import exit_code, forked
from trials import Trials

TOGETHER = 250
"""Cases in one process."""
VALUES = (
    b"\0",
    b"\x01",
    b"\x7f",
    b"\x80",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\0\0\0\0",
    b"../",
    b"9" * 12,
)

Case = Callable[[random.Random], object]


def mutant(content: bytes, chance: random.Random, *, others: list[bytes]) -> bytes:
    """Up to eight changes, most of them near the beginning, where headers are."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 8)):
        place = chance.randrange(min(len(data), chance.choice([32, 200, 600, 1 << 30])) + 1) if data else 0
        length = chance.randint(1, 16)

        # A byte, a telling value, a part that is lost, doubled or foreign, or the end that is cut off.
        match chance.randrange(7):
            case 0 | 1:
                data[place : place + 1] = chance.randbytes(1)
            case 2:
                value = chance.choice(VALUES)
                data[place : place + len(value)] = value
            case 3:
                data[place : place + length] = b""
            case 4:
                data[place:place] = data[place : place + length]
            case 5:
                del data[max(1, len(data) - chance.randint(1, len(data) or 1)) :]
            case 6:
                other = chance.choice(others)
                start = chance.randrange(len(other) + 1)
                data[place : place + length] = other[start : start + length]
    return bytes(data)


def refused_or_read(case: Case, chance: random.Random) -> None:
    began, refusal = time.process_time(), ""
    try:
        case(chance)
    except DavaeError as error:
        refusal = str(error)
    assert len(refusal) < 10_000
    assert time.process_time() - began < 2


def run(case: Case, trials: Trials, folder: Path) -> None:
    """All trials of a case, in processes of `TOGETHER`."""
    for chance in trials:

        def together(chance: random.Random = chance) -> None:
            signal.alarm(120)
            with peak_memory_below(1 << 30):
                for _ in range(TOGETHER):
                    refused_or_read(case, chance)

        before = {path: path.is_file() for path in folder.rglob("*")}
        code = exit_code(forked(together))
        assert code == 0, f"exit code {code}; {trials.replay}"
        assert {path: path.is_file() for path in folder.rglob("*")} == before
        trials.done += TOGETHER - 1


PICTURES = [data for data, _ in EXACT.values()] + list(LOSSY.values()) + list(WHOLE.values())
TEXTS = {
    "a.txt": "a caf\u00e9".encode(),
    "b.caption": b"a caption",
    "c.json": json.dumps({"caption": "in json", "class": 3, "more": [1, {"x": None}]}).encode(),
    "d.cls": b"7",
    "metadata.jsonl": b'{"file_name": "a.png", "text": "row"}\n{"file_name": "sub/e.png", "label": 1}\n',
}


@pytest.mark.soak("R10", ci=6500, full=700_000)
def test_pictures(tmp_path: Path, trials: Trials) -> None:
    def case(chance: random.Random) -> None:
        data = mutant(chance.choice(PICTURES), chance, others=PICTURES)
        image = read_picture(data, "picture", max_pixels=1_000_000, enough=chance.choice([None, 16]))
        assert image.shape[0] == 3
        assert 256 <= image.shape[1] * image.shape[2] <= 1_000_000

    run(case, trials, tmp_path)


@pytest.mark.soak("R10", ci=1000, full=60_000)
def test_shards(tmp_path: Path, trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    files = {"x/a.png": picture(0), "x/a.txt": b"a caption", "b.png": picture(1), "b.json": TEXTS["c.json"]}
    with tarfile.open(fileobj=stream, mode="w") as shard:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(data), {"comment": "a header of its own"}
            shard.addfile(member, io.BytesIO(data))

    # Most changes go into headers, whose places are known.
    whole = stream.getvalue().rstrip(b"\0") + bytes(1024)
    headers = [start for start in range(0, len(whole) - 511, 512) if whole[start + 257 : start + 262] == b"ustar"]
    packed, plain = tmp_path / "set/a.tar.gz", tmp_path / "set/a.tar"
    plain.parent.mkdir()
    monkeypatch.chdir(plain.parent)

    def case(chance: random.Random) -> None:
        if chance.random() < 0.2:
            path, content = packed, mutant(gzip.compress(whole), chance, others=[whole])
        else:
            start = chance.choice(headers)
            header = bytearray(mutant(whole[start : start + 512], chance, others=[whole])[:512].ljust(512, b"\0"))
            if chance.random() < 0.8:  # so that it is more than its checksum that fails
                header[148:156] = b" " * 8
                header[148:156] = b"%06o\0 " % sum(header)
            path, content = plain, whole[:start] + bytes(header) + whole[start + 512 :]
        path.write_bytes(content)
        try:
            open_pictures(path, size=16, classes=chance.random() < 0.2, captions=False).sound()
        finally:
            path.unlink()

    run(case, trials, tmp_path)


@pytest.mark.soak("R10", ci=500, full=40_000)
def test_texts_and_tables(tmp_path: Path, trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    for index, name in enumerate(("a", "b", "c", "d", "sub/e")):
        (folder / f"{name}.png").write_bytes(picture(index))
    for name, data in TEXTS.items():
        (folder / name).write_bytes(data)
    tables = {}
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        pass  # the extra datasets is not installed
    else:
        rows = pyarrow.table({"file_name": ["a.png", "sub/e.png"], "text": ["one", "two"], "label": [1, 2]})
        parquet.write_table(rows, tmp_path / "table")
        tables["metadata.parquet"] = (tmp_path / "table").read_bytes()
    monkeypatch.chdir(folder)

    def case(chance: random.Random) -> None:
        name, data = chance.choice([*TEXTS.items(), *tables.items()])
        changed = mutant(data, chance, others=list(TEXTS.values()))
        (folder / name).write_bytes(changed)
        try:
            classes = chance.random() < 0.3
            pictures = open_pictures(folder, size=16, classes=classes, captions=False)
            for caption in pictures.captions:
                caption.encode()
        finally:
            if name in TEXTS:
                (folder / name).write_bytes(TEXTS[name])
            else:
                (folder / name).unlink()

    run(case, trials, tmp_path)
