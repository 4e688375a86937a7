"""Reads and checks a file of rules in the language of clingo (answer set programming).

    % a comment; a rule that derives flag_conflict refuses the candidate
    %match equation: (\\d+) ([+]) (\\d+) = (\\d+)
    %! equation(I, A, Op, B, C): equation I says A Op B = C
    flag_conflict("wrong sum", I) :- equation(I, A, "+", B, C), A + B != C.

`%match` draws facts from the text: the number of the match, then its groups. `%!` says how an atom
reads in words. A file holds constants, and rules with one conclusion each: no choice, disjunction,
script or include, and no cycle through `not`. So there is exactly one set of conclusions, and
nothing in the file is code.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from clingo import ast

_DIRECTIVES = {"count", "sum", "min", "max", "const", "true", "false", "sup", "inf"}
_CONCLUSION = 'write `flag_conflict("why") :- ...` or another single conclusion'


@dataclass(frozen=True)
class Rule:
    """A rule, `head :- body.`"""

    line: int
    text: str
    head: ast.AST
    body: tuple[ast.AST, ...]

    @property
    def variables(self) -> tuple[str, ...]:
        """The variables with one value per use of the rule, in order.

        They stand in the head, in literals and in the bounds of aggregates.
        """
        names: dict[str, None] = {}
        for part in (self.head, *self.body):
            for node in _outside_aggregates(part):
                names |= dict.fromkeys(name for name in _variables(node) if name != "_")
        return tuple(names)


@dataclass(frozen=True)
class Words:
    """How an atom reads: `words` is a sentence with the variables among `arguments`."""

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
    """Lines of rules that build new terms from their own conclusions.

    A program that never ends repeats one of them.
    """


def read_program(text: str, name: str) -> Program:
    """Parse and check the rules in `text`, whose file is called `name`.

    Raises ValueError with the line and the reason for anything that does not parse or is not
    allowed.
    """
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
    """The first complaint of clingo as one line, with the file's name and the number of the line.

    clingo writes `<string>:3:1-9: error: unsafe variables in: ...`.
    """
    joined = " ".join(" ".join(complaints).split())
    error = re.search(r"<string>:(\d+):\S* error: (.*?)(?= <string>|$)", joined)
    if error is None:
        return f"{name}: {joined or 'not understood'}"
    reason = error[2].replace("[#inc_base];", "").replace("[#inc_base]", "")
    unsafe = re.findall(r"note: '(\w+)' is unsafe", joined)
    if unsafe and "unsafe" in reason:
        names = list(dict.fromkeys(unsafe))
        plural = "s" if len(names) > 1 else ""
        fix = "use each in a positive literal of the same rule"
        return f"{name}, line {error[1]}: unsafe variable{plural} {', '.join(names)}: {fix}"
    return f"{name}, line {error[1]}: {reason}"


def _check_directives(text: str, name: str) -> None:
    """Refuse directives before clingo sees the file.

    clingo would open the file that `#include` names, and run the code in `#script`.
    """
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
                reason = "names that begin with `_` are kept for derivations"
                raise ValueError(f"{name}, line {line}: {reason}; rename `{atom.symbol.name}`")
    return Rule(line, str(statement), head, tuple(statement.body))


def _check_cycles(rules: list[Rule], name: str) -> Iterator[int]:
    """The lines of rules that make new terms on a cycle.

    Raises ValueError for a cycle through `not` or an aggregate.
    """
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
                reason = f"{head} depends on itself through `not` or an aggregate of {inner}"
                raise ValueError(f"{name}, line {rule.line}: {reason}; break the cycle")
        if cyclic and any(_builds(argument) for argument in rule.head.atom.symbol.arguments):
            yield rule.line


def _reach(below: dict[str, set[str]], start: str) -> set[str]:
    """All names that `start` depends on."""
    seen: set[str] = set()
    waiting = list(below.get(start, ()))
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += below.get(name, ())
    return seen


def _builds(term: ast.AST) -> bool:
    """Whether `term` is computed or composed, and not a plain variable or constant."""
    return term.ast_type in (ast.ASTType.BinaryOperation, ast.ASTType.UnaryOperation) or (
        term.ast_type == ast.ASTType.Function and bool(term.arguments)
    )


def _walk(node: object) -> Iterator[ast.AST]:
    """All nodes of a syntax tree, from the root."""
    if isinstance(node, ast.AST):
        yield node
        for key in node.child_keys:
            yield from _walk(getattr(node, key))
    elif isinstance(node, ast.ASTSequence | list | tuple):
        for child in node:
            yield from _walk(child)


def _atoms(node: object) -> Iterator[ast.AST]:
    return (child for child in _walk(node) if child.ast_type == ast.ASTType.SymbolicAtom)


def _variables(node: object) -> Iterator[str]:
    return (child.name for child in _walk(node) if child.ast_type == ast.ASTType.Variable)


def _outside_aggregates(part: ast.AST) -> list[ast.AST]:
    """The parts of a literal outside aggregates and conditions, whose variables have one value."""
    atom = getattr(part, "atom", None)
    if atom is not None and atom.ast_type in (ast.ASTType.BodyAggregate, ast.ASTType.Aggregate):
        return [guard for guard in (atom.left_guard, atom.right_guard) if guard is not None]
    return [] if part.ast_type == ast.ASTType.ConditionalLiteral else [part]


def _words(text: str, name: str) -> Iterator[Words]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("%!"):
            match = re.fullmatch(r"%!\s*(\w+)\s*(?:\((.*?)\))?\s*:\s*(.+)", line)
            if match is None:
                raise ValueError(f"{name}, line {number}: words are written `%! name(X, Y): X and Y in words`")
            arguments = (argument.strip() for argument in (match[2] or "").split(","))
            yield Words(match[1], tuple(filter(None, arguments)), match[3].strip())


def _matches(text: str, name: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("%match"):
            match = re.fullmatch(r"%match\s+([a-z]\w*)\s*:\s*(.+)", line)
            try:
                if match is None:
                    raise re.error("write `%match name: regular expression`")
                re.compile(match[2].strip())
            except re.error as error:
                raise ValueError(f"{name}, line {number}: {error}") from None
            yield match[1], match[2].strip()
