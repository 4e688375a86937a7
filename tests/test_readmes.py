"""READMEs, docstrings and comments name files and verbs of `switchwork` that exist."""

import importlib
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import typer
from house import PACKAGES, ROOT, files_of, prose
from typer.core import TyperGroup
from typer.testing import CliRunner

WORD = re.compile(r"[\w./*~$<>{}:-]+")
PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)+\.(?:py|md|ya?ml|json|toml|png|txt|sh|lp|ttl)")
CODE = re.compile(r"```.*?```", re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
VERB = re.compile(r"(?<![\w:=-])(?<!-n )switchwork +([a-z][a-z-]*)(?: +([a-z][a-z-]*))?")
ADDRESS = re.compile(r"\b[a-z0-9+]+://[^\s)`'\"]+")
WRITTEN = (
    "runs",
    "sweeps",
    "checkpoints",
    "samples",
    "stacks",
    "ends",
    "evals",
    "promoted",
    "proofs",
    "drills",
    "profile",
)
"""Folders that a run or a command makes: their files are in no checkout."""
HIDDEN = (".git", ".venv", "build", "runs", "node_modules")

Text = tuple[str, Path, str]
"""Where it is, as a person would say; the folder that its paths may be relative to; itself."""


@cache
def pages() -> list[Text]:
    """Every README and CONTRIBUTING of the checkout."""
    files = [file for name in ("README.md", "CONTRIBUTING.md") for file in sorted(ROOT.rglob(name))]
    shown = [file for file in files if not set(file.relative_to(ROOT).parts) & set(HIDDEN)]
    return [(str(file.relative_to(ROOT)), file.parent, file.read_text(encoding="utf-8")) for file in shown]


@cache
def docstrings() -> list[Text]:
    """Every docstring and comment of the product."""
    texts = []
    for file in files_of(*PACKAGES):
        texts += [(f"{file}:{line}", (ROOT / file).parent, text) for line, text in prose(file)]
    return texts


def exists(path: str, folder: Path) -> bool:
    """Whether `path`, which may have wildcards, names a file below the root or `folder`."""
    return any(any(base.glob(path)) if "*" in path else (base / path).exists() for base in (ROOT, folder))


def paths(text: str) -> Iterator[str]:
    """The paths of files of the checkout that `text` names."""
    for word in WORD.findall(ADDRESS.sub(" ", text)):
        path = word.rstrip(".:")
        if PATH.fullmatch(path) and path.split("/")[0] not in WRITTEN:
            yield path


@cache
def app() -> typer.Typer:
    """The app behind the console script."""
    script: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["switchwork"]
    found = importlib.import_module(script.partition(":")[0]).app
    assert isinstance(found, typer.Typer)
    return found


@cache
def known_verbs() -> dict[str, list[str]]:
    """The verbs of the app, each with those of its group; an empty list where it is no group."""
    top = typer.main.get_command(app())
    assert isinstance(top, TyperGroup)
    return {name: list(verb.commands) if isinstance(verb, TyperGroup) else [] for name, verb in top.commands.items()}


def verbs(text: str) -> set[tuple[str, ...]]:
    """The verbs that `text` names: a group with the word behind it, any other verb alone."""
    return {(verb, second) if second and known_verbs().get(verb) else (verb,) for verb, second in VERB.findall(text)}


def is_verb(words: tuple[str, ...]) -> bool:
    """Whether the app has the command `words`."""
    return words[0] in known_verbs() and all(word in known_verbs()[words[0]] for word in words[1:])


def report(offenders: list[str]) -> str:
    """The message of a failure."""
    return "\n".join([f"{len(offenders)} in all:", *offenders])


@pytest.mark.parametrize("texts", [pages, docstrings])
def test_paths_exist(texts: Callable[[], list[Text]]) -> None:
    lines = []
    for where, folder, text in texts():
        lines += [f"{where} names {path}" for path in paths(text) if not exists(path, folder)]
    assert not lines, report(lines)


def test_links_lead_somewhere() -> None:
    lines = []
    for where, folder, text in pages():
        prose_alone = CODE.sub("", text)
        targets = (
            target for target in LINK.findall(prose_alone) if "://" not in target and not target.startswith("mailto:")
        )
        lines += [f"{where} links to {target}" for target in targets if not (folder / target).exists()]
    assert not lines, report(lines)


@pytest.mark.parametrize("texts", [pages, docstrings])
def test_verbs_exist(texts: Callable[[], list[Text]]) -> None:
    lines = []
    for where, _, text in texts():
        lines += [f"{where} names switchwork {' '.join(words)}" for words in sorted(verbs(text)) if not is_verb(words)]
    assert not lines, report(lines)


def test_every_verb_that_is_named_explains_itself() -> None:
    named = set[tuple[str, ...]]().union(*(verbs(text) for _, _, text in [*pages(), *docstrings()]))
    assert len(named) > 10
    for words in filter(is_verb, sorted(named)):
        done = CliRunner().invoke(app(), [*words, "--help"])
        assert done.exit_code == 0, f"switchwork {' '.join(words)} --help: {done.output}"
