"""Which layouts are known, which one a file has, and the import of it: whole or not at all."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from davae.errors import CheckpointError, SettingsError
from davae.pipelines.importing.autoencoders import imagenet_da_vae, lightningdit, sd3_da_vae, va_vae
from davae.pipelines.importing.matching import Conversion, ImportReport, Options
from davae.pipelines.importing.reading import Checkpoint, read_checkpoint, read_statistics
from davae.pipelines.importing.stage_two import sd35_stage_two
from davae.run.storage import check_replaceable, replaced_whole, write_json

REPORT = "import.json"


@dataclass(frozen=True)
class Kind:
    """A layout of a checkpoint."""

    convert: Callable[[Checkpoint, Options], Conversion]
    marks: tuple[str, ...]
    """Regular expressions; a file of this kind has a key for each."""
    options: tuple[str, ...] = ()
    """Those that it takes, fields of `Options`."""


KINDS: dict[str, Kind] = {
    "va-vae": Kind(va_vae, (r"encoder\.down\.0\.block\.0\.conv1\.weight", r"decoder\.conv_in\.weight"), ("stats",)),
    "lightningdit": Kind(lightningdit, (r"x_embedder\.proj\.weight", r"blocks\.0\.attn\.qkv\.weight")),
    "imagenet-da-vae": Kind(imagenet_da_vae, (r"da\.da_up\.conv\.weight|dc\.dc_up\.conv\.weight",), ("stats",)),
    "sd3-da-vae": Kind(sd3_da_vae, (r"dc_up\.conv\.weight", r"dc_down\.conv\.weight"), ("stats", "base")),
    "sd35-stage-two": Kind(
        sd35_stage_two, (r"(.*\.)?tokenizer_patch_embed\.proj\.base_conv\.weight",), ("base", "autoencoder", "lora")
    ),
}
"""By the name that `--kind` takes."""


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
) -> ImportReport:
    """Convert a checkpoint of another program into a folder, with `import.json`, the account of every key.

    Args:
        file: the checkpoint.
        out: the folder; what an earlier import wrote there is replaced.
        kind: a key of `KINDS`; found by the file's keys if None.
        stats: a file of latent statistics, `mean` and `std`.
        base: the base pipeline, folder or Hub name.
        autoencoder: folder of an AutoencoderDA.
        lora: file of the LoRA tensors, where they are not in `file`.
        ema: whether the moving average is taken where the file has one.
        dry_run: do all but write.

    Raises:
        SettingsError: an unknown kind, an option that the kind does not take, or an `out` that holds something else.
        CheckpointError: a file that cannot be read or is not of the kind; names the first mismatch.
        StorageError: `out` cannot be written.
    """
    read = {"file": file, "stats": stats, "base": base, "autoencoder": autoencoder, "lora": lora}
    if any(path is not None and Path(path).resolve().is_relative_to(out.resolve()) for path in read.values()):
        raise SettingsError(f"OUT={out} holds what is read, and would be replaced: give another folder")
    check_replaceable(out, holds=REPORT)
    if kind is not None and kind not in KINDS:
        raise SettingsError(f"--kind {kind}: allowed are {', '.join(KINDS)}")
    checkpoint = read_checkpoint(file, ema=ema)
    kind = kind or detect(checkpoint)
    for name in read.keys() - {"file", *KINDS[kind].options}:
        if read[name] is not None:
            takes = ", ".join(f"--{each}" for each in KINDS[kind].options) or "none"
            raise SettingsError(f"--{name} does not belong to {kind}, which takes {takes}")
    options = Options(None if stats is None else read_statistics(stats), base, autoencoder, lora)
    converted = KINDS[kind].convert(checkpoint, options)
    if not dry_run:
        with replaced_whole(out) as partial:
            converted.save(partial)
            write_json(partial / REPORT, converted.report.to_dict())
    return converted.report


def detect(checkpoint: Checkpoint) -> str:
    """The kind whose marks are among the file's keys.

    Raises:
        CheckpointError: none, or more than one.
    """
    kinds = [
        name
        for name, kind in KINDS.items()
        if all(any(re.fullmatch(mark, key) for key in checkpoint.tensors) for mark in kind.marks)
    ]
    if len(kinds) != 1:
        keys = ", ".join(sorted(checkpoint.tensors)[:4])
        raise CheckpointError(
            f"{checkpoint.path} is of no layout that davae knows, or of several: {', '.join(kinds) or 'none'} of "
            f"{', '.join(KINDS)}. It has, for example, {keys}. Say which one it is with --kind"
        )
    return kinds[0]
