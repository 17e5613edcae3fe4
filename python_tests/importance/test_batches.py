"""Batches of every form: their input, their size, and parts of them."""

from __future__ import annotations

import warnings
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn
from torch.utils.data import Dataset, TensorDataset

from mas_ext import FusedMASPenalty, estimate_fisher, estimate_importance
from mas_ext.importance import batches
from mas_ext.importance.evaluation import Evaluate, Labelled, default_forward


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Encoding(UserDict[str, Any]):
    """As tokenizers return it: a dictionary whose items are attributes, too."""

    def __init__(self, data: dict[str, Any], kind: str) -> None:
        super().__init__(data)
        self.kind = kind

    def __getattr__(self, name: str) -> Any:
        return self.data[name]


X, Y = torch.arange(8.0).view(4, 2), torch.arange(4)


@pytest.mark.parametrize(
    ("batch", "kept"),
    [
        ((X, Y), tuple),
        ([X, Y], list),
        (Pair(X, Y), Pair),
        ({"x": X, "y": Y}, dict),
        (OrderedDict(x=X, y=Y), OrderedDict),
        (MappingProxyType({"x": X, "y": Y}), dict),
        (UserDict({"x": X, "y": Y}), UserDict),
        (Encoding({"x": X, "y": Y}, "plain"), Encoding),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, type) else "",
)
def test_a_part_of_any_batch(batch: Any, kept: type) -> None:
    assert batches.first(batch) is X
    assert batches.size(batch) == 4
    part = batches.between(batch, 1, 3)
    assert type(part) is kept
    values = list(part.values() if hasattr(part, "values") else part)
    assert torch.equal(values[0], X[1:3])
    assert torch.equal(values[1], Y[1:3])
    # The batch itself is as it was.
    assert batches.first(batch) is X
    assert batches.size(batch) == 4


def test_an_encoding_reaches_the_model_whole() -> None:
    model = nn.Linear(2, 3)
    seen = []

    def forward(model: nn.Module, batch: Any) -> Tensor:
        seen.append((batch.kind, batch.x.shape[1]))
        output: Tensor = model(batch.x)
        return output

    encoded = [Encoding({"x": X[:3], "text": "three"}, "a"), Encoding({"x": X[3:]}, "b")]
    omega = estimate_importance(model, encoded, forward=forward)
    expected = estimate_importance(model, [X])
    assert set(seen) == {("a", 2), ("b", 2)}
    for name, t in expected.items():
        assert t.sum() > 0
        torch.testing.assert_close(omega[name], t)
    by_default = estimate_importance(model, encoded)
    for name, t in expected.items():
        torch.testing.assert_close(by_default[name], t)


@pytest.mark.parametrize("mapping", [UserDict, MappingProxyType, dict])
def test_a_mapping_of_other_lengths_is_refused(mapping: Any) -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\) in a batch of 4 samples"):
        batches.size(mapping({"x": X, "y": Y[:3]}))
    with pytest.raises(TypeError, match="starting with str"):
        batches.size(mapping({"text": "no tensor", "x": X}))
    with pytest.raises(TypeError, match="starting with NoneType"):
        batches.size(mapping({}))


# -- entries that are no tensors -------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    x: Tensor
    names: Any
    scale: float = 1.0


class Fields(dict[str, Any]):
    """Has its items as attributes, and finds them nowhere else."""

    __getattr__ = dict.__getitem__


class Tensors(dict[str, Tensor]):
    """A TensorDict, as far as it is asked for: it knows its number of samples."""

    samples = 0

    def apply(self, f: Any, batch_size: list[int]) -> Tensors:
        assert batch_size == []
        return Tensors({key: f(t) for key, t in self.items()})

    def auto_batch_size_(self, dims: int) -> Tensors:
        self.samples = len(next(iter(self.values())))
        return self


NAMES = ["a", "b", "c", "d"]


def cut(batch: Any, start: int, stop: int) -> Any:
    """What a model gets of the samples from start to stop, which are cut twice."""
    return batches.copied(batches.between(batches.between(batch, 0, 3), start, stop))


@pytest.mark.parametrize(
    "entry",
    [
        NAMES,
        tuple(NAMES),
        [1, 2, 3, 4],
        [None, {"k": 1}, None, {"k": 2}],
        range(4),
        np.arange(4),
        np.arange(8).reshape(4, 2),
        np.array(NAMES, dtype=object),
        [[1], [2, 3], [], [4]],
        [{"id": i} for i in range(4)],
        torch.Size([2, 3, 4, 5]),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_sequence_as_long_as_the_batch_is_cut_with_it(entry: Any, nested: bool) -> None:
    batch = (X, {"inside": [entry]}) if nested else (X, entry)
    got = cut(batch, 1, 3)[1]
    got = got["inside"][0] if nested else got
    assert type(got) is type(entry)
    assert repr(got) == repr(entry[1:3])
    # Of one sample, too, and an object that a model may change.
    assert repr(batches.copied(batches.between(batch, 3, 4))[1]).count(repr(entry[3:4])) == 1
    if isinstance(entry, (list, np.ndarray)):
        before = repr(entry)
        got[0] = None if isinstance(entry, list) else 7
        assert repr(entry) == before


@pytest.mark.parametrize(
    "entry",
    [
        "four",
        b"four",
        4,
        4.0,
        None,
        (32, 32),
        (1, 2, 3),
        [5],
        np.array(4),
        np.arange(3),
        {"a", "b", "c", "d"},
        {"size": (2, 3), "mode": "mean", "of": {"a": 1, "b": 2, "c": 3, "d": 4}},
        Pair(1, 2),  # type: ignore[arg-type]
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_as_long_as_the_batch_is_for_all_samples(entry: Any) -> None:
    """Also after a cut to as many samples as it is long."""
    for start, stop in ((0, 3), (0, 2), (1, 2)):
        assert repr(cut((X, entry), start, stop)[1]) == repr(entry)


def test_lists_of_tensors_are_fields_or_have_one_for_each_sample() -> None:
    fields = cut((X, [X + 1, Y]), 1, 3)[1]
    assert torch.equal(fields[0], X[1:3] + 1)
    assert torch.equal(fields[1], Y[1:3])
    boxes = [{"boxes": torch.full((n, 2), i)} for i, n in enumerate((3, 3, 3, 1))]
    got = cut((X, boxes), 1, 3)[1]
    assert [(len(item["boxes"]), int(item["boxes"][0, 0])) for item in got] == [(3, 1), (3, 2)]
    names = batches.between((X, [NAMES, NAMES]), 1, 3)
    assert batches.copied(batches.between(names, 0, 1))[1] == [["b"], ["b"]]
    # Two fields of two samples, one of them a list.
    both = (X[:2], (Y[:2], [torch.zeros(5), torch.ones(3)]))
    got = batches.copied(batches.between(both, 1, 2))
    assert got[1][0].tolist() == [1]
    assert [t.tolist() for t in got[1][1]] == [[1.0] * 3]


@pytest.mark.parametrize(
    "batch",
    [Record(X, NAMES), Fields(x=X, names=NAMES), Tensors(x=X), {"nested": Record(X, NAMES)}],
    ids=lambda batch: type(batch).__name__,
)
def test_dataclasses_and_dictionaries_with_attributes_keep_their_type(batch: Any) -> None:
    got = cut(batch, 1, 3)
    assert type(got) is type(batch)
    got, whole = (got["nested"], batch["nested"]) if type(batch) is dict else (got, batch)
    x = got["x"] if isinstance(got, Tensors) else got.x
    assert torch.equal(x, X[1:3])
    if isinstance(got, Tensors):
        assert got.samples == 2
    else:
        assert got.names == ["b", "c"]
        assert whole.names is NAMES
    assert batches.first(batch) is X
    assert batches.size(batch) == 4


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ((X, [torch.zeros(5), torch.zeros(3)]), r"shape \(5,\) in a batch of 4 samples"),
        (
            [torch.zeros(5, 2), torch.zeros(3, 2)],
            "a list of 2 sequences of lengths 5, 3, expected one",
        ),
        (([torch.zeros(5, 2), torch.zeros(3, 2)], X), "a list of 2 sequences of lengths 5, 3"),
        (
            {"x": [torch.zeros(5), torch.zeros(3)], "y": X},
            "sequences of lengths 5, 3, .*pad_sequence",
        ),
        (
            (torch.zeros(7, 4, 2), X),
            r"in a batch of 7 samples.*where dimension 0 is time.*transpose",
        ),
        ((torch.zeros(7, 3, 2), X), r"after a first tensor\)$"),
        (rnn.pack_sequence([torch.ones(2), torch.ones(1)]), "got a PackedSequence"),
        ([X[:2], torch.zeros(5)], r"shape \(5,\) in a batch of 2 samples"),
        ((X, rnn.pack_sequence([torch.ones(2), torch.ones(1)])), "got a PackedSequence"),
        (
            (X, torch.nested.nested_tensor([torch.ones(2)] * 4, layout=torch.jagged)),
            "got a nested tensor in a batch",
        ),
    ],
)
def test_a_ragged_batch_is_refused(batch: Any, said: str) -> None:
    for function in (batches.size, batches.told):
        with pytest.raises(ValueError, match=said):
            function(batch)


class Points(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Any:
        return X[i], i


class OfHuggingFace:
    """As their library's own data sets: rows, and no class of torch's."""

    __module__ = "datasets.arrow_dataset"

    def __iter__(self) -> Any:
        return iter([{"input_ids": [1, 2]}])


@pytest.mark.parametrize("given", [Points(), TensorDataset(X, X), OfHuggingFace()])
def test_a_data_set_is_no_batches(given: Any) -> None:
    model = nn.Linear(X.shape[1], 2)
    said = f"batches: got the data set {type(given).__name__}, .*DataLoader"
    for call in (
        lambda: estimate_importance(model, given),
        lambda: FusedMASPenalty(model).consolidate(given),
        lambda: FusedMASPenalty(model).observe(given),
        lambda: estimate_fisher(model, given),
    ):
        with pytest.raises(TypeError, match=said):
            call()


def test_packed_sequences_are_no_batches() -> None:
    packed = rnn.pack_sequence([torch.ones(2, 2), torch.ones(1, 2)])
    with pytest.raises(ValueError, match=r"got a PackedSequence.*pass padded tensors"):
        estimate_importance(nn.LSTM(2, 2), packed)


class Last(nn.Module):
    """From sequences whose dimension 0 is time to one output for each."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.recurrent(x)[0][-1])
        return output


@pytest.mark.parametrize("samples", [5, 6])
def test_sequences_with_time_first_are_told_what_to_do(samples: int) -> None:
    model, x = Last(), torch.randn(6, samples, 2)
    with pytest.raises(ValueError, match=r"where dimension 0 is time.*batch\.transpose\(0, 1\)"):
        estimate_importance(model, [x])
    with pytest.raises(ValueError, match=r"samples interact.*where dimension 0 is time"):
        estimate_importance(model.recurrent, [x], forward=lambda m, batch: m(batch)[0])
    found = estimate_importance(  # as the message says
        model, [x.transpose(0, 1)], forward=lambda model, batch: model(batch.transpose(0, 1))
    )
    for k in range(samples):
        model.zero_grad()
        model(x[:, k : k + 1]).square().sum().backward()
        for name, p in model.named_parameters():
            found[name] -= p.grad.abs() / samples  # type: ignore[union-attr]
    assert all(t.abs().max() < 1e-6 for t in found.values())


class Scaled(nn.Module):
    """Each sample by the layer, and the number, of its own name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(2, 3) for name in "ab"})

    def forward(self, x: Tensor, names: Any, numbers: Any, power: int) -> Tensor:
        rows = zip(x, names, numbers, strict=True)
        return torch.stack([self.layers[name](r).tanh() ** power * float(n) for r, name, n in rows])


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, lambda items: np.array(items, dtype=object)]
)
@pytest.mark.parametrize("forms", ["tuple", "dict", "record"])
def test_importance_of_batches_with_entries_is_that_of_a_loop(kind: Any, forms: str) -> None:
    model = Scaled().double()
    numbers, names = [0.5, 2.0, -1.0, 3.0, 1.5, 0.1], list("abbaab")
    x = torch.randn(6, 2, dtype=torch.float64)

    def forward(model: Any, batch: Any) -> Tensor:
        if forms == "tuple":
            given = batch
        elif forms == "dict":
            given = batch["x"], batch["more"]["names"], batch["more"]["numbers"], batch["power"]
        else:
            given = batch.x, batch.names[0], batch.names[1], batch.scale
        output: Tensor = model(*given)
        return output

    def batch(start: int, stop: int) -> Any:
        few = x[start:stop], kind(names[start:stop]), kind(numbers[start:stop])
        if forms == "tuple":
            return (*few, 2)
        if forms == "dict":
            return {"x": few[0], "more": {"names": few[1], "numbers": few[2]}, "power": 2}
        return Record(few[0], [few[1], few[2]], 2)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "importance of .* takes the fallback", UserWarning)
        omega = estimate_importance(model, [batch(0, 5), batch(5, 6)], forward=forward)
    for name, p in model.named_parameters():
        total = torch.zeros_like(p)
        for k in range(6):
            y = model(x[k : k + 1], [names[k]], [numbers[k]], 2).pow(2).sum()
            (g,) = torch.autograd.grad(y, p, allow_unused=True)
            total += torch.zeros_like(p) if g is None else g.abs() / 6
        torch.testing.assert_close(omega[name], total, rtol=1e-10, atol=1e-14)


# -- what a proof is of ----------------------------------------------------------------------------


class Odd:
    """Has no value to compare by, and no hash."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> Any:
        raise AssertionError("compared")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ((X, 1, "a"), (X + 1, 1, "a"), True),
        ((X, 1), (X, 2), False),
        ((X, 1), (X, 1.0), False),
        ((X, 1), (X, True), False),
        ((X, "1"), (X, 1), False),
        ((X, float("nan")), (X, float("nan")), True),
        ((X, 0.0), (X, -0.0), False),
        ((X, [1, 2]), (X, [1, 2]), True),
        ((X, [1, 2]), (X, [2, 1]), False),
        ((X, [1, 2]), (X, (1, 2)), False),
        ((X, [[1], 2]), (X, [1, [2]]), False),
        ({"x": X, "k": {"a": [1]}}, {"x": Y, "k": {"a": [1]}}, True),
        ({"x": X, "k": {"a": [1]}}, {"x": X, "k": {"a": [2]}}, False),
        ({"x": X, "a": 1}, {"x": X, "b": 1}, False),
        ((X, np.arange(3)), (X, np.arange(3)), True),
        ((X, np.arange(3)), (X, np.arange(3) + 1), False),
        ((X, np.arange(3)), (X, np.arange(3).astype(float)), False),
        ((X, np.zeros(3, "int32")), (X, np.zeros(3, "float32")), False),
        ((X, np.array(NAMES, object)), (X, np.array(NAMES, object)), True),
        ((X, {1, 2}), (X, {2, 1}), True),
        ((X, {1, 2}), (X, {1, 3}), False),
        (Record(X, NAMES), Record(Y, NAMES), True),
        (Record(X, NAMES), Record(X, NAMES[1:]), False),
        (Pair(X, None), Pair(X, None), True),  # type: ignore[arg-type]
        ((X, torch.float32), (X, torch.float64), False),
        ((X, Y), (X, None), False),
        ((X, Odd()), (X, Odd()), False),
        ((X, object()), (X, object()), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_constants_of_a_batch(one: Any, other: Any, same: bool) -> None:
    assert (batches.constants(one) == batches.constants(other)) is same
    for batch in (one, other):
        again = batches.constants(batch)
        assert again == batches.constants(batch)
        assert hash(again) == hash(batches.constants(batch))
        assert batches.constants(batches.told(batch)) == batches.constants(batches.told(batch))


def test_what_the_default_forward_does_not_pass_on_is_no_constant() -> None:
    def of(batch: Any, forward: Any) -> Any:
        return Evaluate(nn.Linear(2, 3), forward, None, None).constants(
            Labelled(batches.told(batch))
        )  # type: ignore[arg-type]

    files = (X, ["1.png", "2.png", "3.png", "4.png"]), (X, ["5.png", "6.png", "7.png", "8.png"])
    assert of(files[0], default_forward) == of(files[1], default_forward)
    assert of(files[0], lambda model, batch: model(batch[0])) != of(files[1], len)
