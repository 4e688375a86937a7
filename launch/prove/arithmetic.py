"""Synthetic arithmetic in several steps: short programs over digits.

Each assignment of a program needs the value of the one before it. An example, modulo 10:

    a=7 b=a+5 c=b*8 c?        the steps are b=2 c=6, and the answer is 6
"""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from trainer.inference.few_shot import Item, Style, example

_NAMES = "abcdefghijklmnopqrstuvwxyz"


def problem(rng: random.Random, steps: int) -> Item:
    """Draw one problem whose solution takes `steps` steps."""
    value = rng.randrange(10)
    program = [f"a={value}"]
    worked = []
    for previous, name in itertools.pairwise(_NAMES[: steps + 1]):
        operator = rng.choice("+-*")
        number = rng.randrange(10)
        value = {"+": value + number, "-": value - number, "*": value * number}[operator] % 10
        program.append(f"{name}={previous}{operator}{number}")
        worked.append(f"{name}={value}")
    return Item(
        question=" ".join(program) + f" {_NAMES[steps]}?",
        steps=" ".join(worked),
        answer=str(value),
        choices=tuple("0123456789"),
        group=f"{steps} steps",
    )


def write_task(file: Path, steps: Sequence[int], per_count: int, seed: int) -> set[str]:
    """Write a task for `switchwork eval` and return its questions.

    The task has `per_count` different problems for each number of steps in `steps`.
    """
    rng = random.Random(seed)
    items: dict[str, Item] = {}
    for counts_done, count in enumerate(steps):
        while len(items) < (counts_done + 1) * per_count:
            item = problem(rng, count)
            items.setdefault(item.question, item)
    file.write_text("".join(json.dumps(asdict(item)) + "\n" for item in items.values()))
    return set(items)


def write_texts(
    folder: Path, style: Style, steps: Sequence[int], characters: int, seed: int, without: set[str], shards: int = 8
) -> None:
    """Write training documents of problems in `style`, about `characters` characters in total.

    No document asks a question of `without`, so that the model never trains on the task.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        rng = random.Random(f"{seed}/{shard}")
        size = 0
        lines: list[str] = []
        while size < characters / shards:
            text = "".join(_problems(rng, style, steps, without))
            lines.append(json.dumps({"text": text}) + "\n")
            size += len(text)
        (folder / f"part-{shard}.jsonl").write_text("".join(lines))


def _problems(
    rng: random.Random, style: Style, steps: Sequence[int], without: set[str], count: int = 20
) -> Iterator[str]:
    """Yield `count` worked examples in `style`, none of which asks a question of `without`."""
    while count:
        item = problem(rng, rng.choice(steps))
        if item.question not in without:
            count -= 1
            yield example(item, style)
