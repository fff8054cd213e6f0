r"""Cut the photographs of the TAEF2 runs: 512 px pieces of UFO:AI's photo textures, and other photographs to test on.

The packages are Debian's (bookworm); nothing is installed, only unpacked:

    apt-get download ufoai-textures scratch python3-skimage libjxl-testdata \
        lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 mate-backgrounds plasma-workspace-wallpapers
    for package in *.deb; do dpkg-deb -x "$package" "unpacked/${package%%_*}"; done
    unzip -q unpacked/ufoai-textures/usr/share/games/ufoai/base/0textures.pk3 -d textures
    python recipes/taef2/build_pictures.py textures unpacked runs/taef2

OUTPUT/textures: pieces of native pixels out of every distinct colour map of at least 512 px, one in the middle of a
small map, up to four of a large one. About one map in ten is held out, one piece of each; training maps that look like
a held-out one (variants of one wall) are left out.
OUTPUT/photographs: the middle 352 px of other photographs, all held out, never trained on; wallpapers are reduced.
OUTPUT/large: held out, the middle 1024 px of held-out colour maps and other photographs that are so large; to train on,
pieces of 1024 px of the other colour maps and of two more packages' wallpapers.
Licences are mixed (GPL, CC-BY-SA, CC0), so the pictures stay out of the repository.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import typer
from PIL import Image

from davae.data.split import heldout

SIDE = 512
PIECES = 4
"""At most this many of one map."""
NO_COLOUR = re.compile(r"_(nm|gm|sm|rm|bump|norm|gloss|glow)$")
ALIKE = 0.9
"""Correlation of two 16 px thumbnails from which maps count as variants of each other."""
PHOTOGRAPH_SIDE = 352
"""Scratch's photographs are 480x360."""
LARGE = 1024
PHOTOGRAPHS = {
    "scratch/usr/share/scratch/Media/Backgrounds": "*/*.jpg",
    "python3-skimage/usr/lib/python3/dist-packages/skimage/data": "*.*",
    "libjxl-testdata/usr/share/libjxl-testdata/external/wesaturate/500px": "*_srgb8.png",
    "libjxl-testdata/usr/share/libjxl-testdata/jxl/flower": "flower.png",
    "lomiri-wallpapers-16.04/usr/share/backgrounds": "*.jpg",
    "lomiri-wallpapers-20.04/usr/share/backgrounds": "*.jpg",
}
"""Where a package has its pictures, and which of them are looked at."""
LARGE_TRAINING = {
    "mate-backgrounds/usr/share/backgrounds/mate/nature": "*.jpg",
    "plasma-workspace-wallpapers/usr/share/wallpapers": "*/contents/images/2560x1600.jpg",
}
"""Likewise, of large photographs to train on."""
NOT_PHOTOGRAPHS = set(
    "party-room room1 room2 room3 spotlight-stage forest brick-wall1 school2 woods-and-bench phantom Autumn "
    "analogpattern_by_Peter_Nerlich umang_by_Abhishek_Mudgal Infinite-Sea_by_Aury88 Fossa_by_Jasper_Roks "
    "Painting-Colors_by__herobrine7gamer Bridge_by_Sander_Klootwijk moon logo horse bw_text chessboard_RGB color "
    "motorcycle_right ihc retina truncated".split()
)
"""Drawings and others, judged by eye."""
LARGEST_FACTOR = 4
"""Large photographs are soft at their full size; they are reduced by an integer factor up to this one."""


def key_on_side(name: str, held: bool) -> str:
    """`name` with the first number behind it that puts it on that side of davae's split, which goes by the key."""
    return next(key for number in range(1000) if heldout(key := f"{name}-{number}") == held)


def corners(width: int, height: int, side: int) -> list[tuple[int, int]]:
    """Left and top of pieces that do not overlap, spread over the picture; at most PIECES, alone in the middle."""
    across, down = width // side, height // side
    places = [
        ((width - across * side) // 2 + column * side, (height - down * side) // 2 + row * side)
        for row in range(down)
        for column in range(across)
    ]
    return [places[index * len(places) // min(PIECES, len(places))] for index in range(min(PIECES, len(places)))]


def make_thumbnail(image: Image.Image) -> np.ndarray:
    """16x16x3 values, flattened, of mean 0 and norm 1."""
    values = np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float64).ravel()
    values -= values.mean()
    return values / max(np.linalg.norm(values), 1e-9)


def find_colour_maps(folder: Path) -> Iterator[tuple[str, Image.Image]]:
    """Name and picture of every distinct colour map of at least SIDE px without transparency."""
    seen = set()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".jpg", ".png")):
        if NO_COLOUR.search(path.stem):
            continue
        with Image.open(path) as image:
            if min(image.size) < SIDE or image.mode not in ("RGB", "RGBA", "P"):
                continue
            rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema()[0] < 255:
            continue

        picture = rgba.convert("RGB")
        digest = hashlib.sha256(picture.tobytes()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            yield path.relative_to(folder).with_suffix("").as_posix().replace("/", "-"), picture


def find_photographs(unpacked: Path, side: int, places: Mapping[str, str]) -> Iterator[tuple[str, Image.Image]]:
    """Name and picture of the packages' colour photographs of at least `side` px, large ones reduced."""
    for place, pattern in places.items():
        for path in sorted((unpacked / place).glob(pattern)):
            name = path.relative_to(unpacked / place).parts[0] if pattern.count("/") > 1 else path.stem
            if name in NOT_PHOTOGRAPHS or path.suffix not in (".jpg", ".png"):
                continue
            with Image.open(path) as image:
                if image.mode != "RGB" or min(image.size) < side:
                    continue
                picture = image.reduce(max(1, min(LARGEST_FACTOR, min(image.size) // side)))
            yield f"{place.partition('/')[0]}-{name}", picture


def cut_pieces(picture: Image.Image, side: int) -> list[Image.Image]:
    """Its squares of `side` px."""
    return [picture.crop((left, top, left + side, top + side)) for left, top in corners(*picture.size, side)]


def crop_middle(picture: Image.Image, side: int) -> Image.Image:
    """The square of `side` px in the middle of a picture."""
    left, top = ((length - side) // 2 for length in picture.size)
    return picture.crop((left, top, left + side, top + side))


def write_piece(piece: Image.Image, folder: Path, key: str) -> None:
    """One piece and its caption, which davae asks for."""
    piece.save(folder / f"{key}.png")
    (folder / f"{key}.txt").write_text(key + "\n")


def main(textures: Path, unpacked: Path, output: Path) -> None:
    """Write the pieces of the maps in TEXTURES and of the photographs in the packages in UNPACKED to OUTPUT."""
    for name in ("textures", "photographs", "large"):
        (output / name).mkdir(parents=True, exist_ok=True)
    maps = list(find_colour_maps(textures))

    # Textures to train on, except those that look like a held-out one.
    held = np.stack([make_thumbnail(picture) for name, picture in maps if heldout(name)])
    counts = {"train": 0, "held out": 0, "alike": 0, "photographs": 0, "large": 0, "large, to train on": 0}
    sources = list(find_photographs(unpacked, LARGE, LARGE_TRAINING))
    for name, picture in maps:
        side = heldout(name)
        if not side and (held @ make_thumbnail(picture)).max() > ALIKE:
            counts["alike"] += 1
            continue
        if not side and min(picture.size) >= LARGE:
            sources.append((name, picture))
        cut = cut_pieces(picture, SIDE)
        for number, piece in enumerate(cut[:1] if side else cut):
            write_piece(piece, output / "textures", key_on_side(f"{name}-{number}", side))
            counts["held out" if side else "train"] += 1

    # Photographs, all held out.
    for name, picture in find_photographs(unpacked, PHOTOGRAPH_SIDE, PHOTOGRAPHS):
        write_piece(crop_middle(picture, PHOTOGRAPH_SIDE), output / "photographs", key_on_side(name, True))
        counts["photographs"] += 1

    # Large images: the held-out ones, then those to train on.
    large = [(name, picture) for name, picture in maps if heldout(name) and min(picture.size) >= LARGE]
    for name, picture in [*large, *find_photographs(unpacked, LARGE, PHOTOGRAPHS)]:
        write_piece(crop_middle(picture, LARGE), output / "large", key_on_side(name, True))
        counts["large"] += 1
    for name, picture in sources:
        for number, piece in enumerate(cut_pieces(picture, LARGE)):
            write_piece(piece, output / "large", key_on_side(f"{name}-{number}", False))
            counts["large, to train on"] += 1
    typer.echo(f"{len(maps)} maps; pieces: {counts}")


if __name__ == "__main__":
    typer.run(main)
