"""Reacts to collapsed routing: reports it to the run, and takes the job's action.

The hook reads the counters of the routing watch. They come from the load of the whole global batch,
so all ranks decide alike without communication.

Legend: D model width.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from models.init import stable_hash
from models.moe.experts import Experts
from models.moe.layer import MoELayer
from models.moe.policies import BiasBalancedRouting
from models.moe.watch import RaiseBalanceLoss, ReinitDeadExperts, RoutingWatch, Stop, Warn
from trainer.checkpoint.fragments import MOMENTS, Fragment
from trainer.core.protocols import Engine
from trainer.core.training import Hook, Training
from trainer.endings import Ending, Stopped
from trainer.run_rows import EventKind, Say
from trainer.tracking.tracker import Tracker
from trainer.world import World


def collapse_hooks(training: Training, tracker: Tracker, say: Say) -> list[Hook]:
    """Return a hook for each network that contains a routing watch."""
    hooks: list[Hook] = []
    for name, network in training.objective.networks.items():
        for module in network.modules():
            if isinstance(module, RoutingWatch):
                hooks.append(Hook(1, CollapseHook(name, network, module, tracker, say, training.objective.seed)))
    return hooks


@dataclass
class CollapseHook:
    """Checks a routing watch, as rarely as possible, because reading it waits for the GPU.

    The next look is when a layer can have collapsed at the earliest: in a healthy run, every
    `steps` steps of the watch's config.
    """

    name: str
    network: nn.Module
    watch: RoutingWatch
    tracker: Tracker
    say: Say
    seed: int
    next_look: int = 0

    def __call__(self, training: Training) -> None:
        if training.step < self.next_look:
            return
        steps = self.watch.config.steps
        longest = self.watch.over_LE.max(1)
        longest_L: list[int] = longest.values.tolist()
        expert_L: list[int] = longest.indices.tolist()
        for layer, expert in enumerate(expert_L):
            if longest_L[layer] >= steps:
                self._react(training, layer, expert)
                longest_L[layer] = 0
        self.next_look = training.step + steps - int(max(longest_L))

    def _react(self, training: Training, layer: int, busiest: int) -> None:
        config, share = self.watch.config, float(self.watch.share_LE[layer, busiest])
        excess = f"over {self.watch.limit:.0%} of the tokens for {config.steps} steps, now {share:.0%}"
        collapse = f"routing collapse in layer {layer}: expert {busiest} got {excess}"
        match config.action:
            case Warn():
                done = "training continues, as collapse.action is warn"
            case RaiseBalanceLoss(factor=factor, most=most):
                self.watch.raised_L[layer].mul_(factor).clamp_(max=most)
                done = f"its balance loss now counts {float(self.watch.raised_L[layer]):g} times"
            case ReinitDeadExperts():
                dead = (self.watch.idle_LE[layer] >= config.steps).nonzero()[:, 0].tolist()
                reinit_experts(training, self, layer, dead, busiest)
                done = "no expert was without tokens, so none is reinitialised"
                if dead:
                    done = f"experts {', '.join(map(str, dead))} are reinitialised"
            case Stop():
                training.wants_stop = Stopped(Ending.COLLAPSED, collapse)
                done = "stopping"
        self.watch.over_LE[layer] = 0
        self.say(EventKind.COLLAPSE, f"step {training.step}: {collapse}; {done}", training.step)
        self.tracker.log(training.step, {f"collapse/layer{layer}": share})


@torch.no_grad()
def reinit_experts(training: Training, hook: CollapseHook, layer: int, dead: list[int], busiest: int) -> None:
    """Draw new weights for the `dead` experts of a layer, and clear their moments in Adam.

    The weights depend on (seed, name, global expert, step) alone, so they are the same in every
    layout. An expert whose score is below the busiest's for every token would stay dead whatever
    its weights, so its row of the router becomes the busiest's row plus noise, as at
    initialisation.
    """
    layers = [(name, module) for name, module in hook.network.named_modules() if isinstance(module, MoELayer)]
    prefix, module = layers[layer]
    engine = training.engines[hook.name]
    router = f"{prefix}.router.weight"
    assert isinstance(module.experts, Experts)
    row_D = torch.zeros(module.experts.d_model, device=training.world.device)
    row_D = _row(engine, router, busiest, row_D, training.world)
    spread = {f"{prefix}.experts.gate_up": module.experts.std, f"{prefix}.experts.down": module.experts.out_std}
    if not module.router.frozen:
        spread[router] = module.router.std
    for fragment in engine.fragments():
        if fragment.name in spread and fragment.kind in ("weight", *MOMENTS):
            for expert in dead:
                base_D = row_D if fragment.name == router else None
                _renew(fragment, expert, base_D, spread[fragment.name], (hook.seed, training.step))
    _forget_bias(module, dead, busiest)
    engine.refresh()


def _row(engine: Engine, name: str, index: int, row_D: Tensor, world: World) -> Tensor:
    """Add row `index` of the fp32 weight `name` to `row_D`, from the pieces that the ranks own.

    The sum is exact, because exactly one rank owns each element.
    """
    for fragment in engine.fragments():
        if fragment.name == name and fragment.kind == "weight":
            owned = fragment.values[fragment.owned]
            first = fragment.start + fragment.owned.start
            in_row, in_owned = _overlap(first, owned.numel(), index, row_D.numel())
            row_D[in_row] += owned[in_owned].to(row_D)
    return world.sum(row_D)


def _renew(fragment: Fragment, index: int, base: Tensor | None, std: float, origin: tuple[int, int]) -> None:
    """Renew this rank's part of slice `index` of the global tensor.

    A weight becomes `base` plus normal numbers, a moment zero.
    """
    shape = fragment.global_shape[1:]
    in_slice, held = _overlap(fragment.start, fragment.values.numel(), index, prod(shape))
    if held.stop <= held.start:
        return
    if fragment.kind in MOMENTS:
        fragment.values[held] = 0
        return
    generator = torch.Generator().manual_seed(stable_hash(origin[0], fragment.name, index, origin[1]))
    values = torch.empty(shape).normal_(0, std, generator=generator).flatten().to(fragment.values.device)
    fragment.values[held] = (values if base is None else base.to(values) + values)[in_slice]


def _overlap(start: int, numel: int, index: int, size: int) -> tuple[slice, slice]:
    """Intersect slice `index`, of `size` elements, with the `numel` elements from `start` on.

    Returns the intersection twice: relative to the slice, and relative to `start`.
    """
    high = min(start + numel, (index + 1) * size)
    low = min(max(start, index * size), high)
    return slice(low - index * size, high - index * size), slice(low - start, high - start)


def _forget_bias(module: MoELayer, dead: list[int], busiest: int) -> None:
    """Reset the bias that grew while the experts were idle; it would send them every token."""
    if isinstance(module.config.router, BiasBalancedRouting):
        module.router.bias_E[dead] = module.router.bias_E[busiest]
