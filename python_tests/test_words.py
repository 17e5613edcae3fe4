"""Names and docstrings: what a reader meets stands once, and stands alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import mas_ext

PACKAGE = Path(mas_ext.__file__).parent
# Beginnings of docstrings that send the reader elsewhere, or that say what a thing is by what it is not.
REFUSED = ("See ", "See.", "That ", "Those ", "The same", "What of ", "As ")
# Each adapter offers these under the name that fits the library that it is for.
ADAPTERS = {"chosen_lam", "MASCallback", "attach"}


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        yield file, ast.parse(file.read_text(encoding="utf-8"))


def test_docstrings_stand_alone() -> None:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        f"{file.relative_to(PACKAGE)}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}"
        for file, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, kinds)
        and (text := ast.get_docstring(node)) is not None
        and text.startswith(REFUSED)
    ]
    assert not found, "\n".join(found)


def test_no_public_name_is_defined_twice() -> None:
    places: dict[str, set[str]] = {}
    for file, tree in trees():
        for name in defined(tree):
            if not name.startswith("_"):
                places.setdefault(name, set()).add(str(file.relative_to(PACKAGE)))
    twice = {name: where for name, where in places.items() if len(where) > 1}
    for name in ADAPTERS & twice.keys():
        twice[name] = {where for where in twice[name] if not where.startswith("integrations/")}
    assert not {name: where for name, where in twice.items() if len(where) > 1}


def defined(tree: ast.Module) -> Iterator[str]:
    """Classes, functions, constants and aliases that a module defines, also under a condition."""
    for node in tree.body:
        inner = (
            ast.Module(body=[*node.body, *node.orelse], type_ignores=[])
            if isinstance(node, ast.If)
            else None
        )
        if inner is not None:
            yield from defined(inner)
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (t.id for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
