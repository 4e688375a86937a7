"""Few-shot evaluation of a language model (Brown et al. 2020).

A prompt has k worked examples and then the question. The examples give the answer at once, or after
written-out steps (chain of thought, Wei et al. 2022).

A task is a file of JSON lines with `question` and `answer`; with `steps` for chain of thought; with
`choices` for multiple choice; and with `group` to report accuracy by group as well.
"""

import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import torch
import torch.nn.functional as F

from data.text.tokenizers import Tokenizer
from models.init import stable_hash
from models.transformer.generate import generate
from models.transformer.model import Transformer

Style = Literal["direct", "chain_of_thought"]
MARK = " #### "
"""Separates the steps from the answer, as in GSM8K (Cobbe et al. 2021)."""


@dataclass(frozen=True)
class Item:
    """One question of a task."""

    question: str
    answer: str
    steps: str = ""
    """The way to the answer in words, for chain of thought."""
    choices: tuple[str, ...] = ()
    """Possible answers of a multiple-choice question."""
    group: str = ""
    """Group of items for which accuracy is also reported."""


def read_task(file: Path, style: Style) -> list[Item]:
    """The items of a task file.

    Raises ValueError, with the line's number, for a line that is no item, or that has no steps
    where `style` needs them.
    """
    items = []
    if not file.is_file():
        raise ValueError(f"--task: {file} is no file; give JSON lines with question and answer")
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            values = json.loads(line)
            texts: dict[str, Any] = {
                key: tuple(map(str, value)) if key == "choices" else str(value) for key, value in values.items()
            }
            item = Item(**texts)
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise ValueError(
                f"--task: {file}, line {number}: {error}; each line is an object with question and answer, "
                "and may have steps, choices, group"
            ) from None
        if style == "chain_of_thought" and not item.steps:
            raise ValueError(
                f"--task: {file}, line {number}: no steps, which --style chain_of_thought shows; "
                "add them, or use --style direct"
            )
        if item.choices and item.answer not in item.choices:
            raise ValueError(
                f"--task: {file}, line {number}: the answer {item.answer!r} is not among the choices; add it"
            )
        items.append(item)
    if not items:
        raise ValueError(f"--task: {file} is empty; give JSON lines with question and answer")
    return items


def example(item: Item, style: Style) -> str:
    """A question with its answer, as the examples in context show it."""
    way = f"{item.steps}{MARK}" if style == "chain_of_thought" else ""
    return f"Q: {item.question}\nA: {way}{item.answer}\n"


def prompt(items: Sequence[Item], index: int, shots: int, style: Style, seed: int) -> str:
    """`shots` other items with answers, drawn from (seed, index), then the question of `index`."""
    others = [item for position, item in enumerate(items) if position != index]
    drawn = random.Random(stable_hash(seed, index)).sample(others, shots)
    return "".join(example(item, style) for item in drawn) + f"Q: {items[index].question}\nA: "


def answer_in(text: str, style: Style) -> str:
    """The answer in the text that a model wrote after `A: `.

    It is the first line, or for a chain of thought the part after the mark; "" without a mark.
    """
    line = text.partition("\n")[0]
    if style == "chain_of_thought":
        _, mark, line = line.rpartition(MARK)
        line = line if mark else ""
    return line.strip()


class Answer(TypedDict):
    """The judged text that a model wrote for one item of a task; a row of `evals/`."""

    item: int
    group: str
    written: str
    right: bool
    likeliest: NotRequired[str]
    """The likeliest option of a multiple-choice item."""
    likeliest_right: NotRequired[bool]


class Answers:
    """A model's answers to the items of a task."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        items: Sequence[Item],
        shots: int,
        style: Style,
        tokens: int,
        seed: int,
    ):
        if not 0 <= shots < len(items):
            raise ValueError(f"--shots: {shots} examples of a task of {len(items)} items; use 0 to {len(items) - 1}")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.items = items
        self.shots = shots
        self.style = style
        self.tokens = tokens
        self.seed = seed

    def generate(self, indices: Sequence[int], batch: int) -> Iterator[Answer]:
        """For each item, yield the generated text, whether it is correct and, for multiple choice,
        whether the likeliest option is. Prompts are batched by length."""
        prompts = {
            index: self._encode(prompt(self.items, index, self.shots, self.style, self.seed), start=True)
            for index in indices
        }
        by_length: dict[int, list[int]] = {}
        for index, tokens in prompts.items():
            by_length.setdefault(len(tokens), []).append(index)
        for same in by_length.values():
            for begin in range(0, len(same), batch):
                part = same[begin : begin + batch]
                for index, written in zip(part, self._written([prompts[index] for index in part]), strict=True):
                    yield self._judged(index, prompts[index], written)

    def _encode(self, text: str, start: bool = False) -> list[int]:
        begin = [self.tokenizer.eod] * start
        if not text:
            return begin
        return begin + [int(token) for token in self.tokenizer.encode([text])[0]]

    def _written(self, prompts: Sequence[list[int]]) -> list[str]:
        """The greedy continuation of every prompt, up to the end of the line."""
        newline = self._encode("\n")
        tokens_BT = generate(
            self.model,
            torch.tensor(prompts),
            self.tokens,
            temperature=0,
            stop=newline[0] if len(newline) == 1 else None,
        )
        known = [
            [token for token in row if token < self.tokenizer.vocab_size]
            for row in tokens_BT[:, len(prompts[0]) :].tolist()
        ]
        return [self.tokenizer.decode(row).partition("\n")[0] for row in known]

    def _judged(self, index: int, tokens: list[int], written: str) -> Answer:
        item = self.items[index]
        answer = Answer(
            item=index, group=item.group, written=written, right=answer_in(written, self.style) == item.answer
        )
        if item.choices:
            way = written.rpartition(MARK)[0] + MARK if self.style == "chain_of_thought" and MARK in written else ""
            scores = self._log_likelihoods(tokens + self._encode(way), item.choices)
            answer["likeliest"] = item.choices[max(range(len(scores)), key=scores.__getitem__)]
            answer["likeliest_right"] = answer["likeliest"] == item.answer
        return answer

    @torch.no_grad()
    def _log_likelihoods(self, tokens: list[int], choices: Sequence[str]) -> list[float]:
        """log p(choice | tokens), in nats: the sum over the choice's tokens."""
        endings = [self._encode(choice) for choice in choices]
        longest = max(map(len, endings))
        rows_BT = torch.tensor([tokens + ending + [self.tokenizer.eod] * (longest - len(ending)) for ending in endings])
        log_p_BTV = F.log_softmax(self.model(rows_BT)[0][:, len(tokens) - 1 : -1].float(), dim=-1)
        return [
            float(sum(log_p_TV[position, token] for position, token in enumerate(ending)))
            for log_p_TV, ending in zip(log_p_BTV, endings, strict=True)
        ]


def wilson(right: int, of: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927; Brown, Cai & DasGupta 2001, equation 4)."""
    share, shift = right / of, z * z / of
    middle = (share + shift / 2) / (1 + shift)
    reach = z * math.sqrt(share * (1 - share) / of + shift / (4 * of)) / (1 + shift)
    return middle - reach, middle + reach


def digest_of(items: Sequence[Item]) -> str:
    """A digest of the items, which ties answers to the task that they belong to."""
    return hashlib.sha256(json.dumps([vars(item) for item in items]).encode()).hexdigest()[:16]
