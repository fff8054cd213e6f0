"""`davae bench`: cases timed against each other, one JSON line for each, and a Markdown table."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from davae.cost import timing
from davae.cost.cases import (
    Case,
    choose_parts,
    choose_sizes,
    count_flops,
    count_part_parameters,
    count_weight_bytes,
    make_runs,
)
from davae.cost.geometry import build
from davae.errors import SettingsError
from davae.models.autoencoder_da import AutoencoderDA
from davae.models.base_autoencoders import base_facts
from davae.pipelines.loading import load_pipeline
from davae.pipelines.placement import choose_dtype
from davae.pipelines.upgrade import upgrade
from davae.run.markdown import markdown_table
from davae.run.record import environment
from davae.run.storage import finite, write_atomically
from davae.training.devices import lay_out
from davae.training.stage_two_transformer import compile_blocks

# By the type of device: the sizes of the matrix product and of the copy that measure the ceilings.
CEILINGS = {"cuda": {"side": 8192, "copied_bytes": 8 * 10**9}, "cpu": {"side": 1024, "copied_bytes": 256 * 2**20}}
# The parts whose share of the ceiling of products is in the table.
RATED = ("step", "decode", "whole")

# By part, then by the name of the case.
Measurements = Mapping[str, Mapping[str, timing.Measured]]


def load_pair(
    pipeline: str | None,
    against: str | None,
    *,
    adapter: Sequence[Path],
    geometry: str | None,
    layers: int | None,
    parts: Sequence[str],
    dtype: str | None,
    device: str,
) -> dict[str, DiffusionPipeline]:
    """The candidate and, if there is a comparison, the pipeline that it is compared with, by name.

    Either `pipeline` with its adapters and perhaps `against`, folders or names on the Hub; or a `geometry`, a base of
    `layers` blocks with random weights (`davae.cost.geometry.build`), which is compared with its own upgrade.
    """
    place = torch.device(device)
    precision = choose_dtype(dtype, place)
    if (pipeline is None) == (geometry is None):
        raise SettingsError("give a PIPELINE, or a --geometry to build one with random weights, and not both")

    # The candidate is named after its folder and its adapters' folders.
    if pipeline is not None:
        if layers is not None:
            raise SettingsError("--layers is for a --geometry: a loaded pipeline is as deep as it is")
        name = " + ".join(path.name for path in (Path(pipeline), *adapter))
        pair = {name: load_pipeline(pipeline, adapter=adapter, dtype=precision, device=place)}
        if against is not None:
            pair[f"against {Path(against).name}"] = load_pipeline(against, dtype=precision, device=place)
        return pair

    # A geometry has text encoders only if they are timed, because they may be its larger part.
    assert geometry is not None, "one of the two is given"
    if against is not None or adapter:
        raise SettingsError("a --geometry is compared with its own upgrade: leave out --against and --adapter")
    if layers is None and place.type == "cpu":
        raise SettingsError("a --geometry at its full depth is for a GPU: on a CPU give its depth, such as --layers 2")
    text = not parts or "text" in parts or "whole" in parts
    base = build(geometry, layers=layers, text=text, dtype=precision, device=place)
    autoencoder = AutoencoderDA.from_base(base.vae, detail_channels=base_facts(base.vae.config).latent_channels).eval()
    return {f"{geometry} upgraded": upgrade(base, autoencoder), f"against {geometry}": base}


def make_cases(
    pair: Mapping[str, DiffusionPipeline], *, size: int | None, against_sizes: Sequence[int] = (), **settings: Any
) -> list[Case]:
    """The candidate's case, then those of the other pipeline at `against_sizes` or at equal pixels and tokens.

    `settings` are the other fields of `Case`, the same for all.
    """
    (name, pipeline), *others = pair.items()
    side = Case(name, pipeline, 0).backbone.picture_side(pipeline, size)
    cases = [Case(f"{name}, {side} px", pipeline, side, **settings)]
    for other, base in others:
        for each in against_sizes or choose_sizes(cases[0], base):
            cases.append(Case(f"{other}, {each} px", base, each, **settings))
    return cases


def quicken(pipelines: Iterable[DiffusionPipeline], *, compiled: bool, channels_last: bool) -> None:
    """Compile the transformers' blocks, one graph for all sizes; lay the autoencoders' weights out channels last.

    Both work in place and change an image by rounding only (docs/speed.md).
    """
    for pipeline in pipelines:
        if compiled:
            compile_blocks(pipeline.transformer, sizes=2)
        if channels_last:
            lay_out(pipeline.vae, torch.channels_last)


def bench(
    cases: Sequence[Case],
    out: Path,
    *,
    parts: Sequence[str] = (),
    repeats: int = 7,
    warm_up: int = 3,
    whole_repeats: int | None = None,
    shortest: float = timing.SHORTEST,
    ceilings: timing.Ceilings | None = None,
) -> str:
    """Time the cases against each other, and return the table in `out`/bench.md; bench.jsonl has a line for each.

    The first case is the candidate; ratios are the others' times over its own. `parts` are names out of `cases.PARTS`,
    or all that the cases have. `whole_repeats` are the measurements of "whole" after a single call, for images that
    take long; None is like the other parts. `shortest`: see `measure_interleaved`; `ceilings` are measured if None.

    Raises:
        SettingsError: a part or a size that a case does not have.
    """
    # The parts that all cases have, and their functions without arguments.
    shared = set.intersection(*(set(choose_parts(case, parts)) for case in cases))
    parts = [part for part in choose_parts(cases[0], parts) if part in shared]
    device, dtype = cases[0].pipeline.device, cases[0].pipeline.transformer.dtype
    ceilings = ceilings or timing.measure_ceilings(device, dtype, **CEILINGS[device.type])
    runs = {case.name: make_runs(case, parts) for case in cases}

    # The cases take turns in each part, so that a change of the machine's speed changes all alike.
    measured: dict[str, dict[str, timing.Measured]] = {}
    for part in parts:
        counts = {"repeats": repeats, "warm_up": warm_up}
        if part == "whole" and whole_repeats is not None:
            counts = {"repeats": whole_repeats, "warm_up": 1}
        turns = {name: own[part] for name, own in runs.items()}
        measured[part] = timing.measure_interleaved(turns, device, shortest=shortest, **counts)

    # The others are compared with the candidate: measured times, and counted operations.
    candidate, *others = lines = [_describe_case(case, measured, ceilings) for case in cases]
    for line in others:
        line["against"] = candidate["case"]
        line["ratios"] = compare_times(measured, line["case"], candidate["case"])
        line["counted_ratios"] = {}
        for part, flops in candidate["flops"].items():
            if flops and part in parts:
                line["counted_ratios"][part] = line["flops"][part] / flops

    text = "".join(json.dumps(finite(line), allow_nan=False) + "\n" for line in lines)
    write_atomically(out / "bench.jsonl", text.encode())
    table = format_table(lines)
    write_atomically(out / "bench.md", table.encode())
    return table


def _describe_case(case: Case, measured: Measurements, ceilings: timing.Ceilings) -> dict[str, Any]:
    """One line of bench.jsonl: plain JSON values, in seconds, bytes and operations."""
    pipeline, device = case.pipeline, case.pipeline.device
    dtype = pipeline.transformer.dtype
    peak, flops, weights = timing.find_dense_peak(device, dtype), count_flops(case), count_weight_bytes(case)

    parts: dict[str, dict[str, Any]] = {}
    for part, measurements in measured.items():
        own = measurements[case.name]
        # Rates follow from the median time.
        spread = timing.compute_spread(own.seconds)
        rate = flops[part] / spread.median if part in flops else None
        reading = weights[part] / spread.median if part in weights else None
        parts[part] = {
            "seconds": dataclasses.asdict(spread),
            "calls": own.calls,
            "cold_seconds": own.cold,
            "peak_bytes": own.peak_bytes,
            "added_bytes": own.added_bytes,
            "flops_per_second": rate,
            "mfu": rate / peak if rate and peak else None,
            "of_product_ceiling": rate / ceilings.products if rate else None,
            "weights_read_of_copy_ceiling": reading / ceilings.copy if reading else None,
        }

    is_gpu = device.type == "cuda"
    return {
        "case": case.name,
        "pipeline": type(pipeline).__name__,
        "transformer": type(pipeline.transformer).__name__,
        "layers": pipeline.transformer.config.get("num_layers"),
        **{name: getattr(case, name) for name in ("size", "tokens", "batch", "steps", "prompt_tokens", "seed")},
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": count_part_parameters(case),
        "flops": flops,
        "parts": parts,
        "images_per_second": case.batch / parts["whole"]["seconds"]["median"] if "whole" in parts else None,
        "ceilings": dataclasses.asdict(ceilings),
        "dense_peak": peak,
        "device": torch.cuda.get_device_name(device) if is_gpu else f"cpu, {torch.get_num_threads()} threads",
        "environment": environment(),
    }


def compare_times(measured: Measurements, name: str, candidate: str) -> dict[str, Any]:
    """By part: the spread of a case's time over the candidate's, measurement by measurement."""
    ratios = {}
    for part, cases in measured.items():
        ratios[part] = dataclasses.asdict(timing.compute_paired_ratios(cases[name].seconds, cases[candidate].seconds))
    return ratios


# ------------------------------------------------------------------------------------------------------- the table


def format_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """A row for each case, medians with p10 and p90; and a row for each comparison, medians with least and most."""
    first, parts = lines[0], list(lines[0]["parts"])
    rated = [part for part in RATED if part in parts]
    header = ["case", "tokens", "parameters, M", "TFLOP a picture", *(f"{part}, ms" for part in parts)]
    header += ["pictures a second", "peak, GiB", *(f"{part}, % of ceiling" for part in rated), "step, MFU %"]
    text = markdown_table(header, [_format_case(line, rated) for line in lines]) + "\n"

    if len(lines) > 1:
        text += f"\nTimes over those of {first['case']}; in brackets least and most, then as counted:\n\n"
        text += markdown_table(["case", *parts], [_format_ratios(line) for line in lines[1:]]) + "\n"

    facts, limit = first["environment"], first["ceilings"]
    return text + (
        f"\n{first['device']}, {first['dtype']}, batch {first['batch']}, {first['steps']} guided steps, torch "
        f"{facts['versions']['torch']}, commit {facts['commit']}. timing.Ceilings, measured: products "
        f"{limit['products'] / 1e12:.3g} TFLOP/s, copy {limit['copy'] / 1e9:.3g} GB/s.\n"
    )


def _format_case(line: Mapping[str, Any], rated: Sequence[str]) -> list[str]:
    parts, speed = line["parts"], line["images_per_second"]
    cells = [line["case"], f"{line['tokens']}", f"{sum(line['parameters'].values()) / 1e6:,.2f}"]
    cells.append(f"{line['flops']['whole'] / line['batch'] / 1e12:.3g}")

    # Times with three significant digits of the median: a column for each part.
    peaks = []
    for part in parts.values():
        peaks.append(part["peak_bytes"])
        median, p10, p90 = (1000 * part["seconds"][key] for key in ("median", "p10", "p90"))
        digits = max(0, 2 - math.floor(math.log10(median))) if median > 0 else 0
        cells.append(f"{median:.{digits}f} [{p10:.{digits}f}, {p90:.{digits}f}]")

    # The largest peak of all parts, and shares in percent.
    cells.append("-" if speed is None else f"{speed:.3g}")
    cells.append("-" if None in peaks else f"{max(peaks) / 2**30:.2f}")
    shares = [parts[part]["of_product_ceiling"] for part in rated]
    for share in (*shares, parts.get("step", {}).get("mfu")):
        cells.append("-" if share is None else f"{100 * share:.1f}")
    return cells


def _format_ratios(line: Mapping[str, Any]) -> list[str]:
    cells = [line["case"]]
    for part, ratio in line["ratios"].items():
        cell = f"{ratio['median']:.3f} [{ratio['least']:.3f}, {ratio['most']:.3f}]"
        if part in line["counted_ratios"]:
            cell += f" {line['counted_ratios'][part]:.3f}"
        cells.append(cell)
    return cells
