"""One encoded picture, from anywhere, to the pixels that a person sees in it: or a refusal that says why not."""

import struct
import warnings
import zlib
from io import BufferedReader, BytesIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms
from torch import Tensor

from davae.errors import DataError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are decoded, as Pillow names them; the bytes decide, not the name of the file."""

MAX_PIXELS = 64_000_000
MIN_SIDE = 16

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
    """A picture that is not used: `name` says which, `reason` why and how to mend it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


def read_picture(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE) -> Tensor:
    """Decode one picture to sRGB as it is meant to be seen, uint8 [3, H, W].

    - The header is checked before anything is decoded: the format, the number of pixels, the sides.
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

    Raises:
        PictureRefused: the picture is empty, damaged, truncated, too large, too small, of a format or of a colour mode
            that is not read.
    """
    with _open(BytesIO(data), name, max_pixels=max_pixels, min_side=min_side) as image:
        pixels = image.width * image.height
        try:
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
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def check_picture(
    stream: BytesIO | BufferedReader, name: str, *, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE
) -> None:
    """The checks that `read_picture` makes before it decodes, without decoding.

    Raises:
        PictureRefused: as `read_picture`, for what a header shows.
    """
    _open(stream, name, max_pixels=max_pixels, min_side=min_side).close()


def _open(stream: BytesIO | BufferedReader, name: str, *, max_pixels: int, min_side: int) -> Image.Image:
    if not stream.read(1):
        raise PictureRefused(name, "empty, zero bytes; save or download it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(stream, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureRefused(name, f"{error}; scale it down to at most {max_pixels} pixels") from error
    except Image.UnidentifiedImageError as error:
        allowed = ", ".join(FORMATS)
        raise PictureRefused(name, f"not a picture of a format that is read ({allowed}); convert it to one") from error
    except _DECODER_ERRORS as error:
        raise PictureRefused(name, f"its header is damaged ({error}); save or download it again") from error
    size = f"{image.width}x{image.height} pixels"
    if image.width * image.height > max_pixels:
        raise PictureRefused(name, f"{size} is more than the allowed {max_pixels}; scale it down")
    if min(image.size) < min_side:
        raise PictureRefused(name, f"{size}: its shorter side is under {min_side}; bring a larger one")
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
    if image.mode in _SIXTEEN_BIT_MODES or image.mode == "F":
        return Image.fromarray(_scaled_grey(image, name)).convert("RGB")
    match image.mode:
        case "L" | "RGB" | "CMYK" if not image.has_transparency_data:
            return _apply_profile(image, image.info.get("icc_profile"))
        case "1" | "L" | "P" | "PA" | "LA" | "RGB" | "RGBA" | "RGBX" | "YCbCr":
            rgba = image.convert("RGBA")
        case mode:
            raise PictureRefused(name, f"its colour mode {mode} is not read; convert it to RGB")
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
