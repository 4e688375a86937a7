"""A mixture of experts from a dense transformer, with the same output at its first step (Komatsuzaki et al. 2022, "Sparse upcycling").

Each expert starts as the dense feed-forward network, so a token's output is the sum of its gates times the dense output. Where gates
are divided by their sum that is the dense output, for any router. Elsewhere the sum depends on the router: it starts nearly flat, so
that each gate is what an even split gives, and the experts' last matrix is divided by the gates' sum (the weight scaling of He et al.
2024, "Upcycling large language models into mixture of experts", made exact by the flat router).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from models.routing import BiasBalancedRouting, ExpertChoiceRouting, NoisyTopKRouting, RoutingConfig, SwitchRouting, TopKRouting
from models.transformer import TransformerConfig

FLAT = 7e-7
"""Standard deviation of the first logits where gates are not normalised: they change a gate by a part in a million, which is the size of
float32's rounding in a forward pass, and still spread the tokens over the experts, which a router of zeros would all send to the first."""


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """Make a mixture of experts from the dense model in `init_from`."""

    experts: int
    """Copies of each feed-forward network that becomes a mixture of experts. The rest of the mixture is `model.moe`; where that is null:
    top_k with k 2, dropless, in the layers that `model.moe_layers` names."""

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise ValueError(f"upcycle.experts: {self.experts}; it must be at least 2")


class Origin(NamedTuple):
    """What a parameter starts as: `scale` times the dense parameters `names`, flattened, one behind the other; without names `scale` times
    its own random start."""

    names: tuple[str, ...]
    scale: float = 1.0


def upcycled(config: TransformerConfig, names: Iterable[str]) -> dict[str, Origin]:
    """Where each parameter of the mixture of experts `config` comes from; `names` are all of its parameters.

    The output is the dense model's wherever no token is dropped, thus always in evaluation without `eval_capacity_factor`.
    ValueError for a routing that cannot give it.
    """
    origins = {name: Origin((name,)) for name in names}
    if config.moe is None:
        return origins
    gates, flat = _sum_of_gates(config.moe.router, config.moe.experts)
    for index in config.moe_indices:
        ffn, copies = f"blocks.{index}.ffn.", config.moe.experts
        made = {
            "router.weight": Origin((), FLAT / (config.weight_std * math.sqrt(config.d_model)) if flat else 1.0),
            "router.noise_weight": Origin(()),
            "experts.gate_up": Origin((f"{ffn}gate.weight", f"{ffn}up.weight") * copies),
            "experts.down": Origin((f"{ffn}down.weight",) * copies, 1 / gates),
            "shared.gate.weight": Origin(()),
            "shared.up.weight": Origin(()),
            "shared.down.weight": Origin((), 0.0),  # it adds nothing at first, and has a gradient
        }
        origins |= {f"{ffn}{name}": origin for name, origin in made.items() if f"{ffn}{name}" in origins}
    return origins


def _sum_of_gates(router: RoutingConfig, experts: int) -> tuple[float, bool]:
    """The sum of a token's gates, and whether it takes a flat router to have it for all tokens."""
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
                "model.moe.router: expert_choice gives some tokens no expert and others many, so upcycle cannot begin equal to the dense model; use top_k"
            )
