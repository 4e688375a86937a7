"""The JSON Schema of job files, so that editors complete and check them: derived from the same dataclasses that read them.

Descriptions are the docstrings under the fields. Unknown keys are wrong at every level, and a union is told apart by `name`, as in trainer/parsing.py.
"""

import ast
import dataclasses
import functools
import inspect
import textwrap

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from launch.config import JobConfig


def job_schema() -> JsonSchemaValue:
    """The schema (draft 2020-12) of what `switchwork train` takes."""
    schema = TypeAdapter(JobConfig).json_schema(schema_generator=_Generator)
    _name_the_choices(schema, schema["$defs"])
    return {"$schema": GenerateJsonSchema.schema_dialect, "title": "Switchwork job"} | schema


class _Generator(GenerateJsonSchema):
    """pydantic's generator, with what trainer/parsing.py adds to pydantic."""

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        found = super().dataclass_schema(schema)
        target = self.resolve_ref_schema(found)
        target["additionalProperties"] = False
        cls: type = schema["cls"]
        target["description"] = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0]
        for name, text in docstrings(cls).items():
            target["properties"].get(name, {})["description"] = text
        for field in dataclasses.fields(cls):
            if field.default_factory is not dataclasses.MISSING and field.name in target["properties"]:
                target["properties"][field.name]["default"] = self.encode_default(field.default_factory())
        return found


def _name_the_choices(node: object, definitions: JsonSchemaValue) -> None:
    """Where several dataclasses may stand, `name` must say which; it may be left out where it is the default's."""
    if isinstance(node, list):
        for each in node:
            _name_the_choices(each, definitions)
    if not isinstance(node, dict):
        return
    names = [_name(choice, definitions) for choice in node.get("anyOf", [])]
    if sum(name is not None for name in names) > 1:
        default = (node.get("default") or {}).get("name")
        node["anyOf"] = [
            {**choice, "required": ["name"]} if name not in (None, default) else choice
            for choice, name in zip(node["anyOf"], names)
        ]
    for each in node.values():
        _name_the_choices(each, definitions)


def _name(choice: JsonSchemaValue, definitions: JsonSchemaValue) -> str | None:
    """The `name` of a tagged dataclass."""
    fields = definitions.get(str(choice.get("$ref", "")).removeprefix("#/$defs/"), {}).get("properties", {})
    return fields.get("name", {}).get("const")


@functools.cache
def docstrings(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, its base classes' included."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:]):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = inspect.cleandoc(str(text.value.value))
    return found
