"""Command-line options made from the fields of `Recipe`, so that option = keyword = field."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic.fields import FieldInfo

from rankine.cli import known
from rankine.errors import UserError
from rankine.limits import parse_yaml
from rankine.recipe import Recipe

#: Fields that no single option can hold: a chain is written in a recipe file.
FILE_ONLY = frozenset({"stages"})
#: Fields that a chain states stage by stage.
OF_A_STAGE = ("method", "set", "keep", "size", "bits", "paper_ratio")

Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="where to write")
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of text")]
Force = Annotated[bool, typer.Option("--force", help="replace an existing output")]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads")]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE", help="YAML; options override its fields")
]
Command = Callable[..., None]


def takes_recipe(
    *names: str, without: Sequence[str] = (), file: bool = True
) -> Callable[[Command], Command]:
    """Decorator: the command's first parameter, `recipe`, is built from options.

    The options are the fields in `names` (default: all) except `without`; `model` is an argument;
    with `file` a YAML recipe may underlie them. A recipe with a budget is checked at once.
    """
    fields = [n for n in names or Recipe.model_fields if n not in {*without, *FILE_ONLY}]

    def decorate(command: Command) -> Command:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        made = [_parameter(name) for name in fields]
        if file:
            made.append(_keyword("recipe", RecipeFile))
        parameters = [*made, *(p.replace(kind=p.KEYWORD_ONLY) for p in own)]

        @functools.wraps(command)
        def called(**given: Any) -> None:
            path = given.pop("recipe", None)
            values = dict(_given({name: given.pop(name) for name in fields}))
            recipe = _recipe(path, values)
            if "keep" in fields:
                known.check(recipe)
            command(recipe, **given)

        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in parameters}
        return called

    return decorate


def _recipe(path: Path | None, values: dict[str, Any]) -> Recipe:
    recipe = Recipe.read(path, **values) if path else Recipe.of(**values)
    clash = [name for name in OF_A_STAGE if name in values] if recipe.stages else []
    if clash:
        raise UserError(
            f"expected a chain's {clash[0]} in the stages of {path}, found --{option(clash[0])}: "
            "change the file"
        )
    return recipe


def option(field: str) -> str:
    """The long option of a field, without dashes: `text_column` → `text-column`."""
    return field.replace("_", "-")


def _parameter(name: str) -> inspect.Parameter:
    """The option (for `model` the argument) of one field; None or [] means not given, and values
    stay strings: the recipe parses them, so that files and Python get the same sentences."""
    field = Recipe.model_fields[name]
    text = (field.description or "") + _default(field)
    if name == "model":
        return _keyword(name, Annotated[str | None, typer.Argument(metavar="MODEL", help=text)])
    flag = f"--{option(name)}"
    if field.annotation is bool:
        return _keyword(name, Annotated[bool | None, typer.Option(flag, help=text)])
    several = name == "set" or getattr(field.annotation, "__origin__", None) is tuple
    made = typer.Option(flag, metavar=_metavar(name, field), help=text)
    return _keyword(name, Annotated[list[str] | None if several else str | None, made])


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    return "" if default in (None, (), {}, False) else f"  [default: {default}]"


def _metavar(name: str, field: FieldInfo) -> str:
    special = {"set": "NAME=VALUE", "include": "GLOB", "exclude": "GLOB", "tokens": "NxLENGTH"}
    if name in special:
        return special[name]
    kinds = {str(kind) for kind in (*get_args(field.annotation), field.annotation)}
    if str(float) in kinds:
        return "NUMBER"
    return "N" if str(int) in kinds and str(str) not in kinds else "TEXT"


def _given(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if value is None or value == []:
            continue
        yield name, _assignments(value) if name == "set" else value


def _assignments(texts: Sequence[str]) -> dict[str, Any]:
    """{"rank": 8} of ["rank=8"]."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise UserError(f'expected --set NAME=VALUE, such as --set ridge=0.01, found "{text}"')
        found[name.strip()] = parse_yaml(value, f"--set {name}") if value else ""
    return found
