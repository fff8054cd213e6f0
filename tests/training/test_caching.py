"""Caches: stale is a miss, damage is named and made again, no partial entry is used, however a build ends (R20)."""

import copy
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPImageProcessor

import tiny_pipelines
from davae.backbones import backbone_of
from davae.data.cache import TensorCache, find_damage, shard_paths
from davae.data.sources import PictureSet, open_pictures
from davae.errors import StorageError
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.autoencoders import load_autoencoder
from davae.pipelines.loading import load_pipeline
from davae.training.caching import digest_text_encoding
from davae.training.digests import digest_model
from davae.training.stage_two_inputs import (
    ReadLatents,
    cache_conditions,
    cache_latents,
    encode_captions,
    encode_latents,
    restore_repeats,
    trim_repeats,
)
from forks import exit_code, forked
from hashes import digests
from rank_forks import run_ranks
from scenes import fill_with_scenes
from trials import Trials

COUNT = 40
"""Pictures: three blocks of latents, the last one short."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As the forks have: other numbers of threads sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> PictureSet:
    folder = fill_with_scenes(tmp_path_factory.mktemp("pictures"), train=COUNT)
    return open_pictures(folder, size=64, split="train").sound()


@pytest.fixture
def autoencoder(autoencoder_folder: Path) -> AutoencoderDA:
    return load_autoencoder(autoencoder_folder)


@pytest.fixture(scope="module")
def pipeline(base_folder: Path) -> StableDiffusion3Pipeline:
    return load_pipeline(base_folder)


@pytest.fixture(scope="module")
def expected(autoencoder_folder: Path, pictures: PictureSet) -> Tensor:
    """Encoded without a cache: in batches of 16, in the order of the set."""
    return by_batches(load_autoencoder(autoencoder_folder), pictures)


@pytest.fixture(scope="module")
def built(autoencoder_folder: Path, pictures: PictureSet, tmp_path_factory) -> Path:
    """A folder of caches with a shard for every block."""
    folder = tmp_path_factory.mktemp("built")
    cache_latents(load_autoencoder(autoencoder_folder), pictures, folder, shard_bytes=1)
    return folder


@pytest.fixture
def ours(built: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(built, tmp_path / "cache"))


def by_batches(autoencoder: AutoencoderDA, pictures: PictureSet) -> Tensor:
    parts = torch.arange(len(pictures)).split(16)
    return torch.cat([encode_latents(autoencoder, pictures.batch(part.tolist())) for part in parts])


def read_all(read: ReadLatents) -> Tensor:
    return read(range(COUNT), 0)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


# ------------------------------------------------------------------------------------------------------------ latents


def test_what_is_read_is_what_was_encoded_to_the_last_bit(autoencoder, pictures, ours, expected) -> None:
    read = cache_latents(autoencoder, pictures, ours)
    assert torch.equal(read_all(read), expected)
    assert torch.equal(read([39, 0, 39], 7), expected[[39, 0, 39]])


def test_a_hit_encodes_nothing_and_writes_nothing(autoencoder, pictures, ours) -> None:
    before = {path: path.stat().st_mtime_ns for path in [ours, *ours.rglob("*")]}
    encoded: list[int] = []
    autoencoder.detail_encoder.register_forward_hook(lambda *_: encoded.append(1))
    cache_latents(autoencoder, pictures, ours)
    assert not encoded
    assert {path: path.stat().st_mtime_ns for path in [ours, *ours.rglob("*")]} == before
    shards(ours)[0].unlink()
    cache_latents(autoencoder, pictures, ours)
    assert len(encoded) == 1, "one block"


def test_the_pictures_of_another_set_are_found_by_their_bytes(autoencoder, pictures, ours, expected, tmp_path) -> None:
    """Under other names, in another order, with one that is new."""
    for index, path in enumerate(sorted(fill_with_scenes(tmp_path / "all", train=COUNT + 1, held=0).glob("*.png"))):
        (tmp_path / "other").mkdir(exist_ok=True)
        path.rename(tmp_path / "other" / f"q{99 - index}.png")
    others = open_pictures(tmp_path / "other", size=64, captions=False)
    latents = cache_latents(autoencoder, others, ours, shard_bytes=1)(range(COUNT + 1), 0)
    assert torch.equal(latents[1:], expected.flip(0))
    assert len(shards(ours)) == 4


@pytest.mark.parametrize("change", ["weights", "statistics", "configuration", "size", "bytes"])
def test_what_is_stale_is_a_miss(autoencoder, pictures, ours, expected, tmp_path, change) -> None:
    other, files = pictures, len(shards(ours))
    changed = copy.deepcopy(autoencoder)
    with torch.no_grad():
        if change == "weights":  # by the least that float32 can say
            changed.joint_decoder.conv_out.bias[0] = torch.nextafter(
                changed.joint_decoder.conv_out.bias[0], torch.tensor(9.0)
            )
        elif change == "statistics":
            changed.detail_std.mul_(2)
        elif change == "configuration":
            changed.register_to_config(scaling_factor=3.0)
        elif change == "size":
            other = open_pictures(fill_with_scenes(tmp_path / "p", train=COUNT), size=32, split="train")
        else:
            folder = fill_with_scenes(tmp_path / "p", train=COUNT, first=50)
            other = open_pictures(folder, size=64, split="train")
            assert other.keys == pictures.keys

    assert torch.equal(read_all(cache_latents(changed, other, ours)), by_batches(changed, other))
    assert len(shards(ours)) > files

    files = len(shards(ours))
    assert torch.equal(read_all(cache_latents(autoencoder, pictures, ours)), expected)
    assert len(shards(ours)) == files, "what was there before is still found"


def test_the_digest_of_a_model_is_of_what_it_computes(autoencoder, autoencoder_folder, tmp_path) -> None:
    again = Path(shutil.copytree(autoencoder_folder, tmp_path / "elsewhere"))
    assert digest_model(load_autoencoder(again)) == digest_model(autoencoder)
    assert digest_model(autoencoder.to(torch.bfloat16)) != digest_model(load_autoencoder(again))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda sound: b"",
    "cut": lambda sound: sound[: len(sound) // 2],
    "header cut": lambda sound: sound[:20],
    "one bit of a latent": lambda sound: sound[:-1] + bytes([sound[-1] ^ 1]),
    "one bit of a key": lambda sound: sound[:40] + bytes([sound[40] ^ 1]) + sound[41:],
    "longer": lambda sound: sound + b"0",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_named_set_aside_and_made_again(autoencoder, pictures, ours, expected, caplog, how) -> None:
    victim, before = shards(ours)[1], digests(ours)
    victim.write_bytes(DAMAGES[how](victim.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(read_all(cache_latents(autoencoder, pictures, ours)), expected)
    assert f"{victim} is damaged (its SHA-256 is not its name); set aside" in caplog.text
    aside = victim.with_name(f"damaged-{victim.name}")
    assert aside.exists()
    aside.unlink()
    assert digests(ours) == before, "the same file again"


def test_several_processes_check_every_shard_whoever_is_first(autoencoder, pictures, ours) -> None:
    """The first has renamed what it found before the next one looks."""
    for path in shards(ours):
        path.write_bytes(b"")
    cache = TensorCache(ours, "latents", {"autoencoder": digest_model(autoencoder)})
    for process in range(3):
        cache.set_damaged_aside(process=process, processes=3)
    assert len(shards(ours)) == 3
    assert all(path.name.startswith("damaged-") for path in shards(ours))


def test_a_shard_of_another_model_is_set_aside(autoencoder, pictures, ours, expected, caplog) -> None:
    changed = copy.deepcopy(autoencoder)
    changed.detail_std.mul_(2)
    cache_latents(changed, pictures, ours, shard_bytes=1)

    mine, theirs = (path for path in ours.iterdir() if path.is_dir())
    for path in shard_paths(theirs):
        shutil.copy(path, mine)
        path.unlink()
    for path in shard_paths(mine):
        if not (theirs / path.name).exists():
            shutil.copy(path, theirs)
    assert torch.equal(read_all(cache_latents(autoencoder, pictures, ours)), expected)

    assert caplog.text.count("is of another cache; set aside") == 3


def test_a_cache_that_cannot_be_written_is_a_storage_error(autoencoder, pictures, tmp_path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError):
        cache_latents(autoencoder, pictures, tmp_path / "file")


# ------------------------------------------------------------------------------------------- processes, and their ends


def test_three_processes_at_once_make_the_entries_of_one(autoencoder, pipeline, pictures, expected, tmp_path) -> None:
    def build() -> None:
        cache_latents(autoencoder, pictures, tmp_path / "cache")
        cache_conditions(pipeline, backbone, pictures, tmp_path / "cache", tokens=8)

    backbone = backbone_of(pipeline.transformer)
    assert run_ranks(build, 3) == [0, 0, 0]
    assert len(shards(tmp_path / "cache")) == 4, "a block of latents by each, and one of captions"
    assert torch.equal(read_all(cache_latents(autoencoder, pictures, tmp_path / "cache")), expected)
    assert len(shards(tmp_path / "cache")) == 4


@pytest.mark.soak("R20", ci=20, full=200)
def test_killed_while_building(trials: Trials, autoencoder, pipeline, pictures, expected, tmp_path) -> None:
    """Half of the times at any moment, half of them at a file operation: what is found then is whole, and is used."""
    backbone = backbone_of(pipeline.transformer)

    def build(folder: Path, operation: int = 0) -> None:
        seen = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            if event in ("open", "os.rename", "os.remove") and str(folder) in str(arguments[0]):
                seen += 1
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        cache_latents(autoencoder, pictures, folder, shard_bytes=1)
        cache_conditions(pipeline, backbone, pictures, folder, tokens=8)

    began = time.monotonic()
    assert exit_code(forked(lambda: build(tmp_path / "undisturbed"))) == 0
    seconds, reference = time.monotonic() - began, digests(tmp_path / "undisturbed")
    assert len(reference) == 4
    partly = 0
    for chance in trials:
        folder, at_operation = tmp_path / str(trials.number), trials.number % 2
        operation = at_operation * chance.randint(1, 40)
        pid = forked(lambda folder=folder, operation=operation: build(folder, operation))
        if not at_operation:
            time.sleep(chance.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
        trials.done -= exit_code(pid) != -signal.SIGKILL
        left = shards(folder)
        assert all(find_damage(path) == "" for path in left)
        partly += 0 < len(left) < 4
        assert digests(folder).items() <= reference.items()
        assert exit_code(forked(lambda folder=folder: build(folder))) == 0
        assert digests(folder) == reference
        assert not list(folder.rglob(".*.tmp-*")), "the next build removes the litter"
        shutil.rmtree(folder)
        if trials.only is None:
            assert trials.number + 1 < 3 * trials.count, "the builds were over before they could be killed"
    assert partly > 0 or trials.only is not None
    assert torch.equal(read_all(cache_latents(autoencoder, pictures, tmp_path / "undisturbed")), expected)


# --------------------------------------------------------------------------------------------------------------- text


def test_texts_are_read_as_they_were_encoded(pipeline, pictures, tmp_path) -> None:
    """Each caption is kept once: 40 pictures have 16 captions."""
    backbone = backbone_of(pipeline.transformer)
    captions = ["", *pictures.captions]
    expected = encode_captions(pipeline, backbone, captions, 8)
    read = cache_conditions(pipeline, backbone, pictures, tmp_path, tokens=8)
    first = [captions.index(caption) for caption in captions]
    assert len(set(first)) == 17
    for name, values in read(range(len(captions))).items():
        assert torch.equal(values, expected[name][first])
        torch.testing.assert_close(values, expected[name], atol=1e-6, rtol=1e-6)

    calls: list[int] = []
    handle = pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    cache_conditions(pipeline, backbone, pictures, tmp_path, tokens=8)
    assert not calls
    cache_conditions(pipeline, backbone, pictures, tmp_path, tokens=9)
    assert calls, "another length is a miss"
    handle.remove()
    assert len(list(tmp_path.iterdir())) == 2


def test_the_digest_of_the_text_is_of_encoders_and_tokenizers(base_folder: Path) -> None:
    pipeline = load_pipeline(base_folder)
    before = digest_text_encoding(pipeline)
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.zero_()
        pipeline.encode_prompt("red ball", None, None)  # leaves its padding in the tokenizers
    assert digest_text_encoding(pipeline) == before

    pipeline.register_modules(image_encoder=None, feature_extractor=CLIPImageProcessor())
    assert len(digest_text_encoding(pipeline)) == 64

    pipeline.register_modules(feature_extractor=None)
    pipeline.tokenizer_2.model_max_length = 76
    assert digest_text_encoding(pipeline) != before
    pipeline.tokenizer_2.model_max_length = 77

    with torch.no_grad():
        bias = pipeline.text_encoder_3.shared.weight
        bias[0, 0] = torch.nextafter(bias[0, 0], torch.tensor(9.0))
    assert digest_text_encoding(pipeline) != before


def test_repeated_rows_at_the_end_are_not_kept() -> None:
    condition = {
        "text": torch.cat([torch.randn(3, 4), torch.zeros(97, 4)]),
        "signed": torch.tensor([1.0, 0.0, -0.0, 0.0]),
        "mask": torch.tensor([1] * 3 + [0] * 97),
        "full": torch.randn(100, 2).bfloat16(),
        "constant": torch.ones(5, 2),
        "length": torch.tensor(3),
    }

    kept = trim_repeats(condition)
    assert {name: len(kept[name]) for name in ("text", "mask", "full", "constant")} == {
        "text": 4,
        "mask": 4,
        "full": 100,
        "constant": 1,
    }

    again = restore_repeats(kept)
    assert again.keys() == condition.keys()
    for name, values in condition.items():
        assert torch.equal(again[name], values)
        assert again[name].dtype == values.dtype
    assert again["signed"].signbit().tolist() == [False, False, True, False]


@pytest.mark.parametrize("name", ["sana", "lumina2", "pixart_sigma", "qwen_image", "z_image", "flux2"])
def test_padding_that_a_transformer_does_not_see_takes_no_room_and_has_no_say(name: str) -> None:
    """Zero where it is masked, kept as one row; what the transformer makes of it is the same, bit for bit."""
    pipeline = getattr(tiny_pipelines, name)()
    pipeline.system_prompt = "draw"  # Lumina2's own fills all 40 tokens
    backbone = backbone_of(pipeline.transformer)
    captions = ["red ball", "", "a fish and a tree"]

    with torch.no_grad():
        plain = backbone.condition(pipeline, captions, max_sequence_length=40)
        found = encode_captions(pipeline, backbone, captions, 40)
        latents = torch.randn(3, tiny_pipelines.CHANNELS, 8, 8)
        predict, time = backbone.velocity, torch.tensor([0.2, 0.5, 0.9])
        if backbone.noise is not None:
            predict, time = backbone.noise, torch.tensor([3, 500, 900])
        seen, expected = (predict(pipeline.transformer, latents, time, condition) for condition in (found, plain))

    for one, other in zip(seen, expected, strict=True):
        assert one is None or torch.equal(one, other)

    for index in range(3):
        condition = {name: values[index] for name, values in found.items()}
        kept = trim_repeats(condition)
        assert all(torch.equal(values, condition[name]) for name, values in restore_repeats(kept).items())
        text = kept["caption" if name == "z_image" else "encoder_hidden_states"]
        assert (len(text) < 40) == (name != "flux2"), "FLUX.2 attends to its padding"
