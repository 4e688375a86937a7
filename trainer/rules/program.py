"""A file of rules in the language of clingo (answer set programming), read and checked: what may be in it, and how its atoms read in words.

    % comments; a conflict is whatever derives flag_conflict
    %! equation(I, A, Op, B, C): equation I says A Op B = C          how an atom reads
    %match equation: (\\d+) ([+]) (\\d+) = (\\d+)                       facts drawn from the text: number of the match, then its groups
    flag_conflict("wrong sum", I) :- equation(I, A, "+", B, C), A + B != C.

Only rules with one conclusion each, and constants: no choice, disjunction, script or include, and no cycle through `not`. So there is exactly
one set of conclusions, and nothing in the file is code.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from clingo import ast

_DIRECTIVES = {"count", "sum", "min", "max", "const", "true", "false", "sup", "inf"}
_CONCLUSION = 'write `flag_conflict("why") :- ...` or another single conclusion'


@dataclass(frozen=True)
class Rule:
    """`head :- body.`"""

    line: int
    text: str
    head: ast.AST
    body: tuple[ast.AST, ...]

    @property
    def variables(self) -> tuple[str, ...]:
        """Variables that have one value in each use of the rule, in order: those of the head, of literals and of the bounds of aggregates."""
        found: dict[str, None] = {}
        for part in (self.head, *self.body):
            for place in _outside_aggregates(part):
                found |= dict.fromkeys(variable for variable in _variables(place) if variable != "_")
        return tuple(found)


@dataclass(frozen=True)
class Words:
    """How an atom reads: `pattern` is its name and arguments, `words` a sentence with the pattern's variables."""

    name: str
    arguments: tuple[str, ...]
    words: str


@dataclass(frozen=True)
class Program:
    """A checked file of rules."""

    name: str
    text: str
    rules: tuple[Rule, ...]
    constants: tuple[str, ...]
    words: tuple[Words, ...]
    matches: tuple[tuple[str, str], ...]
    suspects: tuple[int, ...]
    """Lines of rules that build new terms of what they conclude themselves: where a program that never ends goes round."""


def read_program(text: str, name: str) -> Program:
    """Raises ValueError, in one line with the file's line and the reason, for what does not parse or may not be there."""
    _check_directives(text, name)
    statements: list[ast.AST] = []
    complaints: list[str] = []
    try:
        ast.parse_string(text, statements.append, logger=lambda _, message: complaints.append(message))
    except RuntimeError:
        raise ValueError(located(name, complaints)) from None
    rules, constants = [], []
    for statement in statements:
        line = statement.location.begin.line
        match statement.ast_type:
            case ast.ASTType.Program | ast.ASTType.Comment:
                pass
            case ast.ASTType.Definition:
                constants.append(str(statement))
            case ast.ASTType.Rule:
                rules.append(_rule(statement, name, line))
            case _:
                raise ValueError(f"{name}, line {line}: `{str(statement).splitlines()[0]}` is no rule; {_CONCLUSION}")
    matches = tuple(_matches(text, name))
    return Program(
        name,
        text,
        tuple(rules),
        tuple(constants),
        tuple(_words(text, name)),
        matches,
        tuple(_check_cycles(rules, name)),
    )


def located(name: str, complaints: list[str]) -> str:
    """clingo's first complaint as one line: `<string>:3:1-9: error: unsafe variables in: ...` with the file's name and the line."""
    joined = " ".join(" ".join(complaints).split())
    found = re.search(r"<string>:(\d+):\S* error: (.*?)(?= <string>|$)", joined)
    if found is None:
        return f"{name}: {joined or 'not understood'}"
    reason = found[2].replace("[#inc_base];", "").replace("[#inc_base]", "")
    unsafe = re.findall(r"note: '(\w+)' is unsafe", joined)
    if unsafe and "unsafe" in reason:
        fix = "use each in a positive literal of the same rule"
        return f"{name}, line {found[1]}: unsafe variable{'s' * (len(set(unsafe)) > 1)} {', '.join(dict.fromkeys(unsafe))}: {fix}"
    return f"{name}, line {found[1]}: {reason}"


def _check_directives(text: str, name: str) -> None:
    """Before clingo sees the file: it would open what `#include` names, and run what `#script` holds."""
    bare = re.sub(r'"(\\.|[^"\\\n])*"|%[^\n]*', lambda token: "%*" if token[0].startswith("%*") else "", text)
    for number, line in enumerate(bare.splitlines(), 1):
        for directive in re.findall(r"#\s*([a-z_]+)", line):
            if directive not in _DIRECTIVES:
                raise ValueError(
                    f"{name}, line {number}: #{directive} is not allowed; rules, #const and aggregates are"
                )
        for token, reason in (
            ("@", "calls a function outside the rules"),
            ("%*", "begins a block comment"),
            ('"', "begins a string without end"),
        ):
            if token in line:
                raise ValueError(f"{name}, line {number}: `{token}` {reason}, which is not allowed; leave it out")


def _rule(statement: ast.AST, name: str, line: int) -> Rule:
    head = statement.head
    if head.ast_type != ast.ASTType.Literal:
        raise ValueError(f"{name}, line {line}: a choice or an `or` among conclusions; {_CONCLUSION}")
    if head.atom.ast_type != ast.ASTType.SymbolicAtom or head.sign:
        raise ValueError(f"{name}, line {line}: a constraint without a conclusion; {_CONCLUSION}")
    for part in (head, *statement.body):
        for atom in _atoms(part):
            if atom.symbol.ast_type == ast.ASTType.UnaryOperation:
                raise ValueError(f"{name}, line {line}: classical negation `{atom}` is not allowed; use `not`")
            if atom.symbol.name.startswith("_"):
                raise ValueError(
                    f"{name}, line {line}: names that begin with `_` are kept for derivations; rename `{atom.symbol.name}`"
                )
    return Rule(line, str(statement), head, tuple(statement.body))


def _check_cycles(rules: list[Rule], name: str) -> Iterator[int]:
    """Lines of rules that make new terms on a cycle. Raises ValueError for a cycle through `not`."""
    below: dict[str, set[str]] = {}
    for rule in rules:
        below.setdefault(rule.head.atom.symbol.name, set()).update(
            atom.symbol.name for part in rule.body for atom in _atoms(part)
        )
    reached = {start: _reach(below, start) for start in below}
    for rule in rules:
        head = rule.head.atom.symbol.name
        cyclic = [
            (part, atom.symbol.name)
            for part in rule.body
            for atom in _atoms(part)
            if head in reached.get(atom.symbol.name, set()) | {atom.symbol.name}
        ]
        for part, inner in cyclic:
            if getattr(part, "sign", 0) or part.atom.ast_type != ast.ASTType.SymbolicAtom:
                raise ValueError(
                    f"{name}, line {rule.line}: {head} depends on itself through `not` or an aggregate of {inner}; break the cycle"
                )
        if cyclic and any(_builds(argument) for argument in rule.head.atom.symbol.arguments):
            yield rule.line


def _reach(below: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(below.get(start, ()))
    while waiting:
        each = waiting.pop()
        if each not in seen:
            seen.add(each)
            waiting += below.get(each, ())
    return seen


def _builds(term: ast.AST) -> bool:
    return term.ast_type in (ast.ASTType.BinaryOperation, ast.ASTType.UnaryOperation) or (
        term.ast_type == ast.ASTType.Function and bool(term.arguments)
    )


def _walk(node: object) -> Iterator[ast.AST]:
    if isinstance(node, ast.AST):
        yield node
        for key in node.child_keys:
            yield from _walk(getattr(node, key))
    elif isinstance(node, ast.ASTSequence | list | tuple):
        for each in node:
            yield from _walk(each)


def _atoms(node: object) -> Iterator[ast.AST]:
    return (each for each in _walk(node) if each.ast_type == ast.ASTType.SymbolicAtom)


def _variables(node: object) -> Iterator[str]:
    return (each.name for each in _walk(node) if each.ast_type == ast.ASTType.Variable)


def _outside_aggregates(part: ast.AST) -> list[ast.AST]:
    atom = getattr(part, "atom", None)
    if atom is not None and atom.ast_type in (ast.ASTType.BodyAggregate, ast.ASTType.Aggregate):
        return [guard for guard in (atom.left_guard, atom.right_guard) if guard is not None]
    return [] if part.ast_type == ast.ASTType.ConditionalLiteral else [part]


def _words(text: str, name: str) -> Iterator[Words]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("%!"):
            found = re.fullmatch(r"%!\s*(\w+)\s*(?:\((.*?)\))?\s*:\s*(.+)", line)
            if found is None:
                raise ValueError(f"{name}, line {number}: words are written `%! name(X, Y): X and Y in words`")
            yield Words(
                found[1], tuple(each.strip() for each in (found[2] or "").split(",") if each.strip()), found[3].strip()
            )


def _matches(text: str, name: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("%match"):
            found = re.fullmatch(r"%match\s+([a-z]\w*)\s*:\s*(.+)", line)
            try:
                if found is None:
                    raise re.error("write `%match name: regular expression`")
                re.compile(found[2].strip())
            except re.error as error:
                raise ValueError(f"{name}, line {number}: {error}") from None
            yield found[1], found[2].strip()
