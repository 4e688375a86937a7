"""What happens beside training: figures, evaluation, samples, checkpoints. Each hook is called with the `Training` after a step."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import nn

from data.batches import Batch, RunState, Share
from trainer.checkpoint.format import State
from trainer.checkpoint.fragments import Fragment
from trainer.checkpoint.save import Checkpointer
from trainer.core.loop import Training, add, over_ranks, to_device
from trainer.core.protocols import SampleSet, Sums
from trainer.records.ledger import Ledger
from trainer.run_files import RunFiles
from trainer.run_rows import EventKind, Say, Spent
from trainer.tracking.tracker import Tracker

_PAUSES: tuple[Spent, ...] = ("evaluation", "checkpoint")
"""What hooks book that stops training."""


@dataclass
class Report:
    """Logs the metrics of the steps since the last report: losses, norms, rates, machine."""

    tracker: Tracker
    peak_flops: float
    """Of one rank; 0 where it is not known."""
    last_samples: int = 0
    last_time: float = field(default_factory=time.perf_counter)
    paused_s: float = 0.0
    """Time of this attempt, up to the last report, that is no part of the training rate."""
    figures: dict[str, float] = field(default_factory=dict)

    def __call__(self, training: Training) -> None:
        if not training.sums:
            return
        sums = over_ranks(training.sums, training.world)
        training.sums = {}
        now = time.perf_counter()
        paused_s = sum(training.seconds.get(pause, 0.0) for pause in _PAUSES)
        seconds = max(1e-9, now - self.last_time - (paused_s - self.paused_s))
        samples = training.samples - self.last_samples
        self.last_time, self.last_samples, self.paused_s = now, training.samples, paused_s
        self.figures = training.objective.report(sums) | self._rates(training, samples / seconds) | _machine(training)
        self.tracker.log(training.step, self.figures)

    def _rates(self, training: Training, samples_per_s: float) -> dict[str, float]:
        objective, phases = training.objective, training.objective.phases
        figures = {"samples_seen": training.samples, "samples_per_s": samples_per_s}
        if objective.tokens_per_sample:
            figures |= {"tokens_seen": training.tokens, "tokens_per_s": samples_per_s * objective.tokens_per_sample}
        if objective.flops_per_sample and self.peak_flops:
            figures["mfu"] = samples_per_s * objective.flops_per_sample / (self.peak_flops * training.world.size)
        for phase, norm in training.norms.items():
            suffix = f"/{phase}" if len(phases) > 1 else ""
            figures[f"grad_norm{suffix}"] = float(norm)
            figures[f"learning_rate{suffix}"] = training.learning_rate(phase, training.step - 1)
        return figures


def _machine(training: Training) -> dict[str, float]:
    """System metrics of rank 0's machine and process."""
    figures = {
        "system/cpu_percent": psutil.cpu_percent(),
        "system/memory_gb": psutil.virtual_memory().used / 1e9,
        "system/worker_rss_gb": psutil.Process().memory_info().rss / 1e9,
    }
    if training.world.device.type == "cuda":
        figures["system/gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return figures


def evaluate(training: Training, batches: list[Batch]) -> dict[str, float]:
    """The objective's measures on held-out `batches`, over all ranks."""
    sums: Sums = {}
    with evaluating(training.nets):
        for batch in batches:
            add(sums, training.objective.evaluate(training.nets, to_device(batch, training.world.device)))
            training.note_progress()
    return training.objective.report(over_ranks(sums, training.world))


@contextmanager
def evaluating(networks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put `networks` in evaluation mode, without gradients, for a `with` block."""
    for network in networks.values():
        network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for network in networks.values():
            network.train()


@dataclass
class Evaluate:
    """Measures on the held-out samples; the batches are made once."""

    held_out: Callable[[], list[Batch]]
    tracker: Tracker
    batches: list[Batch] | None = None
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def __call__(self, training: Training) -> None:
        begin = time.perf_counter()
        if self.batches is None:
            self.batches = self.held_out()
        with training.ema.in_place():
            self.figures = evaluate(training, self.batches)
        self.seconds = time.perf_counter() - begin
        self.tracker.log(training.step, {f"eval/{name}": value for name, value in self.figures.items()})


@dataclass
class Quality:
    """What is measured on the objective's own samples, and what is wrong with them."""

    share: Share
    tracker: Tracker
    say: Say
    figures: dict[str, float] = field(default_factory=dict)

    def __call__(self, training: Training) -> None:
        with training.ema.in_place(), evaluating(training.nets):
            self.figures = training.objective.quality(training.nets, self.share, training.world.gather)
        self.tracker.log(training.step, {f"quality/{name}": value for name, value in self.figures.items()})
        for alarm in training.objective.alarms(self.figures):
            self.say(EventKind.QUALITY, f"step {training.step}: {alarm}", training.step)


@dataclass
class Sample:
    """Samples to look at, as files of the run and artifacts in MLflow."""

    n: int
    seed: int
    files: RunFiles
    tracker: Tracker
    scratch: Path
    samples: SampleSet = field(default_factory=SampleSet)

    def __call__(self, training: Training) -> None:
        if not self.n:
            return
        generator = torch.Generator(training.world.device).manual_seed(self.seed)
        # Sampling grows its input token by token: compiled, it would be compiled anew for every length.
        with training.ema.in_place(), evaluating(training.nets), torch.compiler.set_stance("force_eager"):
            self.samples = training.objective.sample(training.nets, self.n, generator)
        if training.world.is_main:
            for file in write_samples(self.samples, self.scratch, f"step-{training.step:08d}"):
                self.files.samples.put(file, file.name)
                self.tracker.keep(file)


def write_samples(samples: SampleSet, folder: Path, prefix: str) -> list[Path]:
    """The samples as files: texts in one .txt, each grid of images as a .png."""
    files = []
    folder.mkdir(parents=True, exist_ok=True)
    if samples.text:
        file = folder / f"{prefix}.txt"
        file.write_text("".join(f"--- {name}\n{text}\n" for name, text in samples.text.items()), encoding="utf-8")
        files.append(file)
    for name, image in samples.images.items():
        from matplotlib import image as png

        file = folder / f"{prefix}-{name}.png"
        png.imsave(file, image.clamp(0, 1).permute(1, 2, 0).cpu().numpy())
        files.append(file)
    return files


def fragments(training: Training) -> list[Fragment]:
    """All training state that this rank holds."""
    return [fragment.named(name) for name, engine in training.engines.items() for fragment in engine.fragments()] + training.ema.fragments


@dataclass
class Save:
    """A checkpoint: all networks and optimisers, the step, and where the data stand."""

    checkpointer: Checkpointer
    tracker: Tracker
    merge: Callable[[Sequence[RunState]], RunState]
    """Makes one data state of all ranks' states."""
    ledger: Ledger
    say: Say

    def __call__(self, training: Training) -> None:
        if training.step == self.checkpointer.newest:
            return
        begin = time.perf_counter()
        self.settle(training)
        assert training.data_state is not None, "a step was done"
        data = self.merge(training.world.gather(training.data_state))
        state = State(step=training.step, samples=training.samples, data=data, world=training.world.size, guard=training.guard.state())
        self.checkpointer.save(training.step, fragments(training), json.loads(json.dumps(state)))  # a copy: it is written later
        self.ledger.saved(data)
        self.tracker.log(training.step, {"checkpoint_stall_s": time.perf_counter() - begin})

    def settle(self, training: Training) -> str:
        """Wait for the save under way. Where it failed, that is said and returned: the run goes on, and the next save tries again."""
        problem = self.checkpointer.wait_for_all()
        if problem:
            self.say(EventKind.CHECKPOINT, f"{problem}; it is not taken", training.step)
        return problem
