"""A small language model learns one corpus after another, with and without MAS, in full or by LoRA.

pip install ".[transformers]" peft
python examples/language.py [--lora] [--of tokens] [--lam 0.1]

Texts are what is installed anyway: the docstrings of NumPy (before anything else), the reference of the Python
language (first task) and the docstrings of torch (second task). The model reads bytes.

benchmarks/language.py measures what `--of` should be.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import math
import pydoc_data.topics
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from mas_ext.integrations.loading import once
from mas_ext.integrations.transformers import MASCallback, ModelOutput

LENGTH, BATCH = 64, 32
Blocks = list[dict[str, Tensor]]


def docstrings(modules: Iterable[Any]) -> Iterator[str]:
    """What the public names of modules say of themselves."""
    for module in modules:
        for name in sorted(dir(module)):
            text = inspect.getdoc(getattr(module, name))
            if text and not name.startswith("_"):
                yield f"{name}\n{text}\n\n"


def blocks(texts: Iterable[str]) -> tuple[Blocks, Blocks]:
    """The bytes of texts, each once, in pieces: for training, and every tenth for testing."""
    joined = "".join(dict.fromkeys(texts)).encode()[:400_000]
    rows = torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()
    pieces = [{"input_ids": r, "labels": r} for r in rows.split(LENGTH)[:-1]]
    return [p for i, p in enumerate(pieces) if i % 10], pieces[::10]


def corpora() -> dict[str, tuple[Blocks, Blocks]]:
    """Training and test data by name, in the order in which they are learned."""
    return {
        "numpy": blocks(docstrings([np, np.linalg, np.ndarray, np.random])),
        "python": blocks(pydoc_data.topics.topics.values()),
        "torch": blocks(docstrings([torch, torch.nn, nn.functional, Tensor, torch.linalg])),
    }


@torch.no_grad()
def perplexity(model: nn.Module, data: Blocks) -> float:
    """exp of the mean negative log-likelihood of a byte."""
    rows = torch.stack([block["input_ids"] for block in data])
    model.eval()
    losses = [len(r) * float(model(input_ids=r, labels=r).loss) for r in rows.split(128)]
    return math.exp(sum(losses) / len(rows))


def train(
    model: nn.Module, data: Blocks, steps: int, lr: float, mas: list[MASCallback], seed: int = 0
) -> None:
    """One task."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=lr,
            lr_scheduler_type="constant",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        )
        Trainer(model, arguments, train_dataset=data, callbacks=list(mas)).train()


def small_model(seed: int = 0) -> nn.Module:
    """136,000 parameters, from a configuration alone."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, max_position_embeddings=LENGTH, use_cache=False, **shape, **heads
        )
    )
    return model


def with_lora(model: nn.Module) -> nn.Module:
    """Low-rank adapters on every linear layer of the blocks; all else is frozen."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def main() -> None:
    """Compare learning the second corpus with MAS and without."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lora", action="store_true", help="train low-rank adapters alone")
    parser.add_argument("--of", default="tokens", choices=["logits", "tokens", "hidden"])
    parser.add_argument("--last", type=int, help="only this many last positions of a text")
    parser.add_argument("--lam", type=float, nargs="+", default=[1.0], help="strengths to compare")
    parser.add_argument("--steps", type=int, default=300, help="steps for each corpus")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, too")
    chosen = parser.parse_args()

    data, model = corpora(), small_model()
    train(model, data["numpy"][0], 2 * chosen.steps, 3e-3, [])
    if chosen.lora:
        model = with_lora(model)
    lr = 3e-3 if chosen.lora else 1e-3
    train(model, data["python"][0], chosen.steps, lr, [])

    def tested(model: nn.Module) -> list[float]:
        return [perplexity(model, data[name][1]) for name in ("python", "torch")]

    found = {"after the first corpus": tested(model)}
    for lam in [0.0, *chosen.lam]:
        own = copy.deepcopy(model)
        mas = MASCallback(
            lam,
            forward=ModelOutput(chosen.of, chosen.last),
            batches=lambda loader: islice(once(loader), 20),
        )
        # Trained already: no step, but its importance is taken.
        train(own, data["python"][0], 1, 0.0, [mas])
        train(own, data["torch"][0], chosen.steps, lr, [mas])
        found[f"then the second, lam = {lam:g}"] = tested(own)

    print(f"{'perplexity of a byte':36}{'python':>9}{'torch':>9}")
    for name, values in found.items():
        print(f"{name:36}" + "".join(f"{v:9.3f}" for v in values))
    if chosen.json:
        print(json.dumps({"options": vars(chosen), "found": found}))


if __name__ == "__main__":
    main()
