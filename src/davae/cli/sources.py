"""What verbs read: pipelines to sample from, and prompts."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from davae.cli.checks import check_texts, has_gpu
from davae.errors import SettingsError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def read_prompts(path: Path | None) -> list[str]:
    """The prompts of a text file, one on each line; empty lines are passed over."""
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SettingsError(f"--prompts {path} cannot be read ({error.strerror}): give a text file") from error
    except ValueError as error:
        raise SettingsError(f"--prompts {path} is no text in UTF-8: give a file with a prompt on each line") from error

    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise SettingsError(f"--prompts {path} has no prompt: write one on each line")
    return prompts


def check_sampling(
    pipeline: str,
    prompts: Sequence[str] = (),
    *,
    revision: str | None,
    negative: str,
    guidance_scale: float,
    device: str | None,
    offload: str | None,
) -> None:
    """Refuse settings of a sampler that do not fit each other, and a pipeline that cannot read prompts, unloaded."""
    from davae.pipelines.folders import check_reads_prompts
    from davae.pipelines.places import pin

    check_texts(prompts)
    if negative and guidance_scale <= 1:
        raise SettingsError(
            f"--negative needs --guidance-scale above 1, and it is {guidance_scale:g}: give more, or no --negative"
        )
    if offload is not None and (device == "cpu" or (device is None and not has_gpu())):
        place = "here is none" if device is None else "--device is cpu"
        raise SettingsError(f"--offload is for a GPU, and {place}: leave it out")
    check_reads_prompts(pin(pipeline, revision))


def load_sampler(
    pipeline: str,
    *,
    device: str,
    revision: str | None = None,
    adapter: Sequence[Path] = (),
    lora: Sequence[tuple[str, float]] = (),
    dtype: str | None = None,
    offload: str | None = None,
    compiled: bool = False,
    from_image: bool = False,
) -> "DiffusionPipeline":
    """The pipeline that a verb samples from: with its adapters and LoRAs, on its device."""
    from davae.pipelines.base_lora import load_base_loras
    from davae.pipelines.loading import load_pipeline
    from davae.pipelines.placement import choose_dtype, place
    from davae.pipelines.places import pin
    from davae.pipelines.sampling import image_to_image
    from davae.training.stage_two_transformer import compile_blocks

    loaded = load_pipeline(pin(pipeline, revision), adapter=adapter, dtype=choose_dtype(dtype, device))
    load_base_loras(loaded, lora)
    if from_image:
        loaded = image_to_image(loaded)
    if compiled:
        compile_blocks(loaded.transformer, sizes=2)
    return place(loaded, device, offload)


def repeat_command(pipeline: str, settings: Mapping[str, Any], prompt: str, index: int) -> str:
    """The command line that makes one image again, by its prompt and number; None and empty lists are left out."""
    words = ["davae", "generate", pipeline, prompt, "--first-index", str(index)]
    for name, value in settings.items():
        for each in value if isinstance(value, list) else [value]:
            # A size of two sides, or a LoRA with its weight.
            text = ("x" if name == "size" else ":").join(map(str, each)) if isinstance(each, tuple) else str(each)
            words += [] if each is None else [f"--{name.replace('_', '-')}", text]
    return shlex.join(words)
