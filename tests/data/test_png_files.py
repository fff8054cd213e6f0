import pytest
import torch
from PIL import Image

from davae.data.pictures import read_png, to_bytes, write_png
from davae.errors import StorageError
from davae.seeds import generator


def test_bytes_and_back() -> None:
    every = torch.arange(256, dtype=torch.uint8).repeat(3, 2, 1)
    assert torch.equal(to_bytes(every.float() / 127.5 - 1), every)
    assert to_bytes(torch.tensor([-7.0, 0.0, 7.0]).expand(2, 3, 1, 3))[0, 0, 0].tolist() == [0, 128, 255]


def test_a_picture_survives_the_disk(tmp_path) -> None:
    picture = torch.randint(256, (3, 5, 7), dtype=torch.uint8, generator=generator(0, "test"))
    write_png(tmp_path / "deep" / "a.png", picture, origin="here")
    assert torch.equal(read_png(tmp_path / "deep" / "a.png"), picture)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.png"]
    with Image.open(tmp_path / "deep" / "a.png") as image:
        assert image.size == (7, 5)


def test_a_picture_that_cannot_be_written_is_a_storage_error(tmp_path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError):
        write_png(tmp_path / "file" / "a.png", torch.zeros(3, 4, 4, dtype=torch.uint8))
