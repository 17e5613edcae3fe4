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
from mas_ext.compare.cells import fill
from mas_ext.compare.options import read_toml


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


def test_committed_answers_are_twelve_and_twelve() -> None:
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


def test_lam_is_chosen_for_both_texts_and_the_page_has_the_rest(tmp_path: Path) -> None:
    """Of all lam tried the one with the best score; rows have the means of the seeds."""
    experiment: Any = replace(EXPERIMENTS["language"], seeds=2)
    few = {name: VARIANTS[name] for name in ("L2 of A and B", "MAS of s B A")}
    experiment = replace(experiment, variants=few)
    results = Results(tmp_path / "language.json", experiment.protocol())

    def measured(cell: Any) -> Any:
        lam = cell["lam"] or 0.0
        learned, known = 10 * (1 + lam), 2 * (1 + 1 / (lam + 0.01))
        return {
            "perplexity": {"Swahili": learned + cell["seed"] / 10, "English": known},
            "score": -(math.log(learned) + math.log(known)) / 2,
        }

    fill(results, experiment.plan(results), measured)
    tried = {
        cell["lam"]: found["score"]
        for cell, found in results.where(method="MAS of s B A", purpose="choose")
    }
    best = max(tried, key=tried.__getitem__)
    final = results.where(method="MAS of s B A", purpose="final")
    assert {cell["lam"] for cell, _ in final} == {best}
    assert [cell["seed"] for cell, _ in final] == [0, 1]
    assert {cell["seed"] for cell, _ in results.where(purpose="choose")} == {1000}
    page = experiment.show(results)
    learned = 10 * (1 + best) + 0.05
    row = next(line for line in page.text.splitlines() if "MAS of s B A" in line)
    assert row.startswith(f"| MAS of s B A | {learned:.2f} ± ")
    assert row.endswith(f" | {best:g} | 2 |")
    assert "| before | 10.00 | 202.00 |  |  |" in page.text
    assert "](language.png)" in page.text
    (line,) = (
        each
        for each in page.figures["language.png"].axes[0].lines
        if each.get_label() == "MAS of s B A"
    )
    assert len(line.get_xdata()) == len(tried)


def test_data_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found without being imported; a missing package is named, with where it is from."""
    folder = tmp_path / "carrier_of_data"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('not to be imported')")
    (folder / "file").write_bytes(b"content")
    tables = tmp_path / "data.toml"
    tables.write_text(
        '[here]\norigin = "a shop"\npackage = "carrier_of_data"\n'
        '[gone]\norigin = "a museum"\npackage = "no_such_carrier"\n'
    )
    monkeypatch.setattr(manifest, "MANIFEST", tables)
    monkeypatch.syspath_prepend(tmp_path)
    assert package("here") == folder
    assert find("here", "file", None) == folder / "file"
    assert "carrier_of_data" not in sys.modules
    with pytest.raises(
        DataError, match=r"^no_such_carrier is not installed; it is from a museum: pip "
    ):
        find("gone", "file", None)
