"""What there is to know of a family of transformers: one row of the table `davae.backbones.BACKBONES`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

from davae.backbones.timestep_shift import timestep_shift
from davae.errors import SettingsError
from davae.method.widen import LatentPorts


def _ports_only(*arguments: Any, **keywords: Any) -> NoReturn:
    raise SettingsError(
        "this family can be widened and upgraded, but not trained here yet, nor sampled from by davae: its row of "
        "davae.backbones.BACKBONES has no function for it. docs/backbones.md says which families have, and how to add "
        "one; the upgraded pipeline itself can be called as every pipeline of diffusers"
    )


@dataclass(frozen=True)
class Backbone:
    """All that davae knows of a transformer's family.

    One that is trained has `velocity` if it is a flow model, or `noise` if it predicts noise.
    """

    ports: LatentPorts
    """Where latents enter and leave."""
    condition: Callable[..., dict[str, Tensor]] = _ports_only
    """(pipeline, prompts, max_sequence_length=...) -> the keyword arguments that the transformer wants besides latents
    and time, each value [B, ...]."""
    velocity: Callable[[Any, Tensor, Tensor, dict[str, Tensor]], Tensor] = _ports_only
    """(transformer, latents [B,C+D,h,w], sigma [B] in [0, 1], condition) -> velocity [B,C+D,h,w]."""
    noise: Callable[[Any, Tensor, Tensor, dict[str, Tensor]], tuple[Tensor, Tensor | None]] | None = None
    """(transformer, noisy latents [B,C+D,h,w], integer timestep [B], condition) -> noise [B,C+D,h,w], and what the
    transformer says of the variance [B,C+D,h,w] in [-1, 1], or None; None for flow models."""
    lora_targets: tuple[str, ...] = ()
    """Names of the layers that get LoRA by default, as peft matches them."""
    classes: bool = False
    """Conditions are class numbers, not captions: `condition` is (pipeline, class numbers) -> class_labels [B]."""
    null_class: Callable[[Any], int] = _ports_only
    """(transformer) -> the class number that means none; the classes are those below it. Only with `classes`."""
    picture_side: Callable[[Any, int | None], int] = _ports_only
    """(pipeline, pixels or None for the default) -> side in pixels; raises SettingsError for one it cannot make. Of a
    picture that is no square, either side is asked for."""
    shift: Callable[[Any, int], float] = timestep_shift
    """(scheduler, tokens of a picture) -> timestep shift that the stock pipeline samples with; only flow models'."""
    call: Callable[..., dict[str, Any]] = _ports_only
    """(pipeline, prompts, noise=[B,C+D,h,w], height=pixels, width=pixels, guidance_scale=, prompt_tokens=) -> arguments
    of the stock pipeline's call that make these pictures of this size; not of families with `classes`."""
    guided_rows: int = 2
    """Rows of the transformer's batch in a guided step of one picture; 1 where guidance is an input of the model."""
    clip_tokens: int = 0
    """Text tokens beside those of the longest text encoder."""
    advice: str = ""
    """What a call of the stock pipeline must be told once it is upgraded, in words; "" if nothing."""
    refusal: str = ""
    """Why the stock pipeline cannot be upgraded, though its transformer can be widened; "" if it can."""

    def predict(self, transformer: Any, latents: Tensor, sigma: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """One call of the transformer: `velocity`, or `noise` at the step that is `sigma` of all, [B,C+D,h,w]."""
        if self.noise is None:
            return self.velocity(transformer, latents, sigma, condition)
        return self.noise(transformer, latents, (999 * sigma).long(), condition)[0]
