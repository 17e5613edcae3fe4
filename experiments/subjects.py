"""Language models and texts: SmolLM2 with texts in four languages or kinds, and a tiny model with two."""

from __future__ import annotations

import functools
import math
import random
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.manifest import find, package
from mas_ext.comparison.options import read_toml
from mas_ext.scenarios.datasets import import_extra

ANSWERS = Path(__file__).with_name("answers.toml")
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "'mas_ext[language]'"
UNASKED = -100  # what cross_entropy ignores


class Rows(NamedTuple):
    """Texts as token ids, and as labels, which are UNASKED where nothing is asked; (rows, length) each."""

    ids: Tensor
    labels: Tensor


class Subject(NamedTuple):
    """A language model, and what it is to learn, to keep and to be tested on.

    learned: rows to train on, as ids (rows, length). held: rows that importance is taken from.
    test: by kind of text; the first kind is that of `learned`, the model knew the others.
    """

    model: nn.Module
    learned: Tensor
    held: Tensor
    test: Mapping[str, Rows]


# Translations in the database, by their keys there, and numbers of books: Genesis, Matthew and John.
SWAHILI, ENGLISH, FRENCH = "h", "4", "l"
HELD, LEARNED, TESTED = 1, 40, 43


@functools.cache
def smollm2(length: int, held: int, tested: int) -> Subject:
    """SmolLM2-135M-Instruct in bfloat16, which is to learn Swahili.

    It knew English and some French (the same chapters as in Swahili), and its answers to simple questions.

    Args:
        length: tokens of a row.
        held: rows of English that importance is taken from.
        tested: rows of each kind to test on, besides all answers.
    """
    transformers = import_extra("transformers", INSTALL)
    folder = package("smollm2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=MODEL)
    plain = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=MODEL, quantization_config=plain, dtype=torch.bfloat16
    )
    model.config.use_cache = False
    with closing(
        sqlite3.connect(f"file:{find('bible', 'data/bible.db', None)}?mode=ro", uri=True)
    ) as db:

        def rows(translation: str, book: int, count: int | None = None) -> Tensor:
            asked = "SELECT vText FROM bible WHERE bbName = ? AND bNumber = ? ORDER BY id"
            text = " ".join(verse for (verse,) in db.execute(asked, (translation, book)))
            ids = torch.tensor(tokenizer(text)["input_ids"])
            return ids[: len(ids) // length * length].view(-1, length)[:count]

        kinds = {"Swahili": SWAHILI, "English": ENGLISH, "French": FRENCH}
        test = {kind: whole(rows(key, TESTED, tested)) for kind, key in kinds.items()}
        test["answers"] = answers(tokenizer)
        return Subject(model, rows(SWAHILI, LEARNED), rows(ENGLISH, HELD, held), test)


def answers(tokenizer: Any) -> Rows:
    """Simple questions and the model's answers, by greedy decoding before any training: those are asked for."""
    ids, labels = [], []
    for question, answer in read_toml(ANSWERS).items():
        chat = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        start = asked["input_ids"]
        end = tokenizer(answer)["input_ids"]
        ids.append(torch.tensor(start + end))
        labels.append(torch.tensor([UNASKED] * len(start) + end))
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
    # Behind the text: causal attention does not see it.
    return Rows(pad(ids), pad(labels, padding_value=UNASKED))


def whole(ids: Tensor) -> Rows:
    """All of a text is asked for."""
    return Rows(ids, ids)


@functools.cache
def tiny(length: int, held: int, tested: int) -> Subject:
    """Two layers that know sentences of some words and are to learn those of others; see `smollm2`."""
    transformers = import_extra("transformers", INSTALL)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "use_cache": False}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads))
    known, learned = (
        sentences(words, length, 400 + held + tested)
        for words in ("the cat and a dog sat on this mat", "le chat et un chien sont sur ce tapis")
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for rows in known[:400].split(8):
        optimizer.zero_grad()
        nats(model, whole(rows)).mean().backward()
        optimizer.step()
    test = {"learned": whole(learned[:tested]), "known": whole(known[400:][:tested])}
    return Subject(model, learned[tested:], known[-held:], test)


def sentences(words: str, length: int, count: int) -> Tensor:
    """Rows of characters: these words in random order, (count, length)."""
    drawn = random.Random(words).choices(words.split(), k=count * length)
    characters = " ".join(drawn).encode()[: count * length]
    return torch.tensor(list(characters)).view(count, length)


def nats(model: nn.Module, rows: Rows) -> Tensor:
    """-log p of each token that is asked for, (tokens,)."""
    logits: Tensor = model(input_ids=rows.ids).logits[:, :-1].float()
    labels = rows.labels[:, 1:].flatten()
    each = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=UNASKED, reduction="none")
    return each[labels != UNASKED]


@torch.no_grad()
def perplexity(model: nn.Module, rows: Rows) -> float:
    """exp of the mean of `nats` over all tokens that are asked for."""
    parts = zip(*(part.split(4) for part in rows), strict=True)
    return math.exp(torch.cat([nats(model, Rows(*part)) for part in parts]).mean())
