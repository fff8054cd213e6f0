"""A start for the detail half without training: principal components in the decoder's metric (docs/method.md 5)."""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from davae.errors import DataError, NumericsError, SettingsError
from davae.models.autoencoder_da import AutoencoderDA
from davae.seeds import generator

LOG_VARIANCE = -6.0
"""Of the code's posterior at the start: deviation 0.05 beside the code's 1."""

Code = Literal["aligned", "unit variance", "residual", "base added", "zero sum"]
"""What the detail latents are at the start. The decoder's map undoes each, so the first four start with one image."""
BASE_CODES: tuple[Code, ...] = ("residual", "base added", "zero sum")
"""Codes that are made with the base latents: they need an AutoencoderDA with `base_in_detail`."""


Affine = tuple[Tensor, Tensor]
"""Weights [out, in] and offsets [out, 1]."""


@torch.no_grad()
def fit_closed_form(
    autoencoder: AutoencoderDA,
    pictures: Tensor,
    *,
    seed: int = 0,
    metric_pictures: int = 24,
    code: Code = "aligned",
    batch_size: int = 8,
) -> dict[str, list[float]]:
    """Set the two linear blocks of an untrained `autoencoder` from images [N, 3, H, W] in [-1, 1], 100 to 200 of them.

    With Zb the base latents and Zf the unshuffled latents of the full image (both in units): Zf ~ A Zb + a, with the
    residual R; M = E[J^T J], J the decoder's Jacobian, from `metric_pictures` images; W = M^(1/2); U = the first k
    eigenvectors of W E[R R^T] W. The code is linear in U^T W Zf (and in Zb, see `Code`). All of it in float64.

    Returns the spectrum of W E[R R^T] W as "eigenvalues", and the part of its trace that is left out as "unexplained".
    """
    components = _count_components(autoencoder, code)
    base, full = _encode_positions(autoencoder, pictures, batch_size)

    # Zf ~ A Zb + a, and the residual R.
    prediction, offset = least_squares(base, full)
    residual = full - prediction @ base - offset

    # W = M^(1/2), and U: the directions of the residual that cost most pixels.
    root, inverse_root = _square_roots(decoder_metric(autoencoder, pictures[:metric_pictures], seed))
    spectrum, vectors = torch.linalg.eigh(root @ (residual @ residual.T / residual.shape[1]) @ root)
    directions = vectors.flip(1)[:, :components]
    encode, decode = directions.T @ root, inverse_root @ directions  # U^T W and W^-1 U

    # The code: coordinates of the residual with base latents in them, or of the full latents.
    if code in BASE_CODES:
        coordinates = _spread_components(code, encode @ residual, len(base), autoencoder.config.detail_channels)
        maps = _map_residual(prediction, offset, encode, decode, coordinates, add_base=code != "residual")
    else:
        maps = _map_full_latents(prediction, offset, encode, decode, encode @ full, base if code == "aligned" else None)
    _set_linear_blocks(autoencoder, *maps)

    eigenvalues = spectrum.flip(0).clamp_min(0)
    unexplained = (eigenvalues[components:].sum() / eigenvalues.sum()).item()
    return {"eigenvalues": eigenvalues.tolist(), "unexplained": [unexplained]}


def least_squares(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A and a of target ~ A source + a; rows are channels, columns positions."""
    source_mean, target_mean = source.mean(dim=1, keepdim=True), target.mean(dim=1, keepdim=True)
    centred = source - source_mean
    gram = centred @ centred.T
    # A small ridge, for channels that depend on each other.
    gram += 1e-9 * gram.diagonal().mean() * torch.eye(len(gram)).double()
    weights = torch.linalg.solve(gram, centred @ (target - target_mean).T).T
    return weights, target_mean - weights @ source_mean


def decoder_metric(autoencoder: AutoencoderDA, pictures: Tensor, seed: int) -> Tensor:
    """M = E[J^T J], [s^2 C, s^2 C] in float64, over the positions of images [N, 3, H, W] in [-1, 1].

    J is the decoder's Jacobian, so M says what an error of the unshuffled latents costs in pixels. Two random +-1
    images v for each image estimate it: one backward pass gives g = J^T v, whose g g^T are averaged.
    """
    metric, count = torch.zeros(()).double(), 0
    for index, picture in enumerate(pictures.split(1)):
        latents = autoencoder.encode_pretrained(picture.to(autoencoder.device, autoencoder.dtype)).detach()
        for probe in range(2):
            signs = torch.randint(2, picture.shape, generator=generator(seed, "metric probe", index, probe))
            with torch.enable_grad():
                latents.requires_grad_(True)
                pixels = autoencoder.decode_full(latents)
                (gradient,) = torch.autograd.grad(pixels, latents, (signs * 2.0 - 1.0).to(pixels))

            columns = _to_columns(F.pixel_unshuffle(gradient, autoencoder.config.resolution_factor))
            metric, count = metric + columns @ columns.T, count + columns.shape[1]
    return metric / count


def _count_components(autoencoder: AutoencoderDA, code: Code) -> int:
    """How many principal components the code holds; refuses a code that this autoencoder cannot have."""
    detail_channels, base_channels = autoencoder.config.detail_channels, autoencoder.config.base_channels
    if not autoencoder.config.linear_blocks:
        raise SettingsError("fit_closed_form needs an AutoencoderDA made with linear_blocks=True.")
    if code != "unit variance" and not base_channels:
        raise SettingsError(f'code={code!r}: all are new, and this code needs base latents; give code="unit variance".')
    most = autoencoder.detail_downsample.shortcut.in_channels  # channels of the unshuffled latents, s^2 C
    if detail_channels > most:
        raise SettingsError(f"detail_channels={detail_channels}: the full latents have {most}; give at most so many.")

    if code in BASE_CODES and not autoencoder.config.base_in_detail:
        raise SettingsError(f"code={code!r} needs an AutoencoderDA made with base_in_detail=True.")

    # One component of each group is left to the base latent.
    if code != "zero sum":
        return detail_channels
    if detail_channels == base_channels:
        raise SettingsError(f"code={code!r} has 0 components: give detail_channels from {2 * base_channels}.")
    return detail_channels - base_channels


def _encode_positions(autoencoder: AutoencoderDA, pictures: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Zb, [C, positions], and Zf, the full image's latents unshuffled onto the base grid, [s^2 C, positions]."""
    base_parts, full_parts = [], []
    for batch in pictures.split(batch_size):
        batch = batch.to(autoencoder.device, autoencoder.dtype)
        full = F.pixel_unshuffle(autoencoder.encode_pretrained(batch), autoencoder.config.resolution_factor)
        base_parts.append(_to_columns(autoencoder.encode_base(batch)))
        full_parts.append(_to_columns(full))

    base, full = torch.cat(base_parts, dim=1), torch.cat(full_parts, dim=1)
    if full.shape[1] < 4 * len(full):
        raise DataError(
            f"{full.shape[1]} latent positions, {4 * len(full)} are needed: give more (fit_pictures) or larger images."
        )
    if not full.isfinite().all():
        raise NumericsError("latents of the images are not finite: the base autoencoder or an image is damaged.")
    return base, full


def _to_columns(latents: Tensor) -> Tensor:
    return rearrange(latents.double().cpu(), "b c h w -> c (b h w)")


def _square_roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """M^(1/2) and its inverse, finite even in directions that cost no pixels."""
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp_min(1e-6 * values.max()).sqrt()
    return vectors * values @ vectors.T, vectors / values @ vectors.T


def _map_full_latents(
    prediction: Tensor, offset: Tensor, encode: Tensor, decode: Tensor, code: Tensor, base: Tensor | None
) -> tuple[Affine, Tensor, Affine]:
    """z_d = S (U^T W Zf - mean), turned towards `base` if it is given; of unit variance otherwise.

    Zf^ = (I - W^-1 U U^T W)(A Zb + a) + W^-1 U (S^-1 z_d + mean).
    """
    mean = code.mean(dim=1, keepdim=True)
    coordinates = torch.diag(1 / code.std(dim=1, correction=0)) if base is None else _align(code - mean, base)

    # Outside of U, the base latents predict the full ones.
    keep = torch.eye(len(decode)).double() - decode @ encode
    back = decode @ torch.linalg.inv(coordinates)
    encoder = coordinates @ encode, -coordinates @ mean
    decoder = torch.cat([keep @ prediction, back], dim=1), keep @ offset + decode @ mean
    return encoder, torch.zeros(len(encode), prediction.shape[1]).double(), decoder


def _map_residual(
    prediction: Tensor, offset: Tensor, encode: Tensor, decode: Tensor, coordinates: Tensor, *, add_base: bool
) -> tuple[Affine, Tensor, Affine]:
    """z_d = S U^T W (Zf - A Zb - a) + Zb in each of its r channels; Zf^ = A Zb + a + W^-1 U S^+ (z_d - Zb).

    Without `add_base` there is no Zb in z_d.
    """
    channels = prediction.shape[1]
    repeat = torch.eye(channels).double().repeat_interleave(len(coordinates) // channels, dim=0)
    if not add_base:
        repeat = torch.zeros_like(repeat)

    # The encoder sees A Zb in Zf, so the base path takes it away again.
    weights, back = coordinates @ encode, decode @ torch.linalg.pinv(coordinates)
    decoder = torch.cat([prediction - back @ repeat, back], dim=1), offset
    return (weights, -weights @ offset), repeat - weights @ prediction, decoder


def _align(code: Tensor, base: Tensor) -> Tensor:
    """The rotation that brings a centred code [D, N] nearest to the base latents [C, N], each repeated; over its rms.

    An orthogonal Procrustes problem; for D = C the distance is the alignment loss.
    """
    target = (base - base.mean(dim=1, keepdim=True)).repeat_interleave(len(code) // len(base), dim=0)
    left, _, right = torch.linalg.svd(target @ code.T)
    return left @ right / code.square().mean().sqrt()


def _spread_components(code: Code, components: Tensor, base_channels: int, detail_channels: int) -> Tensor:
    """S, [D, k]: components [k, N] of mean zero onto the D channels, the mean variance of their part 1."""
    scale = torch.diag(1 / components.std(dim=1, correction=0))
    if code != "zero sum":
        return scale

    # An orthonormal basis of the vectors of length r that sum to zero: all but the first, constant column.
    ratio = detail_channels // base_channels
    constant_first = torch.cat([torch.ones(ratio, 1), torch.eye(ratio)[:, 1:]], dim=1).double()
    basis = torch.linalg.qr(constant_first)[0][:, 1:]
    return (ratio / (ratio - 1)) ** 0.5 * torch.block_diag(*[basis] * base_channels) @ scale


def _set_linear_blocks(autoencoder: AutoencoderDA, encoder: Affine, base: Tensor, decoder: Affine) -> None:
    """Write the maps into the 1x1 shortcuts: full latents to code, base latents to code, and both to full latents."""
    down, up, channels = autoencoder.detail_downsample, autoencoder.detail_upsample, len(base)
    for convolution in (down.conv, up.conv, down.shortcut):
        convolution.weight.zero_()
        convolution.bias.zero_()

    # Mean and log-variance come out of one convolution.
    down.shortcut.weight[:channels, :, 0, 0], down.shortcut.bias[:channels] = encoder[0], encoder[1][:, 0]
    down.shortcut.bias[channels:] = LOG_VARIANCE
    up.shortcut.weight[:, :, 0, 0], up.shortcut.bias[:] = decoder[0], decoder[1][:, 0]
    if autoencoder.detail_from_base is not None:
        autoencoder.detail_from_base.weight[:, :, 0, 0] = base
