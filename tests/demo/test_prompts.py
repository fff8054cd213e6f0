import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from davae.data.avatar_colors import find_missing_colors
from davae.demo.prompts import (
    BASE,
    CROP,
    CROP_SCALE,
    PROMPTS,
    SIZE,
    UPGRADE,
    crop,
    list_ignored_words,
    make_figure,
    try_prompts,
)
from davae.errors import SettingsError


def shade(value: int, side: int) -> Tensor:
    return torch.full((3, side, side), value, dtype=torch.uint8)


def test_a_crop_shows_the_face_pixel_by_pixel() -> None:
    image = torch.randint(256, (3, SIZE, SIZE), dtype=torch.uint8)
    left, top, side = CROP
    face = crop(image)
    assert face.shape == (3, side * CROP_SCALE, side * CROP_SCALE)
    assert torch.equal(face[:, ::CROP_SCALE, ::CROP_SCALE], image[:, top : top + side, left : left + side])
    assert torch.equal(face[:, ::CROP_SCALE], face[:, CROP_SCALE - 1 :: CROP_SCALE])


def test_words_that_are_not_known_are_named_and_a_prompt_without_any_is_refused() -> None:
    prompt = "a laughing lady with a unicorn"
    assert list_ignored_words(prompt) == ["unicorn"]
    made = {BASE: [shade(9, 8)], UPGRADE: [shade(0, SIZE)]}
    figure = make_figure([prompt], made, {prompt: ["not known: unicorn", "and this"]})
    assert figure.rows == [f"{prompt} (not known: unicorn; and this)"]
    assert {cell.shape for cell in figure.cells[0]} == {(3, SIZE, SIZE)}
    with pytest.raises(SettingsError, match="knows none of these words"):
        list_ignored_words("unicorns everywhere")


def test_the_words_of_the_prompts_that_are_shown_without_any_are_known() -> None:
    assert [list_ignored_words(prompt) for prompt in PROMPTS if "grumpy" not in prompt] == [[]] * 3
    assert [find_missing_colors(prompt) for prompt in PROMPTS] == [[]] * len(PROMPTS)


def test_a_prompt_is_shown_with_its_times(tmp_path: Path) -> None:
    prompt = "a smiling man with a zebra and a big white beard"
    page, figure = try_prompts([prompt], tmp_path)
    assert "not known: zebra; the drawings have no big white beard, only black" in page.read_text()
    assert figure == tmp_path / "figure.png"
    assert figure.is_file()
    facts = json.loads((tmp_path / "result.json").read_text())
    assert facts["ignored_words"] == {prompt: ["zebra"]}
    assert facts["missing_colors"] == {prompt: ["the drawings have no big white beard, only black"]}
    assert all(seconds > 0 for seconds in facts["seconds_per_image"].values())
