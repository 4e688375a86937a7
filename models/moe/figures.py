"""What the routers did: sums that add up over micro-batches and ranks, and the figures made of them.

Legend: L mixture-of-experts layers, G routing groups, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.moe.layer import RouteStats


def routing_sums(stats: Sequence[RouteStats], weight_G: Tensor) -> dict[str, Tensor]:
    """Sums over the tokens of this micro-batch, one row for each layer; the losses weighted by the targets of each group."""
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
    """For each layer: load share of each expert, its spread, dead experts, imbalance tax, router entropy, drop rate, mean gate, the two losses.

    The imbalance tax is the time of the busiest expert over the mean expert's. Experts are equal in size, so time is counted in rows, after
    drops, in each micro-batch of each rank by itself: the sum of the busiest's over that of the means. `load_max_over_mean` is the same
    before drops and over the whole batch, and lower, as micro-batches even out. With an expert on each rank and all ranks waiting for the
    busiest, the tax is what imbalance costs; ranks that hold several experts, or get rows from several others, pay less.
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
