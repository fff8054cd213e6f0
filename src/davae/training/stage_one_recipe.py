"""What decides a run of stage 1, and which of it fits together."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from davae.errors import SettingsError
from davae.method.closed_form import Code
from davae.method.discriminator import DISCRIMINATOR_MIN_SIDE
from davae.method.perceptual import LPIPS_MIN_SIDE
from davae.method.stage_one_loss import StageOneSettings
from davae.run.recipe import Recipe
from davae.training.recipes import Decay, NotNegative, PicturesRecipe, Positive, Weight


class LossWeights(Recipe):
    """Weights of stage 1's loss (METHOD section 4, Table S1)."""

    l1: Weight = 1.0
    gradient: Weight = 0.0
    """Of the L1 between finite differences; not in the paper."""
    lpips: Weight = 1.0
    kl: Weight = 1e-6
    kl_reduction: Literal["mean", "sum"] = "mean"
    """"mean" over elements without 1/2 (the ImageNet set-up), or "sum" with 1/2, averaged over the batch (SD3)."""
    alignment: Weight = 0.5
    adversarial: Weight = 0.0
    """Of the PatchGAN's hinge loss; 0 trains no discriminator."""
    adversarial_start: NotNegative = 0
    """The first step with a discriminator; before it, none is trained and the loss is without it."""
    adversarial_ramp_steps: NotNegative = 0
    """Over so many steps from the start the decoder's weight rises linearly; the discriminator's steps are whole."""
    adaptive_adversarial: bool = False
    """Times |g of the reconstruction loss| / |g of this one| at the decoder's last convolution, up to 1e4."""
    adaptive_alignment: bool = False
    """Times |g of the reconstruction loss| / |g of this one| at the detail encoder's last 3x3 layer, up to 1e8."""
    lpips_weights: str = ""
    """File of VGG16 weights that recipes/small_pair/build_lpips.py writes; "" is the shipped AlexNet. Held-out numbers
    are AlexNet's in any case."""
    lpips_patch: Positive | None = None
    """Side of LPIPS's patches in pixels (the SD3 set-up: 256); without it, the whole crop at once."""
    lpips_stride: Positive | None = None
    """Pixels from one patch to the next; half a patch if not given."""
    discriminator_learning_rate: Weight = 1e-4
    """Constant; the discriminator's other settings are the autoencoder's."""


class AutoencoderRecipe(PicturesRecipe):
    """Everything that decides a run of stage 1."""

    section: ClassVar[str] = "autoencoder"

    base: str = ""
    """Folder or Hub name of the base pipeline, or folder of a bare autoencoder; "" is the shipped pipeline."""
    resolution_factor: Literal[2, 4] = 2
    """s: the base sees the picture at 1/s of its size. 4 wants `detail_channels` in multiples of 8."""
    detail_channels: Positive = 16
    latents: Literal["detail", "full"] = "detail"
    """"detail" beside base latents; or "full": all `detail_channels` latents are new and none is the base's, as in the
    reference's mode of that name. There is nothing to align then, and no transformer to start from."""
    base_downsample: Literal["bicubic", "bicubic-antialias", "bicubic-unclamped"] = "bicubic-antialias"
    start: Literal["closed form", "random"] = "closed form"
    """Of the two new blocks: least squares in the decoder's metric (METHOD section 10), or random as in the paper."""
    autoencoder: str = ""
    """Folder of an AutoencoderDA, or of an adapter, to go on from instead; "" starts anew. `base` may then be left out,
    where it is the shipped one or the folder is no adapter."""
    frozen_trunk: bool = False
    """Keep the detail encoder but for its last block: only the two new blocks and the joint decoder train."""
    decoder_only: bool = False
    """Train the joint decoder and its first block only, on samples of the detail latents as ever. With `autoencoder`
    its latent statistics stay, too: a transformer that was trained on its latents goes on to fit."""
    decoder_block_out_channels: tuple[Positive, ...] = ()
    """Widths of a slim joint decoder's stages, the outermost first; () is as in the base, or as in `autoencoder`. It
    starts from the full one, layer by layer (`davae.method.slim_start`). See docs/slim_decoder.md."""
    decoder_layers_per_block: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Residual blocks of each of them less one; () likewise."""
    target: Literal["picture", "base reconstruction"] = "picture"
    """What the reconstruction is compared with: the crop, or what the base autoencoder at full size makes of it."""
    code: Code = "aligned"
    """Of the closed-form start: what the detail latents are at first, see `davae.method.closed_form.Code`."""
    fit_pictures: Positive = 128
    """How many pictures the closed-form start is fitted on."""
    crop: Positive = 128
    """Side of the training crops in pixels, square in all buckets."""
    batch_size: Positive = 8
    latent_noise: Weight = 0.0
    """Noise on what the joint decoder reads, so that it forgives a transformer's small errors: of deviation |N(0, 1)|
    times this for each picture, in each latent channel's own deviations. Not in the paper; RAE, arXiv 2510.11690."""
    detail_dropout: Decay = 0.0
    """How often a picture's detail latents are zero for the joint decoder; the other losses see them undropped."""
    inverted_dropout: bool = False
    """Divide those that are not dropped by 1 - `detail_dropout`, as the reference code does."""
    evaluate_every: Positive = 500
    calibration_pictures: Positive = 512
    """How many pictures the latent statistics are measured on at the end."""
    heldout_pictures: Positive = 32
    """How many held-out pictures the periodic numbers stand on."""
    loss: LossWeights = LossWeights()


TERMS = ("l1", "gradient", "lpips", "kl", "alignment", "adversarial")
"""The terms of stage 1's loss that have a weight in a recipe."""


def loss_settings(recipe: AutoencoderRecipe) -> StageOneSettings:
    """The settings of `stage_one_loss` that a recipe decides."""
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
    """Refuse settings that contradict each other.

    Raises:
        SettingsError: with the two of them.
    """
    loss = recipe.loss
    if recipe.latents == "full" and loss.alignment:
        raise SettingsError(f'loss.alignment={loss.alignment}: with latents="full" none is aligned; set it to 0')
    if recipe.decoder_only and recipe.frozen_trunk:
        raise SettingsError("decoder_only and frozen_trunk: decoder_only trains less; set only one of them")
    if recipe.decoder_only and loss.adaptive_alignment:
        raise SettingsError("adaptive_alignment with decoder_only: nothing that the alignment loss moves is trained")
    if loss.lpips_stride is not None and not loss.lpips_stride <= (loss.lpips_patch or 0):
        most = loss.lpips_patch or "not given"
        raise SettingsError(f"lpips_stride={loss.lpips_stride}: allowed are 1 to lpips_patch, which is {most}")


def check_sides(recipe: AutoencoderRecipe, factor: int) -> None:
    """Refuse pictures, crops and patches that do not fit each other, the networks or the downsample `factor`.

    Raises:
        SettingsError: with the side, and what is allowed.
    """
    loss = recipe.loss
    needs = [(LPIPS_MIN_SIDE, "LPIPS")] if loss.lpips else []
    needs += [(DISCRIMINATOR_MIN_SIDE, "the discriminator")] if loss.adversarial else []
    least, who = max(needs, default=(0, ""))
    sides = recipe.sides
    if any(side % factor for side in sides):
        raise SettingsError(
            f"size={recipe.size}, bucket_step={recipe.bucket_step}: the pictures' sides are {sides}; "
            f"allowed are multiples of {factor}, the downsample factor"
        )
    if recipe.crop % factor or not least <= recipe.crop <= sides[0]:
        bound = f"from {least}, which {who} needs, " if least else ""
        raise SettingsError(
            f"crop={recipe.crop}: allowed are multiples of {factor}, the downsample factor, "
            f"{bound}up to {sides[0]}, the shortest side of a picture at size={recipe.size}"
        )
    if loss.lpips_patch is not None and not LPIPS_MIN_SIDE <= loss.lpips_patch <= recipe.crop:
        raise SettingsError(f"lpips_patch={loss.lpips_patch}: allowed are {LPIPS_MIN_SIDE} to crop={recipe.crop}")
