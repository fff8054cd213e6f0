"""The pictures of a source with what is said about them, checked by their headers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from davae.data.buckets import Bucket, choose_bucket
from davae.data.labels import read_caption, read_class
from davae.data.loading import in_threads
from davae.data.pictures import PictureRefused, check_picture
from davae.data.stored import Refusal, Sample, StoredBytes

MAX_FILE_BYTES = 512 << 20


@dataclass(frozen=True)
class Entry:
    """One usable picture of a source."""

    key: str
    picture: StoredBytes
    caption: str
    """Empty only where there is a class."""
    width: int
    """Of the upright picture as it is stored, in pixels."""
    height: int
    bucket: Bucket
    label: int | str | None = None
    """Class number, or name of the sub-folder until that has one; None in a set of captioned pictures."""


def least(buckets: Sequence[Bucket]) -> str:
    """The smallest of them, for messages."""
    least = min(buckets, key=lambda bucket: bucket.height * bucket.width)
    return f"{least.width} pixels" if least.width == least.height else f"{least.width}x{least.height} pixels"


def make_entries(
    samples: Mapping[str, Sample],
    buckets: Sequence[Bucket],
    folders: Mapping[str, int] | None,
    needs_caption: bool,
) -> tuple[list[Entry], list[Refusal]]:
    """`make_entry` of each sample by its key, and what it refuses; of pictures of one name the first is taken."""

    def entry(key: str) -> Entry | Refusal:
        try:
            return make_entry(key, samples[key], buckets, folders, needs_caption)
        except PictureRefused as error:
            return Refusal(error.name, error.reason, error.kind)

    entries, refused = [], []
    for sample, found in zip(samples.values(), in_threads(entry, list(samples)), strict=True):
        first, *others = sample.pictures
        refused += [
            Refusal(other.name, f"same name as {first.name}; rename one of them", "same name") for other in others
        ]
        if isinstance(found, Refusal):
            refused.append(found)
        else:
            entries.append(found)
    return entries, refused


def make_entry(
    key: str, sample: Sample, buckets: Sequence[Bucket], folders: Mapping[str, int] | None, needs_caption: bool
) -> Entry:
    """A picture with its caption; or, if `folders` is given, with its class number or the sub-folder out of these.

    Without `needs_caption` the caption of one that has none is "".

    Raises:
        PictureRefused: its header, its size or its texts will not do.
    """
    picture = sample.pictures[0]
    if picture.length > MAX_FILE_BYTES:
        reason = f"{picture.length} bytes is more than the allowed {MAX_FILE_BYTES}; save it smaller"
        raise PictureRefused(picture.name, reason, "too large")
    try:
        with picture.open() as stream:
            width, height = check_picture(stream, picture.name, min_side=1)
    except OSError as error:
        raise PictureRefused(picture.name, f"cannot be opened ({error.strerror}); mend its rights") from error
    bucket = choose_bucket(width, height, buckets)
    if bucket is None:
        reason = f"{width}x{height} pixels: smaller than {least(buckets)}, and nothing is scaled up; bring a larger one"
        raise PictureRefused(picture.name, reason, "too small")
    caption = read_caption(picture.name, sample)
    if folders is None:
        if caption is None and needs_caption:
            refusal = 'no caption; put it beside the picture as .txt, or as "caption" in a .json or in metadata.jsonl'
            raise PictureRefused(picture.name, refusal, "no caption")
        return Entry(key, picture, caption or "", width, height, bucket)
    label: int | str | None = read_class(picture.name, sample)
    if label is None and (top := key.partition("/")[0]) in folders and "/" in key:
        label = top
    if label is None:
        refusal = 'no class; put its number beside the picture as .cls, or as "class" in a .json'
        reason = f"{refusal}, or sort a folder of pictures into a sub-folder for each class"
        raise PictureRefused(picture.name, reason, "no class")
    return Entry(key, picture, caption or "", width, height, bucket, label)
