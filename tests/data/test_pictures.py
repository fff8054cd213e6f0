"""Odd pictures: each gives the pixels that a person sees, or a refusal that names the reason."""

import os
import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from pillow_heif import register_heif_opener

from data.corpus import (
    ALPHA,
    EXACT,
    HALF,
    HEIGHT,
    LOSSY,
    PATTERN,
    REFUSED,
    ROUNDED,
    WHOLE,
    WIDTH,
    encode,
    exif,
    many_scans,
    profile,
    rgb,
)
from data.stored import fill, peak_memory_below, tar
from davae.data.buckets import Bucket, fit
from davae.data.pictures import (
    FORMATS,
    MAX_PIXELS,
    MAX_SCANS,
    PictureRefused,
    check_picture,
    read_picture,
    read_png,
    to_bytes,
    write_png,
)
from davae.data.sources import open_pictures
from davae.errors import StorageError
from davae.seeds import generator
from forks import exit_code, forked


def pixels(data: bytes) -> np.ndarray:
    picture = read_picture(data, "picture")
    assert picture.is_contiguous()
    return picture.permute(1, 2, 0).numpy()


def close(actual: np.ndarray, expected: np.ndarray, tolerance: int = 1) -> bool:
    return actual.shape == expected.shape and np.abs(actual.astype(int) - expected.astype(int)).max() <= tolerance


@pytest.mark.soak("R9")
@pytest.mark.parametrize("kind", EXACT)
def test_lossless_pictures_have_the_pixels_that_a_person_sees(kind):
    data, expected = EXACT[kind]
    assert close(pixels(data), expected, tolerance=1 if kind in ROUNDED else 0)


@pytest.mark.soak("R9")
@pytest.mark.parametrize("kind", LOSSY)
def test_lossy_pictures_have_the_pixels_that_a_person_sees(kind):
    expected = np.repeat(PATTERN[..., :1], 3, axis=-1) if kind == "grey jpeg" else PATTERN
    # chroma of a lossy WebP has half the resolution
    difference = np.abs(pixels(LOSSY[kind]).astype(int) - expected)
    assert difference.mean() < 3 if kind == "lossy webp" else difference.max() <= 8


def test_adobe_jpeg_without_its_marker_is_read_as_plain_cmyk():
    inverted = LOSSY["cmyk jpeg"]
    marker = inverted.index(b"\xff\xee")
    length = int.from_bytes(inverted[marker + 2 : marker + 4], "big")
    plain = inverted[:marker] + inverted[marker + 2 + length :]
    expected = np.asarray(Image.open(BytesIO(plain)).convert("RGB"))
    assert close(pixels(plain), expected, tolerance=0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_every_orientation_is_turned_upright(kind, orientation):
    # what a camera stores, given how it was held, so that the upright picture is the pattern
    stored = {
        1: PATTERN,
        2: PATTERN[:, ::-1],
        3: PATTERN[::-1, ::-1],
        4: PATTERN[::-1],
        5: PATTERN.transpose(1, 0, 2),
        6: np.rot90(PATTERN, 1),
        7: PATTERN[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PATTERN, -1),
    }[orientation]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(rgb(np.ascontiguousarray(stored)), kind, exif=exif(orientation), **options)
    assert close(pixels(data), PATTERN, tolerance=0)


def test_display_p3_becomes_srgb():
    # the colorants of both spaces in the profiles' white, D50
    p3 = np.array([[0.51512, 0.29198, 0.1571], [0.2412, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
    srgb = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.7141]])

    # sRGB's profile with P3's colorants in it.
    data = profile()
    for name, old, new in zip((b"rXYZ", b"gXYZ", b"bXYZ"), srgb.T, p3.T, strict=True):
        entry = data.index(name, 128)
        offset = int.from_bytes(data[entry + 4 : entry + 8], "big") + 8
        stored = np.frombuffer(data[offset : offset + 12], ">i4") / 65536
        assert np.allclose(stored, old, atol=1e-3)
        data = data[:offset] + np.rint(new * 65536).astype(">i4").tobytes() + data[offset + 12 :]

    # The same by hand: linear light, the other space's colorants, sRGB's curve.
    values = PATTERN / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    linear = (linear @ (np.linalg.inv(srgb) @ p3).T).clip(0, 1)
    expected = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    expected = np.rint(255 * expected).astype(np.uint8)

    assert not close(PATTERN, expected, tolerance=10)
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        assert close(pixels(encode(rgb(), kind, icc_profile=data, **options)), expected, tolerance=1)


def test_a_profile_changes_the_colours():
    red = np.zeros_like(PATTERN)
    red[..., 0] = 255
    actual = pixels(encode(rgb(red), "PNG", icc_profile=profile(turned=True)))
    assert close(actual, red[..., [1, 0, 2]], tolerance=2)
    alpha = np.dstack([red, ALPHA])
    actual = pixels(encode(rgb(alpha), "PNG", icc_profile=profile(turned=True)))
    assert close(actual, np.where(HALF[..., None], red[..., [1, 0, 2]], 255), tolerance=2)


@pytest.mark.soak("R9")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_refused_with_name_and_reason(kind):
    data, reason = REFUSED[kind]
    with pytest.raises(PictureRefused) as refusal:
        read_picture(data, "folder/picture")
    assert refusal.value.refusal.name == "folder/picture"
    assert reason in refusal.value.refusal.reason
    assert str(refusal.value).startswith("folder/picture: ")
    assert refusal.value.exit_code == 3


def test_limits_hold_on_the_header_and_are_arguments():
    data = encode(rgb(), "PNG")
    assert close(pixels(data), PATTERN)
    for options in ({"max_pixels": HEIGHT * WIDTH - 1}, {"min_side": HEIGHT + 1}):
        with pytest.raises(PictureRefused):
            read_picture(data, "picture", **options)
        with pytest.raises(PictureRefused):
            check_picture(BytesIO(data[:60]), "picture", **options)
    read_picture(data, "picture", max_pixels=HEIGHT * WIDTH, min_side=HEIGHT)
    check_picture(BytesIO(data[:60]), "picture", max_pixels=HEIGHT * WIDTH, min_side=HEIGHT)


def test_a_jpeg_of_many_scans_is_refused_by_what_they_cost():
    data = many_scans()
    scans = data.count(b"\xff\xda")
    assert scans > 200
    least = -(-scans * HEIGHT * WIDTH // MAX_SCANS)
    read_picture(data, "picture", max_pixels=least)
    with pytest.raises(PictureRefused, match=f"{scans} scans are more than the allowed {scans - 1}") as refusal:
        read_picture(data, "picture", max_pixels=least - 1)
    assert refusal.value.refusal.kind == "too large"


@pytest.mark.soak("R9")
@pytest.mark.parametrize("kind", WHOLE)
def test_a_truncated_picture_is_refused_unless_nothing_of_it_is_missing(kind):
    data = WHOLE[kind]
    whole = pixels(data)
    refused = 0
    for part in range(1, 20):
        try:
            assert close(pixels(data[: len(data) * part // 20]), whole, tolerance=0), f"{part}/20"
        except PictureRefused:
            refused += 1
    assert refused >= 15  # of a PNG the last chunk may be missing


@pytest.mark.parametrize(("kind", "tolerance"), [("AVIF", 12), ("HEIF", 12)])
def test_pictures_of_telephones_are_read(kind, tolerance):
    register_heif_opener()
    smooth = Image.linear_gradient("L").convert("RGB").resize((64, 48))
    stream = BytesIO()
    smooth.save(stream, format=kind, quality=95)
    assert close(pixels(stream.getvalue()), np.array(smooth), tolerance=tolerance)
    assert check_picture(BytesIO(stream.getvalue()), "a.heic") == (64, 48)
    with pytest.raises(PictureRefused, match=r"a\.heic: 64x48 pixels is more than the allowed 100"):
        read_picture(stream.getvalue(), "a.heic", max_pixels=100)
    with pytest.raises(PictureRefused):
        read_picture(stream.getvalue()[:-200], "a.heic")


def test_without_its_reader_heic_is_refused_with_the_name_of_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(PictureRefused, match=r"a: HEIC, which needs a reader; pip install 'davae\[heic\]'") as refused:
        read_picture(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), "a")
    assert refused.value.refusal.kind == "format"


def test_every_allowed_format_is_in_the_corpus():
    seen = {Image.open(BytesIO(data)).format for data in WHOLE.values()}
    assert seen == set(FORMATS)


def test_a_set_of_the_whole_corpus_uses_or_counts_every_file(tmp_path):
    good = {name: data for name, (data, _) in EXACT.items()} | LOSSY
    good |= {f"orientation {number}": encode(rgb(), "PNG", exif=exif(number)) for number in range(1, 9)}

    bad = {name: data for name, (data, _) in REFUSED.items()}
    whole = encode(rgb(), "PNG")
    bad |= {f"cut at {part}/13": whole[: len(whole) * part // 13] for part in range(1, 11)}
    files = {f"{index:03d}": data for index, data in enumerate([*good.values(), *bad.values()])}
    assert len(files) >= 60

    # As files whose suffix says nothing, beside things that are no files.
    folder = tmp_path / "set"
    fill(folder, {f"{name}.jpg": data for name, data in files.items()})
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")

    small = open_pictures(folder, size=16, captions=False).sound()
    assert small.keys == list(files)[: len(good)]
    assert len(small.refused) == len(bad) + 3  # a folder is none of its pictures
    assert all(refusal.reason for refusal in small.refused)

    # In a shard they are the same.
    tar(tmp_path / "set.tar", {f"{name}.jpg": data for name, data in files.items()})
    shard = open_pictures(tmp_path / "set.tar", size=16, captions=False).sound()
    assert shard.keys == small.keys
    assert torch.equal(shard.batch(range(len(shard))), small.batch(range(len(small))))


def test_a_large_picture_takes_few_times_its_own_memory():
    side = 4000
    rgba = Image.new("RGBA", (side, side), (10, 20, 30, 128))
    flat = encode(rgba, "PNG", compress_level=1, icc_profile=profile())
    progressive = encode(rgba.convert("RGB"), "JPEG", progressive=True)
    del rgba

    def read() -> None:
        for data in (flat, progressive):
            # A picture of MAX_PIXELS may take 1 GiB, this one its part of it.
            with peak_memory_below(side * side * (1 << 30) // MAX_PIXELS):
                read_picture(data, "large", max_pixels=side * side)

    assert exit_code(forked(read)) == 0


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_small_and_looks_the_same(orientation):
    y, x = np.mgrid[0:512, 0:768]
    waves = np.stack([np.sin(x / 9 + y / 50), np.cos(y / 7), np.sin((x + y) / 30)], axis=-1)
    data = encode(rgb((waves * 100 + 128).astype(np.uint8)), "JPEG", quality=95, exif=exif(orientation))
    whole = read_picture(data, "large")
    for enough, factor in ((512, 1), (256, 2), (129, 2), (128, 4), (64, 8), (8, 8)):
        small = read_picture(data, "large", enough=enough)
        assert small.shape == (3, whole.shape[1] // factor, whole.shape[2] // factor)
    side = 64
    bucket = Bucket(side, side)
    fast, slow = (fit(image, bucket).float() for image in (read_picture(data, "a", enough=2 * side), whole))
    assert (fast - slow).square().mean().sqrt() < 2  # of 255: more than 42 dB
    check = check_picture(BytesIO(data), "large")
    assert check == (whole.shape[2], whole.shape[1])


# PNG files


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
