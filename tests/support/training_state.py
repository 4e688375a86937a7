"""The whole state of a training, collected from all its ranks."""

from typing import Any

import torch


def whole_state(training: Any) -> dict[str, torch.Tensor]:
    """Every tensor of training state, put together from what all ranks own."""
    from trainer.core.training import fragments

    mine = [(f.key, f.global_shape, f.start + f.owned.start, f.values[f.owned].clone()) for f in fragments(training)]
    state: dict[str, torch.Tensor] = {}
    for rank in training.world.gather(mine):
        for key, shape, start, values in rank:
            flat = state.setdefault(
                key, torch.full((int(torch.Size(shape).numel()),), float("nan"), dtype=values.dtype)
            )
            flat[start : start + len(values)] = values
    return state
