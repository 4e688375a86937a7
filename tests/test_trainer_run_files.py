"""The run folder: one module names its files, and programs agree by types, never by words.

Folders of the old code are still read.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from saved_runs import summary_of

from trainer import run_files as files_of_a_run
from trainer.endings import ALL_STEPS_DONE, UNKNOWN, Ending, Stopped
from trainer.foreign_errors import is_lost_peer, is_out_of_memory
from trainer.inference.load import ALONE
from trainer.records.attempts import begin_attempt, close_attempt, current_attempt, note_end, recorded, stopped_by_error
from trainer.run_files import RunFiles, run_files
from trainer.run_rows import Anomaly, Event, EventKind, Fault, GoodputRow, Job
from trainer.storage import Folder
from trainer.tracking.tracker import JsonlTracker, history

PACKAGES = ("launch", "cluster", "trainer", "models", "data")
MODULES = [path for package in PACKAGES for path in sorted(Path(package).rglob("*.py"))]
NAMES = {value for name, value in vars(files_of_a_run).items() if name.lstrip("_").isupper() and isinstance(value, str)}
WORDS = {name for name in NAMES if "." not in name and "_" not in name}
"""Names that are plain words elsewhere, such as `samples`; they count where a file is meant."""
READERS = {"startswith", "endswith", "removeprefix", "removesuffix", "match", "fullmatch", "search", "find", "index"}
TEXTS = {"ended", "stopped", "event", "detail", "wants_stop", "failure"}
FILE_CALLS = {"exists", "read", "write", "append", "append_line", "lines", "lines_from", "delete", "put", "fetch"}


def docstrings(tree: ast.AST) -> set[int]:
    """Ids of the strings that stand alone: docstrings of modules, functions and fields."""
    alone = (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))
    return {id(value) for value in alone if isinstance(value, ast.Constant)}


def named_files(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of each string that names a file of a run folder."""
    ignored = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in ignored:
            parts = node.value.replace("`", " ").replace("#", " ").replace("/", " ").split()
            if {part.strip(".,;:()") for part in parts} & (NAMES - WORDS):
                yield node.lineno, node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FILE_CALLS:
            yield from (
                (node.lineno, word) for word in map(plain_text, node.args[:1]) if word.partition("/")[0] in WORDS
            )
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and is_run_folder(node.left):
            yield from ((node.lineno, word) for word in [plain_text(node.right)] if word.partition("/")[0] in WORDS)


def plain_text(node: ast.AST) -> str:
    """The text of a string, or what an f-string begins with."""
    if isinstance(node, ast.JoinedStr) and node.values:
        return plain_text(node.values[0])
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def is_run_folder(node: ast.AST) -> bool:
    """Whether an expression is a Folder by its name; scratch folders have other names."""
    return any(name in ("folder", "run", "files") for name in names_in(node))


def names_in(node: ast.AST) -> set[str]:
    """Variables, attributes and string keys that an expression consists of."""
    found = set()
    for part in ast.walk(node):
        match part:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                found.add(name)
            case ast.Subscript(slice=ast.Constant(value=str(key))):
                found.add(key)
    return found


def recognised_words(tree: ast.AST) -> Iterator[int]:
    """Lines in which a text about an end or an event is compared with words."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in READERS:
            texts = [node.func.value, *node.args]
        elif isinstance(node, ast.Compare) and any(
            isinstance(side, ast.Constant) and isinstance(side.value, str) for side in (node.left, *node.comparators)
        ):
            texts = [
                side
                for side in (node.left, *node.comparators)
                if isinstance(side, ast.Attribute | ast.Subscript | ast.Call)
            ]
        else:
            continue
        if any(names_in(text) & TEXTS for text in texts):
            yield node.lineno


def test_one_module_names_the_files_of_a_run_folder() -> None:
    others = [module for module in MODULES if module != Path("trainer/run_files.py")]
    named = [
        f"{module}:{line} {text!r}" for module in others for line, text in named_files(ast.parse(module.read_text()))
    ]
    assert not named, "use a method or a name of trainer/run_files.py:\n" + "\n".join(named)


def test_a_run_folder_is_put_together_in_one_place() -> None:
    joined = [
        f"{module}" for module in MODULES if ".root}/{" in module.read_text() or "['root']}/{" in module.read_text()
    ]
    assert not joined, "use run_files(root, name)"


def test_no_program_recognises_an_end_or_an_event_by_its_words() -> None:
    ours = [module for module in MODULES if "kubernetes" not in str(module)]  # whose own events are words
    others = [module for module in ours if module.name not in ("endings.py", "foreign_errors.py")]
    recognised = [f"{module}:{line}" for module in others for line in recognised_words(ast.parse(module.read_text()))]
    assert not recognised, "compare an Ending or an EventKind:\n" + "\n".join(recognised)


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        (named_files, 'folder.exists("summary.json")'),
        (named_files, 'print(f"see {folder}/metrics.jsonl")'),
        (named_files, 'folder / "checkpoints"'),
        (named_files, 'folder.read("stop")'),
        (recognised_words, 'summary["stopped"].startswith(PREEMPTED)'),
        (recognised_words, '"passing over" in row["event"]'),
        (recognised_words, 'row["ended"] == "all steps done"'),
        (recognised_words, "re.match(words, end.detail)"),
    ],
)
def test_the_rules_notice_what_they_forbid(rule: object, line: str) -> None:
    assert list(rule(ast.parse(line)))  # type: ignore[operator]


def test_the_command_and_rays_controller_read_a_run_folder_without_torch() -> None:
    code = "import sys; import trainer.records.attempts, trainer.run_files; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"


def test_the_table_of_the_run_folder_has_every_file() -> None:
    assert files_of_a_run.__doc__ is not None
    missing = [name for name in NAMES if name not in files_of_a_run.__doc__]
    assert missing == ["harness.json"], "it lies in evals/"


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    files = run_files(str(tmp_path), "run")
    files.folder.make()
    return files


def test_what_a_file_is_given_it_gives_back(files: RunFiles) -> None:
    job = Job(run={"name": "run", "seed": 1}, cluster={"workers": 2})
    anomaly = Anomaly(step=3, reason="the loss is nan", first=2, last=3)
    fault = Fault(fault=0, name="kill", step=3, rank=1, time=4.5)
    goodput = GoodputRow(attempt=0, begin=1.0, until=2.0, step=3, ended=True, seconds={"step": 1.0})
    summary = summary_of(3, Stopped(Ending.ANOMALY, "step 3: the loss is nan"))
    files.write_job(job)
    files.add_anomaly(anomaly)
    files.add_fault(fault)
    files.write_goodput([goodput])
    files.write_summary(summary)
    files.write_data_manifest({"digest": "d"})
    files.add_to_ledger({"step": 0, "lanes": {}})
    files.write_first_step_seconds(1.5)
    files.write_mlflow_run_id("id")
    files.write_job_id("job")
    files.write_failure("no room")
    sent = files.sent()
    sent["sent_bytes"] = 7
    files.write_sent(sent)
    assert (files.job(), files.anomalies(), files.faults(), files.goodput()) == (job, [anomaly], [fault], [goodput])
    assert files.summary() == summary
    assert (files.data_manifest(), files.ledger()) == ({"digest": "d"}, [{"step": 0, "lanes": {}}])
    assert (files.first_step_seconds(), files.mlflow_run_id(), files.job_id(), files.sent()) == (1.5, "id", "job", sent)
    assert files.failure() == "no room"
    files.delete_results()
    assert (files.failure(), files.summary()) == (None, None)


def test_a_folder_without_files_has_nothing_to_tell(files: RunFiles) -> None:
    assert (files.has_job, files.has_begun, files.has_summary) == (False, False, False)
    assert (files.attempts_begun(), files.attempts_ended(), files.events(), files.metrics()) == ([], [], [], [])
    assert (files.summary(), files.stop_request(), files.data_manifest(), files.goodput()) == (None, None, None, [])
    files.delete_stop_request()


def test_attempts_tell_why_they_ended(files: RunFiles) -> None:
    for _ in range(2):
        attempt = begin_attempt(files, ALONE)
    note_end(files, attempt, "rank 0", ALL_STEPS_DONE)
    close_attempt(files, attempt)
    assert current_attempt(files) == 1
    assert [(end.attempt, end.stopped) for end in files.attempts_ended()] == [(0, UNKNOWN), (1, ALL_STEPS_DONE)]
    row = files.folder.lines("attempts.jsonl")[-1]
    assert (row["ended"], row["ending"]) == ("all steps done", "steps_done")


def test_a_new_attempt_at_an_object_store_removes_the_parts_of_a_killed_save() -> None:
    root = Folder("memory://killed-save")
    published, killed = root / "checkpoints" / "step-00000002", root / "checkpoints" / "step-00000004"
    for folder, names in (
        (published, ["manifest.json", "rank-00000.safetensors", "rank-00001.json"]),
        (killed, ["rank-00000.safetensors", "rank-00000.json", "rank-00001.failed"]),
    ):
        for name in names:
            folder.write(name, b"{}")
    begin_attempt(RunFiles(root), ALONE)
    assert published.names() == ["manifest.json", "rank-00000.safetensors"]
    assert killed.names() == [], "rank-00000.json would count as a part of the next save of step 4"


def test_a_new_attempt_at_a_disk_keeps_a_checkpoint_that_lost_its_manifest(files: RunFiles) -> None:
    damaged, unpublished = files.checkpoints / "step-00000002", files.checkpoints / ".step-00000004-0"
    for folder in (damaged, unpublished):
        folder.write("rank-00000.safetensors", b"")
    begin_attempt(files, ALONE)
    assert files.checkpoints.names() == ["step-00000002"]


def test_events_and_metrics_are_followed_from_a_position(files: RunFiles) -> None:
    shown: list[str] = []
    say = recorded(shown.append, files, 2, ALONE)
    tracker = JsonlTracker(files, attempt=2)
    say(EventKind.NOTE, "hello")
    tracker.log(1, {"loss": 2.0})
    _, events_end = files.events_from(0)
    _, metrics_end = files.metrics_from(0)
    say(EventKind.ANOMALY, "step 3: the loss is nan", 3)
    tracker.log(3, {"loss": float("inf"), "rate": 1.0})
    files.append_metrics(b'{"step": 4, "lo')
    (event,), _ = files.events_from(events_end)
    (row,), metrics_end = files.metrics_from(metrics_end)
    assert event == Event(kind=EventKind.ANOMALY, text="step 3: the loss is nan", time=event.time, attempt=2, step=3)
    assert event.kind.is_alarm
    assert (row.step, row.attempt, row.metrics) == (3, 2, {"loss": float("inf"), "rate": 1.0})
    assert files.metrics_from(metrics_end) == ([], metrics_end), "half a row is not read"
    assert shown == ["hello", "step 3: the loss is nan"]
    assert history(files, "loss") == [(1, 2.0), (3, float("inf"))]


def test_a_program_and_a_person_ask_to_stop(files: RunFiles) -> None:
    pruned = Stopped(Ending.PRUNED, "behind the others at step 5")
    files.request_stop(pruned)
    assert files.stop_request() == pruned
    stop = Path(files.folder.path) / "stop"
    for text, detail in (
        ("", "stop requested"),
        ("the cluster is needed\n", "the cluster is needed"),
        ("pruned: no", "pruned: no"),
        ("[1]", "[1]"),
    ):
        stop.write_text(text)
        assert files.stop_request() == Stopped(Ending.STOP_REQUESTED, detail)


OLD_SENTENCES = [
    ("all steps done", False, Ending.STEPS_DONE),
    ("stop.hours: 1.5 h are over", False, Ending.HOURS_OVER),
    ("SIGTERM", False, Ending.SIGNAL),
    ("SIGINT to the command", False, Ending.SIGNAL),
    ("stop requested", False, Ending.STOP_REQUESTED),
    ("the cluster is needed", False, Ending.STOP_REQUESTED),
    ("preemption: the node goes in 30 s", False, Ending.PREEMPTED),
    ("pruned: behind the others at step 5", False, Ending.PRUNED),
    (
        "routing collapse in layer 1: expert 2 got over 90% of the tokens for 100 steps, now 95%",
        False,
        Ending.COLLAPSED,
    ),
    (
        "step 7: the loss is nan; look at the data and the learning rate, or raise the budget and use --resume",
        True,
        Ending.ANOMALY,
    ),
    ("[Errno 28] No space left on device: '/x'; make room and use --resume", True, Ending.CHECKPOINT_FAILED),
]


@pytest.mark.parametrize(("text", "failed", "ending"), OLD_SENTENCES)
def test_a_summary_of_the_old_code_has_an_ending(text: str, failed: bool, ending: Ending, files: RunFiles) -> None:
    old = {**summary_of(5), "stopped": text, "failed": failed}
    del old["ending"]
    files.folder.write("summary.json", json.dumps(old).encode())
    summary = files.summary()
    assert summary is not None
    assert (summary["stopped"], summary["ending"], summary["ending"].is_failure) == (text, ending, failed)
    assert str(Stopped.read(text, summary["ending"])) == text


def test_attempts_and_events_of_the_old_code_are_read(files: RunFiles) -> None:
    ends = [
        ("2 workers became 3", Ending.RESIZED),
        ("killed, or its machine was lost: no worker said why", Ending.LOST),
        ("rank 1 died: The actor is dead because its node has died", Ending.LOST),
        ("no progress for 25 s on rank 0 after step 3: see stacks/rank-0-attempt-0.txt", Ending.HUNG),
        ("OutOfMemory on rank 1 after step 0: out of memory on rank 1 (x); use a smaller network", Ending.ERROR),
        ("rank 0: ValueError: no data", Ending.ERROR),
        (
            "RuntimeError on rank 0 after step 3: [gloo/transport/tcp/pair.cc] Connection closed by peer",
            Ending.PEER_LOST,
        ),
    ]
    for attempt, (text, _) in enumerate(ends):
        files.folder.append_line(
            "attempts.jsonl",
            {"attempt": attempt, "time": 1.0, "world": 2, "host": "a", "pid": 1, "commit": None, "dirty": False},
        )
        files.folder.append_line("attempts.jsonl", {"attempt": attempt, "time": 2.0, "ended": text, "by": "rank 0"})
    files.folder.append_line(
        "events.jsonl", {"time": 1.0, "attempt": 0, "event": "step 3: the loss is nan; passing over step 3"}
    )
    assert [(str(end.stopped), end.stopped.ending) for end in files.attempts_ended()] == ends
    assert [attempt.world for attempt in files.attempts_begun()] == [2] * len(ends)
    assert [event.kind for event in files.events()] == [EventKind.NOTE]


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:40862",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:3: Connection reset by peer",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] "
        "Timed out waiting 1800000ms for recv operation to complete",
        "NCCL error in: ProcessGroupNCCL.cpp:1077, remote process exited or there was a network error",
    ],
)
def test_a_lost_peer_is_told_from_a_cause(text: str) -> None:
    assert is_lost_peer(text)
    assert stopped_by_error(text).ending is Ending.PEER_LOST
    assert stopped_by_error("ValueError: the data are gone").ending is Ending.ERROR


def test_torchs_allocator_says_that_memory_is_out() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(str(caught.value))
    with pytest.raises(RuntimeError) as other:
        torch.zeros(2).view(3)
    assert not is_out_of_memory(str(other.value))


def test_the_readme_has_the_table_of_the_files() -> None:
    table = files_of_a_run.__doc__.partition("\n\n")[2].partition("\n\n")[0].splitlines()
    names = [name for line in table for name in line.strip().partition("  ")[0].split(", ")]
    section = Path("trainer/README.md").read_text().partition("## The run folder")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert [name.strip(" `") for row in rows for name in row.split(",")] == names
    assert {name.strip("/") for name in names} == NAMES - {"harness.json"}
