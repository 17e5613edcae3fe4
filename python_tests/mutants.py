"""Mutants: the code with one small change, which some test must notice.

    python python_tests/mutants.py [FILES ...] [--number N] [--seed S]

draws changes at random, evenly over the files, makes each in a copy of the tree, and runs the tests that can
see it until one fails. What does not compile, or compiles to the same code, counts as nothing. What became of
each is appended to build/mutants/results.txt; what is listed there is not tried again, but for the survivors,
which are printed at the end: each makes no difference to anyone, or shows a hole in the tests.
"""

from __future__ import annotations

import argparse
import ast
import gc
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import venv
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from copy import copy
from functools import partial
from itertools import chain, groupby, islice, zip_longest
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import pybind11
import pytest
from modules import loaded

from mas_ext import _C
from mas_ext.kernels import backends

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "mutants"
RESULTS = OUT / "results.txt"
BIN = Path(sys.executable).parent
NATIVE, SAID = "build/native", "build/tests.txt"  # in a copy of the tree
MEMORY = 16 << 30  # bytes that the tests of a mutant may ask for
HANGS = 300  # seconds after which tests that do nothing are taken for stuck
RESTART = 99

KERNELS = [
    "kernels/test_kernels.py",
    "kernels/test_optim_kernels.py",
    "kernels/test_low_rank.py",
    "kernels/test_per_sample.py",
]
STATE = [
    "state/test_quadratic.py",
    "test_penalty.py",
    "state/test_sequences.py",
    "test_adapters.py",
]
OPTIM = ["optim/test_hooks.py", "optim/test_fused.py", "optim/test_failed_steps.py"]
OPTIM += ["optim/test_mixed_precision.py"]

# The tests that can see a change of a file, those that see most of it first.
TESTS = {
    "csrc/elementwise.h": KERNELS,
    "csrc/cpu/level.h": KERNELS,
    "csrc/cpu/vectors.h": KERNELS[2:],
    "csrc/cpu/accumulate.cpp": KERNELS[:1],
    "csrc/cpu/merge.cpp": KERNELS[:1],
    "csrc/cpu/penalty.cpp": KERNELS[:1],
    "csrc/cpu/proximal.cpp": KERNELS[:1],
    "csrc/cpu/optim.cpp": KERNELS[1:2],
    "csrc/cpu/low_rank.cpp": KERNELS[2:3],
    "csrc/cpu/per_sample.cpp": KERNELS[3:],
    "mas_ext/optim/fused.py": OPTIM[1:],
    "mas_ext/optim/hooks.py": OPTIM,
    "mas_ext/optim/step_size.py": OPTIM,
    "mas_ext/state/buffers.py": STATE,
    "mas_ext/state/files.py": ["state/test_files.py"],
    "mas_ext/state/low_rank.py": [*STATE[::-1]],
    "mas_ext/state/merge_rules.py": STATE,
    "mas_ext/state/offloading.py": ["state/test_offloading.py", *STATE],
    "mas_ext/state/quadratic.py": [*STATE, "state/test_files.py"],
    "mas_ext/state/folders.py": ["state/test_replacing.py", "test_windows.py"],
    "mas_ext/state/replacing.py": ["state/test_replacing.py", "state/test_files.py"],
    "mas_ext/state/sharded_files.py": [
        "parameters/test_fsdp.py",
        "parameters/test_fsdp_adapters.py",
    ],
    "mas_ext/state/sharded_updates.py": ["parameters/test_fsdp_adapters.py"],
    "mas_ext/parameters/sharded_adapters.py": ["parameters/test_fsdp_adapters.py"],
    "mas_ext/parameters/ranks.py": ["parameters/test_ranks.py", "parameters/test_agreement.py"],
    "mas_ext/parameters/agreement.py": ["parameters/test_agreement.py"],
    "mas_ext/parameters/lockstep.py": ["parameters/test_lockstep.py", "parameters/test_fsdp.py"],
    "mas_ext/parameters/fsdp.py": ["parameters/test_fsdp.py", "parameters/test_lockstep.py"],
}


class Mutant(NamedTuple):
    """A replacement of bytes in a file."""

    path: str
    start: int
    end: int
    new: str

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.new.encode() + source[self.end :]

    def shown(self, source: bytes) -> str:
        """The changed line, on one line."""
        begin = source.rfind(b"\n", 0, self.start) + 1
        end = (source + b"\n").index(b"\n", self.end)
        old = b" ".join(source[self.start : self.end].split()).decode()
        before, after = source[begin : self.start].decode(), source[self.end : end].decode()
        number = source.count(b"\n", 0, self.start) + 1
        return f"{self.path}:{number}: {before.lstrip()}[{old} -> {self.new}]{after}"


# -- Python ----------------------------------------------------------------------------------------

SWAPPED: dict[type, list[type]] = {
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
    ast.Add: [ast.Sub],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.Div],
    ast.Div: [ast.Mult],
    ast.FloorDiv: [ast.Mult],
    ast.Mod: [ast.Mult],
    ast.Pow: [ast.Mult],
    ast.BitOr: [ast.BitAnd],
    ast.BitAnd: [ast.BitOr],
    ast.And: [ast.Or],
    ast.Or: [ast.And],
}
RENAMED = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list"}
LEFT_OUT = {"abs", "clone", "contiguous", "copy", "detach", "double", "float", "to"}
# Not of them, nor of what is below them: types, messages, names.
UNTOUCHED = (ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom, ast.expr_context)
UNTOUCHED_FIELDS = {"annotation", "returns", "decorator_list", "exc", "cause"}

Change = tuple[Any, Any]  # a node, and what takes its place


def changed(node: Any, **fields: Any) -> Any:
    other = copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def negated(test: Any) -> ast.UnaryOp:
    return ast.UnaryOp(ast.Not(), test)


def changes(node: Any) -> Iterator[Change]:
    """Each small change of a node."""
    match node:
        case ast.Compare(ops=[op]):
            yield from ((node, changed(node, ops=[other()])) for other in SWAPPED[type(op)])
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op):
            yield from ((node, changed(node, op=other())) for other in SWAPPED.get(type(op), []))
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield node, operand
        case ast.Constant(value=bool(x)):
            yield node, ast.Constant(not x)
        case ast.Constant(value=int(x) | float(x)):
            yield node, ast.Constant(x + 1)
        case ast.Call(func=ast.Name(id=name)) if name in RENAMED:
            yield node.func, ast.Name(RENAMED[name])
        case ast.Call(func=ast.Attribute(value=receiver, attr=name)) if name in LEFT_OUT:
            yield node, receiver
        case ast.If() | ast.While() | ast.IfExp():
            yield node.test, negated(node.test)
        case ast.comprehension(ifs=tests):
            yield from ((test, ast.Constant(True)) for test in tests)
        case ast.With(items=items):
            nothing = ast.parse("__import__('contextlib').nullcontext()", mode="eval").body
            yield from ((i.context_expr, nothing) for i in items if i.optional_vars is None)
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield value, ast.Constant(None)
    match node:
        case ast.BoolOp(values=values):
            for i in range(len(values)):
                rest = values[:i] + values[i + 1 :]
                yield node, rest[0] if len(rest) == 1 else changed(node, values=rest)
        case (
            ast.Expr(value=ast.Call() | ast.Await())
            | ast.Assign(targets=[ast.Attribute() | ast.Subscript()])
            | ast.AugAssign()
            | ast.Delete()
            | ast.Raise()
            | ast.Continue()
            | ast.Break()
        ):
            yield node, ast.Pass()


def nodes(node: Any) -> Iterator[Any]:
    yield node
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            typing = typing or (isinstance(child, ast.keyword) and child.arg == "strict")
            passive = name in UNTOUCHED_FIELDS or isinstance(child, UNTOUCHED) or typing
            if isinstance(child, ast.AST) and not passive:
                yield from nodes(child)


def python_mutants(path: str, source: bytes) -> Iterator[Mutant]:
    lines = [0, *(m.end() for m in re.finditer(rb"\n", source))]
    for node in nodes(ast.parse(source)):
        for old, new in changes(node):
            text = ast.unparse(ast.fix_missing_locations(new))
            yield Mutant(
                path,
                lines[old.lineno - 1] + old.col_offset,
                lines[old.end_lineno - 1] + old.end_col_offset,
                text if isinstance(new, ast.stmt) else f"({text})",
            )


# -- C++ -------------------------------------------------------------------------------------------

OPERATORS = {
    "<": ["<=", ">="],
    "<=": ["<", ">"],
    ">": [">=", "<="],
    ">=": [">", "<"],
    "==": ["!="],
    "!=": ["=="],
    "+": ["-"],
    "-": ["+"],
    "*": ["/"],
    "/": ["*"],
    "%": ["*"],
    "&&": ["||"],
    "||": ["&&"],
    "&": ["|"],
    "|": ["&"],
    "^": ["|"],
    "<<": [">>"],
    ">>": ["<<"],
    "+=": ["-="],
}
REPLACED = {"true": "false", "false": "true", "double": "float"}
# The formatter puts spaces around binary operators, and none around templates' brackets and pointers' stars.
TOKEN = re.compile(
    r"(?P<operator>(?<= )(?:[<>=!+-]=|&&|\|\||<<|>>|[-<>+*/%&|^])(?=\s))"
    r"|(?P<number>(?<![\w.])(?:0x[0-9a-f]+(?!\w)|\d+(?:\.\d+)?)(?=[uF]?\b(?!\.)))"
    r"|(?P<word>\b(?:true|false|double)\b)"
    r"|(?P<condition>(?<=\bif )\([^()\n]*(?:\([^()\n]*\)[^()\n]*)*\))"
    r"|(?P<statement>(?<=\n)[ ]+(?!return|using|const|for|if|case|typedef|static)"
    r"[\w.\[\]>*()-]+(?: [-+*]?= |\().*;(?=\n))"
)


def cpp_mutants(path: str, source: bytes) -> Iterator[Mutant]:
    text = source.decode("ascii")
    code = re.sub(r"//.*|^#.*|\btemplate <.*>$", lambda m: " " * len(m[0]), text, flags=re.M)
    for start in range(len(code)):
        found = TOKEN.match(code, start)
        if found is None:
            continue
        old = found[0]
        match found.lastgroup:
            case "operator":
                others = OPERATORS[old]
            case "number":
                others = [str((float if "." in old else partial(int, base=0))(old) + 1)]
            case "word":
                others = [REPLACED[old]]
            case "condition":
                others = [f"(!{old})"]
            case _:
                others = [";"]
        yield from (Mutant(path, start, found.end(), new) for new in others)


# -- running ---------------------------------------------------------------------------------------


def drawn(files: list[str], number: int, seed: int) -> list[Mutant]:
    """Mutants, the same number of every file as far as there are as many, by file."""
    each = []
    for path in files:
        make = python_mutants if path.endswith(".py") else cpp_mutants
        found = sorted(set(make(path, (ROOT / path).read_bytes())))
        random.Random(f"{seed} {path}").shuffle(found)
        each.append(found)
    in_turn = filter(None, chain.from_iterable(zip_longest(*each)))
    return sorted(islice(in_turn, number), key=lambda m: files.index(m.path))


def is_native(path: str) -> bool:
    return path.startswith("csrc/")


class Tree:
    """A copy of what git knows, with an environment that imports mas_ext from it, and a build of its own."""

    def __init__(self, place: Path) -> None:
        self.place = place
        names = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split("\n")
        for name in filter(None, names):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)
        shutil.copy(_C.__file__, place / "mas_ext")
        venv.create(place / ".venv", symlinks=True)
        (packages,) = (place / ".venv").glob("lib/*/site-packages")
        others = [p for p in sys.path if p.endswith("-packages")]
        (packages / "tree.pth").write_text("\n".join(map(str, [place, *others])))
        (place / "build/emulated").mkdir(parents=True)
        for module in (ROOT / "build/emulated").glob("_C_emulated*"):
            shutil.copy(module, place / "build/emulated")

    def compile(self) -> bool:
        """Build for one instruction set, quickly."""
        build = self.place / NATIVE
        if not build.exists():
            subprocess.run(
                [
                    *(
                        BIN / "cmake",
                        "-S",
                        self.place,
                        "-B",
                        build,
                        "-G",
                        "Ninja",
                    ),
                    *("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=any"),
                    *("-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0"),
                    *(f"-DPython_EXECUTABLE={sys.executable}", "-DPython_FIND_VIRTUALENV=ONLY"),
                    f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                ],
                env={**os.environ, "MAS_EXT_CUDA": "off"},
                stdout=subprocess.DEVNULL,
                check=True,
            )
        return (
            subprocess.run(
                [Path(sys.executable).parent / "ninja", "-j1", "-C", build], capture_output=True
            ).returncode
            == 0
        )


class Server:
    """The tests of some files, collected once in a process whose children run them with the files of then."""

    def __init__(self, place: Path, files: list[str]) -> None:
        for module in (place / "build/emulated").iterdir():
            os.utime(module)  # tests refuse those that are older than the sources
        self.process = subprocess.Popen(
            [place / ".venv/bin/python", "python_tests/mutants.py", "--serve", *files],
            cwd=place,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MAS_EXT_REQUIRE_NATIVE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, path: str, tests: list[str], limit: int = 0) -> tuple[int | None, float]:
        """How tests ended after a change of a file, None if they could not begin, and the seconds they took.

        limit: seconds of the processor, which others may be busy with; 0: any.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            print(json.dumps([path, tests, limit]), file=self.process.stdin, flush=True)
        status, seconds = (self.process.stdout.readline() or "None 0").split()
        return None if status == "None" else int(status), float(seconds)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def serve(files: list[str]) -> None:
    """Be a server. A child's status is 0 if all tests pass, and RESTART if more than functions has changed."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    said = os.open(SAID, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    for descriptor in (0, 1, 2):
        os.dup2(said, descriptor)
    first = {path: Path(path).read_bytes() for path in files}

    class Plugin:
        @pytest.hookimpl(tryfirst=True)
        def pytest_runtestloop(self, session: pytest.Session) -> None:
            if session.testsfailed:
                os._exit(1)
            for line in requests:
                path, tests, limit = json.loads(line)
                child = os.fork()
                if child == 0:
                    os.setsid()
                    if limit:
                        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
                        signal.alarm(HANGS + 10 * limit)
                    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                    session.items = [
                        i for t in tests for i in session.items if located(t) == i.path
                    ]
                    if is_native(path):
                        take_native()
                    elif not take_python(path, first[path]):
                        os._exit(RESTART)
                    return
                _, status, used = os.wait4(child, 0)
                with suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)  # what it has started
                seconds = used.ru_utime + used.ru_stime
                print(os.waitstatus_to_exitcode(status), seconds, file=answers, flush=True)
            os._exit(0)

    others = "[reference or [emulated or cuda or instruction_set" if is_native(files[0]) else "cuda"
    tests = {located(test) for path in files for test in TESTS[path]}
    # Of temporary folders elsewhere, other pytests would remove the oldest.
    options = ["-qx", "-p", "no:cacheprovider", "--basetemp=build/tmp", "-k", f"not ({others})"]
    os._exit(pytest.main([*options, *map(str, tests)], plugins=[Plugin()]))


def located(test: str) -> Path:
    return Path("python_tests", test).resolve()


def take_native() -> None:
    """Have all use the kernels that were built last."""
    (file,) = Path(NATIVE).glob("_C*")
    backends._C = loaded("_C", file.resolve())


def take_python(path: str, first: bytes) -> bool:
    """Give the functions of a file the code that is there now; whether that is all that has changed."""
    module = sys.modules.get(path.removesuffix(".py").replace("/", "."))
    source = Path(path).read_bytes()
    if module is None or source == first:
        return True
    name = str(module.__file__)
    old, new = ([*codes(compile(s, name, "exec"))] for s in (first, source))
    place = {(code.co_name, code.co_firstlineno): k for k, code in enumerate(old)}
    if len(old) != len(new):
        return False
    left = {k for k, (a, b) in enumerate(zip(old, new, strict=True)) if shape(a) != shape(b)}
    for function in gc.get_objects():
        if type(function) is FunctionType and function.__code__.co_filename == name:
            k = place.get((function.__code__.co_name, function.__code__.co_firstlineno))
            if k is not None:
                inside = range(k, k + sum(1 for _ in codes(old[k])))
                if left & {*inside}:
                    with suppress(ValueError):  # other variables of the function around it
                        function.__code__ = new[k]
                        left -= {*inside}
    return not left


def codes(code: CodeType) -> Iterator[CodeType]:
    """A code and those inside, in the order of the source."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def shape(code: CodeType) -> Any:
    """What a code does, but for lines, and what is inside."""
    constants = [None if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    table = getattr(code, "co_exceptiontable", None)
    return code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars, table


class Trial:
    """Mutants of some files, native or not, one after another."""

    def __init__(self, tree: Tree, files: list[str]) -> None:
        self.tree, self.files, self.native = tree, files, is_native(files[0])
        if self.native:
            assert tree.compile()
            self.build = self.built()
        self.server = Server(tree.place, files)
        self.seconds: dict[str, float] = {}
        self.number = 0

    def built(self) -> bytes:
        (module,) = (self.tree.place / NATIVE).glob("_C*")
        return module.read_bytes()

    def limit(self, path: str) -> int:
        """Seconds in which tests end that pass; they must, before anything is changed."""
        for test in TESTS[path]:
            if test not in self.seconds:
                status, self.seconds[test] = self.server.run(path, [test])
                if status != 0:
                    said = (self.tree.place / SAID).read_text(errors="replace")[-10_000:]
                    sys.exit(f"{said}\n{test}: got failures before anything was changed")
        return 30 + 3 * int(sum(self.seconds[test] for test in TESTS[path]))

    def verdict(self, mutant: Mutant) -> str:
        """What becomes of a mutant."""
        file, path = self.tree.place / mutant.path, mutant.path
        source, limit = file.read_bytes(), self.limit(path)
        file.write_bytes(mutant.apply(source))
        try:
            if self.native:
                if not self.tree.compile():
                    return "refused"
                if self.built() == self.build:
                    return "same"
            else:  # what is compiled is known by its time, in seconds
                self.number += 1
                os.utime(file, (self.number, self.number))
            status, _ = self.server.run(path, TESTS[path], limit)
            if status == RESTART:
                other = Server(self.tree.place, [path])
                status, _ = other.run(path, TESTS[path], limit)
                other.close()
            if (
                status is not None and status > 2
            ):  # of pytest: neither passed, nor failed, nor interrupted
                sys.exit(f"{mutant.shown(source)}: pytest ended with status {status}")
            return "refused" if status is None else "killed" if status else "survived"
        finally:
            file.write_bytes(source)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", nargs="+", choices=TESTS, help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", default=[*TESTS], metavar="FILE", help="of the tree")
    parser.add_argument("--number", type=int, default=400, help="of mutants")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.serve is not None:
        serve(given.serve)
    OUT.mkdir(parents=True, exist_ok=True)
    RESULTS.touch()
    known = {}
    for line in RESULTS.read_text().splitlines():
        verdict, shown = line.split(" ", 1)
        known[shown] = verdict
    mutants = drawn(given.files, given.number, given.seed)
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        tree = Tree(Path(folder))
        for native, own in groupby(mutants, key=lambda m: is_native(m.path)):
            trial = None
            for mutant in own:
                shown = mutant.shown((tree.place / mutant.path).read_bytes())
                found[shown] = known.get(shown, "survived")
                if found[shown] == "survived":
                    alike = [path for path in given.files if is_native(path) == native]
                    trial = trial or Trial(tree, alike)
                    found[shown] = trial.verdict(mutant)
                    with RESULTS.open("a") as file:
                        file.write(f"{found[shown]} {shown}\n")
                print(f"{len(found)}/{len(mutants)} {found[shown]} {shown}", flush=True)
            if trial is not None:
                trial.server.close()
    print()
    for path in given.files:
        count = Counter(v for shown, v in found.items() if shown.startswith(f"{path}:"))
        print(f"{path}: {', '.join(f'{n} {verdict}' for verdict, n in count.items()) or 'none'}")
    survivors = [shown for shown, verdict in found.items() if verdict == "survived"]
    killed = sum(verdict == "killed" for verdict in found.values())
    print(f"{killed} of {killed + len(survivors)} were killed")
    print(*survivors, sep="\n")


if __name__ == "__main__":
    main()
