"""One encoded picture, from anywhere, to the pixels that a person sees in it: or a refusal that says why not."""

import struct
import warnings
import zlib
from io import BufferedReader, BytesIO
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageCms
from torch import Tensor

from davae.errors import DataError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are decoded, as Pillow names them; the bytes decide, not the name of the file."""

MAX_PIXELS = 64_000_000
MIN_SIDE = 16
MAX_SCANS = 20
"""Of a JPEG that has the most pixels allowed, and so many more as it is smaller: each is a pass over all pixels,
however few bytes it has. Encoders make about ten."""
STRIP_PIXELS = 1 << 22
"""Colours are converted in strips of so many pixels, so that a large picture needs no more than its own memory."""

Stream = BytesIO | BufferedReader

RefusalKind = Literal[
    "damaged", "format", "too large", "text", "missing", "too small", "no caption", "no class", "same name"
]
LEFT_OUT: tuple[RefusalKind, ...] = ("too small", "no caption", "no class", "same name")
"""Kinds of refusal that say nothing against the files: whoever gathers pictures expects some. The others are losses."""

# What Pillow's decoders raise on damaged or hostile bytes; found by reading them and by the fuzz test.
_DECODER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")


class PictureRefused(DataError):
    """A picture that is not used: `name` says which, `reason` why and how to mend it, `kind` what sort of reason."""

    def __init__(self, name: str, reason: str, kind: RefusalKind = "damaged") -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason
        self.kind = kind


def read_picture(
    data: bytes, name: str, *, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE, enough: int | None = None
) -> UInt8[Tensor, "3 height width"]:
    """Decode one picture to sRGB as it is meant to be seen.

    - The header is checked before anything is decoded: the format, the number of pixels, the sides, a JPEG's scans.
      These limits bound the time and the memory that a file can take (64 million pixels: under 1 GiB). There is no
      clock, so that a busy machine reads the same pictures as an idle one.
    - EXIF orientation is applied. Broken EXIF, or an orientation that does not exist, means upright.
    - 16-bit grey (and mode I, whose values must fit 16 bits) is divided by 257; floating point must lie in [0, 1].
    - An ICC profile is converted to sRGB, perceptual intent. A broken one, or one of another colour space than the
      picture's, is passed over: the picture is then taken for sRGB, which is what viewers show. So is 16-bit grey.
    - Transparency is composited on white. Of an animation or of several pages the first frame is read.

    Args:
        data: the encoded file.
        name: what messages call it.
        max_pixels: most pixels that are decoded. Pillow's own limit, `Image.MAX_IMAGE_PIXELS`, holds besides.
        min_side: shortest side that is accepted, in pixels.
        enough: both sides of a JPEG may be halved, quartered or divided by 8 as long as they stay at least so long:
            libjpeg then decodes a part of each block only, several times as fast. None is full size.

    Raises:
        PictureRefused: the picture is empty, damaged, truncated, too large, too small, of a format or of a colour mode
            that is not read.
    """
    with _open(BytesIO(data), name, max_pixels=max_pixels, min_side=min_side) as image:
        scans, allowed = data.count(b"\xff\xda"), MAX_SCANS * max_pixels // (image.width * image.height)
        if image.format in ("JPEG", "MPO") and scans > allowed:
            raise PictureRefused(name, f"{scans} scans are more than the allowed {allowed}; save it again", "too large")
        try:
            if enough is not None and image.format in ("JPEG", "MPO"):
                image.draft(None, (enough, enough))
            pixels = image.width * image.height
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # notes on metadata; what is wrong with the pixels is raised
                image.load()
        except _DECODER_ERRORS as error:
            raise PictureRefused(name, f"damaged or truncated ({error}); save or download it again") from error
        if image.width * image.height != pixels:
            raise PictureRefused(name, "its header and its content disagree on its size; save it again")
        upright = _UPRIGHT.get(_orientation(image))
        rgb = _to_srgb(image, name)
    if upright is not None:
        rgb = rgb.transpose(upright)
    values = np.asarray(rgb)
    del rgb  # of a large picture each copy counts
    return torch.from_numpy(np.array(values.transpose(2, 0, 1), order="C"))


def check_picture(
    stream: Stream, name: str, *, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE
) -> tuple[int, int]:
    """The checks that `read_picture` makes before it decodes, without decoding.

    Returns:
        Width and height of the picture held upright, as far as the header tells: PNG may say later that it lies.

    Raises:
        PictureRefused: as `read_picture`, for what a header shows.
    """
    with _open(stream, name, max_pixels=max_pixels, min_side=min_side) as image:
        lies = ("exif" in image.info or image.format == "TIFF") and _orientation(image) in (5, 6, 7, 8)
        return image.size[::-1] if lies else image.size


def _open(stream: Stream, name: str, *, max_pixels: int, min_side: int) -> Image.Image:
    if not stream.read(1):
        raise PictureRefused(name, "empty, zero bytes; save or download it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(stream, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"{error}; scale it down to at most {max_pixels} pixels"
        raise PictureRefused(name, reason, "too large") from error
    except Image.UnidentifiedImageError as error:
        reason = f"not a picture of a format that is read ({', '.join(FORMATS)}); convert it to one"
        raise PictureRefused(name, reason, "format") from error
    except _DECODER_ERRORS as error:
        raise PictureRefused(name, f"its header is damaged ({error}); save or download it again") from error
    size = f"{image.width}x{image.height} pixels"
    if image.width * image.height > max_pixels:
        raise PictureRefused(name, f"{size} is more than the allowed {max_pixels}; scale it down", "too large")
    if min(image.size) < min_side:
        raise PictureRefused(name, f"{size}: its shorter side is under {min_side}; bring a larger one", "too small")
    return image


def _orientation(image: Image.Image) -> int:
    # read after the pixels are: PNG may carry EXIF behind them, and Pillow turns a TIFF by itself when it loads it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _DECODER_ERRORS:
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
        return Image.fromarray(_scaled_grey(image, name)).convert("RGB")
    match image.mode:
        case "L" | "RGB" | "CMYK" if not image.has_transparency_data:
            return _apply_profile(image, image.info.get("icc_profile"))
        case "1" | "L" | "P" | "PA" | "LA" | "RGB" | "RGBA" | "RGBX" | "YCbCr":
            rgba = image.convert("RGBA")
        case mode:
            raise PictureRefused(name, f"its colour mode {mode} is not read; convert it to RGB", "format")
    colour = _apply_profile(rgba.convert("RGB"), image.info.get("icc_profile"))
    colour.putalpha(rgba.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB")


def _scaled_grey(image: Image.Image, name: str) -> np.ndarray:
    values = np.asarray(image)
    if image.mode == "F":
        if not ((values >= 0) & (values <= 1)).all():
            raise PictureRefused(name, "floating point values outside [0, 1], or no numbers; scale them and save again")
        return np.rint(values * 255).astype(np.uint8)
    if values.min() < 0 or values.max() > 65535:
        raise PictureRefused(name, "integer values outside 0..65535; save it with 8 or 16 bits a channel")
    grey = ((values.astype(np.int64) + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    return grey if transparent is None else np.where(values == transparent, np.uint8(255), grey)


def _apply_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    if not profile:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        converted = None
    return image.convert("RGB") if converted is None else converted
