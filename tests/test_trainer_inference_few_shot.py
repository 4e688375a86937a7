"""Few-shot tasks: prompts, answers, scores, intervals, and the made-up arithmetic.

An evaluation that is cut off continues.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kube_cluster import Run
from saved_runs import job_of, model_of, save_run
from scipy.stats import binomtest

from launch.commands.eval import evaluate_harness
from launch.prove.arithmetic import problem, write_task, write_texts
from trainer.inference.few_shot import MARK, Answers, Item, answer_in, example, prompt, read_task, wilson

pytestmark = pytest.mark.usefixtures("in_tmp_path")

ITEMS = [
    Item("1+1?", "2", "1+1=2", ("2", "3", "11"), "short"),
    Item("2+3?", "5", "2+3=5", ("5", "6", "x"), "short"),
    Item("1+2+3?", "6", "1+2=3 3+3=6"),
]


def test_a_prompt_shows_other_items_with_their_answers_and_then_asks() -> None:
    text = prompt(ITEMS, 0, 2, "direct", seed=0)
    assert sorted(text.splitlines()) == sorted(["Q: 2+3?", "A: 5", "Q: 1+2+3?", "A: 6", "Q: 1+1?", "A: "])
    assert text.endswith("Q: 1+1?\nA: ")
    assert example(ITEMS[0], "chain_of_thought") == "Q: 1+1?\nA: 1+1=2 #### 2\n"
    assert prompt(ITEMS, 1, 1, "direct", seed=0) == prompt(ITEMS, 1, 1, "direct", seed=0)


@pytest.mark.parametrize(
    ("written", "style", "answer"),
    [
        (" 7 \nQ: more", "direct", "7"),
        ("b=2 #### 2\n", "chain_of_thought", "2"),
        ("b=2", "chain_of_thought", ""),
        ("a #### 1 #### 3", "chain_of_thought", "3"),
    ],
)
def test_the_answer_is_the_first_line_or_what_follows_the_last_mark(written: str, style: Any, answer: str) -> None:
    assert answer_in(written, style) == answer


@pytest.mark.parametrize(("right", "of"), [(0, 7), (3, 7), (7, 7), (130, 200)])
def test_intervals_equal_scipys(right: int, of: int) -> None:
    expected = binomtest(right, of).proportion_ci(method="wilson")
    assert wilson(right, of) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_arithmetic_is_right_and_training_texts_ask_nothing_of_the_task(tmp_path: Path) -> None:
    for steps in (1, 4, 9):
        item = problem(random.Random(steps), steps)
        *program, asked = item.question.split()
        values: dict[str, Any] = {}
        for line in program:
            exec(line, {}, values)
        assert len(program) == steps + 1
        assert item.answer == str(values[asked[:-1]] % 10)
        assert [f"{name}={value % 10}" for name, value in values.items()][1:] == item.steps.split()
    asked = write_task(tmp_path / "task.jsonl", (1, 2), 30, seed=1)
    write_texts(tmp_path / "texts", "chain_of_thought", (1, 2), 20_000, 0, asked)
    text = "".join(
        json.loads(line)["text"] for file in (tmp_path / "texts").iterdir() for line in file.read_text().splitlines()
    )
    assert len(asked) == 60 == len(read_task(tmp_path / "task.jsonl", "chain_of_thought"))
    assert len(text) > 20_000
    assert MARK in text
    assert not asked & {line.removeprefix("Q: ") for line in text.splitlines()}


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(job_of(corpus, tmp_path_factory.mktemp("runs"), "answers", {}))


@torch.no_grad()
def test_what_is_written_is_greedy_and_choices_are_scored_by_their_tokens(run: Path) -> None:
    from data.text.tokenizers import ByteTokenizer

    model = model_of(run)
    tokenizer = ByteTokenizer()
    rows = {
        row["item"]: row
        for row in Answers(model, tokenizer, ITEMS, 1, "direct", tokens=5, seed=0).generate([0, 1, 2], batch=2)
    }
    for index, item in enumerate(ITEMS):
        tokens = [tokenizer.eod, *prompt(ITEMS, index, 1, "direct", 0).encode()]
        row = list(tokens)
        for _ in range(5):
            row.append(int(model(torch.tensor([row]))[0][0, -1].argmax()))
        written = tokenizer.decode([token for token in row[len(tokens) :] if token < tokenizer.vocab_size]).partition(
            "\n"
        )[0]
        assert rows[index]["written"] == written
        assert rows[index]["right"] == (written.strip() == item.answer)
        if item.choices:
            scores = []
            for choice in item.choices:
                ids = torch.tensor([[*tokens, *choice.encode()]])
                scores.append(
                    -float(
                        F.cross_entropy(
                            model(ids[:, :-1])[0][0, len(tokens) - 1 :], ids[0, len(tokens) :], reduction="sum"
                        )
                    )
                )
            assert rows[index]["likeliest"] == item.choices[scores.index(max(scores))]


def test_an_evaluation_that_is_cut_off_goes_on(run: Path, tmp_path: Path, switchwork: Run) -> None:
    task = tmp_path / "task.jsonl"
    write_task(task, (1, 2), 20, seed=0)
    arguments = [
        "eval",
        str(run),
        "--task",
        str(task),
        "--shots",
        "1",
        "--style",
        "chain_of_thought",
        "--tokens",
        "8",
        "--json",
    ]
    code, printed, _ = switchwork(*arguments)
    assert (code, "1 steps" in printed, "answered already" in printed) == (0, True, False)
    (file,) = (run / "evals").iterdir()
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])  # in the middle of a line
    code, again, _ = switchwork(*arguments)
    assert (code, "of 40 items are answered already" in again) == (0, True)
    assert again[again.index("{") :] == printed[printed.index("{") :]
    assert sorted(file.read_text().splitlines()) == sorted(whole.splitlines())


@pytest.mark.parametrize(
    ("line", "options", "words"),
    [
        ('{"question": "q"}', [], ["line 1", "answer"]),
        ("not json", [], ["line 1", "question and answer"]),
        ('{"question": "q", "answer": "a", "choices": ["b"]}', [], ["not among the choices"]),
        ('{"question": "q", "answer": "a"}', ["--style", "chain_of_thought"], ["no steps", "--style direct"]),
        ('{"question": "q", "answer": "a"}', ["--shots", "3"], ["--shots: 3", "use 0 to 0"]),
        ('{"question": "q", "answer": "a"}', ["--style", "loud"], ["--style: 'loud'", "chain_of_thought"]),
    ],
)
def test_a_wrong_task_is_refused_in_one_line(
    line: str, options: list[str], words: list[str], run: Path, tmp_path: Path, switchwork: Run
) -> None:
    (tmp_path / "task.jsonl").write_text(line + "\n")
    code, _, complaint = switchwork("eval", str(run), "--task", str(tmp_path / "task.jsonl"), *options)
    assert (code, complaint.count("\n")) == (2, 1), complaint
    assert all(word in complaint for word in words)


TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{choices.index(answer)}}"
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.slow
def test_the_harness_scores_the_exported_model(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from rich.console import Console

    write_task(tmp_path / "task.jsonl", (1,), 20, seed=0)
    (tmp_path / "sums.yaml").write_text(TASK.replace("FILE", str(tmp_path / "task.jsonl")))
    figures = evaluate_harness(Console(), str(run), "sums", str(tmp_path), shots=0)
    assert 0 <= figures["sums"]["acc,none"] <= 1
    assert json.loads((run / "evals" / "harness.json").read_text()) == figures
