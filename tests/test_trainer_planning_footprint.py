"""The plan's memory, part by part, against the live tensors in real DeepSpeed workers.

Its counts are compared with published ones.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_job
from distributed import run_distributed

from trainer.config import RunConfig
from trainer.parsing import parse
from trainer.planning.footprint import footprint, on_meta, weightless

WORLD = 2
MICRO_BATCHES = 2
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"layers": 3, "d_model": 96, "heads": 4, "kv_heads": 2, "ffn": 288, "qk_norm": True},
    "switch": {
        "layers": 2,
        "d_model": 128,
        "heads": 4,
        "ffn": 512,
        "moe": {"experts": 4, "ffn": 384},
        "moe_layers": "alternate",
    },
    "top_2": {
        "layers": 2,
        "d_model": 64,
        "heads": 4,
        "ffn": 128,
        "tie_embeddings": True,
        "moe": {
            "experts": 8,
            "ffn": 96,
            "shared_expert": 64,
            "router": {"name": "top_k", "k": 2},
            "capacity_factor": 2.0,
        },
    },
}
LAYOUTS = {  # ZeRO 3 comes last: it replaces torch's linear layer for the rest of the process
    "dense": [(1, 1, "bf16"), *((1, zero, "fp32") for zero in range(4))],
    "switch": [(2, 1, "bf16"), *((2, zero, "fp32") for zero in range(3)), *((1, zero, "fp32") for zero in range(4))],
    "top_2": [(2, 2, "fp32"), *((2, zero, "bf16") for zero in range(3)), *((1, zero, "bf16") for zero in range(4))],
}
CASES = [(model, *layout) for model, layouts in LAYOUTS.items() for layout in layouts]


def job(corpus: Path, model: str, ep: int, zero: int, precision: str) -> RunConfig:
    values = tiny_job(
        corpus,
        engine={"name": "deepspeed", "zero": zero, "ep": ep},
        precision=precision,
        batch={"global_batch": 16, "micro_batch": 4},
    )
    values["objective"]["model"] = MODELS[model]
    values["objective"]["data"]["seq_len"] = 60
    return parse(RunConfig, values, "run")


def census(world: Any, corpus: Path, model: str) -> dict[tuple[int, int, str], dict[str, int]]:
    """Return the largest bytes by part over two steps, for every layout of `model`.

    The layouts run one after the other in the same processes.
    """
    from live_tensors import Census, Collectives

    collectives = Collectives()
    from trainer.core.loop import global_weights
    from trainer.worker.main import build_training

    found = {}
    for ep, zero, precision in LAYOUTS[model]:
        run = job(corpus, model, ep, zero, precision)
        training = build_training(run, world)
        watch = Census(training, collectives)
        engine = training.engines["model"]
        generator = torch.Generator().manual_seed(world.rank)
        for _ in range(2):
            collectives.moved.clear()
            batches = [
                {
                    "tokens": torch.randint(0, 256, (4, 61), generator=generator),
                    "sample": torch.arange(4) + 4 * (world.rank + 2 * index),
                }
                for index in range(MICRO_BATCHES)
            ]
            weight = float(global_weights(training, batches)[0])
            for batch in batches:
                with watch.forward():
                    loss, _ = training.objective.loss("model", engine.module, batch, 0)
                watch.after_forward()
                engine.backward(loss * (world.size / weight))
                del loss
                watch.look()
            engine.step(1e-3)
            watch.look()
        found[ep, zero, precision] = watch.largest | {
            f"moved/{name}": moved for name, moved in collectives.moved.items()
        }
    return found


@cache
def measured(corpus: Path, model: str) -> dict[tuple[int, int, str], dict[str, float]]:
    """The mean across ranks: their experts get different rows, which are balanced on average."""
    ranks = run_distributed(census, WORLD, corpus, model)
    return {
        layout: {part: sum(rank[layout].get(part, 0) for rank in ranks) / WORLD for part in ranks[0][layout]}
        for layout in ranks[0]
    }


@pytest.mark.parametrize(("model", "ep", "zero", "precision"), CASES)
def test_every_part_is_within_15_percent_of_the_live_tensors(
    model: str, ep: int, zero: int, precision: str, corpus: Path
) -> None:
    run = job(corpus, model, ep, zero, precision)
    found = measured(corpus, model)[ep, zero, precision]
    estimate = footprint(run, on_meta(run), WORLD, bf16=precision == "bf16", cuda=False)
    state = estimate.states["model"]
    activations = estimate.balanced
    assert activations is not None
    parts = {
        "parameters": state.parameters,
        "gradients": state.gradients,
        "master": state.master,
        "moments": state.moments,
        "activations": activations.kept.activations,
        "bf16 copies": activations.kept.weight_copies,
        "all-to-all": activations.all_to_all,
    }
    wrong = {
        part: (size, found.get(part, 0))
        for part, size in parts.items()
        if found.get(part, 0) != pytest.approx(size, rel=0.15)
    }
    assert not wrong, f"estimated and live bytes: {wrong}"
    assert found["activations"] > 0
    assert estimate.worst is not None
    assert found.get("all-to-all", 0) <= estimate.worst.all_to_all


def test_networks_of_other_objectives_are_counted_without_weights() -> None:
    from models.gan.networks import build_discriminator, build_generator
    from models.gan.residual import ResidualGanConfig
    from models.init import decays
    from models.vae.likelihoods import GaussianConfig
    from models.vae.network import VAE, ConvVAEConfig

    def build() -> list[torch.nn.Module]:
        gan = ResidualGanConfig()
        shape = (3, 32, 32)
        return [
            build_generator(gan, shape, 10),
            build_discriminator(gan, shape, 10),
            VAE(ConvVAEConfig(), GaussianConfig(), shape),
        ]

    with weightless():
        empty = build()
    for counted, whole in zip(empty, build(), strict=True):
        assert all(tensor.is_meta for tensor in (*counted.parameters(), *counted.buffers()))
        expected = {name: (parameter.shape, decays(parameter)) for name, parameter in whole.named_parameters()}
        assert {
            name: (parameter.shape, decays(parameter)) for name, parameter in counted.named_parameters()
        } == expected
        assert [buffer.shape for buffer in counted.buffers()] == [buffer.shape for buffer in whole.buffers()]
    assert not torch.nn.Linear(2, 2).weight.is_meta
