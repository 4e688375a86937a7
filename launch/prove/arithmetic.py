"""Arithmetic in several steps, made up: short programs over digits, each line of which needs the value of the one before.

a=7 b=a+5 c=b*8 c?        worked out modulo 10: b=2 c=6, and the answer is 6
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
    """One problem that takes `steps` steps."""
    value = rng.randrange(10)
    program, worked = [f"a={value}"], []
    for before, name in itertools.pairwise(_NAMES[: steps + 1]):
        operator = rng.choice("+-*")
        number = rng.randrange(10)
        value = {"+": value + number, "-": value - number, "*": value * number}[operator] % 10
        program.append(f"{name}={before}{operator}{number}")
        worked.append(f"{name}={value}")
    return Item(
        question=" ".join(program) + f" {_NAMES[steps]}?",
        steps=" ".join(worked),
        answer=str(value),
        choices=tuple("0123456789"),
        group=f"{steps} steps",
    )


def write_task(file: Path, steps: Sequence[int], per_count: int, seed: int) -> set[str]:
    """`per_count` different problems of every number of `steps`, as a task for `switchwork eval`; returns their questions."""
    rng = random.Random(seed)
    items: dict[str, Item] = {}
    for number, count in enumerate(steps, 1):
        while len(items) < number * per_count:
            item = problem(rng, count)
            items.setdefault(item.question, item)
    file.write_text("".join(json.dumps(asdict(item)) + "\n" for item in items.values()))
    return set(items)


def write_texts(
    folder: Path, style: Style, steps: Sequence[int], characters: int, seed: int, without: set[str], shards: int = 8
) -> None:
    """Training documents of problems in `style`, `characters` of them in all, none of which asks what is in `without`."""
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
    while count:
        item = problem(rng, rng.choice(steps))
        if item.question not in without:
            count -= 1
            yield example(item, style)
