"""Captions beyond what the text encoders read: those that differ only there are one caption to the model."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from davae.pipelines.loading import load_pipeline
from davae.run.storage import read_json

logger = logging.getLogger(__name__)

Tokens = tuple[Any, ...]
# Letters of a caption that may be special tokens: one with fewer bytes than tokens are read is never cut.
MARGIN = 8


class CutCaptions(NamedTuple):
    """Captions that are longer than what is read, and those of them that are another one up to there, in groups."""

    cut: int
    merged: list[list[str]]

    @property
    def merged_count(self) -> int:
        """Captions that are the same as another one up to where they are cut."""
        return sum(map(len, self.merged))


def find_cut_captions(captions: Iterable[str], tokenizers: Iterable[Any], tokens: int) -> CutCaptions:
    """The captions that are cut by all of the tokenizers, or, without any, those of more words than `tokens`.

    The longest text encoder reads `tokens`, CLIP's as many as it has positions.
    """
    long = sorted({caption for caption in captions if len(caption.encode()) > tokens - MARGIN})
    read: list[list[Tokens]] = []
    for tokenizer in tokenizers if long else ():
        is_clip = "CLIP" in type(tokenizer).__name__
        limit = tokenizer.model_max_length if is_clip else min(tokens, tokenizer.model_max_length)
        ids = tokenizer(long, truncation=False, verbose=False)["input_ids"]
        read.append([_cut(row, limit, tokenizer.eos_token_id) for row in ids])
    if not read:
        read.append([_cut(caption.split(), tokens, None) for caption in long])

    # What all text encoders read the same of is one condition.
    groups: dict[tuple[Tokens, ...], list[str]] = {}
    for caption, *parts in zip(long, *read, strict=True):
        if all(part[0] for part in parts):
            groups.setdefault(tuple(parts), []).append(caption)
    return CutCaptions(sum(map(len, groups.values())), [group for group in groups.values() if len(group) > 1])


def _cut(row: list[Any], limit: int, end: Any) -> Tokens:
    """Whether a row of tokens is cut, and what is read of it; an end token takes the last place."""
    if len(row) <= limit:
        return (False, *row)
    return (True, *row[: limit - (row[-1] == end)])


def find_tokenizers(parts: Mapping[str, Any]) -> list[Any]:
    """The tokenizers among the parts of a pipeline, and those of its processors."""
    tokenizers = [getattr(part, "tokenizer", part) for part in parts.values()]
    return [tokenizer for tokenizer in tokenizers if hasattr(tokenizer, "get_vocab")]


def load_tokenizers(base: Path) -> list[Any]:
    """The tokenizers of the pipeline in the folder `base`; nothing else of it is loaded."""
    index = read_json(base / "model_index.json")
    parts = [name for name, entry in index.items() if isinstance(entry, list) and not name.startswith("_")]
    others = [name for name in parts if not name.startswith(("tokenizer", "processor"))]
    return find_tokenizers(load_pipeline(base, without=others).components)


def warn_of_merged_captions(captions: Iterable[str], parts: Mapping[str, Any], tokens: int) -> None:
    """Log how many captions the text encoders cannot tell from others, with an example."""
    found = find_cut_captions(captions, find_tokenizers(parts), tokens)
    if found.merged:
        first, second, *_ = found.merged[0]
        logger.warning(
            "%d captions are another one up to the %d tokens that are read (prompt_tokens), and so the same to the "
            "model, such as %r and %r. Read more, or bring the difference to the front",
            found.merged_count, tokens, first[-200:], second[-200:],
        )  # fmt: skip
    elif found.cut:
        logger.info("%d captions are longer than the %d tokens that are read (prompt_tokens)", found.cut, tokens)
