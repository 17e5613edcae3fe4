"""Which output of a language model keeps its first corpus best: JSON, and the table on docs/how-to/language.md.

python -m benchmarks.language

Needs transformers and accelerate. At every strength lam times the mean importance is the same for all outputs.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.files import RESULTS, ROOT, fill, machine, measured_on, save
from experiments.tables import table
from mas_ext import FusedMASPenalty
from mas_ext.metrics import interval_text

RESULT, PAGE = RESULTS / "language_cpu.json", ROOT / "docs" / "how-to" / "language.md"
OUTPUTS: Mapping[str, tuple[Any, int | None]] = {
    "tokens": ("tokens", None),
    "logits": ("logits", None),
    "logits, last 8": ("logits", 8),
    "hidden": ("hidden", None),
}
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)
NONE, FIRST = "no penalty", "after the first corpus"


def measure(seed: int, steps: int) -> dict[str, Any]:
    """Perplexities of the two corpora, by output and strength."""
    from benchmarks import corpora
    from mas_ext.integrations.loading import once
    from mas_ext.integrations.transformers import MASCallback, ModelOutput

    data, model = corpora.corpora(), corpora.small_model(seed)
    corpora.train(model, data["numpy"][0], steps, 3e-3, [], seed)
    corpora.train(model, data["python"][0], steps, 1e-3, [], seed)

    def tested(model: torch.nn.Module) -> list[float]:
        return [corpora.perplexity(model, data[name][1]) for name in ("python", "torch")]

    def continued(callbacks: list[Any], lam: float = 0.0, state: Any = None) -> list[float]:
        own = copy.deepcopy(model)
        for callback in callbacks:
            callback.penalty = FusedMASPenalty(own, **callback.options)
            callback.penalty.load_state_dict(state)
            callback.penalty.lam = lam
        corpora.train(own, data["torch"][0], steps, 1e-3, callbacks, seed)
        return tested(own)

    found: dict[str, Any] = {FIRST: tested(model), NONE: continued([])}
    for name, (of, last) in OUTPUTS.items():
        forward = ModelOutput(of, last)
        penalty = FusedMASPenalty(model, forward=forward)
        loader = torch.utils.data.DataLoader(data["python"][0], batch_size=corpora.BATCH)
        penalty.consolidate(islice(once(loader), 20))
        omega = torch.cat([w.flatten() for w in penalty.omega.values()])
        mean = float(penalty.scale) * float(omega.double().mean())
        found[name] = {}
        for strength in STRENGTHS:
            # One batch: the importance of the second corpus is not looked at.
            few = MASCallback(forward=forward, batches=lambda loader: islice(once(loader), 1))
            perplexities = continued([few], strength / mean, penalty.state_dict())
            found[name][str(strength)] = perplexities
            print(seed, name, strength, perplexities, flush=True)
    return found


def page(result: Mapping[str, Any]) -> str:
    """What was measured, in Markdown."""
    seeds = result["seeds"]

    def cell(values: list[list[float]]) -> str:
        return " / ".join(interval_text([v[i] for v in values], 2) for i in (0, 1))

    rows = [
        [f"`{name}`", *(cell([found[name][str(s)] for found in seeds]) for s in STRENGTHS)]
        for name in OUTPUTS
    ]
    head = ["lam times mean importance", *map(str, STRENGTHS)]
    return "\n\n".join(
        [
            table(head, rows),
            "Perplexity of a byte of the first / of the second corpus after both, mean and 95 % interval over "
            f"{len(seeds)} seeds, {result['steps']} steps a corpus, all parameters trained, AdamW. After the "
            f"first corpus alone: {cell([found[FIRST] for found in seeds])}; both without a penalty: "
            f"{cell([found[NONE] for found in seeds])}.",
            f"{measured_on(result)}; `benchmarks/language.py`.",
        ]
    )


def main() -> None:
    """Measure, write, and fill in the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", type=Path, default=RESULT, help="the page is of the default")
    options = parser.parse_args()
    about = {"machine": machine(), "threads": torch.get_num_threads(), "steps": options.steps}
    seeds = [measure(seed, options.steps) for seed in range(options.seeds)]
    result = {**about, "seeds": seeds}
    save(result, options.json)
    if options.json == RESULT:
        fill(PAGE, {"language": page(result)})


if __name__ == "__main__":
    main()
