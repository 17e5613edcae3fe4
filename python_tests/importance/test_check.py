"""What check_importance says of models whose ways are known, and of numbers that are made wrong."""

from __future__ import annotations

import copy
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import CASES, Wired

from mas_ext import check_importance, estimate_importance
from mas_ext.importance.exact import rules
from mas_ext.importance.exact.gradient_forms import Product
from mas_ext.importance.exact.layers import Linear

pytestmark = pytest.mark.usefixtures("one_thread")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def test_an_mlp_is_fast_and_exact() -> None:
    report = check_importance(mlp(), torch.randn(6, 4))
    assert [row.name for row in report.rows] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert {(row.fast, row.layout, row.reason) for row in report.rows} == {(True, "leading", "")}
    assert all(0 < row.error < 1e-6 for row in report.rows)
    assert report.note == ""


@pytest.mark.parametrize(
    ("name", "function", "slow"),
    [
        ("bilinear module", "bilinear", {"f.weight", "f.bias"}),
        ("a function with its own backward", "", {"w"}),
        ("long convolution", "mul", {"w"}),
        ("embedding bag, mean", "embedding_bag", {"weight"}),
    ],
)
def test_what_has_no_rule_takes_the_fallback_and_the_function_is_named(
    name: str, function: str, slow: set[str]
) -> None:
    """The report says it, and no warning beside it."""
    case = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = check_importance(case.make(), case.inputs(5), forward=case.forward)
    assert {row.name for row in report.rows if not row.fast} == slow
    for row in report.rows:
        assert row.error < 1e-5
        if row.fast:
            assert (row.layout, row.reason) == ("leading", "")
        else:
            reason = "no rule fits how the model uses it" + (f" ({function})" if function else "")
            assert (row.layout, row.reason) == ("", reason)


@pytest.mark.parametrize(
    ("function", "model", "shape"),
    [
        (torch.tensordot, Wired(lambda m, x: torch.tensordot(x, m.w, dims=1), w=torch.randn(4, 3)), (4,)),
        (F.bilinear, Wired(lambda m, x: m.f(x, x.square()), f=nn.Bilinear(4, 4, 3)), (5, 4)),
        (
            torch.baddbmm,
            Wired(
                lambda m, x: torch.baddbmm(
                    m.b, x.transpose(0, 1), batch2=1 + m.w, alpha=0.5
                ).transpose(0, 1),
                w=torch.randn(5, 4, 3), b=torch.randn(3),
            ),
            (5, 4),
        ),
    ],
)  # fmt: skip
def test_a_rule_of_the_readme_makes_its_function_fast(
    function: Any, model: nn.Module, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = Path(rules.__file__).with_name("README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", readme, re.DOTALL))
    x = torch.randn(7, *shape)
    rows = check_importance(model, x).rows
    named = f"no rule fits how the model uses it ({function.__name__})"
    assert {(row.fast, row.reason) for row in rows} == {(False, named)}
    for known in (torch.tensordot, F.bilinear, torch.baddbmm, Tensor.baddbmm):
        monkeypatch.setitem(rules.RULES, known, None)  # afterwards it has none again
    exec(code, {})
    rows = check_importance(model, x).rows
    assert {(row.fast, row.reason) for row in rows} == {(True, "")}
    assert all(row.layout and row.error < 1e-6 for row in rows)


def test_samples_in_dimension_1_are_said_to_be_there() -> None:
    case = CASES["encoder layer, sequence first, norm last"]
    report = check_importance(case.make(), case.inputs(5), objective="l1", forward=case.forward)
    layouts = {row.name: row.layout for row in report.rows if row.name.startswith("layer.")}
    assert (
        layouts.pop("layer.self_attn.out_proj.weight") == "trailing"
    )  # of rows (positions * samples)
    assert layouts.pop("layer.self_attn.out_proj.bias") == "trailing"
    assert {*layouts.values()} == {"inner"}


def test_what_is_pulled_back_sample_by_sample_says_so() -> None:
    case = CASES["weight norm"]
    report = check_importance(case.make(), case.inputs(5))
    reasons = {row.name: (row.fast, row.reason != "", row.error < 1e-5) for row in report.rows}
    normed = {n for n in reasons if "original" in n}
    assert normed == {f"0.parametrizations.weight.original{i}" for i in range(2)}
    assert {n for n, found in reasons.items() if found == (True, True, True)} == normed
    assert {
        n for n, found in reasons.items() if found == (True, False, True)
    } == reasons.keys() - normed


@pytest.mark.parametrize(
    "weight",
    [
        lambda m: m.w + 2 * (m.b @ m.a),
        lambda m: m.b @ m.a / 3 - m.w,
        lambda m: torch.sub(m.w, (m.a.t() @ m.b.t()).t(), alpha=2),
        lambda m: m.w + (1 + m.b) @ m.a,
        lambda m: m.w + (m.b.double() @ m.a.double()).float(),
    ],
)
def test_factors_reach_parameters_through_sums_and_products(weight: Any) -> None:
    parts = {"w": torch.randn(3, 4), "b": torch.randn(3, 2), "a": torch.randn(2, 4)}
    model = Wired(lambda m, x: F.linear(x, weight(m)) + F.linear(x.tanh(), m.w), **parts)
    rows = check_importance(model, torch.randn(5, 6, 4)).rows
    assert [(row.name, row.fast, row.reason) for row in rows] == [(n, True, "") for n in parts]
    assert all(row.error < 1e-6 for row in rows)


def test_random_numbers_are_the_reason_for_all() -> None:
    model = Wired(lambda m, x: m.a(x) + torch.rand(len(x), 1), a=nn.Linear(4, 3))
    report = check_importance(model, torch.randn(5, 4))
    assert {row.reason for row in report.rows} == {"the model draws random numbers (linear)"}


def test_a_wrong_number_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that is right for three samples, by which the engine checks itself, and twice too much for six."""
    right = Linear.weight_gradients

    def wrong(layer: Linear, grad: Tensor, x: Tensor, layout: Any) -> Any:
        found = right(layer, grad, x, layout)
        assert isinstance(found, Product)
        return found if layout.samples <= 3 else Product(2 * found.left, found.right)

    monkeypatch.setattr(Linear, "weight_gradients", wrong)
    errors = {row.name: row.error for row in check_importance(mlp(), torch.randn(6, 4)).rows}
    for name in ("0.weight", "2.weight"):
        assert errors[name] == pytest.approx(1.0, abs=1e-5)
    for name in ("0.bias", "2.bias"):
        assert errors[name] < 1e-6


def test_errors_are_those_of_the_models_own_precision() -> None:
    """Against |2 y x| in float64, written out."""
    model = nn.Linear(4, 3, bias=False).bfloat16()
    x = torch.randn(7, 4).bfloat16()
    (row,) = check_importance(model, x).rows
    wide = (x.double() @ model.weight.double().T).detach()
    expected = 2 * torch.einsum("ni,nj->ij", wide.abs(), x.double().abs()) / 7
    error = (estimate_importance(model, [x])["weight"] - expected).norm() / expected.norm()
    assert 1e-4 < row.error < 1e-2
    assert row.error == pytest.approx(float(error), rel=1e-6)


def test_parameters_without_importance_have_no_error() -> None:
    model = Wired(lambda m, x: m.a(x), a=nn.Linear(4, 3), unused=torch.ones(2))
    errors = {row.name: row.error for row in check_importance(model, torch.randn(5, 4)).rows}
    assert errors["unused"] == 0
    assert errors["a.weight"] > 0


def test_arguments_are_those_of_an_estimate() -> None:
    batch = {"x": torch.randn(5, 4), "y": torch.randn(5)}
    report = check_importance(
        mlp(),
        batch,
        objective="vector",
        forward=lambda model, batch: model(batch["x"]),
        exclude=["2.*"],
        backend="reference",
    )
    assert [row.name for row in report.rows] == ["0.weight", "0.bias"]
    assert all(row.error < 1e-6 for row in report.rows)
    with pytest.raises(ValueError, match="expected at most max_outputs=2"):
        check_importance(mlp(), torch.randn(5, 4), objective="vector", max_outputs=2)
    with pytest.raises(ValueError, match=r"exclude: got 'haed\.\*', which matches no parameter"):
        check_importance(mlp(), torch.randn(5, 4), exclude=["haed.*"])
    with pytest.raises(ValueError, match="batch: got 1 samples, expected at least 2"):
        check_importance(mlp(), torch.randn(1, 4))
    with pytest.raises(ValueError, match="samples interact"):
        check_importance(Wired(lambda m, x: m.a(x) - m.a(x).mean(0), a=mlp()), torch.randn(5, 4))


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo: Any) -> None:
        raise RuntimeError("one of a kind")


@pytest.mark.parametrize(
    ("model", "note"),
    [
        (Uncopied(4, 3), "no float64 reference: RuntimeError: one of a kind"),
        (
            Wired(lambda m, x: m.a(x.float()), a=nn.Linear(4, 3)),
            "no float64 reference: RuntimeError: mat1 and mat2 must have the same dtype",
        ),
    ],
    ids=["can't be copied", "can't compute in float64"],
)
def test_without_a_reference_there_is_a_note_instead_of_errors(model: nn.Module, note: str) -> None:
    report = check_importance(model, torch.randn(5, 4))
    assert all(row.fast and math.isnan(row.error) for row in report.rows)
    assert report.note.startswith(note)
    assert str(report).splitlines()[-1] == report.note


def test_it_prints_as_a_table() -> None:
    case = CASES["bilinear module"]
    model = Wired(lambda m, x: m.a(m.f(x)), f=case.make(), a=nn.Linear(3, 2))
    lines = str(check_importance(model, case.inputs(5))).splitlines()
    assert lines[0].split() == ["parameter", "way", "samples", "error", "why"]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["f.f.weight", "fallback"],
        ["f.f.bias", "fallback"],
        ["a.weight", "fast"],
        ["a.bias", "fast"],
    ]
    assert lines[1].endswith("no rule fits how the model uses it (bilinear)")
    assert len({line.index(word) for line, word in zip(lines, ("way", "fallback"))}) == 1  # noqa: B905


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    model[0].weight.grad = torch.ones(4, 4)
    before, parameters = copy.deepcopy(model.state_dict()), [*model.parameters()]
    x, random = torch.randn(5, 4), torch.get_rng_state()
    check_importance(model, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert model[0].weight.grad.eq(1).all()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
