"""What ranks share and tell each other; what is generated and measured on several is what one process makes."""

import json
import os
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from davae.data.pictures import PictureRefused
from davae.errors import DataError, RankError, SettingsError
from davae.evaluation.generation import generate
from davae.evaluation.reconstruction import reconstruct
from davae.pipelines.autoencoders import load_autoencoder
from davae.pipelines.loading import load_pipeline
from davae.run.ranks import Ranks, meet
from davae.seeds import generator, rand, randn, sample_generators
from davae.training.stage_two_recipe import FinetuneRecipe
from davae.training.stage_two_run import finetune
from forks import exit_code, forked
from hashes import digests
from rank_forks import FSDP2, run_ranks

LAUNCH = Path(__file__).parents[2] / "recipes" / "launch"


def told(program, count: int, folder: Path, settings: dict[str, str] | None = None) -> list:
    """What `program` of the ranks returns on each, in their order."""
    folder.mkdir(exist_ok=True)

    def write() -> None:
        ranks = Ranks(30.0)
        (folder / f"{ranks.rank}.json").write_text(json.dumps(program(ranks)))

    assert run_ranks(write, count, settings) == [0] * count
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def test_a_batch_and_its_random_numbers_are_cut_into_equal_parts(tmp_path: Path) -> None:
    """Of 1, 2 and 4 ranks, and of one batch of 8 or two of 4."""

    def program(ranks: Ranks) -> list:
        drawn = []
        for batch, size in ((3, 8), (6, 4), (7, 4)):
            random = sample_generators(3, "test", ranks.sample_numbers(batch, size // ranks.count))
            noise, chances = randn((size // ranks.count, 3, 7), random), rand(random)
            drawn.append([[*noise.flatten(1).tolist()], chances.tolist()])
        return [ranks.share(list(range(8))), ranks.gather(torch.tensor([ranks.rank])).tolist(), *drawn]

    random = [generator(3, "test", number) for number in range(24, 32)]
    noise = [torch.randn(21, generator=own).tolist() for own in random]
    chances = [torch.rand(1, generator=own).item() for own in random]
    assert len({value for row in noise for value in row}) == 8 * 21
    for count in (1, 2, 4):
        parts = told(program, count, tmp_path / str(count))
        assert list(chain(*(part[0] for part in parts))) == list(range(8))
        assert [part[1] for part in parts] == [list(range(count))] * count
        for place, rows in ((2, slice(8)), (3, slice(4)), (4, slice(4, 8))):
            assert list(chain(*(part[place][0] for part in parts))) == noise[rows]
            assert list(chain(*(part[place][1] for part in parts))) == chances[rows]


def test_means_largest_and_work_over_chunks(tmp_path: Path) -> None:
    def program(ranks: Ranks) -> list:
        gradients = [torch.full((2, 3), float(ranks.rank)), torch.tensor([4.0 * ranks.rank])]
        ranks.average_(gradients)
        over = ranks.map_chunks(torch.arange(7).split(2), lambda chunk: torch.stack([chunk, chunk * chunk]))
        return [
            ranks.mean([float(ranks.rank), 10.0]),
            ranks.largest(15 * (ranks.rank == 1)),
            [gradient.unique().tolist() for gradient in gradients],
            torch.cat(over, dim=-1).tolist(),
        ]

    expected = [[1.0, 10.0], 15, [[1.0], [4.0]], [[*range(7)], [n * n for n in range(7)]]]
    assert told(program, 3, tmp_path) == [expected] * 3


def test_what_rank_0_says_or_raises_all_hear(tmp_path: Path) -> None:
    def program(ranks: Ranks) -> list:
        heard = [ranks.on_first(lambda: f"from {ranks.rank}")]
        for error in (DataError("no pictures"), PictureRefused("a.png", "empty"), ZeroDivisionError("nought")):

            def fail(error: Exception = error) -> None:
                raise error

            try:
                ranks.on_first(fail)
            except (DataError, RankError, ZeroDivisionError) as raised:
                heard.append(f"{type(raised).__name__} {raised}")
        return heard

    first, second = told(program, 2, tmp_path)
    assert first == ["from 0", "DataError no pictures", "PictureRefused a.png: empty", "ZeroDivisionError nought"]
    assert second == [
        "from 0",
        "DataError on rank 0: no pictures",
        "DataError on rank 0: a.png: empty",
        "RankError on rank 0: nought",
    ]


def test_ranks_of_one_start_meet_whatever_an_earlier_one_has_left() -> None:
    store = dist.HashStore()
    store.set("davae start", "former")
    store.set("davae start former 1", "dead")
    store.set("davae start former all", "dead too")
    with ThreadPoolExecutor() as pool:
        late = [pool.submit(meet, store, rank, 3, 30.0) for rank in (1, 2)]
        time.sleep(0.1)
        parts = [meet(store, 0, 3, 30.0), *(part.result() for part in late)]
    parts[0].set("said", "by 0")
    assert [part.check(["said"]) for part in parts] == [True] * 3
    assert not store.check(["said"])


@pytest.mark.parametrize(("rank", "absent"), [(0, "rank 1, 2"), (1, "rank 0")])
def test_a_rank_that_does_not_come_is_named(rank: int, absent: str) -> None:
    with pytest.raises(RankError, match=rf"rank {rank} of 3: {absent} did not come in 0\.1 s"):
        meet(dist.HashStore(), rank, 3, 0.1)


def test_what_ranks_cannot_share_is_refused(base_folder: Path, picture_folder: Path, tmp_path: Path) -> None:
    recipe = FinetuneRecipe(base=str(base_folder), pictures=str(picture_folder), size=64, batch_size=5)

    def program() -> None:
        with pytest.raises(SettingsError, match=r"batch_size=5 .* multiples of 2, such as 4 or 6"):
            finetune(recipe, tmp_path / "run")

    assert run_ranks(program, 2) == [0, 0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings", [{"FSDP_VERSION": "1"}, {"FSDP_OFFLOAD_PARAMS": "true"}])
def test_fsdp_that_davae_has_not_is_refused(settings: dict[str, str]) -> None:
    assert run_ranks(Ranks, 2, {**FSDP2, **settings}) == [SettingsError.exit_code] * 2


def test_pictures_made_and_measured_on_two_ranks_are_those_of_one(
    base_folder: Path, autoencoder_folder: Path, picture_folder: Path, tmp_path: Path
) -> None:
    prompts = [f"red ball {index}" for index in range(35)]  # three batches

    def program(out: Path) -> None:
        settings = {"steps": 1, "prompt_tokens": 8, "guidance_scale": 1.0}
        generate(load_pipeline(base_folder), prompts, out / "generate", **settings)
        reconstruct(load_autoencoder(autoencoder_folder), picture_folder, out / "reconstruct", size=64)

    assert exit_code(forked(lambda: program(tmp_path / "one"))) == 0
    assert run_ranks(lambda: program(tmp_path / "two"), 2) == [0, 0]
    assert len(digests(tmp_path / "one", "*.png")) == len(prompts)
    for pattern in ("*.png", "*.html"):
        assert digests(tmp_path / "two", pattern) == digests(tmp_path / "one", pattern)
    one, two = (json.loads((tmp_path / n / "reconstruct" / "result.json").read_text()) for n in ("one", "two"))
    assert one["values"] == two["values"]


# ---------------------------------------------------------------------------------------------- accelerate's settings


@pytest.mark.parametrize("name", sorted(path.stem for path in LAUNCH.glob("*.yaml")))
def test_accelerate_reads_what_is_shipped(name: str) -> None:
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))  # an unknown key is an error there
    assert (config.num_processes, config.mixed_precision) == (8, "no")
    assert config.distributed_type.value == {"ddp": "MULTI_GPU"}.get(name, "FSDP")
    known = {argument.dest for argument in launch_command_parser()._actions}
    assert {*config.fsdp_config} <= known


@pytest.mark.parametrize(("name", "reshards"), [("fsdp2", True), ("zero2", False)])
def test_the_shipped_settings_shard_as_they_say(name: str, reshards: bool, tmp_path: Path) -> None:
    """By the environment that accelerate makes of them for the processes that it starts."""
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    arguments = launch_command_parser().parse_args(["script.py"])
    options = {**vars(arguments), **config.fsdp_config, "use_fsdp": True, "num_processes": 2, "num_machines": 1}
    options |= {"mixed_precision": "no", "main_process_port": 0, "dynamo_backend": "no"}
    before = dict(os.environ)
    try:
        environment = prepare_multi_gpu_env(Namespace(**options))
    finally:
        os.environ.clear()
        os.environ.update(before)
    settings = {key: value for key, value in environment.items() if key.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}
    sharding = told(lambda ranks: [ranks.sharded, ranks.reshard_after_forward], 2, tmp_path, settings)
    assert sharding == [[True, reshards]] * 2


def test_deepspeed_is_refused_with_what_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(SettingsError, match=r"zero2\.yaml"):
        Ranks()
