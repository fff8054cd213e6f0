"""`davae bench`: cases against each other, one JSON line for each, and a table in Markdown."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from davae.cost.cases import Case, flops_of, parameters_of, parts_of, runs_of, sizes_against, weight_bytes
from davae.cost.random_weights import build
from davae.cost.timing import (
    SHORTEST,
    Ceilings,
    Measured,
    dense_peak,
    measure_ceilings,
    measure_interleaved,
    paired_ratios,
    spread,
)
from davae.errors import SettingsError
from davae.models.autoencoder_da import AutoencoderDA
from davae.pipelines.loading import load_pipeline
from davae.pipelines.upgrade import upgrade
from davae.run.markdown import markdown_table
from davae.run.record import environment
from davae.run.storage import finite, write_atomically
from davae.training.devices import lay_out
from davae.training.stage_two_transformer import compile_blocks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CEILINGS = {"cuda": {"side": 8192, "copied_bytes": 8 * 10**9}, "cpu": {"side": 1024, "copied_bytes": 256 * 2**20}}
"""By the kind of device: the size of the matrix product and of the copy that the ceilings are measured with."""

RATED = ("step", "decode", "whole")
"""The parts whose share of the ceiling of products is in the table."""


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
    """The candidate, and behind it what it is compared with, if there is anything, by name.

    Args:
        pipeline: folder or Hub name of the candidate; None with a `geometry`.
        against: folder or Hub name of the base; None for no comparison, or with a `geometry`.
        adapter: those of the candidate, in their order.
        geometry: a key of `random_weights.GEOMETRIES` or a folder of configs: that base with random weights, and the
            same one upgraded for the candidate.
        layers: how deep a `geometry` is built; all of it if None.
        parts: what will be timed, all if none: the text encoders of a geometry are built for "text" and "whole" only.
        dtype: a key of `DTYPES`; bfloat16 on a GPU and float32 on the CPU if None.
        device: where both go.

    Raises:
        SettingsError: neither pipeline nor geometry, or both; a depth without a geometry; no depth on a CPU.
        CheckpointError: a pipeline cannot be loaded.
    """
    where = torch.device(device)
    chosen = dtype or ("float32" if where.type == "cpu" else "bfloat16")
    if chosen not in DTYPES:
        raise SettingsError(f"dtype={chosen}: allowed are {', '.join(DTYPES)}")
    if (pipeline is None) == (geometry is None):
        raise SettingsError("give a PIPELINE, or a --geometry to build one with random weights, and not both")
    if pipeline is not None:
        if layers is not None:
            raise SettingsError("--layers is for a --geometry: a loaded pipeline is as deep as it is")
        given = {" + ".join([Path(pipeline).name, *(each.name for each in adapter)]): (pipeline, adapter)}
        if against is not None:
            given |= {f"against {Path(against).name}": (against, ())}
        return {
            name: load_pipeline(path, adapter=extra, dtype=DTYPES[chosen], device=where)
            for name, (path, extra) in given.items()
        }
    assert geometry is not None, "there is one of the two"
    if against is not None or adapter:
        raise SettingsError(
            "a --geometry is compared with itself before the upgrade: leave out --against and --adapter"
        )
    if layers is None and where.type == "cpu":
        raise SettingsError("a --geometry at its full depth is for a GPU: on a CPU give its depth, such as --layers 2")
    text = not parts or bool({"text", "whole"} & set(parts))
    base = build(geometry, layers=layers, text=text, dtype=DTYPES[chosen], device=where)
    autoencoder = AutoencoderDA.from_base(base.vae, detail_channels=base.vae.config.latent_channels).eval()
    return {f"{geometry} upgraded": upgrade(base, autoencoder), f"against {geometry}": base}


def cases_of(
    pair: Mapping[str, DiffusionPipeline], *, size: int | None, against_sizes: Sequence[int] = (), **settings: Any
) -> list[Case]:
    """The candidate's case, and those of the other pipeline at `against_sizes`, or else at equal pixels and tokens.

    Args:
        pair: of `load_pair`.
        size: of the candidate's pictures; its default if None.
        against_sizes: of the other's.
        settings: the other fields of `Case`, the same for all.

    Raises:
        SettingsError: a size that the candidate cannot make, or an unknown backbone.
    """
    (name, pipeline), *others = pair.items()
    side = Case(name, pipeline, 0).backbone.picture_side(pipeline, size)
    candidate = Case(f"{name}, {side} px", pipeline, side, **settings)
    return [candidate] + [
        Case(f"{other}, {each} px", base, each, **settings)
        for other, base in others
        for each in against_sizes or sizes_against(candidate, base)
    ]


def quicken(pipelines: Iterable[DiffusionPipeline], *, compiled: bool, channels_last: bool) -> None:
    """Apply the levers that change a picture by rounding alone, in place: docs/speed.md.

    Args:
        pipelines: all cases'.
        compiled: compile the transformers' blocks, one graph for all sizes.
        channels_last: lay the autoencoders' weights out so.
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
    shortest: float = SHORTEST,
    ceilings: Ceilings | None = None,
) -> str:
    """Time the cases against each other; `out`/bench.jsonl has a line for each, `out`/bench.md the table.

    Args:
        cases: the first is the candidate; ratios are of the others' times to its own.
        out: a folder; files of an earlier run are replaced.
        parts: some of `cases.PARTS`; all that the cases have if none.
        repeats: measurements of each part of each case, interleaved.
        warm_up: calls of each before that.
        whole_repeats: measurements of "whole" after a single call, for pictures that take long; as the others if None.
        shortest: see `measure_interleaved`.
        ceilings: of this machine; measured if None.

    Returns:
        The table.

    Raises:
        SettingsError: a part or a size that a case has not.
    """
    parts = [part for part in parts_of(cases[0], parts) if all(part in parts_of(case, parts) for case in cases)]
    where, dtype = cases[0].pipeline.device, cases[0].pipeline.transformer.dtype
    ceilings = ceilings or measure_ceilings(where, dtype, **CEILINGS[where.type])
    runs = {case.name: runs_of(case, parts) for case in cases}
    counts = dict.fromkeys(parts, (repeats, warm_up))
    if whole_repeats is not None and "whole" in counts:
        counts["whole"] = (whole_repeats, 1)
    found = {
        part: measure_interleaved(
            {name: made[part] for name, made in runs.items()},
            where,
            repeats=times,
            warm_up=first,
            shortest=shortest,
        )
        for part, (times, first) in counts.items()
    }
    lines = [line_of(case, {part: found[part][case.name] for part in parts}, ceilings) for case in cases]
    for line, case in zip(lines[1:], cases[1:], strict=True):
        line["against"] = cases[0].name
        line["ratios"] = ratios(found, case.name, cases[0].name)
        line["counted_ratios"] = {
            part: line["flops"][part] / flops for part, flops in lines[0]["flops"].items() if flops and part in found
        }
    text = "".join(json.dumps(finite(line), allow_nan=False) + "\n" for line in lines)
    write_atomically(out / "bench.jsonl", text.encode())
    write_atomically(out / "bench.md", markdown(lines).encode())
    return markdown(lines)


def line_of(case: Case, found: Mapping[str, Measured], ceilings: Ceilings) -> dict[str, Any]:
    """What is known of a case, as plain JSON values; seconds, bytes and operations."""
    pipeline, device = case.pipeline, case.pipeline.device
    dtype = pipeline.transformer.dtype
    peak, flops, weights = dense_peak(device, dtype), flops_of(case), weight_bytes(case)
    where = environment()
    return {
        "case": case.name,
        "pipeline": type(pipeline).__name__,
        "transformer": type(pipeline.transformer).__name__,
        "layers": pipeline.transformer.config.get("num_layers"),
        **{name: getattr(case, name) for name in ("size", "tokens", "batch", "steps", "prompt_tokens", "seed")},
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": parameters_of(case),
        "flops": flops,
        "parts": {part: _part(part, measured, flops, weights, ceilings, peak) for part, measured in found.items()},
        "images_per_second": case.batch / spread(found["whole"].seconds).median if "whole" in found else None,
        "ceilings": dataclasses.asdict(ceilings),
        "dense_peak": peak,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "environment": where,
    }


def _part(
    part: str,
    measured: Measured,
    flops: Mapping[str, int],
    weights: Mapping[str, int],
    ceilings: Ceilings,
    peak: float | None,
) -> dict[str, Any]:
    seconds = spread(measured.seconds)
    rate = flops[part] / seconds.median if part in flops else None
    reading = weights[part] / seconds.median if part in weights else None
    return {
        "seconds": dataclasses.asdict(seconds),
        "calls": measured.calls,
        "cold_seconds": measured.cold,
        "peak_bytes": measured.peak_bytes,
        "added_bytes": measured.added_bytes,
        "flops_per_second": rate,
        "mfu": rate / peak if rate and peak else None,
        "of_product_ceiling": rate / ceilings.products if rate else None,
        "weights_read_of_copy_ceiling": reading / ceilings.copy if reading else None,
    }


def ratios(found: Mapping[str, Mapping[str, Measured]], name: str, candidate: str) -> dict[str, Any]:
    """By part: the spread of a case's time over the candidate's, measurement by measurement."""
    return {
        part: dataclasses.asdict(paired_ratios(cases[name].seconds, cases[candidate].seconds))
        for part, cases in found.items()
    }


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """A row for each case, medians with p10 and p90; and a row for each comparison, medians with least and most."""
    first, parts = lines[0], list(lines[0]["parts"])
    head = ["case", "tokens", "parameters, M", "TFLOP a picture", *(f"{part}, ms" for part in parts)]
    head += [
        "pictures a second",
        "peak, GiB",
        *(f"{part}, % of ceiling" for part in RATED if part in parts),
        "step, MFU %",
    ]
    text = markdown_table(head, [_row(line, parts) for line in lines]) + "\n"
    if len(lines) > 1:
        rows = [_ratio_row(line, parts) for line in lines[1:]]
        text += f"\nTimes over those of {first['case']}; in brackets least and most, then as counted:\n\n"
        text += markdown_table(["case", *parts], rows) + "\n"
    where, limit = first["environment"], first["ceilings"]
    return text + (
        f"\n{first['device']}, {first['dtype']}, batch {first['batch']}, {first['steps']} guided steps, torch "
        f"{where['versions']['torch']}, commit {where['commit']}. Ceilings, measured: products "
        f"{limit['products'] / 1e12:.3g} TFLOP/s, copy {limit['copy'] / 1e9:.3g} GB/s.\n"
    )


def _row(line: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    found = line["parts"]
    peaks = [found[part]["peak_bytes"] for part in parts]
    shares = [found[part]["of_product_ceiling"] for part in RATED if part in parts]
    return [
        line["case"],
        f"{line['tokens']}",
        f"{sum(line['parameters'].values()) / 1e6:,.2f}",
        f"{line['flops']['whole'] / line['batch'] / 1e12:.3g}",
        *(_milliseconds(found[part]["seconds"]) for part in parts),
        "-" if line["images_per_second"] is None else f"{line['images_per_second']:.3g}",
        "-" if None in peaks else f"{max(peaks) / 2**30:.2f}",
        *(_percent(share) for share in shares),
        _percent(found.get("step", {}).get("mfu")),
    ]


def _ratio_row(line: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    cells = [line["case"]]
    for part in parts:
        ratio, counted = line["ratios"][part], line["counted_ratios"].get(part)
        cells.append(f"{ratio['median']:.3f} [{ratio['least']:.3f}, {ratio['most']:.3f}]")
        cells[-1] += "" if counted is None else f" {counted:.3f}"
    return cells


def _milliseconds(seconds: Mapping[str, float]) -> str:
    """Median, p10 and p90, with three significant digits of the first."""
    median, *ends = (1000 * seconds[name] for name in ("median", "p10", "p90"))
    digits = max(0, 2 - math.floor(math.log10(median))) if median > 0 else 0
    return f"{median:.{digits}f} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
