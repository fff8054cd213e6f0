"""What measured numbers say, in words."""

import math
from collections.abc import Mapping, Sequence

# Shares of the way from the enlarged base to the base at full size, in dB of PSNR.
MOST, SOME = 0.7, 0.3
# A base's own autoencoder at full size: above these LPIPS, or below these dB, it cannot render images, or not well.
CANNOT, LOSES = (20.0, 0.25), (26.0, 0.1)


def judge_base(psnr: float, lpips: float) -> tuple[str, bool]:
    """How well a base's own autoencoder renders images at full size, and whether that will do."""
    if psnr < CANNOT[0] or lpips > CANNOT[1]:
        return "cannot render these images", False
    if psnr < LOSES[0] or lpips > LOSES[1]:
        return "renders these images with losses that the upgrade cannot mend", True
    return "renders these images well", True


def judge_reconstruction(values: Mapping[str, Mapping[str, float]], count: int) -> str:
    """The upgrade's autoencoder between the base at the same tokens and the base at full size."""
    enlarged, upgrade, full = (values[name]["psnr"] for name in ("enlarged", "upgrade", "full size"))
    gain, left = upgrade - enlarged, full - upgrade
    share = gain / (full - enlarged) if full > enlarged else math.copysign(1, gain)

    # The verdict comes first, the numbers after it.
    if not judge_base(full, values["full size"]["lpips"])[1]:
        verdict = "The base's own autoencoder cannot render these images, at full size either"
    elif gain <= 0:
        verdict = "The autoencoder renders no detail yet: train stage 1 longer"
    elif share >= MOST:
        verdict = "The autoencoder renders most of the detail"
    elif share >= SOME:
        verdict = "The autoencoder renders part of the detail; more steps of stage 1 may help"
    else:
        verdict = "The autoencoder renders little of the detail: train stage 1 longer"
    distance = f"{left:.2f} dB below" if left >= 0 else f"{-left:.2f} dB above"
    return (
        f"{verdict}. {upgrade:.2f} dB on {count} held-out images at the same number of tokens: {gain:+.2f} dB over the "
        f"enlarged base, {distance} the base at full size, which takes more tokens."
    )


def judge_distance(kid: Mapping[str, Sequence[float]], count: int) -> str:
    """Images of the upgrade against those of the base: which of them are closer to the real ones."""
    (base, base_error), (upgrade, upgrade_error) = kid["base"], kid["upgrade"]
    error, gain = math.hypot(base_error, upgrade_error), base - upgrade

    # Two standard errors, as usual.
    verdict = f"{count} images cannot tell the upgrade from the enlarged base; generate more to know"
    if gain > 2 * error:
        verdict = "The images of the upgrade are closer to the real ones than those of the enlarged base"
    elif gain < -2 * error:
        verdict = (
            "The images of the upgrade are farther from the real ones than the enlarged base's: train stage 2 longer"
        )
    return f"{verdict}. KID x 1000: {1000 * upgrade:.1f} against {1000 * base:.1f}, standard error {1000 * error:.1f}."
