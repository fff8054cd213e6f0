import copy
import json
import re
from html import unescape
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline
from PIL import Image

from davae.data.pictures import to_bytes
from davae.data.sources import open_pictures
from davae.errors import DataError, SettingsError
from davae.evaluation.evaluate import BASE, GENERATED, REAL, SOFT, evaluate, interpret
from davae.evaluation.generation import (
    generate,
    kid_with_error,
    repeat_captions,
    sample,
    sample_many,
)
from davae.method.metrics import kid
from davae.pipelines.autoencoders import load_autoencoder
from davae.pipelines.loading import load_pipeline
from davae.pipelines.sampling import draw_shared_noise, image_to_image
from davae.pipelines.upgrade import upgrade
from davae.seeds import generator
from hashes import digests
from scenes import fill_with_scenes

QUICK = {"steps": 2, "prompt_tokens": 8}
PROMPTS = ["red ball", "green box", "blue tree", "grey fish", "red fish"]


@pytest.fixture(scope="module")
def base(base_folder: Path) -> DiffusionPipeline:
    pipeline = load_pipeline(base_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def upgraded(base: DiffusionPipeline, autoencoder_folder: Path) -> DiffusionPipeline:
    pipeline = upgrade(base, load_autoencoder(autoencoder_folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --------------------------------------------------------------------------------------------------------------- noise


def test_base_and_upgraded_pipelines_share_the_noise_of_the_base_channels(base, upgraded) -> None:
    first, second = (draw_shared_noise(pipeline, [5, 7], seed=3, height=8, width=8) for pipeline in (base, upgraded))
    assert (first.shape, second.shape) == ((2, 4, 8, 8), (2, 12, 8, 8))
    assert torch.equal(second[:, :4], first)
    assert not torch.equal(second[:, 4:8], first)


def test_noise_is_keyed_by_seed_and_index_not_by_the_place_in_the_batch(upgraded) -> None:
    together = draw_shared_noise(upgraded, range(4), seed=3, height=8, width=8)
    for index in range(4):
        assert torch.equal(draw_shared_noise(upgraded, [index], seed=3, height=8, width=8)[0], together[index])
    assert len({row.sum().item() for row in together}) == 4
    assert not torch.equal(draw_shared_noise(upgraded, range(4), seed=4, height=8, width=8), together)
    large = draw_shared_noise(upgraded, range(64), seed=3, height=8, width=8)
    assert large.mean().item() == pytest.approx(0, abs=0.02)
    assert large.std().item() == pytest.approx(1, abs=0.02)


# -------------------------------------------------------------------------------------------------------------- sample


def test_the_same_seed_makes_the_same_bytes_and_another_seed_others(upgraded) -> None:
    first = sample(upgraded, PROMPTS[:2], seed=1, **QUICK)
    assert (first.shape, first.dtype) == ((2, 3, 64, 64), torch.uint8)
    assert torch.equal(sample(upgraded, PROMPTS[:2], seed=1, **QUICK), first)
    assert not torch.equal(sample(upgraded, PROMPTS[:2], seed=2, **QUICK), first)


def test_a_picture_does_not_depend_on_its_neighbours(upgraded) -> None:
    together = sample(upgraded, PROMPTS[:3], seed=1, **QUICK)
    for index, prompt in enumerate(PROMPTS[:3]):
        alone = sample(upgraded, [prompt], seed=1, first_index=index, **QUICK)[0]
        # Matrix products of other shapes are summed in another order: a last bit, and seldom a rounding of it.
        assert (alone.int() - together[index].int()).abs().max() <= 1
        assert (alone != together[index]).float().mean() < 0.01


def test_a_warm_started_upgrade_follows_the_base_on_the_base_channels(base, upgraded) -> None:
    latents = []
    for pipeline, side in ((base, 32), (upgraded, 64)):
        noise = draw_shared_noise(pipeline, [0], seed=2, height=8, width=8)
        settings = {"num_inference_steps": 2, "max_sequence_length": 8, "output_type": "latent"}
        latents.append(pipeline("red ball", height=side, width=side, latents=noise, **settings).images)
    torch.testing.assert_close(latents[1][:, :4], latents[0], atol=1e-5, rtol=0)


def test_the_prompt_and_the_guidance_matter(upgraded) -> None:
    first = sample(upgraded, ["red ball"], seed=1, **QUICK)
    assert not torch.equal(sample(upgraded, ["blue tree"], seed=1, **QUICK), first)
    unguided = sample(upgraded, ["red ball"], seed=1, guidance_scale=1.0, **QUICK)
    assert not torch.equal(unguided, first)
    assert torch.equal(sample(upgraded, ["red ball"], seed=1, guidance_scale=0.0, **QUICK), unguided)


@pytest.mark.parametrize("size", [40, 60, 63])
def test_a_size_that_the_pipeline_cannot_make_is_refused(upgraded, size) -> None:
    with pytest.raises(SettingsError, match=rf"size={size}: allowed are multiples of 16"):
        sample(upgraded, ["red ball"], seed=0, size=size, **QUICK)
    assert sample(upgraded, ["red ball"], seed=0, size=48, **QUICK).shape == (1, 3, 48, 48)


@pytest.mark.parametrize("size", [(96, 48), (48, 64)])
def test_width_comes_before_height(base, upgraded, size) -> None:
    width, height = size
    made = sample(upgraded, ["red ball"], seed=1, size=size, **QUICK)
    assert made.shape == (1, 3, height, width)
    assert sample(base, ["red ball"], seed=1, size=(width // 2, height // 2), **QUICK).shape[2:] == (
        height / 2,
        width / 2,
    )

    square = sample(upgraded, ["red ball"], seed=1, size=(width, width), **QUICK)
    assert torch.equal(square, sample(upgraded, ["red ball"], seed=1, size=width, **QUICK))
    for sides in ((width, 40), (40, height)):
        with pytest.raises(SettingsError, match="size=40: allowed are multiples of 16"):
            sample(upgraded, ["red ball"], seed=1, size=sides, **QUICK)


def test_a_page_of_wide_pictures(upgraded, tmp_path: Path) -> None:
    page = generate(upgraded, ["red ball"], tmp_path, size=(96, 48), **QUICK)
    assert "96x48 px" in page.read_text()
    with Image.open(tmp_path / "pictures" / "00000.png") as picture:
        assert picture.size == (96, 48)


# --------------------------------------------------------------------------------------------------------- sample_many


def make(pipeline: DiffusionPipeline, folder: Path, prompts: list[str] = PROMPTS, **changes: object):
    settings = {"seed": 1, **QUICK, **changes}
    return sample_many(pipeline, prompts, folder, label="test", batch_size=2, **settings)


def test_many_are_kept_and_only_what_is_missing_is_made_again(upgraded, tmp_path) -> None:
    made = make(upgraded, tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"{index:05d}.png" for index in range(5)]
    assert torch.equal(torch.stack(made[2:4]), sample(upgraded, PROMPTS[2:4], seed=1, first_index=2, **QUICK))

    before = digests(tmp_path, "*")
    inodes = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    (tmp_path / "00003.png").unlink()
    again = make(upgraded, tmp_path)
    assert digests(tmp_path, "*") == before
    anew = {path.name for path in tmp_path.iterdir() if path.stat().st_ino != inodes[path.name]}
    assert anew - {"00003.png"} == {"00002.png"}, "the whole batch of what is missing, and no other"
    assert all(torch.equal(first, second) for first, second in zip(made, again, strict=True))


@pytest.mark.parametrize("keep", [0, 20, -300])
def test_a_damaged_picture_is_made_anew(upgraded, tmp_path, keep) -> None:
    (first,) = make(upgraded, tmp_path, ["red ball"])
    path = tmp_path / "00000.png"
    path.write_bytes(path.read_bytes()[:keep])
    assert torch.equal(make(upgraded, tmp_path, ["red ball"])[0], first)


def test_pictures_of_other_prompts_settings_or_weights_are_not_taken_for_these(upgraded, base, tmp_path) -> None:
    first = make(upgraded, tmp_path, ["red ball"])[0]
    for changes in ({"seed": 2}, {"steps": 3}, {"guidance_scale": 2.0}, {"size": 48}, {"prompts": ["blue tree"]}):
        other = make(upgraded, tmp_path, **{"prompts": ["red ball"], **changes})[0]
        assert other.shape != first.shape or not torch.equal(other, first), changes
        assert torch.equal(make(upgraded, tmp_path, ["red ball"])[0], first)
    assert make(base, tmp_path, ["red ball"])[0].shape == (3, 32, 32)

    # Other weights of the transformer, or of a text encoder.
    norm = upgraded.text_encoder.text_model.final_layer_norm
    with torch.no_grad():
        for bias in (upgraded.transformer.proj_out.bias, norm.bias):
            bias.add_(0.5)
            other = make(upgraded, tmp_path, ["red ball"])[0]
            bias.sub_(0.5)
            assert not torch.equal(other, first)
            assert torch.equal(make(upgraded, tmp_path, ["red ball"])[0], first)


def test_a_picture_tells_how_it_was_made(upgraded, tmp_path) -> None:
    prompts = ["grüner Ball", "red\nball"]
    make(upgraded, tmp_path, prompts, negative="blur", first_index=3, notes={"pipeline": "mine"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00003.png", "00004.png"]
    for index, prompt in enumerate(prompts, 3):
        with Image.open(tmp_path / f"{index:05d}.png") as picture:
            texts = picture.text
        facts = json.loads(texts["davae"])
        expected = {"prompt": prompt, "index": index, "seed": 1, "steps": 2, "negative": "blur", "pipeline": "mine"}
        assert facts.items() >= {**expected, "width": 64, "height": 64}.items()
        assert texts["parameters"].startswith(f"{prompt}\nNegative prompt: blur\nSteps: 2, ")


def test_a_picture_is_made_again_from_its_number_alone(upgraded, tmp_path) -> None:
    """Prompt, seed and number make the image, whatever was made with it."""
    together = make(upgraded, tmp_path / "together", PROMPTS[:2])
    alone = make(upgraded, tmp_path / "alone", PROMPTS[1:2], first_index=1)
    assert (alone[0].int() - together[1].int()).abs().max() <= 1


def test_a_negative_prompt_changes_a_guided_picture_and_is_refused_otherwise(upgraded) -> None:
    first = sample(upgraded, ["red ball"], seed=1, **QUICK)
    assert torch.equal(sample(upgraded, ["red ball"], seed=1, negative="", **QUICK), first)
    assert not torch.equal(sample(upgraded, ["red ball"], seed=1, negative="blue tree", **QUICK), first)
    with pytest.raises(SettingsError, match="guidance_scale=1 leaves a negative prompt unused"):
        sample(upgraded, ["red ball"], seed=1, negative="blue tree", guidance_scale=1.0, **QUICK)


def test_a_picture_of_another_precision_is_not_taken_for_this_one(upgraded, tmp_path) -> None:
    half = copy.deepcopy(upgraded).to(torch.bfloat16)
    whole = make(upgraded, tmp_path, ["red ball"])[0]
    assert not torch.equal(make(half, tmp_path, ["red ball"])[0], whole)
    assert len(list(tmp_path.iterdir())) == 2


def test_offloaded_weights_have_the_digest_of_the_same_weights_in_place(upgraded, tmp_path) -> None:
    whole = make(upgraded, tmp_path, ["red ball"])[0]
    away = copy.deepcopy(upgraded)
    for part in (away.transformer, away.text_encoder):
        cpu_offload(part, torch.device("cpu"))
    assert any(parameter.is_meta for parameter in away.transformer.parameters())
    assert torch.equal(make(away, tmp_path, ["red ball"])[0], whole)
    assert len(list(tmp_path.iterdir())) == 1


def test_image_to_image_starts_from_the_image(upgraded) -> None:
    start = (torch.arange(64) * 4).to(torch.uint8).expand(3, 64, 64)
    pipeline = image_to_image(upgraded)
    made = {}
    for strength in (0.25, 1.0):
        settings = {"seed": 1, "steps": 4, "prompt_tokens": 8, "image": start, "strength": strength}
        made[strength] = sample(pipeline, ["red ball", "red ball"], **settings).int()
        assert made[strength].shape == (2, 3, 64, 64)
        assert not torch.equal(made[strength][0], made[strength][1]), "each image has noise of its own"

    # The decoder has random weights, so the encoded image is the measure: what strength 0 would show.
    scaled = start[None] / 127.5 - 1
    encoded = to_bytes(upgraded.vae.decode(upgraded.vae.encode(scaled).latent_dist.mode()).sample)[0].int()
    near, far = ((made[strength][0] - encoded).abs().float().mean() for strength in (0.25, 1.0))
    assert near < far


# ----------------------------------------------------------------------------------------------------------------- KID


def test_kid_of_equal_distributions_is_about_zero_and_of_others_is_not() -> None:
    real = torch.randn(400, 16, generator=generator(0, "real"))
    made = torch.randn(200, 16, generator=generator(0, "made"))
    value, error = kid_with_error(made, real, seed=0)
    assert value == pytest.approx(kid(made, real))
    assert 0 < error < 0.1
    assert abs(value) < 3 * error
    shifted, error = kid_with_error(made + 0.5, real, seed=0)
    assert shifted > 10 * error
    assert kid_with_error(made, real, seed=0)[1] == kid_with_error(made, real, seed=0)[1]


def test_the_error_of_kid_is_about_the_spread_over_independent_draws() -> None:
    real = torch.randn(300, 8, generator=generator(0, "real"))
    draws = [0.3 + torch.randn(100, 8, generator=generator(index, "draw")) for index in range(60)]
    spread = torch.tensor([kid(draw, real) for draw in draws]).std().item()
    errors = [kid_with_error(draw, real, seed=0)[1] for draw in draws[:8]]
    assert 0.6 < sum(errors) / 8 / spread < 1.6


# -------------------------------------------------------------------------------------------------- generate, evaluate


def test_generate_writes_pictures_and_a_page_that_is_safe(upgraded, tmp_path) -> None:
    prompts = ["red ball", "<b>blue</b> & tree"]
    page = generate(upgraded, prompts, tmp_path / "out", steps=2, seed=4)
    assert {path.name for path in page.parent.iterdir()} == {"index.html", "pictures"}
    assert len(list((page.parent / "pictures").iterdir())) == 2
    text = page.read_text()
    assert "<b>blue" not in text
    assert "<b>blue</b> & tree" in unescape(text)
    assert "2 images of 64x64 px, 2 steps, guidance 4.0, seed 4." in text
    assert re.findall(r'<img src="([^"]+)"', text)[:2] == ["pictures/00000.png", "pictures/00001.png"]
    assert len(page.read_bytes()) < 40_000, "the images are beside it"


def test_several_images_of_a_prompt(upgraded, tmp_path) -> None:
    page = generate(upgraded, ["red ball", "blue tree"], tmp_path, count=3, steps=1, prompt_tokens=8)
    assert len(list((tmp_path / "pictures").iterdir())) == 6
    assert page.read_text().count("seed 0, number ") == 6
    alone = sample(upgraded, ["red ball"], seed=0, first_index=2, steps=1, prompt_tokens=8)[0]
    with Image.open(tmp_path / "pictures" / "00002.png") as third:
        assert abs(np.asarray(third).astype(int).transpose(2, 0, 1) - alone.numpy()).max() <= 1


def test_generate_into_the_same_folder_shows_the_new_prompts(upgraded, tmp_path) -> None:
    pages = [generate(upgraded, [prompt], tmp_path, steps=2).read_text() for prompt in ("red ball", "blue tree")]
    pictures = [re.findall(r'<img src="([^"]+)"', page)[0] for page in pages]
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("content", [b"", b"a text", "a picture"], ids=["empty", "text", "picture"])
def test_generate_overwrites_nothing_that_it_did_not_make(upgraded, tmp_path, content) -> None:
    mine = tmp_path / "pictures" / "00000.png"
    mine.parent.mkdir()
    if isinstance(content, bytes):
        mine.write_bytes(content)
    else:
        Image.new("RGB", (8, 8), "red").save(mine)
    before = mine.read_bytes()

    # Both prompts have names beside it; made again, they are found there.
    pages = [generate(upgraded, [prompt], tmp_path, steps=2).read_text() for prompt in ("red ball", "blue tree")]
    names = digests(mine.parent, "*")
    assert (mine.read_bytes(), len(names)) == (before, 3)
    assert generate(upgraded, ["red ball"], tmp_path, steps=2).read_text() == pages[0]
    assert digests(mine.parent, "*") == names


def test_pictures_of_earlier_prompts_stay(upgraded, tmp_path) -> None:
    generate(upgraded, ["red ball"], tmp_path, steps=2)
    before = digests(tmp_path / "pictures", "*")
    generate(upgraded, ["blue tree"], tmp_path, steps=2)
    assert digests(tmp_path / "pictures", "*").items() > before.items()


def test_prompts_of_an_evaluation_are_the_captions_again_and_again(picture_folder) -> None:
    pictures = open_pictures(picture_folder, size=64, limit=3)
    assert repeat_captions(pictures, 7) == [*pictures.captions, *pictures.captions, pictures.captions[0]]


@pytest.mark.skipif(find_spec("efficientnet_lite_pytorch") is None, reason="needs davae[eval]")
class TestEvaluate:
    def test_it_writes_kid_and_a_page(self, upgraded, picture_folder, tmp_path) -> None:
        page = evaluate(upgraded, picture_folder, tmp_path / "out", count=6, steps=2, seed=1)
        assert {path.name for path in page.parent.iterdir()} == {"index.html", "result.json", "pictures"}
        result = json.loads((page.parent / "result.json").read_text())
        assert (result["count"], result["real"], result["steps"], result["seed"]) == (6, 16, 2, 1)
        assert result["features"] == "EfficientNet-Lite0"
        assert result["kid"] > 0  # made by random weights
        assert result["kid_error"] > 0
        text = unescape(page.read_text())
        assert "KID (EfficientNet-Lite0) of 6 images of 64x64 px against 16 real ones" in text
        assert f"{1000 * result['kid']:.2f}" in text

    def test_it_sets_the_base_and_real_pictures_beside_the_number(
        self, upgraded, base, picture_folder, tmp_path
    ) -> None:
        settings = {"count": 4, "steps": 1, "seed": 1, "prompt_tokens": 8}
        page = evaluate(upgraded, picture_folder, tmp_path, load_base=lambda: base, **settings)
        result = json.loads((tmp_path / "result.json").read_text())
        assert list(result["beside"]) == [BASE, SOFT, REAL]
        value, error = result["beside"][REAL]
        assert abs(value) < abs(result["beside"][SOFT][0]) + 3 * error
        assert all(value > result["beside"][REAL][0] for value in (result["kid"], result["beside"][BASE][0]))
        assert len(list((tmp_path / "base").iterdir())) == 4
        text = unescape(page.read_text())
        assert result["verdict"] in text
        assert text.count("<img src=") == 4 * 3

    @pytest.mark.parametrize("count", [2, 3])
    def test_too_few_pictures_are_refused_before_any_is_made(self, upgraded, picture_folder, tmp_path, count) -> None:
        with pytest.raises(SettingsError, match=f"count={count}: allowed is 4 or more"):
            evaluate(upgraded, picture_folder, tmp_path / "out", count=count)
        assert not (tmp_path / "out").exists()

    def test_one_real_picture_is_refused_before_any_is_made(self, upgraded, tmp_path) -> None:
        pictures = fill_with_scenes(tmp_path / "pictures", train=1, held=0)
        with pytest.raises(DataError, match="2 real images at least"):
            evaluate(upgraded, pictures, tmp_path / "out", count=4)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ((0.05, 0.001), "Base + bicubic has 50.00: the generated images are better, closer to the real images by 21.2"),
        ((0.01, 0.001), "the generated images are worse, farther from the real images by 7.1 standard errors"),
        ((0.021, 0.001), "the difference is within the error"),
        (None, "give the base pipeline, too"),
    ],
)
def test_the_number_is_said_in_words(base: tuple[float, float] | None, words: str) -> None:
    numbers = {GENERATED: (0.02, 0.001)}
    if base is not None:
        numbers[BASE] = base
    text = interpret(numbers)
    assert text.startswith("KID x 1000 of the generated images is 20.00")
    assert words in text
