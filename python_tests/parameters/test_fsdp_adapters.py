"""Updates of low-rank adapters held under fully_shard, against one process and dense products in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from memory import largest_allocation
from processes import run
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F
from toy_lora import LoRA, move

from mas_ext import FusedMASPenalty, load_distributed
from mas_ext.parameters import adapters
from mas_ext.parameters.adapters import (
    AdaptedWeight,
    Factor,
    LowRankProduct,
    adapted_weights,
    register_adapter,
)

Named = dict[str, Tensor]
LAM = 0.7
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


class Turned(nn.Module):
    """x W0 + scale x A B, the weight kept as (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Module()
        self.base.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.4, requires_grad=False)
        self.down = nn.Parameter(torch.randn(2, inputs) * 0.4)
        self.up = nn.Parameter(torch.randn(outputs, 2) * 0.4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.base.weight + 0.5 * x @ self.down.T @ self.up.T


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Conv1d(1, 5, 2, bias=False).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(3, 1, 2))
        self.up = nn.Parameter(torch.randn(5, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.conv1d(F.conv1d(x, self.down), self.up)


@register_adapter
def of_these(module: nn.Module) -> AdaptedWeight | None:
    if isinstance(module, Turned):
        left, right = Factor(module.down, True), Factor(module.up, True)
        return AdaptedWeight(module.base, "weight", [LowRankProduct("default", left, right, 0.5)])
    if isinstance(module, Convolution):
        left, right = Factor(module.up), Factor(module.down)
        return AdaptedWeight(module.base, "weight", [LowRankProduct("default", left, right, 1.0)])
    return None


class Net(nn.Module):
    """Weights of 7, 5, 5 and 3 rows: uneven on 2 ranks, and 4 ranks have none of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = LoRA(5, 7), LoRA(10, 3)
        self.wide, self.turned = Convolution(), Turned(5, 2)
        self.head = nn.Linear(3, 2)
        for layer in (self.first, self.second):
            layer.add("other")
            layer.add("default", rank=3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.wide(x[:, None])).sum(1)[:, :5]
        x = torch.tanh(self.turned(x))
        return self.head(self.second(x.repeat(1, 5)))


NAMES = ["first.weight", "second.weight", "wide.weight", "turned.weight"]


def network(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def sharded(model: Any) -> Any:
    """Two units, and the root stays whole from its forward pass to its backward pass."""
    for unit in (model.first, model.wide, model):
        fully_shard(unit)
    return model


def batches(task: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(10 + task)
    return [x.to(dtype) for x in torch.randn(9, 5).split([3, 3, 2, 1])]


def own(task: int, rank: int, ranks: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """A rank's batches: uneven, and none on the last one."""
    return batches(task, dtype)[rank :: ranks - 1] if rank < ranks - 1 else []


def full(t: Any) -> Tensor:
    return t.full_tensor().detach().clone() if isinstance(t, DTensor) else t.detach().clone()


@torch.no_grad()
def follow(model: nn.Module, other: nn.Module) -> None:
    """Move to where another model is."""
    theta = dict(other.named_parameters())
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):
            p.copy_(distribute_tensor(theta[name].detach(), p.device_mesh, p.placements))
        else:
            p.copy_(theta[name])


# -- the definition --------------------------------------------------------------------------------


def held(model: nn.Module) -> Named:
    """Updates as dense products, and trained parameters, by the names that they are held by."""
    found: Named = {}
    for name, w in adapted_weights(model).items():
        products = [
            p.scale * p.left.matrix(p.left.parameter) @ p.right.matrix(p.right.parameter)
            for p in w.products
        ]
        found[name] = torch.stack(products).sum(0).reshape(w.shape)
    rest = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return found | {n: p for n, p in rest.items() if not {"up", "down"} & {*n.split(".")}}


def importance(model: nn.Module, samples: Sequence[Tensor]) -> Named:
    """Mean over samples of abs(d |F(x)|^2 / d weight), sample by sample."""
    updates = {n: t.detach() for n, t in held(model).items()}
    theta = {n: w.weight for n, w in adapted_weights(model).items()}
    theta |= {n: p for n, p in model.named_parameters() if n in updates}
    total = {n: torch.zeros_like(p) for n, p in theta.items()}
    trained = {n: p.requires_grad for n, p in theta.items()}
    for p in theta.values():
        p.requires_grad_(True)
    for x in samples:
        grads = torch.autograd.grad(model(x[None]).square().sum(), [*theta.values()])
        for n, g in zip(theta, grads, strict=True):
            total[n] += g.abs() / len(samples)
    for n, p in theta.items():
        p.requires_grad_(trained[n])
    return total


class Definition:
    """sum_t alpha_t sum_i Omega_ti (x_i - x*_i)^2 with the latest anchor, x being what is held."""

    def __init__(self, model: nn.Module, merge: str = "sum", gamma: float = 1.0) -> None:
        self.model, self.merge, self.gamma = model, merge, gamma
        self.tasks: list[Named] = []
        self.anchor: Named = {}

    def consolidate(self, samples: Tensor) -> None:
        self.tasks.append(importance(self.model, samples))
        self.anchor = {n: x.detach().clone() for n, x in held(self.model).items()}

    def weight(self) -> Named:
        """sum_t alpha_t Omega_t by name."""
        count = len(self.tasks)
        alpha = [LAM * self.gamma ** (count - 1 - t) for t in range(count)]
        if self.merge == "consistent":
            totals = [float(sum(o.sum() for o in omega.values())) for omega in self.tasks]
            alpha = [LAM * count / s / sum(1 / other for other in totals) for s in totals]
        pairs = [*zip(alpha, self.tasks, strict=True)]
        return {n: torch.stack([a * omega[n] for a, omega in pairs]).sum(0) for n in self.anchor}

    def __call__(self) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The value, and its gradient by every parameter."""
        now, weight = held(self.model), self.weight()
        value = sum((weight[n] * (x - self.anchor[n]) ** 2).sum() for n, x in now.items())
        assert isinstance(value, Tensor)
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(value, [*trained.values()], allow_unused=True)
        return value.detach(), dict(zip(trained, grads, strict=True))


def check(penalty: FusedMASPenalty, value: Tensor, grads: dict[str, Tensor | None]) -> None:
    """As a loss beside the model's, in one pass, scaled, and in an optimizer's step."""
    model = penalty.model
    theta = dict(model.named_parameters())

    def same(times: float) -> None:
        for name, p in theta.items():
            expected = grads.get(name)
            if p.grad is None or expected is None:
                assert expected is None
                assert p.grad is None or not full(p.grad).any(), name
            else:
                close(full(p.grad), times * expected, msg=lambda m, at=name: f"{at}: {m}")

    model.zero_grad()
    output = model(torch.ones(2, 5, dtype=torch.float64))  # now the root is whole
    found = penalty()
    (0.0 * output.sum() + found).backward()
    close(found.detach(), value)
    same(1.0)
    with torch.no_grad():
        close(penalty(), value)
    close(penalty.add_grad_(), value)
    same(2.0)
    penalty.add_grad_to({id(p) for p in theta.values()}, torch.tensor(3.0))
    same(5.0)
    model.zero_grad()
    before = {n: full(p) for n, p in theta.items()}
    optimizer = torch.optim.SGD([p for p in theta.values() if p.requires_grad], 0.01)
    handle = penalty.attach(optimizer)
    optimizer.step()
    handle.remove()
    for name, p in theta.items():
        slope = grads.get(name)
        close(full(p), before[name] if slope is None else before[name] - 0.01 * slope)
    model.zero_grad()
    with torch.no_grad():
        for name, p in theta.items():
            p.copy_(distribute_tensor(before[name], p.device_mesh, p.placements))


# -- what the ranks do -----------------------------------------------------------------------------

RULES: list[dict[str, Any]] = [
    {"merge": "sum"},
    {"merge": "consistent", "state_device": "cpu"},
    {"merge": "decay", "gamma": 0.5},
]


def defined(rank: int, ranks: int) -> None:
    """Every rule over two tasks, of which one comes in another way; all is as before afterwards."""
    for rule in RULES:
        twin, model = network(), sharded(network())
        options = {k: v for k, v in rule.items() if k != "state_device"}
        definition = Definition(twin, **options)
        penalty = FusedMASPenalty(model, lam=LAM, omega_dtype=torch.float64, **rule)
        with torch.no_grad():
            assert penalty() == 0
        trained = {n: p.requires_grad for n, p in model.named_parameters()}
        for task in range(2):
            move(twin, task)
            follow(model, twin)
            data = own(task, rank, ranks)
            if task == 1 and rule["merge"] == "sum":  # as often on every rank
                for i in range(4):
                    penalty.observe(data[i] if i < len(data) else batches(0)[0][:0])
                penalty.consolidate()
            else:
                penalty.consolidate(data, sweeps=1 + task * (rule["merge"] == "decay"))
            definition.consolidate(torch.cat(batches(task)))
            assert {n: p.requires_grad for n, p in model.named_parameters()} == trained
        follow(model, twin)
        for name in NAMES:
            found = penalty.omega[name]
            assert found.to_local().shape[0] <= -(-found.shape[0] // ranks)
            close(penalty.scale * full(found), definition.weight()[name])
            close(full(penalty.anchor[name]), definition.anchor[name])
        move(twin)
        follow(model, twin)
        check(penalty, *definition())


def narrow(rank: int, ranks: int) -> None:
    """Omega of 16 and 8 bits has the bits that it has on one process, also beside factors of 16 bits."""
    rules: list[dict[str, Any]] = [
        {"omega_dtype": torch.bfloat16},
        *[{"omega_dtype": torch.uint8, **rule} for rule in RULES],
    ]
    for i, rule in enumerate(rules):
        dtype = torch.bfloat16 if i == 3 else torch.float32
        twin, model = network(dtype), sharded(network(dtype))
        alone = FusedMASPenalty(twin, process_group=None, **rule)
        spread = FusedMASPenalty(model, **rule)
        for task in range(3):
            torch.manual_seed(task)
            given = {
                n: torch.rand_like(w.weight, dtype=torch.float32)
                for n, w in adapted_weights(twin).items()
            }
            given["first.weight"][0] *= 1e12  # of the first rank alone
            given["head.bias"] = torch.rand(2)
            if task == 2:  # one more after a load
                state = spread.state_dict()
                spread = FusedMASPenalty(model, **rule)
                spread.load_state_dict(state)
            move(twin, task)
            follow(model, twin)
            for penalty in (alone, spread):
                penalty.consolidate(importance=given)
            for name, expected in alone.omega.items():
                assert torch.equal(full(spread.omega[name]), expected), (rule, task, name)
                torch.testing.assert_close(full(spread.anchor[name]), alone.anchor[name])
        move(twin)
        follow(model, twin)
        torch.testing.assert_close(spread().detach(), alone().detach())
        alone.add_grad_()
        spread.add_grad_()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            if q.grad is not None:  # of 16 bits rounded once
                close_to = {"rtol": 2**-8 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-6}
                torch.testing.assert_close(full(p.grad), q.grad, **close_to)


def consolidated(model: nn.Module, **options: Any) -> FusedMASPenalty:
    """From importance that is given, after two tasks."""
    penalty = FusedMASPenalty(model, lam=LAM, omega_dtype=torch.float64, **options)
    twin = network()
    for task in range(2):
        move(twin, task)
        follow(model, twin)
        penalty.consolidate(importance=importance(twin, torch.cat(batches(task))))
    return penalty


def defined_alike() -> Definition:
    twin = network()
    definition = Definition(twin)
    for task in range(2):
        move(twin, task)
        definition.consolidate(torch.cat(batches(task)))
    move(twin)
    return definition


def check_read(penalty: FusedMASPenalty) -> None:
    definition = defined_alike()
    follow(penalty.model, definition.model)
    value, grads = definition()
    penalty.model.zero_grad()
    found = penalty()
    found.backward()
    close(found.detach(), value)
    for name, p in penalty.model.named_parameters():
        if grads.get(name) is not None:
            close(full(p.grad), grads[name])
    penalty.model.zero_grad()


def saved(rank: int, ranks: int, folder: Path, source: int) -> None:
    """Checkpoints and files that other numbers of ranks wrote."""
    model = sharded(network())
    penalty = consolidated(model)
    check_read(penalty)
    for key, t in penalty.state_dict().items():
        if key.startswith(("update.omega", "update.left")):
            assert len(t.to_local()) <= -(-len(t) // ranks)
    read = FusedMASPenalty(model, omega_dtype=torch.float64)
    load_distributed(read, folder / f"{source}", key="kept")
    check_read(read)
    check_read(FusedMASPenalty.load(folder / f"{source}.safetensors", sharded(network())))
    dcp.save({"kept": penalty.state_dict()}, checkpoint_id=folder / f"{ranks}")
    penalty.save(folder / f"{ranks}.safetensors")
    plain = FusedMASPenalty(network(), omega_dtype=torch.float64, process_group=None)
    plain.load_state_dict(penalty.state_dict())
    check_read(plain)
    state = penalty.state_dict()
    for key, t in consolidated(network(), process_group=None).state_dict().items():
        if key.startswith("update."):
            close(full(state[key]), t, msg=lambda m, at=key: f"{at}: {m}")
    with pytest.raises(
        ValueError, match=r"'update\.omega\.wide\.weight': got .* shape \(5, 3\), expected"
    ):
        penalty.load_state_dict({**state, "update.omega.wide.weight": torch.ones(5, 3)})
    bad = full(state["update.left.first.weight.default"])
    bad[0] = float("nan")  # on the first rank alone
    kind = ValueError if rank == 0 else RuntimeError
    with pytest.raises(kind, match=r"left\.first\.weight\.default': got .* expected finite"):
        penalty.load_state_dict({**state, "update.left.first.weight.default": bad})
    check_read(penalty)
    penalty.rename("first.weight", "before")
    with pytest.raises(KeyError):
        FusedMASPenalty(model).load_state_dict(penalty.state_dict())
    penalty.rename("before", "first.weight")
    check_read(penalty)


def several(rank: int, ranks: int) -> None:
    """Adapters that are active or not, merged or frozen; a layer that is wrapped."""
    twin, model = network(), sharded(network())
    pair = [
        FusedMASPenalty(twin, lam=LAM, omega_dtype=torch.float64, process_group=None),
        FusedMASPenalty(model, lam=LAM, omega_dtype=torch.float64),
    ]
    layers = [layer for net in (twin, model) for layer in (net.first, net.second)]

    def same(above: float = 0.0) -> None:
        twin.zero_grad()
        model.zero_grad()
        values = [penalty() for penalty in pair]
        for value in values:
            value.backward()
        assert float(values[0].detach()) > above
        close(values[1].detach(), values[0].detach())
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            if q.grad is not None and p.requires_grad:
                close(full(p.grad), q.grad, msg=lambda m, at=name: f"{at}: {m}")
            if not p.requires_grad:
                assert p.grad is None

    def task(seed: int) -> None:
        move(twin, seed)
        follow(model, twin)
        weights = {n: w.weight for n, w in adapted_weights(twin).items()}
        given = {n: torch.rand_like(w) for n, w in weights.items()}
        for penalty in pair:
            penalty.consolidate(importance=given)

    task(0)
    pair[0].adapt(batches(5))
    pair[1].adapt(own(5, rank, ranks))
    move(twin)
    follow(model, twin)
    same()
    for active in (["other"], ["default", "other"], []):
        for layer in layers:
            layer.active = active
        same()
        task(1)
        same(-1.0)
    for layer in layers:
        layer.active = ["default"]
    move(twin)
    follow(model, twin)
    same()
    model.first.down["default"].requires_grad_(False)
    same()
    for penalty in pair:
        penalty.add_grad_()
    assert model.first.down["default"].grad is None
    close(full(model.first.up["default"].grad), twin.first.up["default"].grad)
    model.first.down["default"].requires_grad_(True)

    for net in (twin, model):  # the first layer's update goes into its weight
        layer = net.first
        with torch.no_grad():
            update = full(
                layer.scale["default"] * full(layer.up["default"]) @ full(layer.down["default"])
            )
            w = layer.base.weight
            w += distribute_tensor(update, w.device_mesh, w.placements) if net is model else update
        layer.active = ["other"]
    same()
    anchors = [penalty._state.memory.updates["first.weight"].anchor.keys() for penalty in pair]
    assert anchors[0] == anchors[1] == {"other"}
    task(2)
    for penalty in pair:
        assert "default" not in penalty._state.memory.updates["first.weight"].anchor
        assert "default" in penalty._state.memory.updates["second.weight"].anchor

    move(twin)
    follow(model, twin)
    fresh = FusedMASPenalty(model)
    for net in (twin, model):
        net.inner = nn.Sequential(net.second)
        del net.second
        net.second = lambda x, net=net: net.inner(x)
    for penalty in pair:
        with pytest.warns(RuntimeWarning, match="under other names"):
            penalty()
    same()
    assert "inner.0.weight" in pair[1].omega
    fresh.consolidate(importance={"inner.0.weight": torch.ones(3, 10)})
    assert torch.equal(full(fresh.omega["inner.0.weight"]), torch.ones(3, 10, dtype=torch.float64))


def columns(rank: int, ranks: int) -> None:
    """Factors that are sharded along another dimension than the weight."""
    torch.manual_seed(0)
    twin = LoRA(8, 5, bias=False).double()
    twin.add("default", rank=4)
    model = copy.deepcopy(twin)
    fully_shard(model, shard_placement_fn=lambda p: Shard(0 if p is model.base.weight else 1))
    given = {"weight": torch.rand(5, 8, dtype=torch.float64)}
    pair = FusedMASPenalty(twin, process_group=None), FusedMASPenalty(model)
    for penalty in pair:
        penalty.consolidate(importance=given)
    move(twin)
    follow(model, twin)
    values = [penalty() for penalty in pair]
    for value in values:
        value.backward()
    torch.testing.assert_close(values[1], values[0])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(full(p.grad), q.grad)
    twin.active = model.active = []
    assert [float(penalty().detach()) for penalty in pair] == [0, 0]


def rounded(rank: int, ranks: int) -> None:
    """A base of 16 bits under factors of 32, and mixed precision; the first pass of all is consolidate's."""
    half = torch.bfloat16
    for policy in (None, MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half)):
        twin = network(torch.float32)
        for name, w in adapted_weights(twin).items():
            if policy is None and name != "first.weight":
                w.weight.data = w.weight.to(half).float()
        model = copy.deepcopy(twin)
        options = {} if policy is None else {"mp_policy": policy}
        for unit in (model.first, model.wide, model):
            fully_shard(unit, **options)
        alone = FusedMASPenalty(twin, process_group=None)
        penalty = FusedMASPenalty(model)
        move(twin, 0)
        follow(model, twin)
        alone.consolidate(batches(0, torch.float32))
        penalty.consolidate(own(0, rank, ranks, torch.float32))
        for name in NAMES:
            error = (full(penalty.omega[name]) - alone.omega[name]).norm() / alone.omega[
                name
            ].norm()
            assert float(error) < (1e-5 if policy is None else 5e-2), (name, float(error))
        model(batches(0, torch.float32)[0]).sum().backward()
        for p in model.parameters():
            if p.grad is not None:
                assert p.grad.dtype == torch.float32


class Mixed(nn.Module):
    """A base of 16 bits under factors of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 6, bias=False).bfloat16().requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x.bfloat16()).float() + x @ self.down.T @ self.up.T


def of_two_dtypes(rank: int, ranks: int) -> None:
    """What FSDP finds out in its first pass, which is consolidate's, is of the factors that are trained."""
    adapters.register_adapter(
        lambda m: (
            AdaptedWeight(
                m.base, "weight", [LowRankProduct("default", Factor(m.up), Factor(m.down), 1.0)]
            )
            if isinstance(m, Mixed)
            else None
        )
    )
    torch.manual_seed(0)
    model = Mixed()
    twin = copy.deepcopy(model)
    fully_shard(model)
    penalty, alone = FusedMASPenalty(model), FusedMASPenalty(twin, process_group=None)
    x = torch.randn(4, 4)
    penalty.consolidate([x] if rank == 0 else [])
    alone.consolidate([x])
    torch.testing.assert_close(full(penalty.omega["weight"]), alone.omega["weight"])
    for net in (model, twin):
        net(x).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(full(p.grad), q.grad)


class Fused(LoRA):
    """As by a kernel for weight and adapter at once: the weight gets no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.base.weight.detach() + self.update()).T


def refused(rank: int, ranks: int) -> None:
    """What must not be silent, and what fails on one rank."""
    torch.manual_seed(0)
    fused = nn.Sequential(Fused(4, 6, bias=False), nn.Linear(6, 2))
    fused[0].add("default")
    fully_shard(fused)
    with pytest.warns(
        RuntimeWarning, match=r"importance of '0\.weight': got zero, so that the task"
    ):
        FusedMASPenalty(fused).consolidate([torch.ones(2, 4)] if rank == 0 else [])
    with pytest.raises(ValueError, match=r"anchor: got 'own' for low-rank updates"):
        FusedMASPenalty(sharded(network()), anchor="own")
    across = LoRA(8, 4)
    across.add("default", rank=4)
    fully_shard(across, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    with pytest.raises(
        ValueError, match=r"got 'weights' for 'weight', one sharded along dimension 1"
    ):
        FusedMASPenalty(across)
    coded = LoRA(4, 6, bias=False)
    coded.add("default")
    coded.base.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
    fully_shard(coded)
    with pytest.raises(ValueError, match=r"got 'weights' for 'weight', a quantised one under"):
        FusedMASPenalty(coded)
    tied = network()
    tied.more = nn.Linear(10, 3).requires_grad_(False)
    tied.more.weight = tied.second.base.weight
    sharded(tied.double())
    with pytest.raises(ValueError, match=r"'second\.weight', one that several layers share"):
        FusedMASPenalty(tied)
    assert FusedMASPenalty(tied, adapters="parameters").num_tasks == 0

    model = sharded(network())
    penalty = consolidated(model)
    with pytest.raises(ValueError, match="mode: got 'proximal' for low-rank updates"):
        penalty.attach(torch.optim.SGD(model.parameters(), 0.1), "proximal")
    factor = model.first.up["default"]
    with torch.no_grad():
        before = full(factor)
        local = factor.to_local()
        if rank == 0:
            local[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"adapters of 'first\.weight': got NaN or Inf"):
        penalty.consolidate(importance={"first.weight": torch.ones(7, 5)})
    with torch.no_grad():
        factor.copy_(distribute_tensor(before, factor.device_mesh, factor.placements))
    large = torch.zeros(7, 5, dtype=torch.float64)
    large[0] = 1e39
    single = FusedMASPenalty(sharded(network(torch.float32)))
    with pytest.raises(
        FloatingPointError, match=r"of 'first\.weight': got values with which omega"
    ):
        single.consolidate(importance={"first.weight": large})
    x = batches(0)[0]
    wrong = torch.ones(2, 9, dtype=torch.float64)
    kind, said = (RuntimeError, "mat1|shape" if rank == 1 else "rank 1 failed")
    with pytest.raises(kind, match=said):
        penalty.consolidate([wrong if rank == 1 else x])
    assert not model.first.base.weight.requires_grad
    assert model.first.up["default"].requires_grad
    penalty.check(x)
    check_read(penalty)


def few(rank: int, ranks: int) -> None:
    """A step gathers all factors at once, and their gradients go back at once."""
    penalty = consolidated(sharded(network()))
    for act, back in ((penalty.add_grad_, 1), (lambda: penalty().backward(), 1), (penalty, 0)):
        with (
            torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
            ) as profile,
            torch.set_grad_enabled(back == 1),
        ):
            act()
        names = [e.name for e in profile.events() if e.name.startswith("c10d::")]
        counts = [
            sum(kind in n for n in names) for kind in ("allgather", "reduce_scatter", "allreduce")
        ]
        assert counts == [1, back, 1], names


def small(rank: int, ranks: int, folder: Path) -> None:
    """Nothing as large as a weight is made but where FSDP gathers it, and then nothing larger."""
    layer = LoRA(300, 200, bias=False)
    layer.add("default", rank=2)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(200, 2))
    for unit in (layer, model):
        fully_shard(unit)
    penalty = FusedMASPenalty(model, omega_dtype=torch.uint8)
    x = torch.randn(4, 300)
    penalty.consolidate([x])
    gathers = largest_allocation(lambda: model(x).sum().backward())
    factor = 4 * 300 * max(2, ranks)  # A, in pieces of equal size
    assert largest_allocation(lambda: penalty().backward()) <= factor
    assert largest_allocation(penalty.add_grad_) <= factor
    assert largest_allocation(lambda: penalty.consolidate([x])) <= gathers
    rows = -(-200 // ranks)
    given = DTensor.from_local(torch.rand(rows, 300), layer.base.weight.device_mesh, [Shard(0)])
    merging = partial(penalty.consolidate, importance={"0.weight": given})
    assert largest_allocation(merging) <= 8 * rows * 300  # own rows, summed in float64
    dcp.save({"penalty": penalty.state_dict()}, checkpoint_id=folder / f"small {ranks}")
    read = FusedMASPenalty(model, omega_dtype=torch.uint8)
    loading = partial(load_distributed, read, folder / f"small {ranks}")
    assert largest_allocation(loading) <= max(rows * 300, factor)
    assert torch.equal(full(read.omega["0.weight"]), full(penalty.omega["0.weight"]))


def everything(folder: Path, source: int, rank: int, ranks: int) -> int:
    defined(rank, ranks)
    narrow(rank, ranks)
    saved(rank, ranks, folder, source)
    several(rank, ranks)
    small(rank, ranks, folder)
    if ranks == 2:  # of no other kind on more
        for act in (columns, rounded, of_two_dtypes, refused, few):
            act(rank, ranks)
    return 0


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_equal_to_one_process(tmp_path: Path) -> None:
    alone = consolidated(network(), process_group=None)
    dcp.save({"kept": alone.state_dict()}, checkpoint_id=tmp_path / "1")
    alone.save(tmp_path / "1.safetensors")
    for source, ranks in ((1, 2), (2, 4)):
        (tmp_path / f"of {ranks}").mkdir()
        run(partial(everything, tmp_path, source), ranks, tmp_path / f"of {ranks}")
    read = FusedMASPenalty(network(), omega_dtype=torch.float64)
    load_distributed(read, tmp_path / "4", key="kept")
    check_read(read)
    check_read(FusedMASPenalty.load(tmp_path / "4.safetensors", network()))
