"""Metrics of routing, and the sums over micro-batches and ranks that they are computed from.

Legend: L mixture-of-experts layers, G routing groups, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.moe.layer import RouteStats


def routing_sums(stats: Sequence[RouteStats], weight_G: Tensor) -> dict[str, Tensor]:
    """Sums over the tokens of this micro-batch, one row per layer.

    The losses are weighted by each group's number of targets.
    """
    return {
        "balance_L": torch.stack([(layer.balance_G.detach() * weight_G).sum() for layer in stats]),
        "z_L": torch.stack([(layer.z_G.detach() * weight_G).sum() for layer in stats]),
        "load_LE": torch.stack([layer.load_E for layer in stats]),
        "dropped_L": torch.stack([layer.dropped for layer in stats]),
        "entropy_L": torch.stack([layer.entropy for layer in stats]),
        "gate_L": torch.stack([layer.gate for layer in stats]),
        "busiest_L": torch.stack([layer.max_rows for layer in stats]),
        "rows_L": torch.stack([layer.rows for layer in stats]),
        "routed_tokens": stats[0].tokens,
    }


def routing_figures(sums: dict[str, Tensor]) -> dict[str, float]:
    """Metrics per layer: every expert's share of the load, the spread of the shares, dead experts,
    imbalance tax, router entropy, drop rate, mean gate and the two losses.

    The imbalance tax is the time of the busiest expert divided by that of the mean expert. Experts
    are equal in size, so time is counted in rows, after drops, separately for every micro-batch of
    every rank: the sum of the largest counts divided by the sum of the mean counts.
    `load_max_over_mean` is the same ratio before drops and across the whole batch; it is lower,
    because micro-batches even out. With one expert per rank, and all ranks waiting for the busiest,
    the tax is the cost of imbalance; ranks that hold several experts, or receive rows from several
    other ranks, pay less.
    """
    if "load_LE" not in sums:
        return {}
    load_LE = sums["load_LE"].double().cpu()
    share_LE = load_LE / load_LE.sum(1, keepdim=True)
    tokens, assignments_L = sums["routed_tokens"].item(), load_LE.sum(1)
    columns = {
        "load_cv": share_LE.std(1, correction=0) / share_LE.mean(1),
        "load_max_over_mean": share_LE.amax(1) / share_LE.mean(1),
        "dead_experts": (load_LE == 0).sum(1),
        "imbalance_tax": sums["busiest_L"].cpu() * load_LE.shape[1] / sums["rows_L"].cpu(),
        "router_entropy": sums["entropy_L"].cpu() / tokens,
        "drop_rate": sums["dropped_L"].cpu() / assignments_L,
        "gate_mean": sums["gate_L"].cpu() / assignments_L,
        "balance_loss": sums["balance_L"].cpu() / sums["targets"].item(),
        "z_loss": sums["z_L"].cpu() / sums["targets"].item(),
    }
    figures = {
        f"{name}/layer{layer}": value for name, column in columns.items() for layer, value in enumerate(column.tolist())
    }
    shares = {
        f"expert_load/layer{layer}/expert{expert}": share
        for layer, row in enumerate(share_LE.tolist())
        for expert, share in enumerate(row)
    }
    return figures | shares
