"""Initial weights that depend on the seed and the module's name alone, so that sharding changes
nothing.

Every module that owns parameters fills them in `reset_parameters()`, as torch's own layers do,
drawing from torch's global generator. `initialise` visits the modules by name and gives each a
seeded generator of its own.
"""

import hashlib

import torch
from torch import nn


def stable_hash(*parts: object) -> int:
    """Return a 63-bit integer computed from `parts`, the same in every process and on every machine
    (unlike `hash`)."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def no_decay(parameter: nn.Parameter) -> nn.Parameter:
    """Tag `parameter` so that the optimiser applies no weight decay to it, and return it."""
    parameter.decay = False  # type: ignore[attr-defined]
    return parameter


def decays(parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: to matrices and stacks of matrices, unless `no_decay`
    tagged them."""
    return getattr(parameter, "decay", parameter.ndim >= 2)


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill all parameters and buffers of `model` in place, from (`seed`, module name).

    The order of modules, the number of ranks and earlier draws do not matter. The global generator
    is left unchanged.
    """
    for name, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        reset = getattr(module, "reset_parameters", None)
        assert callable(reset), f"{name}: {type(module).__name__} owns parameters but has no reset_parameters()"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_hash(seed, name))
            reset()
