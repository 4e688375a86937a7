"""What is done about collapsed routing: a hook that reads the watch's counters, tells the run, and takes the job's action.

The counters come from the load of the whole global batch, so all ranks decide alike without asking each other.

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
    """A hook for each network that has a routing watch in it."""
    hooks: list[Hook] = []
    for name, network in training.objective.networks.items():
        for module in network.modules():
            if isinstance(module, RoutingWatch):
                hooks.append(Hook(1, CollapseHook(name, network, module, tracker, say, training.objective.seed)))
    return hooks


@dataclass
class CollapseHook:
    """Looks when a layer can have collapsed at the earliest, which in a healthy run is once in `steps` steps: reading waits for the GPU."""

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
        longest_L, busiest_L = (each.tolist() for each in self.watch.over_LE.max(1))
        for layer, (length, expert) in enumerate(zip(longest_L, busiest_L, strict=True)):
            if length >= steps:
                self._collapsed(training, layer, expert)
                longest_L[layer] = 0
        self.next_look = training.step + steps - int(max(longest_L))

    def _collapsed(self, training: Training, layer: int, busiest: int) -> None:
        config, share = self.watch.config, float(self.watch.share_LE[layer, busiest])
        what = f"routing collapse in layer {layer}: expert {busiest} got over {self.watch.limit:.0%} of the tokens for {config.steps} steps, now {share:.0%}"
        match config.action:
            case Warn():
                done = "training on, as collapse.action is warn"
            case RaiseBalanceLoss(factor=factor, most=most):
                self.watch.raised_L[layer].mul_(factor).clamp_(max=most)
                done = f"its balance loss now counts {float(self.watch.raised_L[layer]):g} times"
            case ReinitDeadExperts():
                dead = (self.watch.idle_LE[layer] >= config.steps).nonzero()[:, 0].tolist()
                reinit_experts(training, self, layer, dead, busiest)
                done = (
                    f"experts {', '.join(map(str, dead))} start anew"
                    if dead
                    else "no expert was without tokens, so none starts anew"
                )
            case Stop():
                training.wants_stop = Stopped(Ending.COLLAPSED, what)
                done = "stopping"
        self.watch.over_LE[layer] = 0
        self.say(EventKind.COLLAPSE, f"step {training.step}: {what}; {done}", training.step)
        self.tracker.log(training.step, {f"collapse/layer{layer}": share})


@torch.no_grad()
def reinit_experts(training: Training, hook: CollapseHook, layer: int, dead: list[int], busiest: int) -> None:
    """New weights for the `dead` experts of a layer, and no memory of the old ones in Adam's moments.

    Drawn from (seed, name, global expert, step), so the same in every layout. An expert whose score is below the busiest's for every
    token stays dead whatever its weights: its row of the router becomes the busiest's plus noise as at the start.
    """
    prefix, module = [(name, module) for name, module in hook.network.named_modules() if isinstance(module, MoELayer)][
        layer
    ]
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
    """Row `index` of the fp32 weight `name` added to `row_D`, from what each rank owns of it: exact, as each element comes once."""
    for fragment in engine.fragments():
        if fragment.name == name and fragment.kind == "weight":
            owned = fragment.values[fragment.owned]
            there, here = _overlap(fragment.start + fragment.owned.start, owned.numel(), index, row_D.numel())
            row_D[there] += owned[here].to(row_D)
    return world.sum(row_D)


def _renew(fragment: Fragment, index: int, base: Tensor | None, std: float, origin: tuple[int, int]) -> None:
    """Write what this rank holds of slice `index` of the whole tensor: `base` plus normal numbers for a weight, zeros for a moment."""
    shape = fragment.global_shape[1:]
    there, here = _overlap(fragment.start, fragment.values.numel(), index, prod(shape))
    if here.stop <= here.start:
        return
    if fragment.kind in MOMENTS:
        fragment.values[here] = 0
        return
    generator = torch.Generator().manual_seed(stable_hash(origin[0], fragment.name, index, origin[1]))
    values = torch.empty(shape).normal_(0, std, generator=generator).flatten().to(fragment.values.device)
    fragment.values[here] = (values if base is None else base.to(values) + values)[there]


def _overlap(start: int, numel: int, index: int, each: int) -> tuple[slice, slice]:
    """Where slice `index` (of `each` elements) and the `numel` elements from `start` on meet: counted in the slice, and in the elements."""
    low, high = max(start, index * each), min(start + numel, (index + 1) * each)
    low = min(low, high)
    return slice(low - index * each, high - index * each), slice(low - start, high - start)


def _forget_bias(module: MoELayer, dead: list[int], busiest: int) -> None:
    """A bias that grew while the expert was idle would send it every token now."""
    if isinstance(module.config.router, BiasBalancedRouting):
        module.router.bias_E[dead] = module.router.bias_E[busiest]
