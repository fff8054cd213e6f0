"""Verbs about images: `davae data inspect` looks at a source, `davae data avatars` draws one."""

from pathlib import Path
from typing import Annotated, Any

import typer

from davae.cli import options
from davae.cli.checks import check_pictures
from davae.cli.options import by_first, give, say, say_next, show, with_dry_run, with_json

app = typer.Typer(help="Look at images before training on them, or draw some.", no_args_is_help=True)


@app.command()
@with_json
@by_first
def inspect(
    source: options.ImageSource,
    size: Annotated[list[int], typer.Option(min=16, help="Side in pixels. Repeatable, for several resolutions.")] = [
        256
    ],
    aspect_ratios: Annotated[
        list[str], typer.Option("--aspect-ratio", metavar="W:H", help="Of a bucket, such as 3:2. Repeatable.")
    ] = [],
    bucket_step: Annotated[int, typer.Option(min=1, help="The buckets' sides are multiples of this.")] = 32,
    captions: Annotated[bool, typer.Option(help="Images need captions, as in stage 2.")] = True,
    classes: Annotated[bool, typer.Option(help="Images need classes instead.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many images, evenly spread.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a caption that stage 2 reads.")] = 256,
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base pipeline, whose tokenizers count; without it, words do.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for inspection.json and contact_sheet.png; by default runs/data/NAME.")
    ] = None,
    dry_run: options.DryRun = False,
) -> None:
    """Count, measure and show the images of a source, and list the refused ones with reasons."""
    from davae.run.storage import check_writable, write_json

    check_writable(out or Path("runs/data"))
    check_pictures(source)
    from davae.data.buckets import bucket_table

    # Buckets differ from a single square only with several sizes or aspect ratios.
    sizes = sorted(set(size))
    multiple = bucket_step if aspect_ratios or len(sizes) > 1 else 1
    buckets = bucket_table(sizes, aspect_ratios, multiple=multiple)
    settings: dict[str, Any] = {"size": sizes[0], "captions": captions, "classes": classes, "limit": limit}
    if dry_run:
        return show({"source": source, **settings, "buckets": [f"{item.width}x{item.height}" for item in buckets]})
    from davae.data.pictures import digest_origin, write_png
    from davae.data.sources import open_pictures
    from davae.data.survey import contact_sheet, source_name, survey

    # Decode everything once, and write before printing.
    folder = out or Path("runs/data") / source_name(source)
    check_writable(folder)
    pictures = open_pictures(source, buckets=buckets, **settings)
    facts = {"source": source, **survey(pictures)}
    facts["captions"] |= _describe_long(pictures.captions, base, prompt_tokens)
    write_json(folder / "inspection.json", facts)
    origin = digest_origin(source, settings, buckets)
    sheet = write_png(folder / "contact_sheet.png", contact_sheet(pictures), origin=origin)
    _print(facts)
    say(folder / "inspection.json")
    say(sheet)
    give({**facts, "file": folder / "inspection.json", "contact_sheet": sheet})
    _check_trainable(facts)
    say_next(
        f"{facts['pictures']} images can be used at {sizes[0]} px, {facts['refused']['pictures']} cannot",
        f"davae init --base BASE --pictures {source}",
    )


@app.command()
@with_json
@by_first
@with_dry_run
def avatars(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shards; a call that stopped resumes.")],
    training: Annotated[int, typer.Option(min=0, help="Images for training.")] = 8192,
    held_out: Annotated[int, typer.Option(min=0, help="Images that no training sees.")] = 512,
    size: options.Side = 256,
    start: Annotated[int, typer.Option(min=0, help="Number of the avatar to begin with, for other people.")] = 0,
) -> None:
    """Draw captioned avatars, the images of the small pair, into WebDataset shards. Needs the extra `demo`."""
    from davae.data.avatar_shards import write_avatar_shards

    folder = write_avatar_shards(out, training=training, held_out=held_out, size=size, start=start)
    say(folder)
    give({"folder": folder, "training": training, "held_out": held_out})
    say_next(f"{training + held_out} avatars are in {folder}", f"davae data inspect {folder}")


def _describe_long(captions: list[str], base: Path | None, tokens: int) -> dict[str, Any]:
    """How many captions are longer than what is read, how many of these are another one up to there, and an example."""
    from davae.training.captions import find_cut_captions, load_tokenizers

    tokenizers = load_tokenizers(base) if base else []
    long = find_cut_captions(captions, tokenizers, tokens)
    facts = {"read": tokens, "unit": "tokens" if tokenizers else "words", "cut": long.cut, "merged": long.merged_count}
    return {**facts, "example": long.merged[0][:2] if long.merged else []}


def _check_trainable(facts: dict[str, Any]) -> None:
    """Raise the DataError with which both stages would refuse the set, by the share of it that cannot be read."""
    from davae.data.sources import are_too_many
    from davae.errors import DataError
    from davae.training.recipes import PicturesRecipe

    unreadable = facts["refused"]["unreadable"]
    share, total = PicturesRecipe.model_fields["max_unreadable"].default, facts["pictures"] + unreadable
    if not facts["pictures"] or are_too_many(unreadable, total, share):
        raise DataError(
            f"{unreadable} of {total} images cannot be read: both stages refuse such a set, unless max_unreadable is "
            f"more than {share}. Mend or remove them"
        )


def _print(facts: dict[str, Any]) -> None:
    from davae.run.markdown import markdown_table

    refused = facts["refused"]
    say(f"{facts['pictures']} images; {refused['pictures']} refused, {refused['unreadable']} of them unreadable")

    # What was measured of each picture, in quantiles.
    measured = {
        "width, px": facts["stored"]["width"],
        "height, px": facts["stored"]["height"],
        "megapixels": facts["stored"]["megapixels"],
        "detail: PSNR to its half size, dB": facts["half_size_psnr_db"],
        "caption, characters": facts["captions"]["characters"],
        "caption, words": facts["captions"]["words"],
    }
    rows = []
    for name, quantiles in measured.items():
        rows.append([name, *map("{:g}".format, quantiles.values())])
    say(markdown_table(["", *facts["stored"]["width"]], rows))

    # Images in each bucket, and the share of their pixels that the crop cuts off.
    rows = []
    for bucket in facts["buckets"]:
        cut_off = "" if bucket["cut_off"] is None else f"{bucket['cut_off']:.1%}"
        rows.append([f"{bucket['width']}x{bucket['height']}", bucket["pictures"], cut_off])
    say(markdown_table(["bucket, px", "images", "cut off"], rows))

    # The first refusals; a broken download has thousands.
    if refused["each"]:
        say(markdown_table(["refused", "kind", "reason"], [list(item.values()) for item in refused["each"][:20]]))
    if len(refused["each"]) > 20:
        say(f"... and {len(refused['each']) - 20} more, in inspection.json")

    # Conditions, detail, speed.
    captions = facts["captions"]
    say(f"captions: {captions['empty']} empty, {captions['repeated']} that several images have")
    read = f"the {captions['read']} {captions['unit']} that are read"
    say(f"captions longer than {read}: {captions['cut']}; {captions['merged']} of them are another one up to there")
    if captions["example"]:
        say("for example, their ends: " + " | ".join(text[-100:] for text in captions["example"]))
    if "classes" in facts:
        classes = facts["classes"]
        say(f"classes: {classes['classes']}, of {classes['fewest']} to {classes['most']} images")
        if classes["numbers"]:
            say(markdown_table(["class folder", "number"], list(map(list, classes["numbers"].items()))))
    say(f"detail: {facts['soft']} images are soft, above {facts['soft_db']:g} dB")

    alone, together = facts["loader"]["pictures_per_second"]
    say(f"loader: {alone} images/s with one thread, {together} with {facts['loader']['threads']}, files just read")
