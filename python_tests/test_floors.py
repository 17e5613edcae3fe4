"""Imports run downward only, so that a module can be read, tested and changed without those above it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mas_ext

PACKAGE = Path(mas_ext.__file__).parent

# From the roof down. A module may import those of lower floors, never one of its own floor or above.
FLOORS = [
    {"cli"},
    {"report", "experiments"},
    {"charts"},
    {"findings"},
    {"demo", "runs", "benchmarks"},
    {"record", "progress", "summary"},
    {"config"},
    {"trainer"},
    {"learning"},
    {"settings"},
    {"integrations"},
    {"methods", "compat", "sharded_checkpoint"},
    {"penalty"},
    {"optim"},
    {"attach", "held", "distributed"},
    {"consolidation"},
    {"importance", "memory", "info", "checkpoint"},
    {"sharded"},
    {"parameters", "rules", "streaming"},
    {"kernels"},
    {"_C"},
    # The side rooms: at the bottom, since they know nothing of the house.
    {"catalogue"},
    {"data", "stream"},
    {"data_files"},
    {"scenarios"},
    {"models"},
    {"names", "transforms", "resnet", "metrics"},
]
SIDE_ROOMS = set().union(*FLOORS[FLOORS.index({"catalogue"}) :])
FLOOR = {module: i for i, floor in enumerate(FLOORS) for module in floor}
# The same inside these packages.
INSIDE = {
    "kernels": [
        {"ops"},
        {"optim_native", "per_sample_native"},
        {"native"},
        {"optim_reference"},
        {"reference"},
    ],
    "benchmarks": [
        {"penalty", "importance", "step"},
        {"forms", "gradients", "networks", "workloads", "copies"},
        {"timing", "memory"},
    ],
}


def imports(file: Path) -> Iterator[list[str]]:
    """Everything that a file imports, anywhere in it, as the parts of a dotted name."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write out relative imports"
            assert node.module
            yield from ([*node.module.split("."), alias.name] for alias in node.names)


def files() -> Iterator[tuple[str, Path]]:
    """Each file with its module: the first name below mas_ext."""
    for file in PACKAGE.rglob("*.py"):
        module = file.relative_to(PACKAGE).with_suffix("").parts[0]
        if module != "__init__":
            yield module, file


def edges() -> Iterator[tuple[str, str, Path]]:
    for module, file in files():
        for name in imports(file):
            imported = [*name, "__init__"][1]
            if name[0] == "mas_ext" and imported != module:
                yield module, imported, file


def test_every_module_has_a_floor() -> None:
    assert {module for module, _ in files()} <= FLOOR.keys()


def test_imports_run_downward() -> None:
    found = list(edges())
    assert ("kernels", "_C", PACKAGE / "kernels" / "native.py") in found
    for module, imported, file in found:
        assert imported in FLOOR, f"{file}: import {imported} from the module that defines it"
        assert FLOOR[imported] > FLOOR[module], f"{file} imports {imported}, which is not below it"


def test_only_native_touches_the_extension() -> None:
    assert {file.name for _, imported, file in edges() if imported == "_C"} == {"native.py"}


def test_state_knows_no_estimator() -> None:
    assert ("consolidation", "importance") not in {(module, low) for module, low, _ in edges()}


@pytest.mark.parametrize("package", INSIDE)
def test_packages_run_downward(package: str) -> None:
    above: set[str] = set()
    for floor in INSIDE[package]:
        above |= floor
        for name in floor:
            file = PACKAGE / package / f"{name}.py"
            used = {parts[2] for parts in imports(file) if parts[1:2] == [package]}
            assert not used & above, file
    assert above == {file.stem for file in (PACKAGE / package).glob("*.py")} - {"__init__"}


def test_side_rooms_import_only_what_reads_tensors_and_data() -> None:
    allowed = {"torch", "numpy", "safetensors", "mas_ext", *sys.stdlib_module_names}
    for module, file in files():
        if module in SIDE_ROOMS:
            assert {name[0] for name in imports(file)} <= allowed, file
