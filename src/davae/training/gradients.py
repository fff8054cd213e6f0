"""The gradients of one step, of all ranks together: averaged, measured and clipped."""

from collections.abc import Mapping

from torch import Tensor, nn

from davae.run.ranks import Ranks
from davae.training.sharding import own_gradient


def clipped_norm(
    trained: Mapping[str, nn.Parameter], parts: Mapping[str, nn.Parameter], ranks: Ranks, most: float
) -> Tensor:
    """Average the gradients over the ranks, in place, and clip them; the gradients of `parts` are then those to use.

    Args:
        trained: the models' parameters by name, after the backward pass.
        parts: `own_part` of each.
        ranks: each has its own gradients of whole parameters; FSDP2 has averaged those of sharded ones already.
        most: the largest norm of all gradients together that is left as it is.

    Returns:
        That norm before clipping, the same on all ranks, a scalar.
    """
    sharded = {name for name, part in parts.items() if part is not trained[name]}
    whole = [part for name, part in parts.items() if name not in sharded and part.grad is not None]
    ranks.average_([part.grad for part in whole if part.grad is not None])
    if not sharded:
        return nn.utils.clip_grad_norm_(whole, most)
    for name in sharded:
        parts[name].grad = own_gradient(trained[name])
    pieces = [parts[name] for name in parts if name in sharded and parts[name].grad is not None]
    gradients = ([part.grad for part in some if part.grad is not None] for some in (pieces, whole))
    norms = [nn.utils.get_total_norm(some).to(ranks.device) for some in gradients]
    norm = (ranks.sum_(norms[0].square()) + norms[1].square()).sqrt()
    nn.utils.clip_grads_with_norm_([*pieces, *whole], most, norm)
    return norm
