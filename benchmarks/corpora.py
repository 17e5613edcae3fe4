"""A small language model that reads bytes, and what it reads: for the benchmark of its outputs.

Texts are what is installed anyway: the docstrings of NumPy (before anything else), the reference of the Python
language (first task) and the docstrings of torch (second task).
"""

from __future__ import annotations

import inspect
import math
import pydoc_data.topics
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from mas_ext.integrations.transformers import MASCallback

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
