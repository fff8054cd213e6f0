"""A start for a slim joint decoder without training: some of the full one's channels, each layer by least squares.

No start of a narrower decoder is exact. This one takes one layer at a time, from the latents outwards. The target of
a slim layer is a choice of the full layer's channels, those from which the others are predicted best. Its input is the
output of the slim layers before it for the same images, errors included, so that the fit corrects them where it can
(arXiv 1707.06168 prunes so). Channels are chosen by whole groups of the next norm, which then has the same statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from einops import rearrange
from torch import Tensor, nn

from davae.errors import NumericsError, SettingsError
from davae.method.closed_form import least_squares
from davae.models.autoencoder_da import AutoencoderDA
from davae.seeds import generator


@torch.no_grad()
def slimmed(
    autoencoder: AutoencoderDA, block_out_channels: Sequence[int] = (), layers_per_block: Sequence[int] = ()
) -> AutoencoderDA:
    """An AutoencoderDA of the same encoders, latents and statistics, its joint decoder narrower and not trained.

    Weights that both decoders have in the same shape are copied, the rest is random until `fit_slim_decoder`. The
    settings are diffusers', the outermost stage first; () for the base's.
    """
    # `_use_default_values` names the arguments that were left out: `from_config` would ignore what is given for them.
    config = dict(autoencoder.config)
    config.pop("_use_default_values", None)
    for name in ("decoder_block_out_channels", "decoder_layers_per_block"):
        if config[name] is not None:
            raise ValueError(
                f"the joint decoder is slim already, {name}={list(config[name])}: start from one with the full decoder"
            )
    config["decoder_block_out_channels"] = block_out_channels or None
    config["decoder_layers_per_block"] = layers_per_block or None
    slim = type(autoencoder).from_config(config)
    nn.Module.to(slim, dtype=autoencoder.dtype, device=autoencoder.device)

    # Encoders, statistics, and the decoder's layers that kept their shapes.
    weights = slim.state_dict()
    for name, weight in autoencoder.state_dict().items():
        if name in weights and weight.shape == weights[name].shape:
            weights[name] = weight
    slim.load_state_dict(weights)
    return slim.train(autoencoder.training)


@torch.no_grad()
def fit_slim_decoder(slim: AutoencoderDA, full: AutoencoderDA, pictures: Tensor, *, seed: int = 0) -> float:
    """Set the joint decoder of `slim`, which `slimmed` made of `full`, from dozens of images [N, 3, H, W].

    Inner stages that both have in the same shapes are copies already, and stay. One layer's output for all images is
    in memory at a time. Returns the mean squared difference of the two decoders' images in [-1, 1].
    """
    slim_decoder: Decoder = slim.joint_decoder
    full_decoder: Decoder = full.joint_decoder
    inner, full_inner = slim_decoder.mid_block.resnets[0].norm1, full_decoder.mid_block.resnets[0].norm1
    if not isinstance(slim_decoder.conv_in, nn.Conv2d) and inner.num_channels != full_inner.num_channels:
        raise SettingsError(
            "decoder_block_out_channels: the innermost stage is narrower than the base's, and without linear blocks "
            'nothing can be fitted to that. Keep its width, or use start="closed form"'
        )

    # What the full decoder reads for these images.
    inputs: list[Tensor] = []
    hook = full_decoder.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    for batch in pictures.split(8):
        full.decode(full.encode(batch.to(full.device, full.dtype)).latent_dist.mode())
    hook.remove()
    hidden = torch.cat(inputs)

    front = _Front(hidden, hidden, torch.arange(hidden.shape[1]), seed)
    _fit_decoder(front, slim_decoder, full_decoder)
    error = (front.slim - front.full).double().square().mean()
    if not error.isfinite():
        raise NumericsError("the decoders' images are not finite: the autoencoder is damaged")
    return error.item()


@dataclass
class _Front:
    """How far the fit has come: both decoders' outputs of the last layer that is done."""

    slim: Tensor
    full: Tensor
    chosen: Tensor
    """The channels of `full` that the channels of `slim` stand for."""
    seed: int

    @property
    def exact(self) -> bool:
        """Whether all layers so far are copies."""
        return torch.equal(self.slim, self.full)


def _fit_decoder(front: _Front, slim: Decoder, full: Decoder) -> None:
    if isinstance(slim.conv_in, nn.Conv2d):
        _fit_convolution(front, slim.conv_in, full.conv_in, groups=full.mid_block.resnets[0].norm1.num_groups)

    # The middle: a residual block, then pairs of attention and residual block.
    _fit_resnet(front, slim.mid_block.resnets[0], [full.mid_block.resnets[0]], front.full)
    for place, (ours, theirs) in enumerate(zip(slim.mid_block.attentions, full.mid_block.attentions, strict=True), 1):
        if not front.exact:  # its queries and keys are of all channels: it starts without effect
            ours.to_out[0].weight.zero_()
            ours.to_out[0].bias.zero_()
        front.slim, front.full = ours(front.slim), theirs(front.full)
        _fit_resnet(front, slim.mid_block.resnets[place], [full.mid_block.resnets[place]], front.full)

    # The stages, from the inner one outwards.
    for ours, theirs in zip(slim.up_blocks, full.up_blocks, strict=True):
        stage_end = front.full
        for resnet in theirs.resnets:
            stage_end = resnet(stage_end, None)

        # The last residual block of a shorter stage stands for all that the full stage has left.
        last = len(ours.resnets) - 1
        for place, resnet in enumerate(ours.resnets):
            blocks = theirs.resnets[place:] if place == last else theirs.resnets[place : place + 1]
            _fit_resnet(front, resnet, list(blocks), stage_end)

        for our_upsampler, their_upsampler in zip(ours.upsamplers or (), theirs.upsamplers or (), strict=True):
            front.slim = F.interpolate(front.slim, scale_factor=2.0)
            front.full = F.interpolate(front.full, scale_factor=2.0)
            _fit_convolution(front, our_upsampler.conv, their_upsampler.conv, groups=full.conv_norm_out.num_groups)

    # To pixels.
    _copy_norm(slim.conv_norm_out, full.conv_norm_out, front.chosen)
    front.slim = slim.conv_act(slim.conv_norm_out(front.slim))
    front.full = full.conv_act(full.conv_norm_out(front.full))
    _fit_convolution(front, slim.conv_out, full.conv_out, groups=1)


def _fit_convolution(front: _Front, slim: nn.Conv2d, full: nn.Conv2d, *, groups: int) -> None:
    """One layer alone, to the channels of `full` that predict the others best."""
    target = full(front.full)
    copied = front.exact and slim.weight.shape == full.weight.shape
    front.chosen = _choose_channels(target, slim.out_channels, groups)
    if not copied:
        _fit_weights([slim], [front.slim], target[:, front.chosen], front.seed)
    front.slim, front.full = slim(front.slim), target


def _fit_resnet(front: _Front, slim: ResnetBlock2D, full: Sequence[ResnetBlock2D], stage_end: Tensor) -> None:
    """One residual block for one or several; `stage_end` is the full decoder's output of its stage."""
    first, target = full[0], front.full
    for block in full:
        target = block(target, None)

    same_width = slim.conv1.weight.shape == first.conv1.weight.shape
    if front.exact and same_width and slim.conv2.weight.shape == first.conv2.weight.shape and len(full) == 1:  # a copy
        front.chosen = torch.arange(slim.conv2.out_channels)
        front.slim, front.full = slim(front.slim, None), target
        return

    # First half: norm1, activation and conv1, to the inner channels that norm2 keeps.
    hidden = first.conv1(first.nonlinearity(first.norm1(front.full)))
    features = first.nonlinearity(first.norm2(hidden))
    inner = _choose_channels(features, slim.conv1.out_channels, first.norm2.num_groups)
    _copy_norm(slim.norm1, first.norm1, front.chosen)
    _copy_norm(slim.norm2, first.norm2, inner)
    before = slim.nonlinearity(slim.norm1(front.slim))
    _fit_weights([slim.conv1], [before], hidden[:, inner], front.seed)

    # Second half: conv2 and the shortcut together, to the channels of the stage's end where they change.
    if first.conv_shortcut is not None or len(front.chosen) != slim.conv2.out_channels:
        front.chosen = _choose_channels(stage_end, slim.conv2.out_channels, first.norm2.num_groups)
    behind = slim.nonlinearity(slim.norm2(slim.conv1(before)))
    goal = target[:, front.chosen] * slim.output_scale_factor
    if slim.conv_shortcut is None:
        _fit_weights([slim.conv2], [behind], goal - front.slim, front.seed)
    else:
        _fit_weights([slim.conv2, slim.conv_shortcut], [behind, front.slim], goal, front.seed)
    front.slim, front.full = slim(front.slim, None), target


def _copy_norm(slim: nn.GroupNorm, full: nn.GroupNorm, chosen: Tensor) -> None:
    slim.weight.copy_(full.weight[chosen])
    slim.bias.copy_(full.bias[chosen])


def _choose_channels(values: Tensor, count: int, groups: int) -> Tensor:
    """Indices, rising, of `count` channels of [N, C, h, w] that predict the others well: whole groups of a norm.

    A Cholesky decomposition of their covariance with pivots: the next group is the one that is known least so far.
    """
    channels = values.shape[1]
    if count == channels:
        return torch.arange(channels)

    covariance = torch.cov(rearrange(values.double(), "n c h w -> c (n h w)"))
    members = torch.arange(channels).unflatten(0, (groups, -1))
    chosen: list[int] = []
    for _ in range(count * groups // channels):
        unknown = covariance.diagonal().unflatten(0, (groups, -1)).sum(dim=1)
        unknown[chosen] = -torch.inf
        chosen.append(int(unknown.argmax()))

        # What the chosen group explains of the others is known now.
        group = members[chosen[-1]]
        explained = torch.linalg.pinv(covariance[group][:, group], hermitian=True)
        covariance = covariance - covariance[:, group] @ explained @ covariance[group]
    return members[chosen].flatten().sort().values


def _fit_weights(convolutions: list[nn.Conv2d], sources: list[Tensor], target: Tensor, seed: int) -> None:
    """Least squares for convolutions of `sources` whose sum is to be `target`; the first one has the bias."""
    # Some positions of each image are enough for a fit: 16 in all for each unknown.
    number, _, height, width = target.shape
    sizes = [conv.weight[0].numel() for conv in convolutions]
    each = min(height * width, -(-16 * sum(sizes) // number))
    positions = torch.randperm(height * width, generator=generator(seed, "positions"))[:each]

    pairs = zip(sources, convolutions, strict=True)
    rows = torch.cat([_read_patches(source, conv.kernel_size[0], positions) for source, conv in pairs])
    goal = rearrange(target.flatten(2)[:, :, positions].double(), "n c p -> c (n p)")
    weights, bias = least_squares(rows, goal)

    for conv, part in zip(convolutions, weights.split(sizes, dim=1), strict=True):
        assert conv.bias is not None, "a decoder's convolutions have biases"
        conv.weight.copy_(part.unflatten(1, conv.weight.shape[1:]))
        conv.bias.copy_(bias[:, 0] if conv is convolutions[0] else torch.zeros_like(conv.bias))


def _read_patches(source: Tensor, side: int, positions: Tensor) -> Tensor:
    """What a convolution of `side` reads at positions of each image, [channels x side^2, N x positions]."""
    width, padded = source.shape[3], F.pad(source, [side // 2] * 4)
    windows = padded.unfold(2, side, 1).unfold(3, side, 1)  # a view, [N, C, h, w, side, side]
    patches = windows[:, :, positions // width, positions % width]
    return rearrange(patches.double(), "n c p y x -> (c y x) (n p)")
