"""Rounds of paired timings: each benchmark runs its sides in turn and prints medians and ratios."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks take."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default: {rounds}")
    return parser


def in_turn(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each side in each round, after one round that does not count.

    The order of the sides turns from round to round.
    """
    samples: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for index in range(rounds + 1):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            begin = time.perf_counter()
            sides[name]()
            if index:
                samples[name].append(time.perf_counter() - begin)
    return samples


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over rounds of ours / theirs: what slows the machine in a round strikes both."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def show(samples: Mapping[str, Sequence[float]], unit: float = 1e3, name: str = "ms") -> None:
    """A line for each side: median, and the range of the rounds."""
    for side, seconds in samples.items():
        scaled = [value * unit for value in seconds]
        spread = f"{min(scaled):.2f} to {max(scaled):.2f} in {len(scaled)} rounds"
        print(f"{side:24} {statistics.median(scaled):9.2f} {name}   ({spread})")


def write(file: Path | None, content: Any) -> None:
    if file is not None:
        file.write_text(json.dumps(content, indent=1))
