"""Why an atom holds: the rules and facts that lead to it, in words.

Each rule gets a twin that records its uses, `_used(number of the rule, conclusion, (values of its variables,))`, so the solver itself says
which instances fired. A conclusion is explained by the first instance whose premises are explained before it: no circular reasons.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from clingo import Function, Number, String, Symbol, SymbolType, ast, parse_term

from trainer.rules.program import Program, Rule


def instrumented(program: Program) -> list[str]:
    """The rules, in the lines of the file, and their twins."""
    return [program.text, *(twin(number, rule) for number, rule in enumerate(program.rules))]


def twin(number: int, rule: Rule) -> str:
    """The rule that records the uses of rule `number`; an anonymous variable in a positive literal gets a name, so that its value is known."""
    body = "; ".join(str(part) for part in named(rule).body)
    values = "".join(f"{variable}," for variable in named(rule).variables)
    return f"_used({number},{rule.head},({values})) :- {body}." if body else f"_used({number},{rule.head},({values}))."


def named(rule: Rule) -> Rule:
    """The rule with its anonymous variables in positive literals numbered."""
    count = iter(range(1_000_000))

    class Name(ast.Transformer):
        def visit_Variable(self, node: ast.AST) -> ast.AST:
            return node.update(name=f"Any{next(count)}") if node.name == "_" else node

    return Rule(
        rule.line, rule.text, rule.head, tuple(Name()(part) if _is_positive(part) else part for part in rule.body)
    )


@dataclass(frozen=True)
class Use:
    """One instance of a rule."""

    rule: Rule
    premises: tuple[Symbol, ...]
    conditions: tuple[str, ...]
    """Comparisons, absences and aggregates, with their values put in."""


def uses(program: Program, atoms: Iterable[Symbol]) -> dict[Symbol, list[Use]]:
    """All recorded instances, by conclusion."""
    rules = [named(rule) for rule in program.rules]
    found: dict[Symbol, list[Use]] = {}
    for atom in sorted(atoms):
        if atom.name == "_used":
            number, head, values = atom.arguments
            rule = rules[number.number]
            found.setdefault(head, []).append(_use(rule, dict(zip(rule.variables, values.arguments, strict=True))))
    return found


def _use(rule: Rule, values: Mapping[str, Symbol]) -> Use:
    class Put(ast.Transformer):
        def visit_Variable(self, node: ast.AST) -> ast.AST:
            return ast.SymbolicTerm(node.location, values[node.name]) if node.name in values else node

    premises, conditions = [], []
    for part in rule.body:
        ground = str(Put()(part))
        if _is_positive(part):
            premises.append(parse_term(ground))
        else:
            conditions.append(f"{ground.removeprefix('not ')} is not known" if ground.startswith("not ") else ground)
    return Use(rule, tuple(premises), tuple(conditions))


def _is_positive(part: ast.AST) -> bool:
    return part.ast_type == ast.ASTType.Literal and not part.sign and part.atom.ast_type == ast.ASTType.SymbolicAtom


def explain(
    goal: Symbol, program: Program, found: Mapping[Symbol, list[Use]], facts: Mapping[Symbol, str]
) -> list[str]:
    """Lines, indented by depth: each conclusion with its rule, below it what it rests on; `facts` says where each given fact is from."""
    first: dict[Symbol, Use] = {}
    known = set(facts)
    growing = True
    while growing:
        growing = False
        for head, instances in found.items():
            use = None if head in known else next((each for each in instances if known.issuperset(each.premises)), None)
            if use is not None:
                first[head], growing = use, True
                known.add(head)
    lines: list[str] = []
    said: set[Symbol] = set()

    def say(atom: Symbol, depth: int) -> None:
        indent = "  " * depth
        if atom in facts or atom not in first:
            lines.append(f"{indent}{in_words(atom, program)} [{facts.get(atom, 'fact')}]")
            return
        use = first[atom]
        again = atom in said
        lines.append(
            f"{indent}{in_words(atom, program)} [{program.name}, line {use.rule.line}{', as above' if again else ''}]"
        )
        if not again:
            said.add(atom)
            for premise in use.premises:
                say(premise, depth + 1)
            lines.extend(f"{indent}  {condition}" for condition in use.conditions)

    say(goal, 0)
    return lines


def in_words(atom: Symbol, program: Program) -> str:
    """By the first `%!` line whose name and constants fit; else the atom itself."""
    arguments = [
        argument.string if argument.type == SymbolType.String else str(argument) for argument in atom.arguments
    ]
    for words in program.words:
        if words.name == atom.name and len(words.arguments) == len(arguments):
            values = {}
            for pattern, value, symbol in zip(words.arguments, arguments, atom.arguments, strict=True):
                if re.fullmatch(r"_*[A-Z]\w*", pattern):
                    values[pattern] = value
                elif str(symbol) != pattern:
                    break
            else:
                return "".join(values.get(part, part) for part in re.split(r"\b([A-Z]\w*)\b", words.words))
    return str(atom)


def conflicts(atoms: Iterable[Symbol]) -> list[Symbol]:
    """All flag_conflict atoms, in order."""
    return sorted(atom for atom in atoms if atom.match("flag_conflict", len(atom.arguments)))


def symbol(fact: Sequence[str | int]) -> Symbol:
    """(name, argument, ...) as an atom: whole numbers are numbers, all else is a string."""
    name, *arguments = fact
    return Function(
        str(name), [Number(argument) if isinstance(argument, int) else String(argument) for argument in arguments]
    )
