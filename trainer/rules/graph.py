"""Reads a knowledge graph as facts `triple(subject, predicate, object)`.

A graph is a CSV file with three columns, or N-Triples (W3C 2014). A name from N-Triples is the
whole IRI. Whole numbers become numbers in both.
"""

import csv
import re
from pathlib import Path

from trainer.parsing import one_line

Fact = tuple[str | int, ...]
"""A name, then its arguments."""


def read_graph(path: str) -> list[Fact]:
    """The triples of `path` (.csv, .nt). Raises ValueError with the line that is wrong."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"--graph: no file {path}; name a .csv or .nt file of triples")
    match file.suffix:
        case ".csv":
            return _read_csv(file)
        case ".nt":
            return _read_n_triples(file)
    raise ValueError(f"--graph: {path} is neither .csv nor .nt; triples come as three columns or as N-Triples")


def _read_csv(file: Path) -> list[Fact]:
    facts: list[Fact] = []
    with file.open(newline="", encoding="utf-8") as stream:
        for number, row in enumerate(csv.reader(stream), 1):
            if len(row) != 3:
                reason = f"{len(row)} columns; a triple has 3: subject, predicate, object"
                raise ValueError(f"--graph: {file.name}, line {number}: {reason}")
            if number > 1 or [cell.strip().lower() for cell in row] != ["subject", "predicate", "object"]:
                facts.append(("triple", *(_value(cell.strip()) for cell in row)))
    return facts


def _read_n_triples(file: Path) -> list[Fact]:
    from rdflib.plugins.parsers.ntriples import ParseError, W3CNTriplesParser

    facts: list[Fact] = []

    class Sink:
        def triple(self, subject: object, predicate: object, value: object) -> None:
            facts.append(("triple", *(_value(str(term)) for term in (subject, predicate, value))))

    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            W3CNTriplesParser(Sink()).parsestring(line + "\n")  # type: ignore[arg-type]
        except ParseError as error:
            raise ValueError(f"--graph: {file.name}, line {number}: {one_line(error, 120)}") from None
    return facts


def _value(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?\d{1,9}", text) else text
