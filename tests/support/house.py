"""The structure of the product: modules, imports, functions and texts, read with `ast`.

Nothing is imported.
"""

import ast
import io
import tokenize
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: tuple[str, ...] = tuple(_SETTINGS["tool"]["importlinter"]["root_packages"])
Graph = dict[str, set[str]]
"""The nodes that each node imports."""


@cache
def files_of(*folders: str) -> list[Path]:
    """All Python files below `folders`, relative to the root."""
    return sorted(file.relative_to(ROOT) for folder in folders for file in (ROOT / folder).rglob("*.py"))


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), str(file))


def module_of(file: Path) -> str:
    """The dotted name by which `file` is imported."""
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """The product's files by their dotted names."""
    return {module_of(file): file for file in files_of(*PACKAGES)}


def package_of(file: Path, level: int) -> str:
    """The package that a relative import of `level` dots in `file` starts from."""
    return ".".join(file.parts[: len(file.parts) - level])


def targets(node: ast.Import | ast.ImportFrom, file: Path) -> Iterator[str]:
    """Yield the product's modules that `node` imports.

    `from a import b` is a.b where that is a module, else a.
    """
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules())
        return
    base = node.module or ""
    if node.level:
        base = ".".join(part for part in (package_of(file, node.level), base) if part)
    for alias in node.names:
        name = f"{base}.{alias.name}"
        if name in modules() or base in modules():
            yield name if name in modules() else base


@cache
def imports() -> dict[Path, set[Path]]:
    """The files that each file of the product imports, lazily and under TYPE_CHECKING as well."""
    graph: dict[Path, set[Path]] = {}
    for file in files_of(*PACKAGES):
        graph[file] = set()
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                graph[file] |= {modules()[name] for name in targets(node, file)} - {file}
    return graph


def rooms(folder: Path) -> Graph:
    """How the entries of `folder` import one another.

    An entry is a file, or a folder with everything below it.
    """
    graph: Graph = {}
    depth = len(folder.parts)
    for file, imported in imports().items():
        if file.is_relative_to(folder):
            room = str(Path(*file.parts[: depth + 1]))
            inside = (other for other in imported if other.is_relative_to(folder))
            graph.setdefault(room, set()).update(str(Path(*other.parts[: depth + 1])) for other in inside)
    return {room: others - {room} for room, others in graph.items()}


def circles(graph: Graph) -> list[str]:
    """A line for each group of nodes that can all reach one another, with its shortest circle."""
    lines = []
    told = set[str]()
    for node in sorted(graph):
        circle = shortest_circle(graph, node)
        if circle and node not in told:
            group = {other for other in reachable(graph, node) if node in reachable(graph, other)}
            told |= group
            shortest = min((shortest_circle(graph, other) for other in sorted(group)), key=len)
            lines.append(f"{len(group)} in a circle, such as {' -> '.join(shortest)}: {', '.join(sorted(group))}")
    return lines


def reachable(graph: Graph, start: str) -> set[str]:
    """The nodes that imports lead to from `start`, including `start` where it lies on a circle."""
    seen = set[str]()
    waiting = [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += new
    return seen


def shortest_circle(graph: Graph, start: str) -> list[str]:
    """The shortest way from `start` back to itself; empty where there is none."""
    ways = [[start]]
    seen = {start}
    while ways:
        longer = []
        for way in ways:
            for node in sorted(graph.get(way[-1], set())):
                if node == start:
                    return [*way, start]
                if node not in seen:
                    seen.add(node)
                    longer.append([*way, node])
        ways = longer
    return []


def functions(file: Path) -> Iterator[tuple[str, int, int]]:
    """Name, first line and length of each function of `file`, from its `def` to its end."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            yield node.name, node.lineno, node.end_lineno - node.lineno + 1


def import_lines(file: Path) -> set[int]:
    """The numbers of the lines that belong to an import."""
    nodes = (node for node in ast.walk(tree_of(file)) if isinstance(node, ast.Import | ast.ImportFrom))
    return {line for node in nodes for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def prose(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the docstrings (of fields too) and comments of `file`, with their first lines."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
    for token in tokenize.generate_tokens(io.StringIO((ROOT / file).read_text(encoding="utf-8")).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
