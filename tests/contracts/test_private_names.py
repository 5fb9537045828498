"""Private names of torch, transformers and the rest are touched in `compat.py` only, so that a new
release of theirs breaks one file."""

import ast
from pathlib import Path

import rankine

SOURCE = Path(rankine.__file__).parent
FILES = sorted(file for file in SOURCE.rglob("*.py") if file.name != "compat.py")
#: `_name_or_path` is a key in every saved config.json.
PUBLIC_BY_USE = {"_name_or_path"}


def private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def parsed(file):
    return ast.parse(file.read_text("utf-8"))


def own_names():
    """Attributes that our own classes define: methods, class variables, `self._x = ...`."""
    found = set()
    for tree in map(parsed, FILES):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for part in node.body:
                    names = [getattr(part, "name", "")]
                    targets = getattr(part, "targets", [getattr(part, "target", None)])
                    names += [t.id for t in targets if isinstance(t, ast.Name)]
                    found.update(names)
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            for target in targets if isinstance(node, ast.Assign | ast.AnnAssign) else []:
                inner = target.elts if isinstance(target, ast.Tuple) else [target]
                found.update(t.attr for t in inner if isinstance(t, ast.Attribute))
    return found - {"_parameters", "_buffers", "_modules", "_version"}


def foreign_names(file, ours):
    """(line, name) of each private name that is not ours."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in ours:
            yield node.lineno, ast.unparse(node)
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("rankine"):
            path = (node.module or "").split(".")
            names = [*path, *(alias.name for alias in node.names)]
            yield from ((node.lineno, name) for name in names if private(name))
        if isinstance(node, ast.Import):
            parts = [part for alias in node.names for part in alias.name.split(".")]
            yield from ((node.lineno, part) for part in parts if private(part))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            *("getattr", "setattr", "hasattr", "delattr"),
        ):
            for argument in node.args[1:2]:
                name = getattr(argument, "value", None)
                if isinstance(name, str) and private(name) and name not in ours | PUBLIC_BY_USE:
                    yield node.lineno, name


def test_only_compat_touches_them():
    ours = own_names()
    found = [
        f"{file.relative_to(SOURCE)}:{line}: {name}"
        for file in FILES
        for line, name in foreign_names(file, ours)
    ]
    assert found == []


def test_the_search_finds_what_it_should(tmp_path):
    file = tmp_path / "file.py"
    file.write_text(
        "import torch._dynamo\nfrom transformers.utils import _private\nfrom torch._C import x\n"
        "model._parameters\ngetattr(model, '_tied_weights_keys')\nself._mine\n__class__\n"
    )
    found = {name for _, name in foreign_names(file, {"_mine"})}
    assert found == {"_dynamo", "_private", "_C", "model._parameters", "_tied_weights_keys"}
