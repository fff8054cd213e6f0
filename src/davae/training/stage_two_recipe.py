"""The settings of stage 2."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from davae.method.widen import PortsStart
from davae.training.recipes import NotNegative, PicturesRecipe, Positive, Weight


class FinetuneRecipe(PicturesRecipe):
    """Everything that decides a run of stage 2."""

    section: ClassVar[str] = "finetune"
    free_to_change: ClassVar[frozenset[str]] = frozenset({"compile"})

    base: str = ""
    """Folder or Hub name of the base pipeline; "" is the shipped one."""
    autoencoder: str = ""
    """Folder of the trained AutoencoderDA, or an adapter folder, for its own; "" is the shipped upgrade's."""
    trained: Literal["lora", "layers", "full", "ports"] = "lora"
    """Both ports in full and LoRA on the targets; both ports and the targets' own weights; the whole transformer; both
    ports alone."""
    lora_rank: Positive = 32
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    lora_targets: tuple[str, ...] = ()
    """Ends of the names of the layers that get LoRA, or are trained themselves; () is the backbone's default."""
    adapter: str = ""
    """An adapter folder of the same base to go on from; with LoRA, of the same rank, alpha, targets."""
    ports_start: PortsStart = "zero"
    """Of the ports' new half: "zero" is the method's warm start, the others are for comparison (`start_ports`)."""
    batch_size: Positive = 32
    detail_warmup_steps: NotNegative = 200
    """Steps over which the detail channels' weight rises from 0 to 1 (Eq. 12)."""
    shift: Annotated[float, Field(gt=0)] | None = None
    """Timestep shift in training; the scheduler's own, for so many tokens, if it is left out."""
    objective: Literal["velocity", "data"] = "velocity"
    """What the squared error is of: the velocity, or the clean latents that it amounts to (sigma^2 times the first)."""
    min_snr: Annotated[float, Field(gt=0)] | None = None
    """gamma of the weight min((1 - sigma) / sigma, gamma) of each sample's error; only with objective = "data"."""
    cosine_weight: Weight = 0.0
    """Of LightningDiT's cosine term between predicted and true velocity, on all channels from the first step on."""
    detail_noise: Weight = 0.0
    """Deviation of the noise that the detail latents get once, when they are encoded; 1 in the reference's ImageNet
    code. Their statistics in the autoencoder are changed to fit."""
    gradient_checkpointing: bool = False
    """Keep only what enters each block, and compute the rest of it again in the backward pass: far less memory for one
    more forward pass. The budget of `--dry-run` is that of a run without it."""
    compile: bool = False
    """Compile the transformer's blocks by torch.compile, which takes minutes before the first step. Losses differ in
    their last digits; a run may go on with it or without."""
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """How often a caption is replaced by the empty one, or a class by the null class."""
    prompt_tokens: Annotated[int, Field(gt=0, le=512)] = 256
    """Length of the longest text encoder's output (T5's, in SD3)."""
    validation_every: NotNegative = 0
    """Steps between pictures with raw and EMA weights, the first at step 0, the last after training; 0 draws none."""
    validation_prompts: tuple[str, ...] = ()
    """What is drawn; () is the captions of the first four pictures."""
    validation_steps: Positive = 28
    """Of the sampler."""
    validation_guidance_scale: Weight = 4.0
    cache: str = ""
    """Folder of the caches of latents and text embeddings, shared by as many runs as one likes; "" is the run's own."""
    online: bool = False
    """Encode pictures and captions at every step instead: slower, and nothing is kept."""
    flips: bool = False
    """Mirror half of the pictures, drawn at every step; only with online = true."""

    @model_validator(mode="after")
    def _flips_are_online(self) -> "FinetuneRecipe":
        if self.flips and not self.online:
            raise ValueError("flips = true: cached latents cannot be mirrored; add online = true")
        return self

    @model_validator(mode="after")
    def _min_snr_is_for_data(self) -> "FinetuneRecipe":
        if self.min_snr is not None and self.objective != "data":
            raise ValueError(f'min_snr = {self.min_snr} weights the error of objective = "data", and there is none')
        return self


def flow_settings(recipe: FinetuneRecipe) -> dict[str, Any]:
    """The options of `davae.method.flow.flow_loss` that a recipe decides."""
    return {
        "data_objective": recipe.objective == "data",
        "min_snr": recipe.min_snr,
        "cosine_weight": recipe.cosine_weight,
    }
