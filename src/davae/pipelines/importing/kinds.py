"""Which layouts are known, which one a file has, and the import of it: whole or not at all."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from davae.errors import CheckpointError, SettingsError
from davae.pipelines.importing import autoencoders, transformers
from davae.pipelines.importing.account import Import, Save
from davae.pipelines.importing.reading import ForeignCheckpoint, read_checkpoint, read_statistics
from davae.run.storage import check_replaceable, check_writable, replaced_whole, write_json

REPORT = "import.json"


@dataclass(frozen=True)
class Kind:
    """A layout of a checkpoint."""

    convert: Callable[[Import], Save]
    marks: tuple[str, ...]  # regular expressions; a file of this kind has a key for each
    options: tuple[str, ...] = ()  # the fields of `Import` that it takes


# The kinds by their names on the command line.
KINDS: dict[str, Kind] = {
    "va-vae": Kind(
        autoencoders.convert_va_vae,
        (r"encoder\.down\.0\.block\.0\.conv1\.weight", r"decoder\.conv_in\.weight"),
        ("stats",),
    ),
    "lightningdit": Kind(
        transformers.convert_lightningdit, (r"x_embedder\.proj\.weight", r"blocks\.0\.attn\.qkv\.weight")
    ),
    "imagenet-da-vae": Kind(autoencoders.convert_imagenet_da_vae, (r"d([ac])\.d\1_up\.conv\.weight",), ("stats",)),
    "sd3-da-vae": Kind(
        autoencoders.convert_sd3_da_vae, (r"dc_up\.conv\.weight", r"dc_down\.conv\.weight"), ("stats", "base")
    ),
    "sd35-stage-two": Kind(
        transformers.convert_sd35_stage_two,
        (r"(.*\.)?tokenizer_patch_embed\.proj\.base_conv\.weight",),
        ("base", "autoencoder", "lora"),
    ),
}


def import_checkpoint(
    file: Path,
    out: Path,
    *,
    kind: str | None = None,
    stats: Path | None = None,
    base: str | None = None,
    autoencoder: Path | None = None,
    lora: Path | None = None,
    ema: bool = True,
    dry_run: bool = False,
) -> Import:
    """Convert a checkpoint of another program into a folder, with `import.json`, the account of every key.

    The arguments are those of `davae import`: `kind` is a key of `KINDS`, found by the file's keys if None; `stats` a
    file of latent statistics, `base` a pipeline's folder or Hub name, `autoencoder` the folder of an AutoencoderDA.
    """
    # Nothing is read that would be replaced.
    paths = {"stats": stats, "base": base, "autoencoder": autoencoder, "lora": lora}
    for path in (file, *paths.values()):
        if path is not None and Path(path).resolve().is_relative_to(out.resolve()):
            raise SettingsError(f"OUT={out} holds {path}, which is read, and would be replaced: give another folder")
    for folder in (out, out.resolve().parent):
        check_writable(folder)
    check_replaceable(out, holds=REPORT)
    if kind is not None and kind not in KINDS:
        raise SettingsError(f"--kind {kind}: allowed are {', '.join(KINDS)}")

    # Which kind it is, and whether the options belong to it.
    checkpoint = read_checkpoint(file, ema=ema)
    kind = kind or detect_kind(checkpoint)
    for name, path in paths.items():
        if path is not None and name not in KINDS[kind].options:
            allowed = ", ".join(f"--{option}" for option in KINDS[kind].options) or "none"
            raise SettingsError(f"--{name} does not belong to {kind}, which takes {allowed}")

    statistics = None if stats is None else read_statistics(stats)
    job = Import(kind, checkpoint, statistics, base, autoencoder, lora)
    save = KINDS[kind].convert(job)
    if not dry_run:
        with replaced_whole(out) as partial:
            save(partial)
            write_json(partial / REPORT, job.to_dict())
    return job


def detect_kind(checkpoint: ForeignCheckpoint) -> str:
    """The kind whose marks are among the file's keys; refuses a file of none, or of more than one."""
    kinds = []
    for name, kind in KINDS.items():
        matches = [mark for mark in kind.marks if any(re.fullmatch(mark, key) for key in checkpoint.tensors)]
        if len(matches) == len(kind.marks):
            kinds.append(name)
    if len(kinds) != 1:
        examples = ", ".join(sorted(checkpoint.tensors)[:4])
        raise CheckpointError(
            f"{checkpoint.path} is of no layout that davae knows, or of several: {', '.join(kinds) or 'none'} of "
            f"{', '.join(KINDS)}. It has, for example, {examples}. Say which one it is with --kind"
        )
    return kinds[0]
