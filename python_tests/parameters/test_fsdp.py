"""Models under fully_shard on several processes against one, written out in plain float64 loops."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import (
    LAM,
    LR,
    TASKS,
    importance_of,
    mesh_of,
    network,
    one_process,
    run,
    tasks,
    train,
)
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from mas_ext import (
    FusedMASPenalty,
    choose_lam,
    estimate_importance,
    load_distributed,
    optim,
    read_pull,
)

FORMS = ["loss", "add_grad", "gradient", "proximal"]
# What every rule remembers, task by task, of these weights.
RULES: list[dict[str, Any]] = [
    {"merge": "consistent", "anchor": "own"},
    {"merge": "sum", "anchor": "own"},
    {"merge": "consistent"},
    {"merge": "sum"},
    {"merge": "decay", "gamma": 0.5},
    {"merge": "decay", "gamma": 0.5, "anchor": "own"},
    {"merge": "sum", "store": "per_task"},
    {"merge": "consistent", "store": "per_task", "anchor": "own", "state_device": "cpu"},
]
WEIGHTS = [1.0, 0.5, 2.0]

# In torch 2.6 FSDP's own forward pass fails on a CPU.
PASSES = hasattr(torch.cpu.Stream, "record_event")

Named = dict[str, Tensor]
PLAIN = network()
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


def sharded(mesh: DeviceMesh, model: nn.Module | None = None) -> nn.Module:
    """Two units, and the root stays whole from its forward pass to its backward pass."""
    model = network() if model is None else model
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def full(t: Any) -> Tensor:
    return t.full_tensor().detach().clone() if isinstance(t, DTensor) else t.detach().clone()


# -- trainings -------------------------------------------------------------------------------------


def trained(form: str, mesh: DeviceMesh, rank: int, ranks: int) -> list[dict[str, list[Tensor]]]:
    """After every task: theta, scale W and A."""
    model = sharded(mesh)
    penalty = FusedMASPenalty(
        model, lam=LAM, merge="consistent", anchor="own", omega_dtype=torch.float64
    )
    optimizer = torch.optim.SGD(model.parameters(), LR)
    if form in ("gradient", "proximal"):
        penalty.attach(optimizer, mode=form)
    history = []
    for t, task in enumerate(tasks()):
        train(model, penalty, optimizer, form, task, rank, ranks)
        portions = task.portions(rank, ranks)
        if form == "add_grad" and t < 2:  # every rank observes as often, not as much
            for i in range(3):
                penalty.observe(portions[i] if i < len(portions) else portions[0][:0])
            penalty.consolidate()
        else:
            penalty.consolidate(iter(portions))
        assert model.training
        names = [name for name, _ in PLAIN.named_parameters()]
        history.append(
            {
                "theta": [full(p) for p in model.parameters()],
                "weight": [penalty.scale * full(penalty.omega[name]) for name in names],
                "anchor": [full(penalty.anchor[name]) for name in names],
            }
        )
    return history


# -- what is remembered ----------------------------------------------------------------------------


def remembered() -> list[tuple[Named, Named]]:
    """Parameters and importance of some tasks; one parameter is of no importance to the first."""
    torch.manual_seed(2)
    found = [(point(), {name: t.abs() for name, t in point().items()}) for _ in WEIGHTS]
    del found[0][1]["0.bias"]
    return found


def point() -> Named:
    shapes = {name: p.shape for name, p in PLAIN.named_parameters()}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def quadratic(rule: Mapping[str, Any], theta: Named) -> tuple[float, Named]:
    """The penalty and its gradient, task by task."""
    entries, own_anchors = remembered(), rule.get("anchor") == "own"
    if rule["merge"] == "consistent":
        shares = [
            w / sum(float(o.sum()) for o in omega.values())
            for w, (_, omega) in zip(WEIGHTS, entries, strict=True)
        ]
        alpha = [LAM * sum(WEIGHTS) * share / sum(shares) for share in shares]
    else:
        faded = rule.get("gamma", 1.0)
        alpha = [LAM * w * faded**age for w, age in zip(WEIGHTS, (2, 1, 0), strict=True)]
    value, gradient = 0.0, {name: torch.zeros_like(x) for name, x in theta.items()}
    for a, (anchor, omega) in zip(alpha, entries, strict=True):
        for name, o in omega.items():
            x = theta[name] - (anchor if own_anchors else entries[-1][0])[name]
            value += a * float((o * x**2).sum())
            gradient[name] += 2 * a * o * x
    return value, gradient


@torch.no_grad()
def move(model: nn.Module, theta: Named) -> None:
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):
            p.copy_(distribute_tensor(theta[name], p.device_mesh, p.placements))
        else:
            p.copy_(theta[name])


def consolidated(rule: Mapping[str, Any], model: nn.Module, **options: Any) -> FusedMASPenalty:
    penalty = FusedMASPenalty(model, lam=LAM, omega_dtype=torch.float64, **rule, **options)
    for (theta, omega), weight in zip(remembered(), WEIGHTS, strict=True):
        move(model, theta)
        penalty.consolidate(importance=omega, weight=weight)
    return penalty


def check(penalty: FusedMASPenalty, rule: Mapping[str, Any]) -> None:
    """Its value and gradient, at another point."""
    torch.manual_seed(3)
    theta = point()
    move(penalty.model, theta)
    value, gradient = quadratic(rule, theta)
    found = penalty()
    found.backward()
    close(found, torch.tensor(value, dtype=torch.float64))
    assert penalty.num_tasks == len(WEIGHTS)
    for name, p in penalty.model.named_parameters():
        close(full(p.grad), gradient[name])
    with torch.no_grad():
        close(penalty.add_grad_(), found)
    for name, p in penalty.model.named_parameters():
        close(full(p.grad), 2 * gradient[name])
    penalty.model.zero_grad()


def states(mesh: DeviceMesh, rank: int, ranks: int, folder: Path, source: str) -> None:
    """Every rule; checkpoints that other numbers of ranks wrote; one file."""
    for i, rule in enumerate(RULES):
        model = sharded(mesh)
        penalty = consolidated(rule, model)
        check(penalty, rule)
        values = [torch.empty((), dtype=torch.float64) for _ in range(ranks)]
        dist.all_gather(values, penalty().detach())
        assert all(torch.equal(v, values[0]) for v in values)

        read = FusedMASPenalty(model, omega_dtype=torch.float64, **rule)
        load_distributed(read, folder / f"{source}-{i}", key="remembered")
        check(read, rule)
        dcp.save({"remembered": read.state_dict()}, checkpoint_id=folder / f"{mesh.shape}-{i}")

    penalty.save(folder / f"{mesh.shape}.safetensors")
    loaded = FusedMASPenalty.load(folder / f"{mesh.shape}.safetensors", sharded(mesh))
    check(loaded, rule)
    loaded.drop(0)
    loaded.set_weight(1, 0.0)
    anchor, omega = remembered()[1]
    for name in omega:
        close(full(loaded.anchor[name]), anchor[name])
    plain = FusedMASPenalty(network(), omega_dtype=torch.float64, process_group=None, **rule)
    plain.load_state_dict(penalty.state_dict())
    check(plain, rule)
    wrong = (
        (FileNotFoundError, "nowhere")
        if rank == 0
        else (RuntimeError, "save: rank 0 failed with FileNotFoundError")
    )
    with pytest.raises(wrong[0], match=wrong[1]):
        penalty.save(folder / "nowhere" / "file")
    with pytest.raises(KeyError, match=r"got 'model', expected one of \['remembered'\]"):
        load_distributed(penalty, folder / f"{source}-0", key="model")
    state = penalty.state_dict()
    with pytest.raises(
        ValueError, match=r"omega of '4\.bias': got shape \(3, 2\), expected \(3, 3\)"
    ):
        penalty.load_state_dict({**state, "omega.4.bias": torch.ones(3, 2)})
    with pytest.raises(KeyError, match="'other', which the model has no parameter for"):
        penalty.load_state_dict({**state, "omega.other": torch.ones(3, 2)})
    check(penalty, rule)


# -- importance, and what is refused -----------------------------------------------------------------


class Odd(nn.Module):
    """A tied weight, one that is used in a way without a rule, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.odd = nn.Parameter(torch.randn(6, 2))
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).tanh()) * self.frozen
        return torch.einsum("bi,ij->bj", x, self.odd.exp())

    def head(self, x: Tensor) -> Tensor:
        return self(x)[:, :1]


def importance(mesh: DeviceMesh, rank: int, ranks: int) -> None:
    """Of models that need the slow ways, at any moment, and parameters as they were after it."""
    torch.manual_seed(5)
    x = torch.randn(11, 6, dtype=torch.float64)
    expected = importance_of(Odd().requires_grad_(True), x)
    model = Odd()
    fully_shard(model, mesh=mesh)
    before = [*model.parameters()]
    assert all(isinstance(p, DTensor) for p in before)
    penalty = FusedMASPenalty(model, anchor="own", omega_dtype=torch.float64)
    model(x).sum().backward()
    slope = [full(p.grad) for p in before if p.requires_grad]
    model.zero_grad()
    output = model(x)  # and now all of it is whole
    penalty.observe(x[rank::ranks])
    output.sum().backward()
    for p, g in zip((p for p in before if p.requires_grad), slope, strict=True):
        close(full(p.grad), g)
    with pytest.raises(RuntimeError, match="observed samples, expected consolidate"):
        penalty.state_dict()
    penalty.consolidate()
    assert all(p is q for p, q in zip(model.parameters(), before, strict=True))
    names = [name for name, _ in Odd().named_parameters()]
    for name, e in zip(names, expected, strict=True):
        if name != "frozen":
            close(full(penalty.omega[name]), e)
    together = estimate_importance(model, [x[rank::ranks]])
    for name, e in zip(names, expected, strict=True):
        if name != "frozen":
            close(full(together[name]), e)

    def failing() -> Any:
        yield x[:3]
        if rank == 1:
            raise OSError("no such image")

    wrong = (OSError, "no such image") if rank == 1 else (RuntimeError, "rank 1 .* no such image")
    with pytest.raises(wrong[0], match=wrong[1]):
        penalty.consolidate(failing())
    assert all(p is q for p, q in zip(model.parameters(), before, strict=True))
    constant = FusedMASPenalty(
        model, merge="consistent", forward=lambda m, b: nn.functional.normalize(m(b))
    )
    with pytest.raises(ValueError, match="the level of rounding"):
        constant.consolidate([x] if rank == 0 else [])
    register_fsdp_forward_method(model, "head")
    by_head = estimate_importance(model, [x], forward=lambda m, b: m.head(b))
    plain = Odd()
    slopes = [
        torch.autograd.grad(plain.head(sample[None]).square().sum(), plain.first.bias)[0]
        for sample in x
    ]
    close(full(by_head["first.bias"]), torch.stack(slopes).abs().mean(0))
    assert all(p is q for p, q in zip(model.parameters(), before, strict=True))
    model.head(x).sum().backward()


def refused(mesh: DeviceMesh, rank: int, ranks: int) -> None:
    """What must not be silent."""
    with pytest.raises(TypeError, match="params: got a DTensor, as by fully_shard, expected"):
        optim.SGD(sharded(mesh).parameters())

    two = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
    for data_parallel in (fully_shard, replicate):
        layer = parallelize_module(nn.Linear(4, 4), two["tensor"], ColwiseParallel())
        data_parallel(layer, mesh=two["data"])
        with pytest.raises(
            TypeError,
            match=r"'weight': got placements .*, Shard.* on a mesh of shape .* expected every",
        ):
            FusedMASPenalty(layer)

    partly = network()
    fully_shard(partly[0], mesh=mesh)
    with pytest.raises(
        TypeError, match=r"parameter '1\.weight': got one that is not sharded beside"
    ):
        FusedMASPenalty(partly)
    outer = nn.Sequential(partly)
    fully_shard(outer, mesh=mesh)
    with pytest.raises(
        TypeError, match=r"parameter '1\.weight': got one that fully_shard of an outer"
    ):
        FusedMASPenalty(partly)
    inner = FusedMASPenalty(partly, exclude=("1.*", "4.*"))
    x = torch.randn(4, 6, dtype=torch.float64)
    with pytest.raises(
        TypeError, match=r"parameter '1\.weight': got one that fully_shard of an outer"
    ):
        inner.consolidate([x])
    inner.consolidate(importance={"0.bias": torch.ones(5)})
    assert set(inner.omega) == {"0.bias"}

    meshes = network()
    fully_shard(meshes[0], mesh=two["data"])
    fully_shard(meshes, mesh=two)
    with pytest.raises(TypeError, match=r"parameter '1\.weight': got another mesh"):
        FusedMASPenalty(meshes)

    model = sharded(mesh)
    with pytest.raises(ValueError, match="got None for a model that is sharded over ranks"):
        FusedMASPenalty(model, process_group=None)
    penalty = consolidated(RULES[0], model, process_group=dist.group.WORLD)
    check(penalty, RULES[0])
    model[0] = fully_shard(nn.Linear(6, 5).double(), mesh=mesh)
    check(penalty, RULES[0])
    model[0] = fully_shard(nn.Linear(7, 5).double(), mesh=mesh)
    with pytest.raises(ValueError, match=r"'0\.weight': got shape \(5, 7\) .* expected \(5, 6\)"):
        penalty()

    later = network()
    before = consolidated(RULES[1], later, process_group=None)
    sharded(mesh, later)
    for call in (before, before.add_grad_, lambda: before.consolidate([x])):
        with pytest.raises(TypeError, match="got fully_shard after the penalty was made"):
            call()
    after = FusedMASPenalty(later, omega_dtype=torch.float64, anchor="own")
    after.load_state_dict(before.state_dict())
    check(after, RULES[1])
    after.rename("0.bias", "bias")
    close(full(after.state_dict()["omega.bias"]), full(before.state_dict()["omega.0.bias"]))
    after.rename("bias", "0.bias")
    check(after, RULES[1])


def narrow(mesh: DeviceMesh, rank: int, ranks: int) -> None:
    """Omega of 16 and 8 bits is rounded as on one process, whatever the number of ranks."""
    offloaded = {"state_device": "cpu"}
    rules: list[dict[str, Any]] = [
        offloaded,
        {"merge": "consistent", "anchor": "own"},
        {"omega_dtype": torch.bfloat16},
        {"anchor_dtype": torch.bfloat16},
        *RULES[5:],
    ]
    for rule in rules:
        dtype = torch.bfloat16 if "anchor_dtype" in rule else torch.float32
        options = {"omega_dtype": torch.uint8, **rule}
        alone, spread = (
            FusedMASPenalty(m, process_group=group, **options)
            for m, group in (
                (network().to(dtype), None),
                (sharded(mesh, network().to(dtype)), "auto"),
            )
        )
        for t, (theta, omega) in enumerate([*remembered(), remembered()[1]]):
            omega["4.weight"] *= 1e-6
            omega["0.weight"][0] *= 1e6  # of the first rank alone
            given = {name: t.float() for name, t in omega.items()}
            if t == len(WEIGHTS):  # one more after a load
                state = spread.state_dict()
                spread = FusedMASPenalty(spread.model, **options)
                spread.load_state_dict(state)
            for penalty in (alone, spread):
                move(penalty.model, theta)
                penalty.consolidate(importance=given)
            for name, expected in alone.omega.items():
                assert torch.equal(full(spread.omega[name]), expected), (rule, t, name)
                assert torch.equal(full(spread.anchor[name]), alone.anchor[name]), (rule, t, name)


def columns(mesh: DeviceMesh, rank: int, ranks: int) -> None:
    """Shards along another dimension, and Adam's own step lengths."""
    torch.manual_seed(6)
    model = nn.Linear(8, 4, bias=False).double()
    start, omega = model.weight.detach().clone(), torch.rand(4, 8, dtype=torch.float64)
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1))
    penalty = FusedMASPenalty(model, lam=LAM, anchor="own", omega_dtype=torch.float64)
    penalty.consolidate(importance={"weight": omega})
    assert penalty.omega["weight"].placements[-1] == Shard(1)
    close(full(penalty.omega["weight"]), omega)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.0)
    penalty.attach(optimizer, mode="proximal")
    x = torch.randn(4, 8, dtype=torch.float64)
    model(x).square().sum().backward()
    optimizer.step()
    slope = 2 * (x @ start.T).T @ x
    length = LR / (slope.abs() + 1e-8)  # in the first step
    c = 2 * LAM * length * omega
    stepped = start - length * slope
    close(full(model.weight), (stepped + c * start) / (1 + c))


def chosen(mesh: DeviceMesh) -> None:
    """What the penalty does to a step, and the lam that is chosen, are those of one process."""
    found = []
    for model, group in ((network(), None), (sharded(mesh), "auto")):
        options = {"omega_dtype": torch.float64, "process_group": group}
        penalty = FusedMASPenalty(model, lam=LAM, **options)
        penalty.consolidate(importance=remembered()[1][1])
        torch.manual_seed(8)
        x = torch.randn(8, 6, dtype=torch.float64)

        def loss(model: nn.Module = model, x: Tensor = x) -> Tensor:
            return (model(x) - 1).square().mean()

        def learn(model: nn.Module = model, loss: Any = loss) -> Any:
            optimizer = torch.optim.Adam(model.parameters(), 0.01)
            for _ in range(40):
                optimizer.zero_grad()
                loss().backward()
                optimizer.step()
                yield optimizer

        lam = choose_lam(penalty, learn, lambda loss=loss: (float(loss().detach()), ()))
        *_, optimizer = learn()
        penalty.lam = 100 * lam
        optimizer.zero_grad()
        loss().backward()
        found.append([lam, *read_pull(penalty, optimizer)])
    assert found[1] == pytest.approx(found[0], rel=1e-6), str(found)
    assert 0 < found[0][-1] < 1


def stages(rank: int, ranks: int) -> None:
    """Two meshes of replicas of shards, each with a model and data of its own."""
    names = ("stage", "replicate", "shard")
    mesh = init_device_mesh("cpu", (2, ranks // 2, 1), mesh_dim_names=names)[names[1:]]
    stage, replica = divmod(rank, ranks // 2)
    torch.manual_seed(7)
    x = torch.randn(2, 5, 6, dtype=torch.float64)[stage]
    penalty = FusedMASPenalty(sharded(mesh), omega_dtype=torch.float64)
    penalty.consolidate([x[replica :: ranks // 2]])
    for name, e in zip(penalty.omega, importance_of(network(), x), strict=True):
        close(full(penalty.omega[name]), e)


def everything(folder: Path, source: str, shape: tuple[int, ...], rank: int, ranks: int) -> Any:
    mesh = mesh_of(shape)
    refused(mesh, rank, ranks)
    narrow(mesh, rank, ranks)
    states(mesh, rank, ranks, folder, source)
    if not PASSES:
        return {}
    columns(mesh, rank, ranks)
    chosen(mesh)
    importance(mesh, rank, ranks)
    stages(rank, ranks)
    return {form: trained(form, mesh, rank, ranks) for form in FORMS}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_several_processes_train_as_one(tmp_path: Path) -> None:
    for i, rule in enumerate(RULES):
        state = {"remembered": consolidated(rule, network()).state_dict()}
        dcp.save(state, checkpoint_id=tmp_path / f"one-{i}")
    source = "one"
    for shape in ((2,), (2, 1), (4,), (1, 2), (2, 2)):
        (tmp_path / f"{shape}").mkdir()
        found = run(
            partial(everything, tmp_path, source, shape), math.prod(shape), tmp_path / f"{shape}"
        )
        source = f"{shape}"
        for form in found[0]:
            expected = one_process(proximal=form == "proximal")._asdict()
            for t in range(TASKS):
                for what, values in found[0][form][t].items():
                    for i, value in enumerate(values):
                        for other in found[1:]:
                            assert torch.equal(other[form][t][what][i], value), (form, t, what)
                        close(value, expected[what][t][i])
    for i, rule in enumerate(RULES):
        penalty = FusedMASPenalty(network(), omega_dtype=torch.float64, **rule)
        load_distributed(penalty, tmp_path / f"{source}-{i}", key="remembered")
        check(penalty, rule)
    check(FusedMASPenalty.load(tmp_path / f"{source}.safetensors", network()), rule)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.cuda)])
def test_example(ranks: int, tmp_path: Path) -> None:
    if not PASSES:
        return
    example = Path(__file__).parents[2] / "examples" / "fsdp.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, f"--nproc-per-node={ranks}", str(example), str(tmp_path / "kept")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    # Not by its exit code: torch's own threads were seen to abort a process whose work was done.
    assert f"{ranks} ranks" in done.stdout, done.stderr
    first, kept, second = (float(n) for n in re.findall(r"([\d.]+)%", done.stdout))
    assert first > 90
    assert kept > 80  # 39 at lam = 0
    assert second > 90

    layers = [nn.Sequential(nn.Linear(n, 200), nn.ReLU()) for n in (64, 200)]
    model = nn.Sequential(*layers, nn.Linear(200, 10))
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "kept")
    model.load_state_dict(state["model"])
    penalty = FusedMASPenalty(model)
    load_distributed(penalty, tmp_path / "kept")
    assert f"{penalty.num_tasks} tasks, penalty {penalty():.4f}" in done.stdout
