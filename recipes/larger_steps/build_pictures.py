"""Build the pictures of the larger steps: Fluent Emoji Flat (MIT), vectors drawn at 512 px, emojibase's captions.

Get and unpack the two npm packages, and the renderer; then run this from the root of the repository:

    npm pack @iconify-json/fluent-emoji-flat@1.2.6 && npm pack emojibase-data@17.0.0
    mkdir flat base && tar -xzf iconify-*.tgz -C flat && tar -xzf emojibase-*.tgz -C base
    pip install resvg-py==0.5.0
    python recipes/larger_steps/build_pictures.py flat/package base/package runs/larger_steps/pictures

The drawings of the shipped set's emoji under the same captions and keys, so with the same held-out ones; those with
skin tones are left out. Each is `key.png`, on white, and `key.txt`.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from davae.run.progress import track


def picture_key(codes: str) -> str:
    """Code points in lower case joined by "-", without the variation selector: the packages differ in it."""
    return "-".join(code for code in codes.lower().split("-") if code != "fe0f")


def drawings(flat: Path) -> dict[str, str]:
    """SVG texts by key."""
    icons = json.loads((flat / "icons.json").read_text())
    names = json.loads((flat / "chars.json").read_text())
    box = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {icons["width"]} {icons["height"]}"'
    return {
        picture_key(codes): f"<svg {box}>{icons['icons'][name]['body']}</svg>"
        for codes, name in names.items()
        if name in icons["icons"]
    }


def main(
    flat: Path, emojibase: Path, out: Path, size: Annotated[int, typer.Option(help="Side in pixels.")] = 512
) -> None:
    """Draw the packages FLAT and EMOJIBASE (both unpacked) into the folder OUT."""
    import resvg_py  # needed here only, and by nothing else

    found = drawings(flat)
    labels = {
        picture_key(emoji["hexcode"]): emoji["label"] for emoji in json.loads((emojibase / "en/data.json").read_text())
    }
    keys = sorted(found.keys() & labels.keys())
    out.mkdir(parents=True, exist_ok=True)
    for key in track(keys, "drawing"):
        picture = resvg_py.svg_to_bytes(svg_string=found[key], background="white", width=size, height=size)
        (out / f"{key}.png").write_bytes(bytes(picture))
        (out / f"{key}.txt").write_text(labels[key] + "\n")
    typer.echo(f"{len(keys)} pictures")


if __name__ == "__main__":
    typer.run(main)
