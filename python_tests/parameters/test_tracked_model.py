"""What is remembered belongs to a name; where that is gone it goes with the parameter, whatever comes next."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mas_ext import FusedMASPenalty
from mas_ext.state.files import decode

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    """Two layers of one shape, a scale, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.parts = nn.ModuleDict({"head": nn.Linear(4, 3)})

    def forward(self, x: Tensor) -> Tensor:
        for name in ("first", "second", "old", "body"):
            layer = getattr(self, name, getattr(self.parts, name, None))
            x = x if layer is None else layer(x).tanh()
        for name in ("scale", "gain"):
            x = x * getattr(self, name, 1.0)
        output: Tensor = self.parts["head"](x)
        return output


class Wrapper(nn.Module):
    """What runs a layer in parallel, or under another name, by an attribute of its own."""

    def __init__(self, layer: nn.Module, name: str = "module") -> None:
        super().__init__()
        self.name = name
        self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = getattr(self, self.name)(x)
        return output


class LowRank(nn.Module):
    """A frozen layer and a trained update of it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base_layer(x) + self.up(self.down(x))
        return output


def in_sequence(net: Any) -> None:
    net.first = nn.Sequential(net.first, nn.Dropout(0.1))


def in_a_wrapper(net: Any) -> None:
    net.second = Wrapper(net.second)


def in_two_wrappers(net: Any) -> None:
    net.parts["head"] = Wrapper(Wrapper(net.parts["head"]), "inner")


def with_low_rank(net: Any) -> None:
    net.first = LowRank(net.first)


def renamed_parameter(net: Any) -> None:
    net.gain = net.scale
    del net.scale


def replaced_parameter(net: Any) -> None:
    """The old one goes on under another name, the new one has its name and shape."""
    net.gain = net.scale
    net.scale = nn.Parameter(torch.ones(4, dtype=torch.float64))


def replaced_layer(net: Any) -> None:
    net.old = net.second
    net.second = nn.Linear(4, 4).double()


def moved_layer(net: Any) -> None:
    net.parts["body"] = net.second
    del net.second


def swapped_layers(net: Any) -> None:
    net.first, net.second = net.second, net.first


def swapped_parameters(net: Any) -> None:
    net.first.weight, net.second.weight = net.second.weight, net.first.weight


def an_alias_before(net: Any) -> None:
    """A tied parameter counts under its first name, which is another one now."""
    net.alias = net.parts["head"]
    for name in [n for n in net._modules if n != "alias"]:
        net._modules[name] = net._modules.pop(name)


FOLLOWED = [
    in_sequence,
    in_a_wrapper,
    in_two_wrappers,
    with_low_rank,
    renamed_parameter,
    moved_layer,
]
# Something else has the name.
REPLACED = [replaced_parameter, replaced_layer, swapped_layers, swapped_parameters]
MOVES: dict[str, Callable[[Any], None]] = {f.__name__: f for f in (*FOLLOWED, *REPLACED)}
pytestmark = pytest.mark.filterwarnings(
    "ignore:parameters under other names:RuntimeWarning",
    "ignore:parameters .* got a new module:RuntimeWarning",
)
every_move = pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)


class Held(NamedTuple):
    """Omega times scale and the anchor under each name, and the parameter that had the name then."""

    net: Any
    penalty: FusedMASPenalty
    entries: list[tuple[str, nn.Parameter, Tensor, Tensor]]

    @property
    def now(self) -> list[tuple[nn.Parameter, Tensor, Tensor]]:
        """Each parameter that is held: the one of that name, or, where that is gone, the one that had it."""
        theta = dict(self.net.named_parameters())
        return [(theta.get(name, p), w, a) for name, p, w, a in self.entries]

    def value(self) -> float:
        return sum(float((w * (p.detach() - a) ** 2).sum()) for p, w, a in self.now)


def held(**options: Any) -> Held:
    torch.manual_seed(0)
    net = Net().double()
    penalty = FusedMASPenalty(net, anchor="own", lam=0.7, omega_dtype=torch.float64, **options)
    penalty.consolidate([X])
    theta, omega, anchor = dict(net.named_parameters()), penalty.omega, penalty.anchor
    known = [(n, theta[n], 0.7 * w.clone(), anchor[n].clone()) for n, w in omega.items()]
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p += 0.1 * (k + 1)
    return Held(net, penalty, known)


@every_move
def test_the_value_and_its_gradient_follow(move: Any) -> None:
    case = held()
    move(case.net)
    right = case.value()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        value = case.penalty()
        value.backward()
        case.penalty()
    other_module = move in (replaced_layer, swapped_layers)
    words = ["parameters under other names"] * (move in FOLLOWED)
    words += ["got a new module with other values"] * other_module
    assert len(told) == len(words)
    assert all(word in str(w.message) for word, w in zip(words, told, strict=True))
    assert value.item() == pytest.approx(right, rel=1e-12)
    for p, w, a in case.now:
        if p.requires_grad:
            torch.testing.assert_close(p.grad, 2 * w * (p.detach() - a), rtol=1e-12, atol=0)
    others = {id(p) for p, _, _ in case.now}
    assert all(
        p.grad is None or not p.grad.any() for p in case.net.parameters() if id(p) not in others
    )


@every_move
@pytest.mark.parametrize("store", ["merged", "per_task"])
def test_each_form_follows(move: Any, store: str) -> None:
    case = held(store=store)
    move(case.net)
    assert case.penalty.add_grad_().item() == pytest.approx(case.value(), rel=1e-12)

    optimizer = torch.optim.SGD(case.net.parameters(), lr=0.05)
    optimizer.zero_grad()
    case.penalty.attach(optimizer)
    before = [p.detach().clone() for p, _, _ in case.now]
    optimizer.step()
    for (p, w, a), old in zip(case.now, before, strict=True):
        pull = 2 * w * (old - a) if p.requires_grad else 0.0
        torch.testing.assert_close(p.detach(), old - 0.05 * pull, rtol=1e-12, atol=1e-15)


@every_move
@pytest.mark.parametrize("form", ["attach", "proximal", "fused"])
def test_what_was_attached_before_follows(move: Any, form: str) -> None:
    from mas_ext.optim import SGD

    case = held()
    optimizer = (SGD if form == "fused" else torch.optim.SGD)(case.net.parameters(), lr=0.05)
    case.penalty.attach(optimizer, "proximal" if form == "proximal" else "gradient")
    move(case.net)
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    there = [(p, w, a) for p, w, a in case.now if id(p) in own]
    before = [p.detach().clone() for p, _, _ in there]
    optimizer.step()
    for (p, w, a), old in zip(there, before, strict=True):
        c = 2 * 0.05 * w
        pull = c / (1 + c) if form == "proximal" else c
        expected = old - pull * (old - a) if p.requires_grad else old
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-15)


@every_move
@pytest.mark.parametrize("asked", [False, True])
def test_a_second_task_is_merged_with_the_first(move: Any, asked: bool) -> None:
    """Also where the penalty was not asked for anything in between."""
    case = held()
    move(case.net)
    if asked:
        case.penalty()
    new = {id(p): n for n, p in case.net.named_parameters()}
    theta = {id(p): p.detach().clone() for p in case.net.parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".* any more")
        case.penalty.consolidate(importance={n: torch.ones_like(theta[k]) for k, n in new.items()})
    with torch.no_grad():
        for p in case.net.parameters():
            p -= 0.3
    right = 0.7 * sum(float(0.09 * torch.ones_like(t).sum()) for t in theta.values())
    assert case.penalty().item() == pytest.approx(right + case.value(), rel=1e-10)


@every_move
def test_an_alias_that_comes_first_is_followed_at_the_end_of_a_task(move: Any) -> None:
    case = held()
    move(case.net)
    an_alias_before(case.net)
    assert case.penalty().item() == pytest.approx(case.value(), rel=1e-12)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".* any more")
        zeros = {n: torch.zeros_like(p) for n, p in case.net.named_parameters()}
        case.penalty.consolidate(importance=zeros)
    assert case.penalty().item() == pytest.approx(case.value(), rel=1e-12)


@every_move
@pytest.mark.parametrize("asked", [False, True])
def test_files_and_states_have_the_new_names(move: Any, asked: bool, tmp_path: Path) -> None:
    case = held()
    move(case.net)
    if asked:
        case.penalty()
    case.penalty.save(tmp_path / "penalty")
    config = decode("config", case.penalty.state_dict()["config"])
    assert config["absent"] == [], "all are in the model"
    names = {n for n, p in case.net.named_parameters() if any(p is q for q, _, _ in case.now)}
    state = case.penalty.state_dict()
    assert {key[6:] for key in state if key.startswith("omega.")} == names
    loaded = FusedMASPenalty.load(tmp_path / "penalty", case.net)
    other = FusedMASPenalty(case.net, anchor="own", omega_dtype=torch.float64)
    other.load_state_dict(state)
    for penalty in (loaded, other):
        assert penalty().item() == pytest.approx(case.value(), rel=1e-12)


@every_move
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_copies_follow(move: Any, asked: bool, when: str) -> None:
    """Parameters that move before they are copied, or in the copy."""
    case = held()
    if when == "before":
        move(case.net)
    if asked:
        case.penalty()
    deep = copy.deepcopy({"net": case.net, "penalty": case.penalty})
    pickled = pickle.loads(pickle.dumps({"penalty": case.penalty, "net": case.net}))
    alone, values = copy.deepcopy(case.penalty), []
    for copied in (deep, pickled):
        assert copied["penalty"].model is copied["net"]
        if when == "after":
            torch.manual_seed(1)  # a new layer's numbers
            move(copied["net"])
        values.append(copied["penalty"]().item())
    if when == "after":
        torch.manual_seed(1)
        move(case.net)
    assert alone.model is case.net
    assert [*values, alone().item()] == pytest.approx(3 * [case.value()], rel=1e-12)


@every_move
def test_a_second_task_that_fails_leaves_the_first(move: Any) -> None:
    case = held()
    move(case.net)
    with pytest.raises(KeyError, match="'nothing', which the model has no parameter for"):
        case.penalty.consolidate(importance={"nothing": torch.zeros(1)})
    assert case.penalty().item() == pytest.approx(case.value(), rel=1e-12)


@pytest.mark.parametrize("move", [in_sequence, in_a_wrapper, in_two_wrappers, an_alias_before])
def test_what_is_observed_before_and_after_is_added(move: Any) -> None:
    """Where the network computes what it did."""
    torch.manual_seed(0)
    net, twin = Net().double(), Net().double()
    twin.load_state_dict(net.state_dict())
    penalty, unmoved = (
        FusedMASPenalty(m, anchor="own", omega_dtype=torch.float64) for m in (net, twin)
    )
    objects = dict(net.named_parameters())
    for x in (X, 2 * X):
        for each in (penalty, unmoved):
            each.observe(x)
        if x is X:
            move(net)
    for each in (penalty, unmoved):
        each.consolidate()
    for name, p in objects.items():
        now = next(n for n, q in net.named_parameters() if q is p)
        torch.testing.assert_close(penalty.omega[now], unmoved.omega[name], rtol=1e-12, atol=0)


@every_move
def test_what_was_observed_follows(move: Any) -> None:
    """Half of a task's samples before, half after; and before anything was consolidated."""
    torch.manual_seed(0)
    net, twin = Net().double(), Net().double()
    twin.load_state_dict(net.state_dict())
    penalty, unmoved = (
        FusedMASPenalty(m, anchor="own", omega_dtype=torch.float64) for m in (net, twin)
    )
    for each in (penalty, unmoved):
        each.observe(X)
    objects = dict(net.named_parameters())
    move(net)
    for each in (penalty, unmoved):
        each.consolidate()
    names = dict(net.named_parameters())
    for name, p in objects.items():
        now = name if name in names else next(n for n, q in names.items() if q is p)
        torch.testing.assert_close(penalty.omega[now], unmoved.omega[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("beside", [True, False])
def test_a_parameter_that_was_gone_and_comes_back_under_another_name(beside: bool) -> None:
    """Whether something else has changed since, too, or not."""
    case = held()
    kept = case.net.second
    del case.net.second
    gone = {id(p) for p in kept.parameters()}
    left = [(p, w, a) for p, w, a in case.now if id(p) not in gone]
    right = sum(float((w * (p.detach() - a) ** 2).sum()) for p, w, a in left)
    assert case.penalty().item() == pytest.approx(right, rel=1e-12)
    case.net.parts["again"] = kept
    if beside:
        case.net.first = Wrapper(case.net.first)
    with pytest.warns(RuntimeWarning, match=r"'second\.weight' is 'parts\.again\.weight'"):
        assert case.penalty().item() == pytest.approx(case.value(), rel=1e-12)


@pytest.mark.parametrize("whole", [True, False])
def test_a_parameter_that_was_gone_and_comes_back(whole: bool) -> None:
    """Also where nothing else changes, and also where everything was gone."""
    case = held()
    kept = dict(case.net.named_children()) if whole else {"second": case.net.second}
    scale = case.net.scale
    for name in kept:
        delattr(case.net, name)
    if whole:
        del case.net.scale
    assert case.penalty().item() < 0.9 * case.value()
    for name, layer in kept.items():
        case.net.add_module(name, layer)
    case.net.scale = scale
    assert case.penalty().item() == pytest.approx(case.value(), rel=1e-12)


def test_moved_several_times_and_back() -> None:
    case = held()
    names, first, second = set(case.penalty.omega), case.net.first, case.net.second
    for move in (in_sequence, in_a_wrapper, swapped_layers, in_sequence):
        move(case.net)
        assert case.penalty().item() == pytest.approx(case.value(), rel=1e-12)
    case.net.first, case.net.second = first, second
    assert case.penalty().item() == pytest.approx(case.value(), rel=1e-12)
    assert set(case.penalty.omega) == names


def test_renaming_what_was_followed_already_changes_nothing() -> None:
    case = held()
    in_sequence(case.net)
    for asked in (True, False):
        if asked:
            case.penalty()
        for kind in ("weight", "bias"):
            case.penalty.rename(f"first.{kind}", f"first.0.{kind}")
        assert case.penalty().item() == pytest.approx(case.value(), rel=1e-12)
    with pytest.raises(KeyError, match=r"old: got 'first\.weight', expected one of"):
        case.penalty.rename("first.weight", "second.weight")


def test_a_new_parameter_of_an_old_name_and_shape_is_held_as_before() -> None:
    """Where the old one is nowhere in the model, a name means what it meant, and nothing is built anew."""
    case = held()
    memory = case.penalty._state.memory
    case.net.scale = nn.Parameter(case.net.scale.detach() + 1)
    case.penalty().backward()
    w, a = case.penalty.omega["scale"], case.penalty.anchor["scale"]
    expected = 2 * 0.7 * w * (case.net.scale.detach() - a)
    torch.testing.assert_close(case.net.scale.grad, expected, rtol=1e-12, atol=0)
    assert case.penalty._state.memory is memory


def test_what_is_known_under_the_new_name_goes_on() -> None:
    """Of the name that is gone nothing is held, with a word, until it is back."""
    case = held()
    first, second = case.net.first, case.net.second
    case.net.second = first
    del case.net.first
    words = r"'first\.(weight|bias)': its name is now 'second\.\1', which is known itself"
    with pytest.warns(RuntimeWarning, match=words):
        value = case.penalty().item()
    there = {id(p) for p in case.net.parameters()}
    entries = [(n, p, w, a) for n, p, w, a in case.entries if not n.startswith("first.")]
    now = Held(case.net, case.penalty, entries)
    assert {id(p) for p, _, _ in now.now} == there
    assert value == pytest.approx(now.value(), rel=1e-12)
    case.net.first = first
    case.net.second = second
    assert case.penalty().item() == pytest.approx(case.value(), rel=1e-12)


def test_a_name_that_is_excluded_is_told() -> None:
    case = held(exclude=("parts.*",))
    moved_layer(case.net)
    words = r"'second\.(weight|bias)': its name is now 'parts\.body\.\1', which is excluded"
    with pytest.warns(RuntimeWarning, match=words):
        assert case.penalty().item() < 0.9 * case.value()
    case.net.second = case.net.parts.pop("body")  # it is remembered
    assert case.penalty().item() == pytest.approx(case.value(), rel=1e-12)
