"""Coverage-guided fuzzing of what reads files: `python -m fuzz READER [options of libFuzzer]`.

Inputs that reach new code are kept in build/fuzz, those that fail as build/fuzz/failed-READER-...: put these
into corpus/READER, which `test_corpus.py` runs through the reader.
"""

from __future__ import annotations

import copy
import gc
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import atheris
from fuzz.targets import TARGETS, tree_of

# What libFuzzer sees the branches of.
INSTRUMENTED = {"mas_ext", "tomllib", "zipfile", "gzip"}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf")),
    *(2**31, 2**63, 10**30, "", "a", "\0", "\ud800", "auto", "mas", [], {}, [[]], {"": []}),
)

Place = tuple[Any, Any]  # a dict or list, and where in it


def places(node: Any) -> Iterator[Place]:
    """Everything in a tree, by what holds it."""
    for key in [*node] if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from places(node[key])


def mutate_tree(tree: dict[str, Any], chance: random.Random) -> None:
    """One change, at any place."""
    every = list(places(tree))
    if not every:
        tree[chance.choice(["config", "settings", "tree", "seeds"])] = copy.deepcopy(
            chance.choice(VALUES)
        )
        return
    node, key = chance.choice(every)
    old = node[key]
    match chance.randrange(7):
        case 0:
            node[key] = copy.deepcopy(chance.choice(VALUES))
        case 1:
            other, there = chance.choice(every)
            node[key] = copy.deepcopy(other[there])
        case 2:
            del node[key]
        case 3 if isinstance(node, dict):
            node[chance.choice(every)[1] if chance.random() < 0.5 else f"{key}x"] = node.pop(key)
        case 4:
            node[key] = [old, copy.deepcopy(old)][: chance.choice([1, 2])]
        case 5 if type(old) in (int, float) and abs(old) < 1e300:
            node[key] = chance.choice([-old, old + 1, old * 2, old / 3, str(old)])
        case _ if isinstance(old, str):
            new = atheris.Mutate(old.encode(errors="surrogatepass"), len(old) + 16)
            node[key] = new.decode(errors="replace")
        case _:
            node[key] = {"a": old}


def mutator(data: bytes, max_size: int, seed: int) -> bytes:
    """A tree changed as a tree, anything else as bytes."""
    tree = tree_of(data)
    if not isinstance(tree, dict):
        return bytes(atheris.Mutate(data, max_size))
    chance = random.Random(seed)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        mutate_tree(tree, chance)
    new = json.dumps({str(key): node for key, node in tree.items()}).encode()
    return new if len(new) <= max_size else data


def instrument() -> None:
    """Have libFuzzer see what runs; atheris's way, at import, does not see what is installed as editable."""
    for function in gc.get_objects():
        if type(function) is FunctionType:
            package = str(function.__module__).partition(".")[0]
            if package in INSTRUMENTED:
                atheris.instrument_func(function)


def main() -> None:
    """Run libFuzzer until an input fails, takes 20 s or 2 GB, or until its options say."""
    reader, *options = sys.argv[1:]
    found = Path("build/fuzz")
    (found / reader).mkdir(parents=True, exist_ok=True)
    kept = Path(__file__).with_name("corpus") / reader
    limits = ["-timeout=20", "-rss_limit_mb=2048", f"-artifact_prefix={found}/failed-{reader}-"]
    words = [sys.argv[0], str(found / reader), str(kept), *limits, *options]
    instrument()
    atheris.Setup(words, TARGETS[reader], custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
