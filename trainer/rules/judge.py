"""The solver, in a process of its own so that it can be ended.

Reads one request as JSON from standard input, and writes one line per candidate.

    python -m trainer.rules.judge < REQUEST

A fact is a list: its name, then its arguments.
"""

import json
import re
import resource
import sys
from collections.abc import Sequence
from typing import TypedDict

import clingo

from trainer.rules.derivation import conflicts, explain, instrumented, symbol, uses
from trainer.rules.graph import Fact
from trainer.rules.program import Program, located, read_program

_MEMORY = 2 << 30
_LARGEST = (1 << 31) - 1


class Judged(TypedDict):
    """A candidate in a request."""

    text: str
    facts: Sequence[Fact]


class Request(TypedDict):
    """Rules, and the candidates to judge by them."""

    name: str
    """The file of rules."""
    text: str
    """Its text."""
    graph: Sequence[Fact]
    candidates: Sequence[Judged]


class Verdict(TypedDict):
    """The answer for one candidate."""

    conflicts: list[str]
    derivation: list[str]


def judge(program: Program, graph: Sequence[Fact], candidate: Judged) -> Verdict:
    """Judge one candidate. Raises ValueError for rules that cannot be grounded."""
    facts = {symbol(fact): "knowledge graph" for fact in graph}
    facts |= {symbol(fact): "given" for fact in candidate["facts"]}
    facts |= {symbol(fact): "from the text" for fact in matched(program, candidate["text"])}
    atoms = solve(program, list(facts))
    goals = conflicts(atoms)
    recorded = uses(program, atoms)
    derivation: list[str] = []
    for goal in goals:
        derivation += explain(goal, program, recorded, facts)
    return {"conflicts": [str(goal) for goal in goals], "derivation": derivation}


def matched(program: Program, text: str) -> list[Fact]:
    """The facts that the `%match` lines draw from `text`.

    A fact is a name, the number of the match from 1, then its groups; digits are whole numbers.
    """
    facts: list[Fact] = []
    for name, pattern in program.matches:
        for number, match in enumerate(re.finditer(pattern, text), 1):
            facts.append((name, number, *(_value(group or "") for group in match.groups())))
    return facts


def _value(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?\d{1,10}", text) and abs(int(text)) <= _LARGEST else text


def solve(program: Program, facts: list[clingo.Symbol]) -> list[clingo.Symbol]:
    """All atoms that follow from the rules and `facts`: the only answer set."""
    complaints: list[str] = []
    control = clingo.Control(["--models=2", "--warn=none"], logger=lambda _, message: complaints.append(message))
    try:
        control.add("base", [], "\n".join(instrumented(program)))
        with control.backend() as backend:
            for fact in facts:
                backend.add_rule([backend.add_atom(fact)])
        control.ground([("base", [])])
    except RuntimeError:
        lines = [line.replace("<block>", "<string>") for line in complaints]
        raise ValueError(located(program.name, lines)) from None
    with control.solve(yield_=True) as handle:
        models = [model.symbols(atoms=True) for model in handle]
    assert len(models) == 1, f"{program.name}: {len(models)} answer sets of a stratified program"
    return list(models[0])


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    request: Request = json.load(sys.stdin)
    program = read_program(request["text"], request["name"])
    try:
        for candidate in request["candidates"]:
            print(json.dumps(judge(program, request["graph"], candidate)), flush=True)
    except ValueError as error:
        print(json.dumps({"error": str(error)}), flush=True)
    except MemoryError:
        print(json.dumps({"endless": f"more than {_MEMORY >> 30} GB"}), flush=True)


if __name__ == "__main__":
    main()
