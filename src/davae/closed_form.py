"""A start for the detail half without training: least squares and principal components in the decoder's metric.

The pretrained autoencoder already knows how to encode the full picture: its full-size latents, unshuffled onto the
base grid, are 4 C channels. The base latents predict part of them; the rest is projected on the D directions that cost
the decoder most pixels. Encoder and decoder maps are the two 1x1 shortcuts of `AutoencoderDA` (METHOD section 10).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from davae.autoencoder_da import AutoencoderDA
from davae.errors import DataError, NumericsError, SettingsError
from davae.seeds import generator

LOG_VARIANCE = -6.0
"""Of the code's posterior at the start: deviation 0.05 beside the code's 1."""
PROBES = 2


@torch.no_grad()
def fit_closed_form(
    autoencoder: AutoencoderDA,
    pictures: Tensor,
    *,
    seed: int = 0,
    metric_pictures: int = 24,
    aligned: bool = True,
    batch_size: int = 8,
) -> dict[str, list[float]]:
    """Set the two linear blocks of an untrained `autoencoder` from `pictures`, [N, 3, H, W] in [-1, 1], 100 to 200.

    With Zb the base latents and Zf the unshuffled latents of the full picture (both in units):
    Zf ~ A Zb + a; R = Zf - A Zb - a; M = E[J^T J], J the decoder's Jacobian; W = M^(1/2);
    U = the first D eigenvectors of W E[R R^T] W. The code is z_d = S (U^T W Zf - mean), see `aligned` for S,
    and the decoder reads Zf^ = (I - W^-1 U U^T W)(A Zb + a) + W^-1 U (S^-1 z_d + mean). All of it in float64.

    Args:
        autoencoder: from `AutoencoderDA.from_base(..., linear_blocks=True)`; changed in place.
        pictures: the training pictures that are fitted.
        seed: of the probes of the metric.
        metric_pictures: how many of the pictures the decoder's metric is measured on, with two probes each.
        aligned: turn the code to where its channels are nearest to their group's base latents, and scale it as a
            whole, so that distances in it are distances in pixels; otherwise every component has unit variance.
        batch_size: pictures at a time.

    Returns:
        The spectrum of W E[R R^T] W as "eigenvalues", and "unexplained": the part of its trace that D leaves out.

    Raises:
        SettingsError: the autoencoder has no linear blocks, or more detail channels than the code can have, 4 C;
            `aligned`, and it has no base latents (all new: the code is then of Zf itself).
        DataError: fewer positions than four for each channel of the full latents.
        NumericsError: latents that are not finite.
    """
    if not autoencoder.config.linear_blocks:
        raise SettingsError("fit_closed_form needs an AutoencoderDA made with linear_blocks=True.")
    detail_channels, most = autoencoder.config.detail_channels, autoencoder.detail_downsample.shortcut.in_channels
    if aligned and not autoencoder.config.base_channels:
        raise SettingsError("all latents of this autoencoder are new: there are no base latents to align the code to.")
    if detail_channels > most:
        raise SettingsError(f"detail_channels={detail_channels}: the full latents have but {most}; give at most these.")
    base, full = _latents(autoencoder, pictures, batch_size)
    prediction, offset = _least_squares(base, full)
    residual = full - prediction @ base - offset
    root, inverse = _roots(decoder_metric(autoencoder, pictures[:metric_pictures], seed))
    spectrum, vectors = torch.linalg.eigh(root @ (residual @ residual.T / residual.shape[1]) @ root)
    directions = vectors.flip(1)[:, :detail_channels]

    encode, project = directions.T @ root, inverse @ directions
    keep = torch.eye(len(full)).double() - project @ encode
    code = encode @ full
    mean = code.mean(dim=1, keepdim=True)
    coordinates = _aligned_coordinates(code - mean, base) if aligned else torch.diag(1 / code.std(dim=1, correction=0))
    back = project @ torch.linalg.inv(coordinates)
    _set_linear_blocks(
        autoencoder,
        encoder_map=(coordinates @ encode, -coordinates @ mean),
        decoder_map=(torch.cat([keep @ prediction, back], dim=1), keep @ offset + project @ mean),
    )
    eigenvalues = spectrum.flip(0).clamp_min(0)
    unexplained = (eigenvalues[detail_channels:].sum() / eigenvalues.sum()).item()
    return {"eigenvalues": eigenvalues.tolist(), "unexplained": [unexplained]}


def _latents(autoencoder: AutoencoderDA, pictures: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Base latents [C, positions] and unshuffled full latents [4 C, positions], float64."""
    rows = []
    for batch in pictures.split(batch_size):
        batch = batch.to(autoencoder.device, autoencoder.dtype)
        full = F.pixel_unshuffle(autoencoder.encode_pretrained(batch), 2)
        rows.append((_positions(autoencoder.encode_base(batch)), _positions(full)))
    base, full = (torch.cat(parts, dim=1) for parts in zip(*rows, strict=True))
    if full.shape[1] < 4 * len(full):
        raise DataError(f"{full.shape[1]} latent positions, {4 * len(full)} are needed: give more or larger pictures.")
    if not full.isfinite().all():
        raise NumericsError("latents of the pictures are not finite: the base autoencoder is damaged, or they are.")
    return base, full


def _set_linear_blocks(
    autoencoder: AutoencoderDA, encoder_map: tuple[Tensor, Tensor], decoder_map: tuple[Tensor, Tensor]
) -> None:
    """Weight and bias of full latents -> code, and of base latents and code -> full latents; the 3x3 paths are zero."""
    down, up, channels = autoencoder.detail_downsample, autoencoder.detail_upsample, len(encoder_map[0])
    for convolution in (down.conv, up.conv, down.shortcut):
        convolution.weight.zero_()
        convolution.bias.zero_()
    down.shortcut.weight[:channels, :, 0, 0], down.shortcut.bias[:channels] = encoder_map[0], encoder_map[1][:, 0]
    down.shortcut.bias[channels:] = LOG_VARIANCE
    up.shortcut.weight[:, :, 0, 0], up.shortcut.bias[:] = decoder_map[0], decoder_map[1][:, 0]


def _aligned_coordinates(code: Tensor, base: Tensor) -> Tensor:
    """The rotation of a centred code [D, N] nearest to the base latents [C, N], each repeated; over its rms.

    An orthogonal Procrustes problem. With one channel to a group (D = C) the distance is the alignment loss; with more
    of them it also holds the channels of a group together, so a rotation of smaller alignment loss may exist.
    """
    target = (base - base.mean(dim=1, keepdim=True)).repeat_interleave(len(code) // len(base), dim=0)
    left, _, right = torch.linalg.svd(target @ code.T)
    return left @ right / code.square().mean().sqrt()


def _positions(latents: Tensor) -> Tensor:
    return latents.double().cpu().transpose(0, 1).flatten(1)


def _least_squares(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A and a of target ~ A source + a; rows are channels, columns positions."""
    source_mean, target_mean = source.mean(dim=1, keepdim=True), target.mean(dim=1, keepdim=True)
    centred = source - source_mean
    gram = centred @ centred.T
    gram += 1e-9 * gram.diagonal().mean() * torch.eye(len(gram)).double()
    weights = torch.linalg.solve(gram, centred @ (target - target_mean).T).T
    return weights, target_mean - weights @ source_mean


def decoder_metric(autoencoder: AutoencoderDA, pictures: Tensor, seed: int) -> Tensor:
    """M = E[J^T J], [4C, 4C] in float64, over the positions of `pictures` [N, 3, H, W] in [-1, 1].

    What an error of the unshuffled latents, in units, costs in pixels: J is the decoder's Jacobian, and J^T J is
    estimated from two random +-1 pictures v for each picture, whose g = J^T v one backward pass gives.
    """
    metric, count = torch.zeros(()).double(), 0
    for index, picture in enumerate(pictures.split(1)):
        latents = autoencoder.encode_pretrained(picture.to(autoencoder.device, autoencoder.dtype)).detach()
        for probe in range(PROBES):
            signs = torch.randint(2, picture.shape, generator=generator(seed, "metric probe", index, probe))
            with torch.enable_grad():
                latents.requires_grad_(True)
                pixels = autoencoder.decode_full(latents)
                (gradient,) = torch.autograd.grad(pixels, latents, (signs * 2.0 - 1.0).to(pixels))
            columns = _positions(F.pixel_unshuffle(gradient, 2))
            metric, count = metric + columns @ columns.T, count + columns.shape[1]
    return metric / count


def _roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """M^(1/2) and its inverse, eigenvalues floored at 1e-6 of the largest."""
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp_min(1e-6 * values.max()).sqrt()
    return vectors * values @ vectors.T, vectors / values @ vectors.T
