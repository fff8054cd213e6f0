"""Odd pictures as files, with the pixels that a person sees in them, or the reason why they are refused."""

import random
import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

HEIGHT, WIDTH = 24, 40
_y, _x = np.mgrid[0:HEIGHT, 0:WIDTH]
# no symmetry, so that every orientation differs; grey levels of all sizes
PATTERN = np.stack([_x * 6, _y * 10, (_x + 2 * _y) * 2], axis=-1).astype(np.uint8)
GREY = PATTERN[..., 0]
HALF = _x < WIDTH // 2


def encode(image: Image.Image, kind: str, **options) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def rgb(array: np.ndarray = PATTERN) -> Image.Image:
    return Image.fromarray(array)


def png(header: bytes, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in body)


def exif(orientation: object) -> Image.Exif:
    result = Image.Exif()
    result[274] = orientation
    return result


def profile(*, turned: bool = False) -> bytes:
    """The profile of sRGB, or one in which red is sRGB's green, green its blue, blue its red."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if turned:
        for old, new in ((b"rXYZ", b"????"), (b"gXYZ", b"rXYZ"), (b"bXYZ", b"gXYZ"), (b"????", b"bXYZ")):
            data = data.replace(old, new, 1)
    return data


def grey(array: np.ndarray) -> np.ndarray:
    return np.repeat(array[..., None], 3, axis=-1)


def paletted() -> Image.Image:
    image = Image.fromarray((_x // 10 + 4 * (_y // 12)).astype(np.uint8), "L").convert("P")
    image.putpalette([value for index in range(8) for value in (index * 30, 255 - index * 20, index * 7)])
    return image


def interlaced() -> bytes:
    """The pattern as a PNG in Adam7's seven passes, which Pillow reads and does not write."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [PATTERN[top::down, left::right] for top, left, down, right in passes]
    rows = b"".join(b"\0" + row.tobytes() for part in parts for row in part)
    return png(struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 1), rows)


PALETTE_PIXELS = np.asarray(paletted().convert("RGB"))
ALPHA = np.where(HALF, 255, 0).astype(np.uint8)
ON_WHITE = np.where(HALF[..., None], PATTERN, 255).astype(np.uint8)
GREY_ON_WHITE = grey(np.where(HALF, GREY, 255).astype(np.uint8))
SIXTEEN = GREY.astype(np.uint16) * 257 + 100
SIXTEEN_ROWS = b"".join(b"\0" + row.astype(">u2").tobytes() for row in SIXTEEN)
FRAMES = {"save_all": True, "append_images": [rgb(255 - PATTERN)], "duration": 100}

EXACT = {
    "png": (encode(rgb(), "PNG"), PATTERN),
    "webp": (encode(rgb(), "WEBP", lossless=True), PATTERN),
    "bmp": (encode(rgb(), "BMP"), PATTERN),
    "tiff": (encode(rgb(), "TIFF"), PATTERN),
    "tiff, lzw": (encode(rgb(), "TIFF", compression="tiff_lzw"), PATTERN),
    "ppm": (encode(rgb(), "PPM"), PATTERN),
    "grey": (encode(rgb(GREY), "PNG"), grey(GREY)),
    "one bit": (encode(Image.fromarray(HALF), "PNG"), grey(HALF * np.uint8(255))),
    "grey and alpha": (encode(Image.merge("LA", [rgb(GREY), rgb(ALPHA)]), "PNG"), GREY_ON_WHITE),
    "alpha": (encode(rgb(np.dstack([PATTERN, ALPHA])), "PNG"), ON_WHITE),
    "alpha, webp": (encode(rgb(np.dstack([PATTERN, ALPHA])), "WEBP", lossless=True), ON_WHITE),
    "half alpha": (encode(rgb(np.dstack([PATTERN, ALPHA * 0 + 51])), "PNG"), np.rint(PATTERN * 0.2 + 204)),
    "colour key": (
        encode(rgb(), "PNG", transparency=(0, 0, 0)),
        np.where(PATTERN.any(-1, keepdims=True), PATTERN, 255),
    ),
    "grey key": (encode(rgb(GREY), "PNG", transparency=6), grey(np.where(GREY == 6, 255, GREY))),
    "palette": (encode(paletted(), "PNG"), PALETTE_PIXELS),
    "palette, gif": (encode(paletted(), "GIF"), PALETTE_PIXELS),
    "palette with a transparent colour": (
        encode(paletted(), "PNG", transparency=5),
        np.where(np.asarray(paletted())[..., None] == 5, 255, PALETTE_PIXELS),
    ),
    "palette with alphas": (
        encode(paletted(), "PNG", transparency=bytes([255, 255, 0])),
        np.where(np.asarray(paletted())[..., None] == 2, 255, PALETTE_PIXELS),
    ),
    "grey 16 bit, png": (encode(rgb(SIXTEEN), "PNG"), grey(GREY)),
    "grey 16 bit, tiff": (encode(rgb(SIXTEEN), "TIFF"), grey(GREY)),
    "grey 16 bit with a key": (
        png(struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 0, 0, 0, 0), SIXTEEN_ROWS, (b"tRNS", struct.pack(">H", 100))),
        grey(np.where(GREY == 0, 255, GREY)),
    ),
    "rgb 16 bit": (
        png(
            struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0),
            b"".join(b"\0" + (row.astype(np.uint16) * 257).astype(">u2").tobytes() for row in PATTERN),
        ),
        PATTERN,
    ),
    "integers": (encode(rgb(SIXTEEN.astype(np.int32)), "TIFF"), grey(GREY)),
    "floats": (encode(rgb((GREY / 255).astype(np.float32)), "TIFF"), grey(GREY)),
    "cmyk, tiff": (encode(Image.fromarray(np.dstack([255 - PATTERN, GREY * 0]), "CMYK"), "TIFF"), PATTERN),
    "rgbx, tiff": (encode(Image.fromarray(np.dstack([PATTERN, GREY]), "RGBX"), "TIFF"), PATTERN),
    "animated gif": (encode(paletted(), "GIF", save_all=True, append_images=[rgb()]), PALETTE_PIXELS),
    "animated png": (encode(rgb(), "PNG", **FRAMES), PATTERN),
    "animated webp": (encode(rgb(), "WEBP", lossless=True, **FRAMES), PATTERN),
    "many pages": (encode(rgb(), "TIFF", save_all=True, append_images=[rgb(255 - PATTERN)]), PATTERN),
    "profile of sRGB": (encode(rgb(), "PNG", icc_profile=profile()), PATTERN),
    "broken profile": (encode(rgb(), "PNG", icc_profile=b"no profile at all"), PATTERN),
    "cut profile": (encode(rgb(), "PNG", icc_profile=profile()[:200]), PATTERN),
    "profile of another space": (
        encode(rgb(), "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()),
        PATTERN,
    ),
    "broken exif": (encode(rgb(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), PATTERN),
    "exif of garbage": (encode(rgb(), "WEBP", lossless=True, exif=b"\xde\xad\xbe\xef" * 5), PATTERN),
    "orientation 0": (encode(rgb(), "PNG", exif=exif(0)), PATTERN),
    "orientation 99": (encode(rgb(), "PNG", exif=exif(99)), PATTERN),
    "interlaced png": (interlaced(), PATTERN),
    "sequential gif": (encode(paletted(), "GIF", interlace=0), PALETTE_PIXELS),
    "transparent gif": (
        encode(paletted(), "GIF", transparency=5),
        np.where(np.asarray(paletted())[..., None] == 5, 255, PALETTE_PIXELS),
    ),
    "palette, bmp": (encode(paletted(), "BMP"), PALETTE_PIXELS),
    "palette, tiff": (encode(paletted(), "TIFF"), PALETTE_PIXELS),
    "one bit, pbm": (encode(Image.fromarray(HALF), "PPM"), grey(HALF * np.uint8(255))),
    "one bit, tiff": (encode(Image.fromarray(HALF), "TIFF", compression="group4"), grey(HALF * np.uint8(255))),
    "grey, pgm": (encode(rgb(GREY), "PPM"), grey(GREY)),
    "tiff, deflate": (encode(rgb(), "TIFF", compression="tiff_adobe_deflate"), PATTERN),
    "alpha, tiff": (encode(rgb(np.dstack([PATTERN, ALPHA])), "TIFF"), ON_WHITE),
    "odd sides": (encode(rgb(PATTERN[:17, :19]), "PNG"), PATTERN[:17, :19]),
    "bytes behind the end": (encode(rgb(), "PNG") + b"tail" * 99, PATTERN),
}
ROUNDED = ("half alpha", "profile of sRGB")

LOSSY = {
    "jpeg": encode(rgb(), "JPEG", quality=100, subsampling=0),
    "progressive jpeg": encode(rgb(), "JPEG", quality=100, subsampling=0, progressive=True),
    "cmyk jpeg": encode(Image.fromarray(np.dstack([255 - PATTERN, GREY * 0]), "CMYK"), "JPEG", quality=100),
    "grey jpeg": encode(rgb(GREY), "JPEG", quality=100),
    "lossy webp": encode(rgb(), "WEBP", quality=100),
    "tiff with jpeg inside": encode(rgb(), "TIFF", compression="jpeg", quality=100),
    "mpo": encode(rgb(), "MPO", save_all=True, append_images=[rgb(255 - PATTERN)], quality=100, subsampling=0),
    "jpeg with broken exif": encode(rgb(), "JPEG", quality=100, subsampling=0, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
}


def text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    for index in range(80):
        info.add_text(f"key{index}", "a" * (1 << 20), zip=True)
    return encode(rgb(), "PNG", pnginfo=info)


def bomb(side: int) -> bytes:
    return png(struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"")


def damaged_data() -> bytes:
    data = bytearray(encode(rgb(), "PNG"))
    data[data.index(b"IDAT") + 20] ^= 0xFF
    return bytes(data)


def many_scans() -> bytes:
    """A progressive JPEG whose last scan is there 200 times: each is decoded again, over all pixels."""
    data = encode(rgb(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 200 + data[-2:]


REFUSED = {
    "zero bytes": (b"", "empty"),
    "html": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "format"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>', "format"),
    "eps": (encode(rgb(), "EPS"), "format"),
    "ico": (encode(rgb(np.zeros((32, 32, 3), np.uint8)), "ICO"), "format"),
    "noise": (random.Random(0).randbytes(2000), "format"),
    "12000 squared": (bomb(12_000), "64000000"),
    "20000 squared": (bomb(20_000), "64000000"),
    "one pixel": (encode(rgb(PATTERN[:1, :1]), "PNG"), "1x1"),
    "a line": (encode(rgb(np.zeros((20_000, 1, 3), np.uint8)), "PNG"), "1x20000"),
    "lab": (encode(Image.fromarray(PATTERN, "RGB").convert("LAB"), "TIFF"), "mode LAB"),
    "negative integers": (encode(rgb(SIXTEEN.astype(np.int32) - 1000), "TIFF"), "0..65535"),
    "large integers": (encode(rgb(SIXTEEN.astype(np.int32) * 2), "TIFF"), "0..65535"),
    "large floats": (encode(rgb(GREY.astype(np.float32)), "TIFF"), "[0, 1]"),
    "not a number": (encode(rgb(np.full((32, 32), np.nan, np.float32)), "TIFF"), "[0, 1]"),
    "damaged data": (damaged_data(), "damaged"),
    "half a header": (encode(rgb(), "PNG")[:20], "header is damaged"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), "format"),
    "text bomb": (text_bomb(), "damaged"),
}

WHOLE = {name: EXACT[name][0] for name in ("png", "webp", "bmp", "tiff", "tiff, lzw", "ppm", "palette, gif")} | {
    name: LOSSY[name] for name in ("jpeg", "progressive jpeg")
}
