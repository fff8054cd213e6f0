"""Weights that are elsewhere until a module's `forward` runs, for code that reads them outside of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def weights_in_place(*modules: Any) -> Iterator[None]:
    """Have the tensors of modules there, as the hooks of accelerate and of group offloading have them for `forward`."""
    hooks = []
    for module in modules:
        registry = getattr(module, "_diffusers_hook", None)
        group_hook = None if registry is None else registry.get_hook("group_offloading")
        for hook in (getattr(module, "_hf_hook", None), group_hook):
            if hook is not None:
                hooks.append((hook, module))
                hook.pre_forward(module)
    try:
        yield
    finally:
        for hook, module in reversed(hooks):
            hook.post_forward(module, None)
