"""Command-line options made from the fields of `Recipe`, so that option = keyword = field."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic.fields import FieldInfo

from rankine import own
from rankine.cli import known
from rankine.errors import UserError
from rankine.limits import allowing_pickles, parse_yaml
from rankine.recipe import Recipe

#: Fields that no single option can hold: a chain is written in a recipe file.
FILE_ONLY = frozenset({"stages"})
#: MODEL may be written as an option too.
NAMED_MODEL = "named_model"

Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="where to write")
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of text")]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help=Recipe.model_fields["allow_pickle"].description),
]
Force = Annotated[bool, typer.Option("--force", help="replace an existing output")]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads")]
Timeout = Annotated[
    float,
    typer.Option(
        metavar="SECONDS", min=1, help="under torchrun, a rank silent for so long counts as lost"
    ),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="the same as an option")
]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", help="let the recipe file name code (package.module:name)"),
]
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
        others = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        made = [_parameter(name) for name in fields]
        if "model" in fields:
            made.append(_keyword(NAMED_MODEL, ModelOption))
        if file:
            made += [_keyword("recipe", RecipeFile), _keyword("allow_code", AllowCode, False)]
        parameters = [*made, *(p.replace(kind=p.KEYWORD_ONLY) for p in others)]

        @functools.wraps(command)
        def called(**given: Any) -> None:
            path, allow_code = given.pop("recipe", None), given.pop("allow_code", False)
            named = given.pop(NAMED_MODEL, None)
            values = dict(_given({name: given.pop(name) for name in fields}))
            if named is not None:
                values["model"] = _once(values.get("model"), named)
            read = Recipe.read(path, allow_code=allow_code, **values) if path else None
            recipe = read or Recipe.of(**values)
            if "keep" in fields:
                known.check(recipe)
            with (
                own.current_directory_importable(_names_own_code(recipe, given)),
                allowing_pickles(recipe.allow_pickle),
            ):
                command(recipe, **given)

        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in parameters}
        return called

    return decorate


def _once(model: str | None, named: str) -> str:
    if model is not None:
        raise UserError(f"expected one model, found {model} and --model {named}: name it once")
    return named


def _names_own_code(recipe: Recipe, given: Mapping[str, Any]) -> bool:
    """Only then may modules of the current directory be imported: it may hold anything."""
    return any(own.is_name(value) for value in (*recipe.given().values(), *given.values()))


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


def _keyword(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    quiet = default in (None, (), {}) or isinstance(default, bool)
    return "" if quiet else f"  [default: {default}]"


def _metavar(name: str, field: FieldInfo) -> str:
    special = {"set": "NAME=VALUE", "include": "GLOB", "exclude": "GLOB", "tokens": "NxLENGTH"}
    special |= dict.fromkeys(("into", "forward", "loss", "evaluate"), "PACKAGE.MODULE:NAME")
    special["accept"] = "CONDITION"
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
