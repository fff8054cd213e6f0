"""The settings of stage 2."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from davae.training.recipes import NotNegative, PicturesRecipe, Positive, Weight


class FinetuneRecipe(PicturesRecipe):
    """The settings of a run of stage 2."""

    section: ClassVar[str] = "finetune"
    free_to_change: ClassVar[frozenset[str]] = PicturesRecipe.free_to_change | {
        "cache",
        "compile",
        "gradient_checkpointing",
        "pictures_licence",
        "validation_every",
    }
    places: ClassVar[frozenset[str]] = PicturesRecipe.places | {"adapter"}

    base: str = ""
    """Folder or Hub name of the base pipeline; "" is the shipped one."""
    autoencoder: str = ""
    """Folder of the trained AutoencoderDA, or of an adapter that holds one; "" is the shipped upgrade's."""
    pictures_licence: str = ""
    """Licence of the training images, for the model card."""
    trained: Literal["lora", "layers", "full", "ports"] = "lora"
    """Both ports with LoRA on the targets; both ports with the targets' own weights; the whole transformer; or both
    ports alone."""
    lora_rank: Positive = 32
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    lora_targets: tuple[str, ...] = ()
    """Ends of the names of the layers that get LoRA, or are trained themselves; () is the backbone's default."""
    adapter: str = ""
    """Folder of an adapter to train further, for the same base; with LoRA, of the same rank, alpha and targets."""
    ports_start: Literal["zero", "random", "repeat"] = "zero"
    """How the ports' new half starts: "zero" is the method's warm start, the others are for comparison."""
    batch_size: Positive = 32
    detail_warmup_steps: NotNegative = 200
    """Steps over which the detail channels' weight rises from 0 to 1 (Eq. 12)."""
    shift: Annotated[float, Field(gt=0)] | None = None
    """Timestep shift in training; by default the scheduler's own."""
    objective: Literal["velocity", "data"] = "velocity"
    """The squared error is the velocity's, or the clean latents' that it implies (sigma^2 times the first)."""
    min_snr: Annotated[float, Field(gt=0)] | None = None
    """gamma in each sample's weight min((1 - sigma) / sigma, gamma); only with objective = "data"."""
    cosine_weight: Weight = 0.0
    """Weight of LightningDiT's cosine term between predicted and true velocity, on all channels from the first step."""
    detail_noise: Weight = 0.0
    """Standard deviation of fixed noise on each image's detail latents; 1 in the reference's ImageNet code. The
    autoencoder's latent statistics are adapted."""
    gradient_checkpointing: bool = False
    """Keep only the blocks' inputs and compute the rest again in the backward pass: much less memory for one more
    forward pass. The budget of `--dry-run` does not know it."""
    compile: bool = False
    """Compile the transformer's blocks, which takes minutes before the first step. Losses differ in their last digits;
    a run may resume with or without it."""
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Probability that a caption is replaced by the empty one, or a class by the null class."""
    prompt_tokens: Annotated[int, Field(gt=0, le=512)] = 256
    """Length of the longest text encoder's output (T5's, in SD3)."""
    validation_every: NotNegative = 0
    """Steps between images with raw and EMA weights, from step 0 until after training; 0 draws none."""
    validation_prompts: tuple[str, ...] = ()
    """Prompts of these images; () is the captions of the first four training images."""
    validation_steps: Positive = 28
    """Sampling steps."""
    validation_guidance_scale: Weight = 4.0
    cache: str = ""
    """Folder of the caches of latents and text embeddings, which several runs may share; "" is the run's own."""
    online: bool = False
    """Encode images and captions at every step: slower, and nothing is kept."""
    flips: bool = False
    """Mirror half of the images, drawn at every step; only with online = true."""

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

    def late_settings(self) -> list[str]:
        """As for any run, and the weight of the detail channels."""
        late = super().late_settings()
        if self.detail_warmup_steps > self.steps:
            late.append(f"detail_warmup_steps = {self.detail_warmup_steps}: the detail channels never weigh in full")
        return late


def flow_settings(recipe: FinetuneRecipe) -> dict[str, Any]:
    """The options of `davae.method.flow.flow_loss` that a recipe decides."""
    return {
        "data_objective": recipe.objective == "data",
        "min_snr": recipe.min_snr,
        "cosine_weight": recipe.cosine_weight,
    }
