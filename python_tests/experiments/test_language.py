"""The experiment on language models, without the packages that it reads."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments import EXPERIMENTS, Results, manifest, subjects
from experiments.language import VARIANTS, importance_of
from experiments.manifest import DataError, find, package
from experiments.subjects import UNASKED, Rows, nats, perplexity, sentences, whole
from mas_ext.comparison.cells import fill
from mas_ext.comparison.options import read_toml


class Bigrams(nn.Module):
    """Logits of the next of five tokens, from this one alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 5)

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.table(input_ids))


def test_perplexity_is_of_what_is_asked_for() -> None:
    """exp of the mean of -log p over tokens, not over rows; the first token of a row is not asked for."""
    torch.manual_seed(1)
    ids = torch.randint(5, (7, 6))
    labels = ids.clone()
    labels[:, :2] = UNASKED
    labels[3, 3:] = UNASKED
    model = Bigrams()
    table = model.table.weight.detach().double()
    expected = []
    for row, asked in zip(ids.tolist(), labels.tolist(), strict=True):
        for before, token, label in zip(row[:-1], row[1:], asked[1:], strict=True):
            if label != UNASKED:
                weights = [math.exp(x) for x in table[before].tolist()]
                expected.append(-math.log(weights[token] / sum(weights)))
    assert len(expected) == 7 * 4 - 3
    rows = Rows(ids, labels)
    torch.testing.assert_close(
        nats(model, rows).double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6
    )
    assert perplexity(model, rows) == pytest.approx(
        math.exp(sum(expected) / len(expected)), rel=1e-5
    )
    assert len(nats(model, whole(ids))) == 7 * 5


def test_sentences_are_of_their_words() -> None:
    rows = sentences("ab c", 10, 4)
    assert rows.shape == (4, 10)
    text = "".join(map(chr, rows.flatten().tolist()))
    assert set(text.split()[:-1]) == {"ab", "c"}
    torch.testing.assert_close(rows, sentences("ab c", 10, 4))


class Letters:
    """A tokenizer: a letter is a token; a chat is its question between two marks."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, chat: Any, **how: Any) -> dict[str, list[int]]:
        assert how == {"add_generation_prompt": True, "return_dict": True}
        return self("<" + chat[0]["content"] + ">")


def test_answers_alone_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "answers.toml"
    path.write_text('"Why?" = "So."\n"Is it?" = "Yes"\n')
    monkeypatch.setattr(subjects, "ANSWERS", path)
    ids, labels = subjects.answers(Letters())
    assert ["".join(map(chr, row)).strip("\0") for row in ids.tolist()] == [
        "<Why?>So.",
        "<Is it?>Yes",
    ]
    asked = [[chr(each) for each in row if each != UNASKED] for row in labels.tolist()]
    assert asked == [list("So."), list("Yes")]
    assert labels[0, 6] == ids[0, 6] == ord("S")


def test_committed_answers() -> None:
    known = read_toml(subjects.ANSWERS)
    assert len(known) == 24
    assert known["What is the capital of France?"] == "The capital of France is Paris.<|im_end|>"


@pytest.mark.parametrize("importance", ["ones", "mas", "fisher"])
def test_importance_of_a_variant(importance: Any) -> None:
    """Against sums over samples."""
    torch.manual_seed(2)
    held, model = torch.randint(5, (6, 4)), Bigrams()
    table = model.table.weight.detach().double().requires_grad_()
    expected = torch.ones_like(table) if importance == "ones" else torch.zeros_like(table)
    for row in held if importance != "ones" else ():
        logits = table[row[:-1]]
        if importance == "mas":
            value = logits.gather(1, row[1:, None]).square().sum()
            expected += torch.autograd.grad(value, table)[0].abs() / len(held)
        else:
            value = logits.log_softmax(1).gather(1, row[1:, None]).sum()
            expected += torch.autograd.grad(value, table)[0].square() / len(held)
    found = importance_of(model, held, "parameters", importance, batch=2)["table.weight"]
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_every_lam_is_measured_with_one_seed_before_two(tmp_path: Path) -> None:
    """The middle lam of all methods first; rows and curves have the means over the seeds."""
    experiment: Any = replace(EXPERIMENTS["language"], seeds=2)
    few = {name: VARIANTS[name] for name in ("L2 of A and B", "MAS of s B A")}
    experiment = replace(experiment, variants=few)
    results = Results(tmp_path / "language.json", experiment.protocol())

    def measured(cell: Any) -> Any:
        auto = cell["lam"] == "auto"
        learned = 10 * (1 + (0.5 if auto else cell["lam"] or 0.0)) + cell["seed"]
        found = {"perplexity": {"Swahili": learned, "English": 4.0, "French": 9.0}}
        return {**found, "chosen_lam": 0.25 + cell["seed"]} if auto else found

    fill(results, experiment.plan(results), measured)
    order = [(cell["method"], cell["lam"], cell["seed"]) for cell, _ in results.where()]
    assert order[:4] == [
        ("before", None, 0),
        ("fine-tuning", None, 0),
        ("L2 of A and B", 0.1, 0),
        ("MAS of s B A", 0.01, 0),
    ]
    assert [seed for _, _, seed in order] == [0] * 8 + [1] * 7 + [0, 0, 1, 1]
    assert {lam for _, lam, _ in order[-4:]} == {"auto"}
    assert len(set(order)) == len(order)

    page = experiment.show(results)
    row = next(line for line in page.text.splitlines() if "| MAS of s B A | 0.1 |" in line)
    assert row.startswith("| MAS of s B A | 0.1 | 11.50 ± ")
    assert row.endswith(" | 4.00 ± 0.00 | 9.00 ± 0.00 | 2 |")
    assert "| before |  | 10.00 | 4.00 | 9.00 |  |" in page.text
    assert "| MAS of s B A | auto: 0.25 to 1.2 | 15.50 ± " in page.text
    assert "](language.svg)" in page.text
    lines = {line.get_label(): line for line in page.figures["language.svg"].axes[0].lines}
    assert [label for label in lines if label[0] != "_"] == ["before", "fine-tuning", *few]
    stars = [line for line in lines.values() if line.get_marker() == "*"]
    assert len(stars) == 2
    assert stars[0].get_xdata() == pytest.approx([math.sqrt(15 * 16)])
    y = lines["MAS of s B A"].get_ydata()
    assert y == pytest.approx([6.0] * 3)
    x = lines["MAS of s B A"].get_xdata()
    assert x[-1] == pytest.approx(math.sqrt(11 * 12))


def test_data_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found without being imported; of a missing package is told how to install it."""
    folder = tmp_path / "carrier_of_data"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('not to be imported')")
    (folder / "file").write_bytes(b"content")
    tables = tmp_path / "data.toml"
    tables.write_text(
        '[here]\norigin = "a shop"\npackage = "carrier_of_data"\n'
        '[gone]\npackage = "no_such_carrier"\ninstall = "no-such==1"\n'
    )
    monkeypatch.setattr(manifest, "MANIFEST", tables)
    monkeypatch.syspath_prepend(tmp_path)
    assert package("here") == folder
    assert find("here", "file", None) == folder / "file"
    assert "carrier_of_data" not in sys.modules
    with pytest.raises(
        DataError,
        match=r"^no_such_carrier is not installed, run: pip install --no-deps no-such==1$",
    ):
        find("gone", "file", None)
