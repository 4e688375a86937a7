"""Rule files, good and bad, with the decisions and derivations that are due.

The knowledge graph, the decision log's chain and the hook are tested too.
"""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.rules import RulesConfig
from trainer.rules.gate import Candidate, Gate, labels, measures
from trainer.rules.graph import read_graph
from trainer.rules.log import DecisionLog, digest, verify
from trainer.run_files import RULES_HEAD, RULES_LOG
from trainer.storage import Folder

FILES = Path(__file__).parent / "rules"
FAMILY = "subject,predicate,object\nann,parent,bob\nbob,parent,cid\n"


def gate(name: str, graph: Path | None = None, **options: Any) -> Gate:
    return Gate(RulesConfig(file=str(FILES / f"{name}.lp"), graph=str(graph) if graph else None, **options))


GOOD: list[tuple[str, str, tuple[Any, ...], list[str], list[str]]] = [
    ("sums", "1 + 2 = 3 and 4 + 4 = 8", (), [], []),
    (
        "sums",
        "1 + 2 = 3, then 12 + 7 = 20.",
        (),
        ['flag_conflict("wrong sum",2)'],
        [
            "the sum of equation 2 is wrong [sums.lp, line 5]",
            "  equation 2 says 12 + 7 = 20 [from the text]",
            "  (12+7) != 20",
        ],
    ),
    ("arithmetic", "3 * 4 = 12, 3 - 5 = -2", (), [], []),
    (
        "arithmetic",
        "3 * 4 = 13",
        (),
        ['flag_conflict("wrong",1)'],
        [
            'flag_conflict("wrong",1) [arithmetic.lp, line 6]',
            '  equation(1,3,"*",4,13) [from the text]',
            "  value(1,12) [arithmetic.lp, line 5]",
            '    equation(1,3,"*",4,13) [from the text]',
            "  12 != 13",
        ],
    ),
    (
        "arithmetic",
        "words",
        (),
        ['flag_conflict("nothing claimed")'],
        ['flag_conflict("nothing claimed") [arithmetic.lp, line 7]', "  claimed is not known"],
    ),
    ("family", "ann is a parent of dan", (), [], []),
    (
        "family",
        "cid is a parent of ann",
        (),
        ['flag_conflict("cid","ann")'],
        [
            "cid cannot be a parent of ann [family.lp, line 11]",
            "  the text calls cid a parent of ann [from the text]",
            "  ann is an ancestor of cid [family.lp, line 10]",
            "    ann is an ancestor of bob [family.lp, line 9]",
            "      ann is a parent of bob [family.lp, line 8]",
            "        it is known that ann is a parent of bob [knowledge graph]",
            "    bob is a parent of cid [family.lp, line 8]",
            "      it is known that bob is a parent of cid [knowledge graph]",
        ],
    ),
    ("labels", "", labels([("cat", 0.9), ("dog", 0.1)]), [], []),
    (
        "labels",
        "",
        labels([("cat", 0.5), ("dog", 0.45)]),
        ['flag_conflict("unsure")', 'flag_conflict("two at once","cat","dog")'],
        [
            'flag_conflict("unsure") [labels.lp, line 2]',
            "  sure is not known",
            'flag_conflict("two at once","cat","dog") [labels.lp, line 4]',
            '  label("cat",50) [given]',
            '  label("dog",45) [given]',
            '  "cat" < "dog"',
            "  50 >= 40",
            "  45 >= 40",
        ],
    ),
    ("metrics", "", (*measures("metric", {"loss": 1.5}), *measures("champion_metric", {"loss": 1.5001})), [], []),
    (
        "metrics",
        "",
        (*measures("metric", {"loss": 1.52}), *measures("champion_metric", {"loss": 1.5})),
        ['flag_conflict("worse","loss")'],
        [
            "loss is worse than the champion's [metrics.lp, line 6]",
            "  loss is 1520 thousandths [given]",
            "  the champion's loss is 1500 thousandths [given]",
            '  lower_is_better("loss") [metrics.lp, line 9]',
            "  1520 > 1500",
        ],
    ),
    (
        "metrics",
        "",
        (),
        ['flag_conflict("not measured","loss")'],
        [
            "loss was not measured [metrics.lp, line 7]",
            '  lower_is_better("loss") [metrics.lp, line 9]',
            '  measured("loss") is not known',
        ],
    ),
    ("count", "a b a b a b", (), [], []),
    ("constants", "9 10", (), [], []),
    (
        "constants",
        "9 11",
        (),
        ['flag_conflict("too large",11)'],
        ['flag_conflict("too large",11) [constants.lp, line 3]', "  number(2,11) [from the text]", "  11 > limit"],
    ),
    ("intervals", "5", (), [], []),
    (
        "intervals",
        "50",
        (),
        ["flag_conflict"],
        ["flag_conflict [intervals.lp, line 4]", "  number(1,50) [from the text]", "  digit(50) is not known"],
    ),
    ("bounded", "", (("length", 7),), [], []),
    ("never", "anything", (), [], []),
]


@pytest.mark.parametrize(
    ("name", "text", "facts", "conflicts", "derivation"),
    GOOD,
    ids=[f"{name}-{number}" for number, (name, *_) in enumerate(GOOD)],
)
def test_good_rules_decide_and_say_why(
    name: str, text: str, facts: tuple[Any, ...], conflicts: list[str], derivation: list[str], tmp_path: Path
) -> None:
    graph = tmp_path / "graph.csv"
    graph.write_text(FAMILY)
    (decision,) = gate(name, graph).judge([Candidate(text=text, facts=facts)])
    assert list(decision.conflicts) == conflicts
    assert list(decision.derivation) == derivation
    assert decision.accepted is not bool(conflicts)


def test_aggregates_strings_recursion_and_many_candidates() -> None:
    first, second = gate("count").judge([Candidate(text="go " * 3), Candidate(text="go " * 4)])
    assert first.accepted
    assert second.reasons == ('flag_conflict("repeats","go") [count.lp, line 3]',) * len(second.reasons)
    (quoted,) = gate("strings").judge([Candidate(text="'a \"b\" % c'")])
    assert quoted.conflicts == ('flag_conflict("% #include @","a \\"b\\" % c")',)
    (far,) = gate("bounded").judge([Candidate(facts=(("length", 101),))])
    assert far.conflicts == ('flag_conflict("far",5)',)
    assert "      step(3) [bounded.lp, line 3]" in far.derivation


def test_a_cycle_in_the_graph_is_explained_without_going_round(tmp_path: Path) -> None:
    graph = tmp_path / "graph.nt"
    graph.write_text("".join(f"<urn:{a}> <urn:above> <urn:{b}> .\n" for a, b in (("a", "b"), ("b", "c"), ("c", "a"))))
    rules = tmp_path / "cycle.lp"
    rules.write_text((FILES / "cyclic_graph.lp").read_text().replace('"above"', '"urn:above"'))
    (decision,) = Gate(RulesConfig(file=str(rules), graph=str(graph))).judge([Candidate()])
    assert len(decision.conflicts) == 3
    first = decision.derivation[
        : next(i for i, line in enumerate(decision.derivation[1:], 1) if not line.startswith(" "))
    ]
    stack: list[str] = []
    for line in first:
        depth = (len(line) - len(line.lstrip())) // 2
        stack = [*stack[:depth], line.strip().split(" [")[0]]
        assert len(set(stack)) == len(stack), "an atom rests on itself"
    assert sum("knowledge graph" in line for line in first) >= 3


BAD = [
    ("bad_syntax", ["line 2", "syntax error"]),
    ("bad_unsafe", ["line 3", "unsafe variable X"]),
    ("bad_choice", ["line 1", "choice"]),
    ("bad_script", ["line 2", "#script is not allowed"]),
    ("bad_include", ["line 1", "block comment"]),
    ("bad_negation", ["line 1", "depends on itself through `not`"]),
    ("bad_constraint", ["line 2", "constraint without a conclusion"]),
    ("bad_disjunction", ["line 1", "`or` among conclusions"]),
    ("bad_match", ["line 1", "unterminated subpattern"]),
    ("bad_external", ["line 1", "`@` calls a function"]),
]


@pytest.mark.parametrize(("name", "words"), BAD, ids=[name for name, _ in BAD])
def test_bad_rules_are_refused_with_line_and_reason(name: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        gate(name)
    assert "\n" not in str(error.value)
    for word in (f"{name}.lp", *words):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"), [("bad_endless", ["line 2", "bound them"]), ("bad_explosion", ["no conclusion"])]
)
def test_rules_that_never_end_are_ended(name: str, words: list[str]) -> None:
    begin = time.monotonic()
    with pytest.raises(ValueError) as error:
        gate(name, time_limit_s=3.0)
    assert time.monotonic() - begin < 10
    assert "\n" not in str(error.value)
    for word in (f"{name}.lp", *words):
        assert word in str(error.value)


def test_graphs(tmp_path: Path) -> None:
    file = tmp_path / "g.csv"
    file.write_text(FAMILY + '"d, e",age,41\n')
    assert read_graph(str(file)) == [
        ("triple", "ann", "parent", "bob"),
        ("triple", "bob", "parent", "cid"),
        ("triple", "d, e", "age", 41),
    ]
    triples = tmp_path / "g.nt"
    triples.write_text('# a comment\n<http://x/a> <http://x/p> "caf\\u00e9"@fr .\n\n<http://x/a> <http://x/n> "7" .\n')
    assert read_graph(str(triples)) == [
        ("triple", "http://x/a", "http://x/p", "café"),
        ("triple", "http://x/a", "http://x/n", 7),
    ]
    for name, content, words in (
        ("w.csv", "a,b\n", ["line 1", "2 columns"]),
        ("w.nt", "<urn:a> <urn:b> <urn:c> .\nnonsense\n", ["line 2"]),
        ("w.ttl", "", ["neither .csv nor .nt"]),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError) as error:
            read_graph(str(tmp_path / name))
        assert "\n" not in str(error.value)
        assert all(word in str(error.value) for word in words)


def test_the_audit_log_breaks_wherever_it_is_touched(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    rules = gate("sums")
    candidates = [Candidate(text=f"{n} + 1 = {n + 1 + n % 2}") for n in range(6)]
    log = DecisionLog(folder)
    for candidate, decision in zip(candidates[:4], rules.judge(candidates[:4]), strict=True):
        log.add(rules, candidate, decision, "test", "digest")
    log = DecisionLog(folder)  # a later command goes on with the same chain
    for candidate, decision in zip(candidates[4:], rules.judge(candidates[4:]), strict=True):
        log.add(rules, candidate, decision, "test", "digest")
    rows = [json.loads(line) for line in (tmp_path / RULES_LOG).read_text().splitlines()]
    assert [row["accepted"] for row in rows] == [True, False] * 3
    assert rows[1]["derivation"][0] == "the sum of equation 1 is wrong [sums.lp, line 5]"
    assert {row["rules"] for row in rows} == {rules.rules_digest}
    assert verify(folder) == []
    good = (tmp_path / RULES_LOG).read_text().splitlines()
    head = (tmp_path / RULES_HEAD).read_text()
    forged = json.loads(good[2]) | {"accepted": False}
    forged["hash"] = digest(forged)
    damaged = {
        "a changed line": [*good[:1], good[1].replace('"accepted": false', '"accepted": true'), *good[2:]],
        "a changed line with its hash": [*good[:2], json.dumps(forged), *good[3:]],
        "a dropped line": [*good[:3], *good[4:]],
        "a dropped end": good[:-1],
        "two lines exchanged": [good[1], good[0], *good[2:]],
        "a repeated line": [*good, good[-1]],
        "no JSON": [*good[:5], "{"],
    }
    for what, lines in damaged.items():
        (tmp_path / RULES_LOG).write_text("\n".join(lines) + "\n")
        assert len(verify(folder)) == 1, what
        with pytest.raises(ValueError, match="audit log"):
            DecisionLog(folder)
    (tmp_path / RULES_LOG).unlink()
    assert verify(folder) != []
    (tmp_path / RULES_LOG).write_text("\n".join(good) + "\n")
    (tmp_path / RULES_HEAD).write_text(head)
    assert verify(folder) == []


def test_what_the_arithmetic_rules_accept_is_right(tmp_path: Path) -> None:
    """Of random claims, half of them wrong, every right one is accepted and no wrong one is."""
    import random

    random.seed(0)
    claims = []
    for _ in range(60):
        a = random.randrange(-99, 99)
        b = random.randrange(0, 99)
        op = random.choice("+-*")
        right = {"+": a + b, "-": a - b, "*": a * b}[op]
        claims.append((a, op, b, right + random.choice([0, 0, 1, -10])))
    decisions = gate("arithmetic").judge([Candidate(text=f"{a} {op} {b} = {c}") for a, op, b, c in claims])
    truth = [eval(f"({a}) {op} ({b})") == c for a, op, b, c in claims]
    assert [decision.accepted for decision in decisions] == truth
    assert 10 < sum(truth) < 50
