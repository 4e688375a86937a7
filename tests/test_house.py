"""The structure of the product, computed from its files: imports, sizes, widths, types.

A failure lists the offenders.
"""

import re
from collections import Counter
from pathlib import Path

import pytest
from house import PACKAGES, ROOT, circles, files_of, functions, import_lines, imports, rooms

MODULES_IN_A_FOLDER = 12
LINES_OF_A_FUNCTION = 40
COLUMNS = 120
LINES_WITH_ANY = 60

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
