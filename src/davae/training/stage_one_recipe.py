"""The settings of stage 1, and which of them fit together."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from davae.errors import SettingsError
from davae.run.recipe import Recipe
from davae.training.recipes import Decay, NotNegative, PicturesRecipe, Positive, Weight


class LossWeights(Recipe):
    """Weights of the terms of stage 1's loss (Table S1), and their settings."""

    l1: Weight = 1.0
    gradient: Weight = 0.0
    """Weight of the L1 between finite differences; not in the paper."""
    lpips: Weight = 1.0
    kl: Weight = 1e-6
    kl_reduction: Literal["mean", "sum"] = "mean"
    """"mean" over elements without 1/2 (the ImageNet set-up), or "sum" with 1/2, averaged over the batch (SD3)."""
    alignment: Weight = 0.5
    adversarial: Weight = 0.0
    """Weight of the PatchGAN's hinge loss; 0 trains no discriminator."""
    adversarial_start: NotNegative = 0
    """The first step with a discriminator."""
    adversarial_ramp_steps: NotNegative = 0
    """Steps over which the adversarial weight rises linearly; the discriminator's own loss has no ramp."""
    adaptive_adversarial: bool = False
    """Multiply by |gradient of the reconstruction loss| / |gradient of this term| at the decoder's last convolution, at
    most 1e4."""
    adaptive_alignment: bool = False
    """Multiply by |gradient of the reconstruction loss| / |gradient of this term| at the detail encoder's last 3x3
    layer, at most 1e8."""
    lpips_weights: str = ""
    """File of VGG16 weights that recipes/lpips/build_lpips.py writes; "" is the shipped AlexNet. Held-out metrics
    always use AlexNet."""
    lpips_patch: Positive | None = None
    """Side of LPIPS's patches in pixels (the SD3 set-up: 256); without it, LPIPS sees the whole crop."""
    lpips_stride: Positive | None = None
    """Pixels from one patch to the next; half a patch by default."""
    discriminator_learning_rate: Weight = 1e-4
    """Constant; the discriminator's other settings are the autoencoder's."""


class AutoencoderRecipe(PicturesRecipe):
    """All settings that decide a run of stage 1."""

    section: ClassVar[str] = "autoencoder"
    free_to_change: ClassVar[frozenset[str]] = PicturesRecipe.free_to_change | {"evaluate_every"}

    base: str = ""
    """Folder or Hub name of the base pipeline, or folder of a bare autoencoder; "" is the shipped pipeline."""
    resolution_factor: Literal[2, 4] = 2
    """s: the base sees the image at 1/s of its size. 4 needs `detail_channels` in multiples of 8."""
    detail_channels: Positive = 16
    latents: Literal["detail", "full"] = "detail"
    """"detail" beside base latents; or "full": all `detail_channels` latents are new, as in the reference code's mode
    of that name. Then there is nothing to align, and no transformer to start from."""
    base_downsample: Literal["bicubic", "bicubic-antialias", "bicubic-unclamped"] = "bicubic-antialias"
    start: Literal["closed form", "random"] = "closed form"
    """Of the two new blocks: least squares in the decoder's metric (docs/method.md), or random as in the paper."""
    autoencoder: str = ""
    """Folder of an AutoencoderDA, or of an adapter, to go on from; "" starts anew. `base` may then be left out, if it
    is the shipped one or the folder is no adapter."""
    frozen_trunk: bool = False
    """Freeze the detail encoder except its last block: only the two new blocks and the joint decoder train."""
    decoder_only: bool = False
    """Train only the joint decoder and its first block, on samples of the detail latents. With `autoencoder` the latent
    statistics stay, too, so that a transformer that was trained on these latents still fits."""
    decoder_block_out_channels: tuple[Positive, ...] = ()
    """Widths of a slim joint decoder's stages, the outermost first; () is as in the base, or as in `autoencoder`. It
    starts from the full one, layer by layer (docs/slim_decoder.md)."""
    decoder_layers_per_block: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Residual blocks of each of these stages, less one; () is as in the base, or as in `autoencoder`."""
    target: Literal["picture", "base reconstruction"] = "picture"
    """What the reconstruction is compared with: the crop, or the base autoencoder's reconstruction at full size."""
    code: Literal["aligned", "unit variance", "residual", "base added", "zero sum"] = "aligned"
    """The detail latents of the closed-form start, see `davae.method.closed_form.Code`."""
    fit_pictures: Positive = 128
    """Images for the fit of the closed-form start."""
    crop: Positive = 128
    """Side of the training crops in pixels, square in all buckets."""
    batch_size: Positive = 8
    latent_noise: Weight = 0.0
    """Noise on the joint decoder's input, so that it forgives a transformer's small errors: |N(0, 1)| x this for each
    image, in units of each latent channel's deviation. Not in the paper; RAE, arXiv 2510.11690."""
    detail_dropout: Decay = 0.0
    """How often an image's detail latents are zero for the joint decoder; the other terms see them undropped."""
    inverted_dropout: bool = False
    """Divide the latents that stay by 1 - `detail_dropout`, as the reference code does."""
    evaluate_every: Positive = 500
    calibration_pictures: Positive = 512
    """Images for the latent statistics, which are measured at the end."""
    heldout_pictures: Positive = 32
    """Held-out images for the metrics during training."""
    loss: LossWeights = LossWeights()

    @property
    def may_split_steps(self) -> bool:
        """The discriminator's BatchNorm and the adaptive weights see a batch as a whole."""
        return super().may_split_steps and not (self.loss.adversarial or self.loss.adaptive_alignment)

    def late_settings(self) -> list[str]:
        """As for any run, and the discriminator's beginning."""
        late, loss = super().late_settings(), self.loss
        start, ramp = loss.adversarial_start, loss.adversarial_ramp_steps
        if loss.adversarial and start >= self.steps:
            late.append(f"loss.adversarial_start = {start}: the discriminator never plays")
        elif loss.adversarial and start + ramp > self.steps:
            late.append(
                f"loss.adversarial_start = {start}, adversarial_ramp_steps = {ramp}: the adversarial weight never "
                f"reaches {loss.adversarial:g}"
            )
        return late


TERMS = ("l1", "gradient", "lpips", "kl", "alignment", "adversarial")
"""The terms of stage 1's loss that have a weight in a recipe."""


def loss_settings(recipe: AutoencoderRecipe) -> Any:
    """The StageOneSettings that a recipe decides."""
    from davae.method.stage_one_loss import StageOneSettings  # imports diffusers

    loss = recipe.loss
    adaptive = {"alignment": loss.adaptive_alignment, "adversarial": loss.adaptive_adversarial}
    return StageOneSettings(
        weights={name: getattr(loss, name) for name in TERMS},
        adaptive=frozenset(name for name, chosen in adaptive.items() if chosen),
        kl_reduction=loss.kl_reduction,
        lpips_patch=loss.lpips_patch,
        lpips_stride=loss.lpips_stride,
        latent_noise=recipe.latent_noise,
        detail_dropout=recipe.detail_dropout,
        inverted_dropout=recipe.inverted_dropout,
    )


def check_choices(recipe: AutoencoderRecipe) -> None:
    """Refuse settings that contradict each other."""
    loss = recipe.loss
    if recipe.latents == "full" and loss.alignment:
        raise SettingsError(f'loss.alignment={loss.alignment}: latents="full" has nothing to align; set it to 0')
    if recipe.decoder_only and recipe.frozen_trunk:
        raise SettingsError("decoder_only and frozen_trunk: decoder_only trains less; set only one of them")
    if recipe.decoder_only and loss.adaptive_alignment:
        raise SettingsError("adaptive_alignment with decoder_only: nothing that the alignment loss moves is trained")
    if loss.lpips_stride is not None and not loss.lpips_stride <= (loss.lpips_patch or 0):
        most = loss.lpips_patch or "not given"
        raise SettingsError(f"lpips_stride={loss.lpips_stride}: allowed are 1 to lpips_patch, which is {most}")


def check_sides(recipe: AutoencoderRecipe, factor: int) -> None:
    """Refuse images, crops and patches that do not fit each other, the networks or the downsample `factor`."""
    from davae.method.discriminator import DISCRIMINATOR_MIN_SIDE
    from davae.method.perceptual import LPIPS_MIN_SIDE

    loss = recipe.loss
    sides = recipe.sides
    least, network = 0, ""
    if loss.adversarial:
        least, network = DISCRIMINATOR_MIN_SIDE, "the discriminator"
    if loss.lpips:
        least, network = LPIPS_MIN_SIDE, "LPIPS"

    # Latents must fit whole pixels, and each network its smallest image.
    if any(side % factor for side in sides):
        raise SettingsError(
            f"size={recipe.size}, bucket_step={recipe.bucket_step}: the pictures' sides are {sides}; "
            f"allowed are multiples of {factor}, the downsample factor"
        )
    if recipe.crop % factor or not least <= recipe.crop <= sides[0]:
        bound = f"from {least}, which {network} needs, " if least else ""
        raise SettingsError(
            f"crop={recipe.crop}: allowed are multiples of {factor}, the downsample factor, "
            f"{bound}up to {sides[0]}, the shortest side of a picture at size={recipe.size}"
        )
    if loss.lpips_patch is not None and not LPIPS_MIN_SIDE <= loss.lpips_patch <= recipe.crop:
        raise SettingsError(f"lpips_patch={loss.lpips_patch}: allowed are {LPIPS_MIN_SIDE} to crop={recipe.crop}")
