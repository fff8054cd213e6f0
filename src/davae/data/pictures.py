"""One encoded picture, from anywhere, to the pixels that a person sees in it, or a refusal that says why not."""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin, features
from torch import Tensor

from davae.errors import DataError
from davae.run.storage import write_atomically

# The formats that are decoded, by Pillow's names; the bytes decide, not the name of the file.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Brands that the header of a HEIC or AVIF file may name. Pillow's wheels read AVIF; HEIC needs the extra `heic`.
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")

MAX_PIXELS = 64_000_000
MIN_PICTURE_SIDE = 16
# Most scans of a JPEG of `MAX_PIXELS`; smaller ones may have more. Each scan is a pass over all pixels, however few
# bytes it has. Encoders write about ten.
MAX_SCANS = 20
# Colours are converted in strips of so many pixels, so that a large picture needs little more than its own memory.
STRIP_PIXELS = 1 << 22
# Name of the text in a PNG file that says where the picture comes from.
ORIGIN = "davae-origin"

Stream = BytesIO | BufferedReader

# Refusals that any collection of pictures has; all others mean that a file is broken.
LeftOutKind = Literal["too small", "no caption", "no class", "same name", "hidden", "mask", "archive", "link"]
RefusalKind = Literal["damaged", "format", "too large", "text", "missing"] | LeftOutKind
LEFT_OUT: tuple[RefusalKind, ...] = get_args(LeftOutKind)

_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")


@dataclass(frozen=True)
class Refusal:
    """A picture that is left out, why, and how to mend it."""

    name: str
    reason: str
    kind: RefusalKind = "damaged"


class PictureRefused(DataError):
    """A picture that cannot be used, for the reason in `refusal`."""

    def __init__(self, name: str, reason: str, kind: RefusalKind = "damaged") -> None:
        super().__init__(f"{name}: {reason}")
        self.refusal = Refusal(name, reason, kind)


def read_picture(
    data: bytes, name: str, *, max_pixels: int = MAX_PIXELS, min_side: int = MIN_PICTURE_SIDE, enough: int | None = None
) -> UInt8[Tensor, "3 height width"]:
    """Decode one picture to sRGB, as a person sees it, or raise a PictureRefused that says why it cannot be used.

    - Format, number of pixels, sides and a JPEG's scans are checked by the header, before anything is decoded. These
      limits bound time and memory (under 1 GiB for 64 million pixels). There is no clock: a busy machine reads the
      same pictures as an idle one.
    - EXIF orientation is applied. Broken EXIF, or an orientation that does not exist, means upright.
    - 16-bit grey (and mode I, whose values must fit 16 bits) is divided by 257; floats must lie in [0, 1].
    - An ICC profile is converted to sRGB, perceptual intent. A broken profile, one of another colour space, and one of
      16-bit grey are ignored, as viewers do.
    - Transparency is composited on white. Of an animation or of several pages the first is read.
    - A JPEG's sides may be divided by 2, 4 or 8, which is fast, as long as they stay at least `enough`.

    `name` is for messages. Pillow's own limit, `Image.MAX_IMAGE_PIXELS`, holds beside `max_pixels`.
    """
    with _open(BytesIO(data), name, max_pixels=max_pixels, min_side=min_side) as image:
        # Hostile scans cost time and have few bytes: counted before they are decoded.
        jpeg = image.format in ("JPEG", "MPO")
        scans, allowed = data.count(b"\xff\xda"), MAX_SCANS * max_pixels // (image.width * image.height)
        if jpeg and scans > allowed:
            raise PictureRefused(name, f"{scans} scans are more than the allowed {allowed}; save it again", "too large")

        # Decode, at a smaller scale where that will do.
        try:
            if jpeg and enough is not None:
                image.draft(None, (enough, enough))
            pixels = image.width * image.height
            with warnings.catch_warnings(action="ignore"):  # notes on metadata; errors in the pixels are raised
                image.load()
        except Exception as error:  # decoders have many kinds for damaged and hostile bytes
            raise PictureRefused(name, f"damaged or truncated ({error}); save or download it again") from error
        if image.width * image.height != pixels:
            raise PictureRefused(name, "its header and its content disagree on its size; save it again")

        # Pillow turns by EXIF data: it gets the orientation alone, for the rest of the file's may be broken.
        orientation = _orientation(image)
        rgb = _to_srgb(image, name)
        rgb.info.clear()
        rgb.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(rgb, in_place=True)

    values = np.asarray(rgb)
    del rgb  # each copy of a large picture counts
    return torch.from_numpy(np.array(values.transpose(2, 0, 1), order="C"))


def check_picture(
    stream: Stream, name: str, *, max_pixels: int = MAX_PIXELS, min_side: int = MIN_PICTURE_SIDE
) -> tuple[int, int]:
    """The checks of `read_picture` that need the header only; returns width and height of the upright picture.

    A PNG that lies on its side may say so behind its pixels, where this does not look.
    """
    with _open(stream, name, max_pixels=max_pixels, min_side=min_side) as image:
        lies = ("exif" in image.info or image.format == "TIFF") and _orientation(image) in (5, 6, 7, 8)
        return image.size[::-1] if lies else image.size


def to_bytes(image: Float[Tensor, "*batch 3 h w"]) -> UInt8[Tensor, "*batch 3 h w"]:
    """The models' values, in [-1, 1], as bytes."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_floats(images: UInt8[Tensor, "*batch 3 h w"]) -> Float[Tensor, "*batch 3 h w"]:
    """Bytes as the models' values, float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def digest_origin(*facts: Any) -> str:
    """SHA-256 (hex) of all that a picture is made from."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def place_png(path: Path, origin: str) -> Path:
    """`path`, or a name beside it if something is there that was not made from `origin`: nothing is overwritten."""
    if not os.path.lexists(path):
        return path
    with suppress(OSError, SyntaxError, ValueError):  # what Pillow raises for a file that is no PNG
        if path.is_file():
            with Image.open(path, formats=["PNG"]) as image:
                if image.info.get(ORIGIN) == origin:
                    return path
    return path.with_stem(f"{path.stem}-{origin[:12]}")


def write_png(
    path: Path, picture: UInt8[Tensor, "3 h w"], *, origin: str = "", texts: Mapping[str, str] | None = None
) -> Path:
    """Write one picture, whole or not at all, and return its path: that of `place_png`, if an `origin` is given.

    `texts` are further metadata, by keyword.
    """
    path = place_png(path, origin) if origin else path
    text, stream = PngImagePlugin.PngInfo(), BytesIO()
    for key, value in {ORIGIN: origin, **(texts or {})}.items():
        text.add_text(key, value)
    Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(stream, format="PNG", pnginfo=text)
    write_atomically(path, stream.getvalue())
    return path


def read_png(path: Path) -> UInt8[Tensor, "3 h w"]:
    """Read a picture that `write_png` wrote."""
    return read_picture(path.read_bytes(), str(path), min_side=1)


def _open(stream: Stream, name: str, *, max_pixels: int, min_side: int) -> Image.Image:
    if not stream.read(1):
        raise PictureRefused(name, "empty, zero bytes; save or download it again")
    formats = (*FORMATS, *_find_more_formats(stream, name))
    try:
        with warnings.catch_warnings(action="ignore"):
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(stream, formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureRefused(name, f"{error}; scale it down to at most {max_pixels} pixels", "too large") from error
    except Image.UnidentifiedImageError as error:
        raise PictureRefused(name, f"not of a format that is read ({', '.join(formats)})", "format") from error
    except Exception as error:  # as above
        raise PictureRefused(name, f"its header is damaged ({error}); save or download it again") from error

    # The header's size is known now, and nothing is decoded.
    size = f"{image.width}x{image.height} pixels"
    if image.width * image.height > max_pixels:
        raise PictureRefused(name, f"{size} is more than the allowed {max_pixels}; scale it down", "too large")
    # Animations are decoded with several frames in memory.
    if image.format == "WEBP" and getattr(image, "n_frames", 1) > 1 and image.width * image.height > max_pixels // 4:
        reason = f"{size} in an animation, allowed are {max_pixels // 4}; save its first frame alone"
        raise PictureRefused(name, reason, "too large")
    if min(image.size) < min_side:
        raise PictureRefused(name, f"{size}: its shorter side is under {min_side}; bring a larger one", "too small")
    return image


def _find_more_formats(stream: Stream, name: str) -> tuple[str, ...]:
    """The format of a HEIC or AVIF file, if it is one; a PictureRefused where its reader is not installed."""
    stream.seek(0)
    header = stream.read(32)
    stream.seek(0)
    if header[4:8] != b"ftyp":
        return ()

    # An AVIF file may name a general brand first.
    brands = {header[start : start + 4] for start in (8, 16, 20, 24, 28)}
    if not brands.isdisjoint(AVIF_BRANDS):
        if not features.check("avif"):
            raise PictureRefused(name, "AVIF, which this Pillow was built without; pip install -U pillow", "format")
        return ("AVIF",)
    if brands.isdisjoint(HEIC_BRANDS):
        return ()
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise PictureRefused(name, "HEIC, which needs a reader; pip install 'davae[heic]'", "format") from error
    register_heif_opener()
    return ("HEIF",)


def _orientation(image: Image.Image) -> int:
    # To be read after the pixels: a PNG may have EXIF behind them, and loading turns a TIFF.
    try:
        with warnings.catch_warnings(action="ignore"):
            orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as above; broken EXIF means upright
        return 1
    return orientation if isinstance(orientation, int) else 1


def _to_srgb(image: Image.Image, name: str) -> Image.Image:
    rows = max(1, STRIP_PIXELS // image.width)
    if rows >= image.height:
        return _strip_to_srgb(image, name)
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        rgb.paste(_strip_to_srgb(strip, name), (0, top))
    return rgb


def _strip_to_srgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in _SIXTEEN_BIT_MODES or image.mode == "F":
        return Image.fromarray(_scale_grey(image, name)).convert("RGB")

    match image.mode:
        case "L" | "RGB" | "CMYK" if not image.has_transparency_data:
            return _apply_profile(image, image.info.get("icc_profile"))
        case "1" | "L" | "P" | "PA" | "LA" | "RGB" | "RGBA" | "RGBX" | "YCbCr":
            rgba = image.convert("RGBA")
        case mode:
            raise PictureRefused(name, f"its colour mode {mode} is not read; convert it to RGB", "format")

    # Profiles are for colours: the alpha channel goes around them.
    colour = _apply_profile(rgba.convert("RGB"), image.info.get("icc_profile"))
    colour.putalpha(rgba.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB")


def _scale_grey(image: Image.Image, name: str) -> np.ndarray:
    """16-bit, 32-bit or floating-point grey as 8 bits."""
    values = np.asarray(image)
    if image.mode == "F":
        if not ((values >= 0) & (values <= 1)).all():
            raise PictureRefused(name, "floating point values outside [0, 1], or no numbers; scale them and save again")
        return np.rint(values * 255).astype(np.uint8)

    # 65535 is white.
    if values.min() < 0 or values.max() > 65535:
        raise PictureRefused(name, "integer values outside 0..65535; save it with 8 or 16 bits a channel")
    grey = ((values.astype(np.int64) + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    return grey if transparent is None else np.where(values == transparent, np.uint8(255), grey)


def _apply_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    converted = None
    if profile:
        with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):  # a profile that cannot be applied
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return image.convert("RGB") if converted is None else converted
