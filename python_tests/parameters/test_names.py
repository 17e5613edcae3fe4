"""Names are those of the bare model; what can't be held is refused by name; changes are noticed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from mas_ext import Distillation, FusedMASPenalty, estimate_importance
from mas_ext.parameters.names import (
    Binding,
    ModelView,
    check_patterns,
    check_supported,
    layouts,
    named_parameters,
)


class Net(nn.Module):
    """A child of its own is called `module`, as DDP calls the model it wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3) + 0.5)
        self.module = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.module(x * self.scale))
        return output


NAMES = ["scale", "module.0.weight", "module.0.bias", "head.weight", "head.bias"]


class Wrapped(nn.Module):
    """Stands in for FSDP's wrapper, which needs a GPU."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = model

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self._fsdp_wrapped_module(x)
        return output


def checkpointed_inside(model: nn.Module) -> nn.Module:
    model.module[0] = checkpoint_wrapper(model.module[0])
    return model


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda model: model,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "ddp": nn.parallel.DistributedDataParallel,
    "data_parallel": nn.DataParallel,
    "fsdp": Wrapped,
    "checkpoint": checkpoint_wrapper,
    "checkpoint_inside": checkpointed_inside,
    "ddp_of_compiled": lambda model: nn.parallel.DistributedDataParallel(
        torch.compile(model, backend="eager")
    ),
    "compiled_ddp": lambda model: torch.compile(
        nn.parallel.DistributedDataParallel(checkpointed_inside(model)), backend="eager"
    ),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_leaves_no_trace_in_names_importance_and_state(wrapper: str) -> None:
    bare = Net()
    wrapped = WRAPPERS[wrapper](copy.deepcopy(bare))
    found = named_parameters(wrapped)
    assert list(found) == NAMES == [name for name, _ in bare.named_parameters()]
    for name, p in bare.named_parameters():
        assert torch.equal(found[name], p)

    batches = [torch.randn(3, 3), torch.randn(2, 3)]
    expected = estimate_importance(bare, batches)
    for name, omega in estimate_importance(wrapped, batches).items():
        torch.testing.assert_close(omega, expected[name])

    # A state goes from one to the other, and pulls there.
    kept, other = (
        FusedMASPenalty(bare, exclude=("head.*",)),
        FusedMASPenalty(wrapped, exclude=("head.*",)),
    )
    kept.consolidate(batches)
    other.load_state_dict(kept.state_dict())
    with torch.no_grad():
        found["scale"] += 2
    expected_value = 4 * kept.scale * kept.omega["scale"].double().sum()
    assert other().item() == pytest.approx(expected_value.item(), rel=1e-5)


def test_a_child_called_module_keeps_its_name() -> None:
    assert list(named_parameters(nn.Sequential(Net())))[1] == "0.module.0.weight"


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ((), NAMES),
        (("head.*",), ["scale", "module.0.weight", "module.0.bias"]),
        (["*.bias", "scale"], ["module.0.weight", "head.weight"]),
        (("module.?.*", "head.[bw]*"), ["scale"]),
        (("*",), []),
    ],
)
def test_patterns_exclude_whole_names(exclude: Any, left: list[str]) -> None:
    model = Net()
    check_patterns(model, exclude)
    assert list(named_parameters(model, exclude)) == left
    omega = estimate_importance(model, [torch.randn(2, 3)], exclude=exclude)
    assert list(omega) == left


@pytest.mark.parametrize("pattern", ["head", "Head.*", "ead.weight", "module.module.*", ""])
def test_a_pattern_that_matches_no_whole_name_is_refused(pattern: str) -> None:
    message = r"exclude: got .*, which matches no parameter; the names are scale, module\.0\.weight"
    with pytest.raises(ValueError, match=message):
        FusedMASPenalty(Net(), exclude=("*.bias", pattern))


def test_parameters_are_no_model() -> None:
    with pytest.raises(TypeError, match=r"model: got generator, expected a torch\.nn\.Module"):
        FusedMASPenalty(Net().parameters())  # type: ignore[arg-type]


def test_a_single_string_is_no_list_of_patterns() -> None:
    with pytest.raises(TypeError, match=r"exclude: got the string 'head\.\*', expected a sequence"):
        FusedMASPenalty(Net(), exclude="head.*")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.embedding(x))
        return output


def test_a_tied_parameter_counts_once_under_its_first_name() -> None:
    assert list(named_parameters(Tied())) == ["embedding.weight", "head.bias"]


@pytest.mark.parametrize("pattern", ["embedding.*", "head.weight"])
def test_a_tied_parameter_is_excluded_by_each_of_its_names(pattern: str) -> None:
    omega = estimate_importance(Tied(), [torch.tensor([1, 2])], exclude=(pattern,))
    assert list(omega) == ["head.bias"]


def test_a_shared_module_counts_once() -> None:
    layer = nn.Linear(2, 2)
    assert list(named_parameters(nn.Sequential(layer, layer))) == ["0.weight", "0.bias"]


# -- what can't be held ----------------------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight) if not isinstance(weight, nn.Parameter) else weight
        self.layer = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        return output


UNSUPPORTED: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "complex": (lambda: torch.zeros(2, dtype=torch.complex64), TypeError, "got torch.complex64"),
    "float8": (
        lambda: torch.zeros(2).to(torch.float8_e4m3fn),
        TypeError,
        "got torch.float8_e4m3fn",
    ),
    "sparse": (lambda: torch.zeros(2, 2).to_sparse(), TypeError, "got layout torch.sparse_coo"),
    "meta": (lambda: torch.zeros(2, device="meta"), TypeError, "got a meta tensor"),
    "lazy": (nn.UninitializedParameter, TypeError, "got a lazy parameter"),
    "expanded": (lambda: torch.zeros(1).expand(3), ValueError, r"got strides \(0,\)"),
    "overlapping": (
        lambda: torch.zeros(5).as_strided((3, 2), (1, 1)),
        ValueError,
        r"got strides \(1, 1\) for shape \(3, 2\)",
    ),
    "strided": (lambda: torch.zeros(4, 4)[:, ::2], ValueError, r"got strides \(4, 2\)"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_an_unsupported_parameter_is_refused_by_its_name(kind: str) -> None:
    make, error, message = UNSUPPORTED[kind]
    model = nn.Sequential(Holder(make()))
    penalty = FusedMASPenalty(model)
    for act in (
        lambda: estimate_importance(model, [torch.randn(3, 2)]),
        lambda: penalty.consolidate([torch.randn(3, 2)]),
        lambda: penalty.observe(torch.randn(3, 2)),
    ):
        with pytest.raises(error, match=rf"parameter '0\.weight': {message}"):
            act()
    assert penalty.num_tasks == 0
    assert penalty().item() == 0


def test_a_model_in_parts_of_zero_3_is_refused() -> None:
    """Its parameters are empty between passes, and hooks fill them."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i > 1)
        p.ds_id, p.ds_shape = i, p.shape  # type: ignore[attr-defined]
        p.data = torch.empty(0)
    name = r"parameter '.*': got "
    with pytest.raises(TypeError, match=name + "one that DeepSpeed's ZeRO-3 has spread over ranks"):
        FusedMASPenalty(model)
    with pytest.raises(TypeError, match=name + "one that DeepSpeed's ZeRO-3 has spread over ranks"):
        estimate_importance(model, [torch.randn(3, 3)])
    with pytest.raises(TypeError, match=name + "a part, as by ZeRO-3"):
        Distillation(model)


@pytest.mark.parametrize("kind", [*(k for k in UNSUPPORTED), "integer"])
def test_a_frozen_parameter_may_be_of_any_kind(kind: str) -> None:
    if kind == "lazy":
        weight = nn.UninitializedParameter(requires_grad=False)
    elif kind == "integer":
        weight = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    else:
        weight = nn.Parameter(UNSUPPORTED[kind][0](), requires_grad=False)
    model = Holder(weight)
    penalty = FusedMASPenalty(model)
    penalty.consolidate([torch.randn(3, 2)])
    assert list(penalty.omega) == ["layer.weight", "layer.bias"]
    with torch.no_grad():
        model.layer.bias += 1
    assert penalty().item() == pytest.approx((penalty.omega["layer.bias"] * penalty.scale).item())


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(3, 0, 2),
        torch.zeros(3, 4).T,
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.zeros(8, 1, 3, 3).to(memory_format=torch.channels_last),
        torch.zeros(2, 7)[:1, :3],
        torch.zeros(4, 3)[1:],
        *(torch.zeros(3, dtype=d) for d in (torch.float64, torch.bfloat16, torch.float16)),
    ],
)
def test_dense_parameters_are_supported(weight: Tensor) -> None:
    check_supported("weight", weight)


# -- finding them again ----------------------------------------------------------------------------


def test_a_binding_finds_the_parameters_in_the_order_of_the_names() -> None:
    model = Net()
    found = Binding(ModelView(model), ["head.bias", "scale", "module.0.weight"]).parameters()
    expected = [model.head.bias, model.scale, model.module[0].weight]
    assert [id(p) for p in found] == [id(p) for p in expected]


def test_a_call_walks_over_the_parameters_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many batches there are, and whatever needs the parameters on the way."""
    walks: list[nn.Module] = []
    init = ModelView.__init__

    def counted(view: ModelView, model: nn.Module, exclude: Any = ()) -> None:
        walks.append(model)
        init(view, model, exclude)

    model, batches = Net(), [torch.randn(3, 3), torch.randn(2, 3)]
    penalty = FusedMASPenalty(model)
    monkeypatch.setattr(ModelView, "__init__", counted)
    for act in (
        lambda: penalty.consolidate(batches),
        lambda: penalty.observe(batches[0]),
        lambda: penalty.consolidate(),
        lambda: penalty.adapt(batches),
        lambda: estimate_importance(model, batches),
    ):
        walks.clear()
        act()
        assert walks == [model]
    walks.clear()
    penalty()
    assert not walks


def test_a_binding_notices_replaced_modules_on_every_level() -> None:
    model = nn.Sequential(Net(), Net())
    binding = Binding(ModelView(model), ["0.module.0.weight"])
    assert binding.intact()
    model[0].head = nn.Linear(4, 7)
    model[1] = Net()
    assert binding.intact(), "neither is on the way to the parameter"
    for replace in (
        lambda: model[0].module.__setitem__(0, nn.Linear(3, 4)),
        lambda: setattr(model[0], "module", nn.Sequential(nn.Linear(3, 4))),
        lambda: model.__setitem__(0, Net()),
        lambda: model.__delitem__(0),
    ):
        binding = Binding(ModelView(model), ["0.module.0.weight"])
        replace()
        assert not binding.intact()


def test_a_binding_returns_replaced_parameters_and_shows_missing_ones_in_their_layout() -> None:
    model = Net()
    binding = Binding(ModelView(model), ["head.weight", "scale"])
    before = layouts(binding.parameters())

    model.head.weight = nn.Parameter(torch.ones(2, 4))
    assert binding.parameters()[0] is model.head.weight
    assert layouts(binding.parameters()) == before

    model.head.weight = nn.Parameter(torch.ones(3, 4))
    assert layouts(binding.parameters()) != before
    model.head.weight = nn.Parameter(torch.ones(2, 4))
    assert layouts(binding.parameters()) == before

    for remove in (
        lambda: delattr(model, "scale"),
        lambda: model.register_parameter("scale", None),
    ):
        model.scale = nn.Parameter(torch.ones(3))
        remove()
        assert binding.intact()
        assert layouts(binding.parameters()) != before


def test_a_binding_notices_dtype_device_and_strides() -> None:
    model = Net()
    binding = Binding(ModelView(model), NAMES)
    before = layouts(binding.parameters())
    for change in (
        lambda: model.double(),
        lambda: model.to("meta"),
        lambda: setattr(model.head, "weight", nn.Parameter(torch.ones(4, 2).T)),
    ):
        change()
        assert layouts(binding.parameters()) != before


def test_a_binding_shows_a_name_that_the_model_lacks() -> None:
    model = Net()
    binding = Binding(ModelView(model), ["scale", "nothing"])
    assert layouts(binding.parameters())[0] == layouts([model.scale])[0]
    assert layouts(binding.parameters())[1] != layouts([model.scale])[0]
