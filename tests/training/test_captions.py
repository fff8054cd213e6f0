"""Captions that differ only behind what the text encoders read are named, before and in training."""

import logging
from pathlib import Path

import torch

from data.stored import fill, picture
from davae.backbones import backbone_of
from davae.pipelines.loading import load_pipeline
from davae.training.captions import find_cut_captions, load_tokenizers
from davae.training.stage_two_inputs import encode_captions
from davae.training.stage_two_run import finetune
from stages import finetune_recipe

TOKENS = 16
SAME = "red apple " * 60
CAPTIONS = [f"{SAME}on a table", f"{SAME}in a tree", f"blue {SAME}on a table", "red apple", "red apple in a tree"]


def test_what_is_merged_is_one_condition_to_the_model(base_folder: Path) -> None:
    found = find_cut_captions(CAPTIONS, load_tokenizers(base_folder), TOKENS)
    assert (found.cut, found.merged, found.merged_count) == (3, [sorted(CAPTIONS[:2])], 2)

    # The text encoders agree.
    pipeline = load_pipeline(base_folder)
    conditions = encode_captions(pipeline, backbone_of(pipeline.transformer), CAPTIONS, TOKENS)
    for first in range(len(CAPTIONS)):
        for second in range(first):
            same = all(torch.equal(values[first], values[second]) for values in conditions.values())
            assert same == ({CAPTIONS[first], CAPTIONS[second]} == set(CAPTIONS[:2]))


def test_without_tokenizers_words_are_counted() -> None:
    found = find_cut_captions(["a b c d e f g h i", "a b c d e f g h j", "a b", "a b c"], [], 8)
    assert found == (2, [["a b c d e f g h i", "a b c d e f g h j"]])


def test_a_run_names_them(base_folder: Path, autoencoder_folder: Path, tmp_path: Path, caplog) -> None:
    files = {}
    for index, caption in enumerate(CAPTIONS):
        files |= {f"{index}.png": picture(index, 64, 64), f"{index}.txt": caption.encode()}
    recipe = finetune_recipe(
        base_folder, autoencoder_folder, fill(tmp_path / "set", files), steps=0, prompt_tokens=TOKENS
    )
    with caplog.at_level(logging.WARNING):
        finetune(recipe, tmp_path / "run")
    (message,) = [text for text in caplog.messages if "another one up to" in text]
    assert message.startswith(f"2 captions are another one up to the {TOKENS} tokens that are read")
    assert "in a tree" in message
    assert "on a table" in message
