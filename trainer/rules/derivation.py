"""Why an atom holds: the rules and facts that lead to it, in words.

Each rule gets a twin that records its uses, `_used(number of the rule, conclusion, (values of its
variables,))`, so the solver itself says which instances fired. A conclusion is explained by the
first instance whose premises are explained before it, so no reason is circular.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from clingo import Function, Number, String, Symbol, SymbolType, ast, parse_term

from trainer.rules.program import Program, Rule


def instrumented(program: Program) -> list[str]:
    """The rules, as the file has them, and their twins."""
    return [program.text, *(twin(number, rule) for number, rule in enumerate(program.rules))]


def twin(number: int, rule: Rule) -> str:
    """The rule that records the uses of rule `number`.

    An anonymous variable in a positive literal gets a name, so that its value is known.
    """
    body = "; ".join(str(part) for part in named(rule).body)
    values = "".join(f"{variable}," for variable in named(rule).variables)
    return f"_used({number},{rule.head},({values})) :- {body}." if body else f"_used({number},{rule.head},({values}))."


def named(rule: Rule) -> Rule:
    """The rule with names for the anonymous variables of its positive literals."""
    count = iter(range(1_000_000))

    class Name(ast.Transformer):
        def visit_Variable(self, node: ast.AST) -> ast.AST:
            return node.update(name=f"Any{next(count)}") if node.name == "_" else node

    body = tuple(Name()(part) if _is_positive(part) else part for part in rule.body)
    return Rule(rule.line, rule.text, rule.head, body)


@dataclass(frozen=True)
class Use:
    """One instance of a rule."""

    rule: Rule
    premises: tuple[Symbol, ...]
    conditions: tuple[str, ...]
    """Comparisons, absences and aggregates, with the values of their variables."""


def uses(program: Program, atoms: Iterable[Symbol]) -> dict[Symbol, list[Use]]:
    """All recorded instances, by conclusion."""
    rules = [named(rule) for rule in program.rules]
    by_conclusion: dict[Symbol, list[Use]] = {}
    for atom in sorted(atoms):
        if atom.name == "_used":
            number, head, values = atom.arguments
            rule = rules[number.number]
            bound = dict(zip(rule.variables, values.arguments, strict=True))
            by_conclusion.setdefault(head, []).append(_use(rule, bound))
    return by_conclusion


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
    goal: Symbol, program: Program, recorded: Mapping[Symbol, list[Use]], facts: Mapping[Symbol, str]
) -> list[str]:
    """The derivation of `goal`, a line per conclusion, indented by depth.

    A conclusion names its rule, and its premises follow. `facts` gives the origin of each fact.
    """
    first = _first_uses(recorded, facts)
    lines: list[str] = []
    explained: set[Symbol] = set()

    def say(atom: Symbol, depth: int) -> None:
        indent = "  " * depth
        if atom in facts or atom not in first:
            lines.append(f"{indent}{in_words(atom, program)} [{facts.get(atom, 'fact')}]")
            return
        use = first[atom]
        above = ", as above" if atom in explained else ""
        lines.append(f"{indent}{in_words(atom, program)} [{program.name}, line {use.rule.line}{above}]")
        if not above:
            explained.add(atom)
            for premise in use.premises:
                say(premise, depth + 1)
            lines.extend(f"{indent}  {condition}" for condition in use.conditions)

    say(goal, 0)
    return lines


def _first_uses(recorded: Mapping[Symbol, list[Use]], facts: Mapping[Symbol, str]) -> dict[Symbol, Use]:
    """For each conclusion, the first use whose premises are known before it."""
    first: dict[Symbol, Use] = {}
    known = set(facts)
    growing = True
    while growing:
        growing = False
        for head, instances in recorded.items():
            if head in known:
                continue
            use = next((instance for instance in instances if known.issuperset(instance.premises)), None)
            if use is not None:
                first[head] = use
                known.add(head)
                growing = True
    return first


def in_words(atom: Symbol, program: Program) -> str:
    """The atom in the words of the first `%!` line that fits, else as it is written."""
    arguments = [_text(argument) for argument in atom.arguments]
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


def _text(argument: Symbol) -> str:
    """A string without its quotation marks, and anything else as it is written."""
    return argument.string if argument.type == SymbolType.String else str(argument)


def conflicts(atoms: Iterable[Symbol]) -> list[Symbol]:
    """All flag_conflict atoms, in order."""
    return sorted(atom for atom in atoms if atom.match("flag_conflict", len(atom.arguments)))


def symbol(fact: Sequence[str | int]) -> Symbol:
    """The atom of a fact (name, argument, ...): an argument is a whole number or a string."""
    name, *arguments = fact
    terms = [Number(argument) if isinstance(argument, int) else String(argument) for argument in arguments]
    return Function(str(name), terms)
