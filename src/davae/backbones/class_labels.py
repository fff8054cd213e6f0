"""Class numbers as conditions, for families that know no captions."""

from collections.abc import Sequence

import torch
from diffusers import ModelMixin
from torch import Tensor

from davae.errors import SettingsError


def class_labels(transformer: ModelMixin, labels: Sequence[int], *, null: int) -> dict[str, Tensor]:
    """Class numbers as the transformer wants them: `class_labels` [B], int64.

    Raises:
        SettingsError: a number that is no class and not `null`, which stands for none.
    """
    foreign = [label for label in labels if label not in range(null + 1)]
    if foreign:
        raise SettingsError(f"class {foreign[0]!r}: allowed are 0 to {null - 1}, and {null} for none")
    return {"class_labels": torch.tensor(list(labels), dtype=torch.long, device=transformer.device)}
