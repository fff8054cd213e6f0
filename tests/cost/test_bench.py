"""`davae bench`: what it compares, what it writes, what it refuses; never how long anything took."""

import json
from pathlib import Path

import pytest
import torch

from davae import AutoencoderDA, upgrade
from davae.cli import main
from davae.cost.bench import bench, compare_times, format_table, load_pair, make_cases, quicken
from davae.cost.cases import PARTS
from davae.cost.timing import Ceilings, Measured
from davae.errors import SettingsError
from davae.training.sharding import blocks_of
from tiny import tiny_class_pipeline, tiny_sd3_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:The following part of your input was truncated")
LIMITS = Ceilings(products=2e12, copy=1e10)
QUICK = {"repeats": 2, "warm_up": 1, "shortest": 0.0, "ceilings": LIMITS}
LOADING = {"adapter": [], "geometry": None, "layers": None, "parts": [], "dtype": None, "device": "cpu"}


def pair() -> dict:
    base = tiny_sd3_pipeline()
    return {"new": upgrade(base, AutoencoderDA.from_base(base.vae, detail_channels=4)), "old": base}


def measured(*seconds: float) -> Measured:
    return Measured(cold=9.0, calls=1, seconds=list(seconds), peak_bytes=2**30, added_bytes=0)


# ------------------------------------------------------------------------------------------------------------- cases


def test_the_candidate_is_compared_with_its_base_at_equal_pixels_and_equal_tokens() -> None:
    cases = make_cases(pair(), size=None, batch=2, steps=3)
    assert [(case.name, case.tokens) for case in cases] == [
        ("new, 64 px", 16),
        ("old, 64 px", 64),
        ("old, 32 px", 16),
    ]
    assert {(case.batch, case.steps) for case in cases} == {(2, 3)}
    assert [case.size for case in make_cases(pair(), size=32, against_sizes=[16, 24])] == [32, 16, 24]
    assert [case.name for case in make_cases({"alone": tiny_sd3_pipeline()}, size=16)] == ["alone, 16 px"]


def test_a_size_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(SettingsError, match="size=36: allowed are multiples of 16"):
        make_cases(pair(), size=36)


# -------------------------------------------------------------------------------------------------------------- record


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("bench")
    cases = make_cases(pair(), size=None, batch=2, steps=2, prompt_tokens=8)
    table = bench(cases, out, **QUICK)
    lines = [json.loads(line) for line in (out / "bench.jsonl").read_text().splitlines()]
    assert table == (out / "bench.md").read_text() == format_table(lines)
    return lines


def test_there_is_a_line_for_each_case(lines: list[dict]) -> None:
    assert [line["case"] for line in lines] == ["new, 64 px", "old, 64 px", "old, 32 px"]
    assert {line["batch"] for line in lines} == {2}
    for line in lines:
        assert list(line["parts"]) == list(PARTS)
        for part in line["parts"].values():
            assert part["seconds"]["count"] == 2
            assert part["seconds"]["least"] <= part["seconds"]["median"] <= part["seconds"]["most"]
        assert line["images_per_second"] == pytest.approx(2 / line["parts"]["whole"]["seconds"]["median"])
        assert line["environment"]["versions"]["torch"]


def test_rates_are_counted_work_over_measured_time(lines: list[dict]) -> None:
    for line in lines:
        for name in ("text", "step", "decode", "whole"):
            part = line["parts"][name]
            rate = line["flops"][name] / part["seconds"]["median"]
            assert part["flops_per_second"] == pytest.approx(rate)
            assert part["of_product_ceiling"] == pytest.approx(rate / LIMITS.products)
            assert part["mfu"] is None, "a CPU has no data sheet"
        assert line["parts"]["to-cpu"]["flops_per_second"] is None
        step = line["parts"]["step"]
        read = 4 * line["parameters"]["transformer"] / step["seconds"]["median"]
        assert step["weights_read_of_copy_ceiling"] == pytest.approx(read / LIMITS.copy)


def test_comparisons_stand_with_the_others(lines: list[dict]) -> None:
    first, *others = lines
    assert "ratios" not in first
    for line in others:
        assert line["against"] == first["case"]
        assert line["ratios"].keys() == first["parts"].keys()
        assert line["counted_ratios"]["step"] == line["flops"]["step"] / first["flops"]["step"]
    assert others[0]["counted_ratios"]["step"] > 2
    assert others[1]["counted_ratios"]["step"] == pytest.approx(1, rel=0.01)


def test_ratios_are_of_neighbours_and_above_one_where_the_candidate_is_faster() -> None:
    found = {"step": {"new": measured(1.0, 2.0, 1.0), "old": measured(4.0, 8.0, 5.0)}}
    ratio = compare_times(found, "old", "new")["step"]
    assert (ratio["median"], ratio["least"], ratio["most"], ratio["count"]) == (4.0, 4.0, 5.0, 3)


def test_the_table_has_a_row_for_each_case_and_each_comparison(lines: list[dict]) -> None:
    text = format_table(lines)
    rows = [line for line in text.splitlines() if line.startswith(("| new", "| old"))]
    assert [row.split(" | ")[0] for row in rows] == [
        "| new, 64 px", "| old, 64 px", "| old, 32 px", "| old, 64 px", "| old, 32 px",
    ]  # fmt: skip
    assert rows[0].count("|") == next(line for line in text.splitlines() if "---:" in line).count("|")
    assert f"{lines[1]['counted_ratios']['step']:.3f} |" in rows[3]
    assert "products 2 TFLOP/s, copy 10 GB/s" in text
    assert "Times over" not in format_table(lines[:1])


def test_only_the_parts_that_are_asked_for_are_timed(tmp_path: Path) -> None:
    table = bench(make_cases(pair(), size=None), tmp_path, parts=["decode", "step"], **QUICK)
    first = json.loads((tmp_path / "bench.jsonl").read_text().splitlines()[0])
    assert list(first["parts"]) == ["step", "decode"]
    assert first["images_per_second"] is None
    assert "whole" not in table
    with pytest.raises(SettingsError, match="part 'train'"):
        bench(make_cases(pair(), size=None), tmp_path, parts=["train"], **QUICK)


def test_whole_pictures_may_be_timed_less_often(tmp_path: Path) -> None:
    bench(make_cases(pair(), size=None, steps=1), tmp_path, parts=["step", "whole"], whole_repeats=1, **QUICK)
    for line in map(json.loads, (tmp_path / "bench.jsonl").read_text().splitlines()):
        assert {part: found["seconds"]["count"] for part, found in line["parts"].items()} == {"step": 2, "whole": 1}


@pytest.mark.filterwarnings("ignore")  # the compiler's, about itself
def test_levers_are_applied_to_every_case() -> None:
    both = pair()
    blocks = [block for pipeline in both.values() for block in blocks_of(pipeline.transformer)]
    quicken(both.values(), compiled=False, channels_last=True)
    assert all(block._compiled_call_impl is None for block in blocks)
    for pipeline in both.values():
        decoder = getattr(pipeline.vae, "joint_decoder", None) or pipeline.vae.decoder
        assert decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    quicken(both.values(), compiled=True, channels_last=False)
    assert all(block._compiled_call_impl is not None for block in blocks)


def test_a_class_conditional_pair_has_no_text(tmp_path: Path) -> None:
    base = tiny_class_pipeline()
    new = upgrade(base, AutoencoderDA.from_base(base.vae, detail_channels=4))
    bench(make_cases({"new": new, "old": base}, size=None, steps=1), tmp_path, **QUICK)
    lines = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert [line["size"] for line in lines] == [64, 32]
    assert list(lines[0]["parts"]) == ["step", "decode", "to-cpu", "whole"]
    assert "text" not in lines[1]["counted_ratios"]


# -------------------------------------------------------------------------------------------------------- what to load


def test_loaded_pipelines_are_named_after_their_folders(base_folder: Path) -> None:
    found = load_pair(str(base_folder), str(base_folder), **LOADING)
    assert list(found) == [base_folder.name, f"against {base_folder.name}"]
    assert list(load_pair(str(base_folder), None, **LOADING)) == [base_folder.name]


def test_a_geometry_is_compared_with_itself_before_the_upgrade(base_folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(base_folder.parent)
    settings = LOADING | {"geometry": base_folder.name, "layers": 1, "parts": ["step"], "dtype": "bfloat16"}
    new, old = load_pair(None, None, **settings).items()
    assert (new[0], old[0]) == (f"{base_folder.name} upgraded", f"against {base_folder.name}")
    assert new[1].vae.config.latent_channels == 2 * old[1].vae.config.latent_channels
    assert len(new[1].transformer.transformer_blocks) == 1
    assert new[1].vae_scale_factor == 2 * old[1].vae_scale_factor


@pytest.mark.parametrize(
    ("pipeline", "against", "settings", "message"),
    [
        (None, None, {}, "give a PIPELINE, or a --geometry"),
        ("a", None, {"geometry": "sd35m"}, "give a PIPELINE, or a --geometry .* not both"),
        ("a", None, {"layers": 2}, "--layers is for a --geometry"),
        (None, "b", {"geometry": "sd35m", "layers": 2}, "leave out --against"),
        (None, None, {"geometry": "sd35m"}, "on a CPU give its depth, such as --layers 2"),
        ("a", None, {"dtype": "int8"}, "dtype=int8: allowed are float32, bfloat16, float16"),
    ],
)
def test_what_is_refused(pipeline, against, settings: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_pair(pipeline, against, **LOADING | settings)


def test_the_verb_prints_the_table_and_writes_both_files(base_folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    asked = ["--part", "step", "--repeats", "2", "--warm-up", "1", "--out", str(out)]
    with pytest.raises(SystemExit) as left:
        main(["bench", str(base_folder), *asked])
    assert left.value.code == 0
    assert capsys.readouterr().out.strip() == (out / "bench.md").read_text().strip()
    assert len((out / "bench.jsonl").read_text().splitlines()) == 1
