"""The structure of the product, computed from its files: imports, sizes, widths, types.

A failure lists the offenders.
"""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
from house import PACKAGES, ROOT, circles, files_of, functions, import_lines, imports, rooms, tree_of

MODULES_IN_A_FOLDER = 12
LINES_OF_A_FUNCTION = 40
COLUMNS = 120
LINES_WITH_ANY = 60
OTHER_TESTS = ("house", "k8s_manifests", "readmes", "same_losses", "wheel")
"""The tests of the project as a whole; all others are named after a package."""

FOLDERS = sorted({file.parent for file in files_of(*PACKAGES)})


def report(offenders: list[str]) -> str:
    """The message of a failure."""
    return "\n".join([f"{len(offenders)} in all:", *offenders])


def test_no_files_import_each_other_in_a_circle() -> None:
    lines = circles({str(file): {str(other) for other in imported} for file, imported in imports().items()})
    assert not lines, report(lines)


def test_packages_do_not_import_each_other_in_a_circle() -> None:
    lines = circles(rooms(Path()))
    assert not lines, report(lines)


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_rooms_of_a_folder_do_not_import_each_other_in_a_circle(folder: Path) -> None:
    lines = circles(rooms(folder))
    assert not lines, report(lines)


def test_no_folder_has_too_many_modules() -> None:
    sizes = Counter(file.parent for file in files_of(*PACKAGES) if file.name != "__init__.py")
    lines = [f"{folder}/ has {size} modules" for folder, size in sizes.items() if size > MODULES_IN_A_FOLDER]
    assert not lines, report(lines)


def test_job_files_stand_alone() -> None:
    lines = [str(file) for file in files_of(*PACKAGES) if "configs" in file.parts]
    assert not lines, report(lines)


def test_no_function_is_too_long() -> None:
    lines = []
    for file in files_of(*PACKAGES):
        long = (entry for entry in functions(file) if entry[2] > LINES_OF_A_FUNCTION)
        lines += [f"{file}:{line} {name} has {length} lines" for name, line, length in long]
    assert not lines, report(lines)


def test_no_line_is_too_wide() -> None:
    lines = []
    for file in files_of(*PACKAGES, "tests"):
        for number, line in enumerate((ROOT / file).read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > COLUMNS:
                lines.append(f"{file}:{number} has {len(line)} columns")
    assert not lines, report(lines)


def test_few_lines_say_any() -> None:
    lines = []
    for file in files_of(*PACKAGES):
        skipped = import_lines(file)
        for number, line in enumerate((ROOT / file).read_text(encoding="utf-8").splitlines(), 1):
            if number not in skipped and re.search(r"\bAny\b", line):
                lines.append(f"{file}:{number} {line.strip()}")
    assert len(lines) < LINES_WITH_ANY, report(lines)


def test_no_test_file_imports_another() -> None:
    lines = []
    for file in files_of("tests"):
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names]
                base = getattr(node, "module", None) or ""
                lines += [f"{file}:{node.lineno} imports {name}" for name in [base, *names] if is_test(name)]
    assert not lines, report(lines)


def is_test(module: str) -> bool:
    """Whether `module` is a test file, by its last name."""
    return module.split(".")[-1].startswith("test_")


def test_tests_are_named_after_a_package_or_are_of_the_whole_project() -> None:
    names = {file.stem.removeprefix("test_") for file in files_of("tests") if is_test(file.stem)}
    named = {name for name in names if name.startswith(tuple(f"{package}_" for package in PACKAGES))}
    assert names - named == set(OTHER_TESTS)
