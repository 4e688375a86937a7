"""Bytes of a worker's live tensors, by part, at their largest during a step.

The plan's estimates are compared with them.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_gather",
    "all_to_all_single",
)


class Collectives:
    """Add up the bytes that this rank handles in each kind of collective.

    It is made before DeepSpeed is imported, which keeps references to the functions.
    """

    def __init__(self) -> None:
        self.moved: dict[str, int] = {}
        self.watchers: list[Callable[[str, list[Tensor]], None]] = []
        for name in COLLECTIVES:
            setattr(dist, name, self._counted(name, getattr(dist, name)))

    def _counted(self, name: str, call: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            flat = [
                each
                for value in (*arguments, *options.values())
                for each in (value if isinstance(value, list | tuple) else [value])
            ]
            tensors = [each for each in flat if isinstance(each, Tensor)]
            self.moved[name] = self.moved.get(name, 0) + max((each.nbytes for each in tensors), default=0)
            for watcher in self.watchers:
                watcher(name, tensors)
            return call(*arguments, **options)

        return counted


class Census:
    """Watches one engine of a `Training`; `largest` is the most bytes that each part ever held."""

    def __init__(self, training: Any, collectives: Collectives):
        self.engine = training.engines["model"]
        self.zero = self.engine.zero
        self.network = self.engine.network
        self.largest: dict[str, int] = {}
        self.saved: dict[int, tuple[int, bool]] = {}
        collectives.watchers = [self._collective]
        for parameter in self.network.parameters():
            parameter.register_hook(lambda gradient: self.look([gradient]))
            parameter.register_post_accumulate_grad_hook(lambda _: self.look())
        optimizer = self.engine.engine.optimizer
        if self.zero in (1, 2):
            self._look_after(optimizer, "reduce_ipg_grads")
        (optimizer if self.zero == 0 else optimizer.optimizer).register_step_pre_hook(lambda *_: self.look())

    def _look_after(self, thing: Any, method: str) -> None:
        call = getattr(thing, method)

        def looking(*arguments: Any, **options: Any) -> Any:
            result = call(*arguments, **options)
            self.look()
            return result

        setattr(thing, method, looking)

    def _collective(self, name: str, tensors: list[Tensor]) -> None:
        if name == "all_to_all_single":
            if tensors[0].is_floating_point():
                self._note("all-to-all", sum(each.nbytes for each in tensors))
        elif "gather" not in name and name != "broadcast":
            self.look(tensors)

    def look(self, gradients: Iterable[Tensor] = ()) -> None:
        """Take note of what lives now, `gradients` among it."""
        parts = {
            "parameters": self._parameters(),
            "master": self._master(),
            "moments": self._moments(),
            "gradients": [*self._gradients(), *gradients],
        }
        taken: set[int] = set()
        for part, tensors in parts.items():
            stores = {
                store.data_ptr(): store.nbytes() for store in map(Tensor.untyped_storage, tensors) if store.nbytes()
            }
            self._note(part, sum(size for place, size in stores.items() if place not in taken))
            taken |= stores.keys()

    def _note(self, part: str, size: int) -> None:
        self.largest[part] = max(self.largest.get(part, 0), size)

    def _parameters(self) -> Iterator[Tensor]:
        for parameter in self.network.parameters():
            yield parameter.data
            if self.zero == 3:
                yield parameter.ds_tensor.data

    def _master(self) -> Iterable[Tensor]:
        optimizer = self.engine.engine.optimizer
        match self.zero:
            case 0:
                return []
            case 3:
                return optimizer.fp32_partitioned_groups_flat
            case _:
                return optimizer.single_partition_of_fp32_groups

    def _moments(self) -> Iterator[Tensor]:
        optimizer = self.engine.engine.optimizer
        for state in (optimizer if self.zero == 0 else optimizer.optimizer).state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.ndim)

    def _gradients(self) -> Iterator[Tensor]:
        optimizer = self.engine.engine.optimizer
        holders = [*self.network.parameters(), *self._master()]
        yield from (each.grad.data for each in holders if each.grad is not None)
        if self.zero == 0:
            return
        for bucket in optimizer.ipg_buckets.values():
            yield from bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
        for held in (optimizer.averaged_gradients, getattr(optimizer, "all_grad_tensors", {})):
            for tensors in held.values():
                yield from tensors or []
        if self.zero == 3:
            yield optimizer.grad_partitions_flat_buffer
        elif getattr(optimizer, "grads_in_partition", None) is not None:
            yield optimizer.grads_in_partition

    def forward(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Around the loss: counts what autograd keeps for the backward pass, parameters aside."""
        self.saved = {}
        shapes = [tuple(getattr(parameter, "ds_shape", parameter.shape)) for parameter in self.network.parameters()]
        weights = {sorted_shape for shape in shapes for sorted_shape in [tuple(sorted(shape))]}

        def pack(tensor: Tensor) -> Tensor:
            store = tensor.untyped_storage()
            if store.data_ptr() not in {each.untyped_storage().data_ptr() for each in self._parameters()}:
                copy = tensor.dtype == torch.bfloat16 and tuple(sorted(tensor.shape)) in weights
                self.saved[store.data_ptr()] = (store.nbytes(), copy)
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def after_forward(self) -> None:
        self._note("activations", sum(size for size, copy in self.saved.values() if not copy))
        self._note("bf16 copies", sum(size for size, copy in self.saved.values() if copy))
        self.look()
