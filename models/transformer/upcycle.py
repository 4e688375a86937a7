"""Upcycling: a mixture of experts from a dense transformer, with the same output at its first step
(Komatsuzaki et al. 2022, "Sparse upcycling").

Each expert starts as the dense feed-forward network, so a token's output is the sum of its gates
times the dense output. If gates are divided by their sum, that is the dense output for any router.
Otherwise the sum depends on the router. It then starts nearly flat, so that each gate equals an
even split, and the experts' last matrix is divided by the sum of the gates (the weight scaling of
He et al. 2024, "Upcycling large language models into mixture of experts", made exact by the flat
router).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from models.moe.policies import (
    BiasBalancedRouting,
    ExpertChoiceRouting,
    NoisyTopKRouting,
    RoutingConfig,
    SwitchRouting,
    TopKRouting,
)
from models.transformer.model import TransformerConfig

FLAT = 7e-7
"""Standard deviation of the first logits if gates are not normalised. It changes a gate by one part
in a million, the size of float32's rounding in a forward pass, and still spreads the tokens over
the experts, where a router of zeros would send all to the first."""


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """Makes a mixture of experts from the dense model in `init_from`."""

    experts: int
    """Number of copies of each feed-forward network that becomes a mixture of experts. `model.moe`
    gives the rest of the mixture; null: top_k with k 2, dropless, in the layers of
    `model.moe_layers`."""

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise ValueError(f"upcycle.experts: {self.experts}, which must be at least 2")


class Origin(NamedTuple):
    """Initial value of a parameter: `scale` times the dense parameters `names`, flattened and
    concatenated; without names, `scale` times its own random start."""

    names: tuple[str, ...]
    scale: float = 1.0


def upcycled(config: TransformerConfig, names: Iterable[str]) -> dict[str, Origin]:
    """Return the origin of each parameter of the mixture of experts `config`; `names` are all of
    its parameters.

    The output equals the dense model's if no token is dropped, hence always in evaluation without
    `eval_capacity_factor`. Raises ValueError for a routing that cannot reproduce it.
    """
    origins = {name: Origin((name,)) for name in names}
    if config.moe is None:
        return origins
    gates, flat = _sum_of_gates(config.moe.router, config.moe.experts)
    for index in config.moe_indices:
        ffn = f"blocks.{index}.ffn."
        copies = config.moe.experts
        made = {
            "router.weight": Origin((), FLAT / (config.weight_std * math.sqrt(config.d_model)) if flat else 1.0),
            "router.noise_weight": Origin(()),
            "experts.gate_up": Origin((f"{ffn}gate.weight", f"{ffn}up.weight") * copies),
            "experts.down": Origin((f"{ffn}down.weight",) * copies, 1 / gates),
            "shared.gate.weight": Origin(()),
            "shared.up.weight": Origin(()),
            "shared.down.weight": Origin((), 0.0),  # adds nothing at first, but has a gradient
        }
        origins |= {f"{ffn}{name}": origin for name, origin in made.items() if f"{ffn}{name}" in origins}
    return origins


def _sum_of_gates(router: RoutingConfig, experts: int) -> tuple[float, bool]:
    """Return the sum of a token's gates, and whether only a flat router gives that sum for all
    tokens."""
    match router:
        case SwitchRouting():
            return 1 / experts, True
        case TopKRouting(k=k, normalise=normalise):
            return (1.0, False) if normalise else (k / experts, True)
        case NoisyTopKRouting():
            return 1.0, False
        case BiasBalancedRouting(k=k, normalise=normalise, scale=scale):
            return (scale, False) if normalise else (scale * k / 2, True)
        case ExpertChoiceRouting():
            raise ValueError(
                "model.moe.router: expert_choice gives some tokens no expert and others many, "
                "so upcycling cannot start equal to the dense model; use top_k"
            )
