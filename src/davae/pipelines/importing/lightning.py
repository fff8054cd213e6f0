"""LightningDiT -> LightningDiT2DModel, whose parameter names are the checkpoint's."""

import torch

from davae.errors import CheckpointError
from davae.pipelines.importing.conversion import Conversion, Options
from davae.pipelines.importing.matching import Source, build_empty, leave_rest, match, new_report
from davae.pipelines.importing.reading import Checkpoint


def lightningdit(checkpoint: Checkpoint, options: Options) -> Conversion:
    """A class-conditional LightningDiT; base or DA-VAE's, QK-norm or not, as its keys and shapes say.

    Raises:
        CheckpointError: the first mismatch, a variant that the class is not, or rotary tables other than its own.
    """
    from davae.models.lightningdit import LightningDiT2DModel, config_of

    report = new_report("lightningdit", checkpoint)
    try:
        config = config_of(checkpoint.tensors)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    model = build_empty(LightningDiT2DModel, config, checkpoint)
    wanted = model.state_dict()
    found = match(checkpoint, wanted, {name: Source(name) for name in wanted}, report)
    tables = [name for name, _ in model.named_buffers() if name in checkpoint.tensors]
    for name in tables:  # computed here, not stored; but only if they are the same
        computed, stored = model.get_buffer(name).double(), checkpoint.tensors[name].double()
        if computed.shape != stored.shape or not torch.allclose(computed, stored, atol=1e-2):
            raise CheckpointError(
                f"{checkpoint.path}: the first mismatch is {name}: found {list(stored.shape)}, wanted "
                f"{list(computed.shape)} with the rotary embedding's angles at the base resolution"
            )
    model.load_state_dict(found, assign=True)
    leave_rest(checkpoint, report, dict.fromkeys(tables, "computed; compared, and the same"), owned=("",))
    return Conversion(model.save_pretrained, report)
