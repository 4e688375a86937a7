"""The samples of a stream, byte by byte, across any number of ranks."""

import json

from data.batches import merge_states
from data.config import ImageConfig, TextConfig
from data.share import RunState, Share
from data.training_stream import ImageStream, TextStream


def stream_samples(
    config: TextConfig | ImageConfig,
    world: int,
    steps: int,
    state: RunState | None = None,
    global_batch: int = 16,
    micro_batch: int = 2,
) -> tuple[dict[int, bytes], RunState]:
    """Return the bytes per sample of `steps` steps across `world` ranks, and the merged state."""
    samples = {}
    states = []
    kind = ImageStream if isinstance(config, ImageConfig) else TextStream
    for rank in range(world):
        with kind(
            config,
            Share(rank=rank, world=world, global_batch=global_batch, micro_batch=micro_batch),
            seed=3,
            state=state,
        ) as stream:
            for _ in range(steps):
                step = next(stream)
                for batch in step.micro_batches:
                    values = batch["image" if kind is ImageStream else "tokens"]
                    samples |= dict(
                        zip(batch["sample"].tolist(), (value.numpy().tobytes() for value in values), strict=True)
                    )
            states.append(step.state)
    return samples, json.loads(json.dumps(merge_states(states)))
