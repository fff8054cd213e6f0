"""The measured numbers of a job as a table, for its page and its model card."""

from typing import Any

from davae.evaluation.reconstruction import make_table
from davae.evaluation.report import Table

# The images that are compared.
BASE, UPGRADE, REAL = "base", "upgrade", "real"
ROW_NAMES = {"enlarged": "base, enlarged", "upgrade": "upgrade", "full size": "base at full size"}


def make_numbers(facts: dict[str, Any]) -> Table | None:
    """Reconstruction of the held-out images, and KID, once they are measured."""
    if "reconstruction" not in facts:
        return None
    caption, kid = f"Reconstructions of {facts['heldout']} held-out images.", facts["kid"]
    if kid:
        caption += f" KID: {facts['count']} generated images against as many real ones, with its standard error."
    quality = make_table({title: facts["reconstruction"][name] for name, title in ROW_NAMES.items()}, caption=caption)
    if not kid:
        return quality

    # The base at full size makes no images.
    rows = []
    for row, name in zip(quality.rows, (BASE, UPGRADE, ""), strict=True):
        value = kid.get(name)
        rows.append([*row, "-" if value is None else f"{1000 * value[0]:.1f} +- {1000 * value[1]:.1f}"])
    return Table([*quality.header, "KID x 1000"], rows, caption)
