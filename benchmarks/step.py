"""Measures whole training steps: without a penalty, with each of this library's forms, and as others write it.

All forms train one network, whose weights hardly move, and take turns within every repeat, together with plain
copies of memory.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks import memory
from benchmarks.copies import plain_copies
from benchmarks.timing import SAMPLE_SECONDS, check_device, in_turns, median
from benchmarks.workloads import WORKLOADS, Workload, build
from mas_ext import optim
from mas_ext.compare.bench import eager_fits, held_bytes, state_bytes
from mas_ext.optim.hooks import Mode
from mas_ext.parameters.names import named_parameters
from mas_ext.penalty import FusedMASPenalty
from mas_ext.training.settings import OPTIMIZERS

PLAIN, EAGER, AVALANCHE = "no penalty", "eager autograd", "Avalanche's MASPlugin"
DTYPES = ("float32", "bfloat16")
LAM = 0.1
# Too small a step to change what is measured: weights stay what they are.
LR = 1e-9
# Of optimizers that step in one pass: torch's without a penalty, which the others are compared with.
FUSED = "fused=True"
FUSED_FORMS = ("attach, fused=True", "mas_ext.optim", "mas_ext.optim, proximal")
ONE_PASS: Mapping[str, tuple[Any, Any]] = {
    "sgd": (
        partial(torch.optim.SGD, lr=LR, momentum=0.9, fused=True),
        partial(optim.SGD, lr=LR, momentum=0.9),
    ),
    "adamw": (partial(torch.optim.AdamW, lr=LR, fused=True), partial(optim.AdamW, lr=LR)),
}
COPIED_BYTES = 1 << 28  # more than caches hold

# What becomes of the loss before backward().
Before = Callable[[Tensor], Tensor]


def run(
    model: str = "mlp",
    optimizer: str = "sgd",
    device: str = "cpu",
    dtype: str = "float32",
    tasks: Sequence[int] = (1, 10, 100),
    samples: int | None = None,
    repeats: int = 31,
    limit: float = math.inf,
) -> dict[str, Any]:
    """Measure the step of one network with every form.

    Args:
        model: "mlp" (784-400-400-10, 128 samples), "resnet18" (32 x 32, 32 samples), "resnet50" (64 x 64, 8
            samples), "vit_b" (ViT-B/16, 2 samples) or "gpt2" (small, 2 x 64 tokens); the last three need
            transformers.
        optimizer: "sgd" (momentum 0.9), "adam" or "adamw".
        device: "cpu" or "cuda".
        dtype: of the parameters, "float32" or "bfloat16"; importance and anchors are float32 in both.
        tasks: numbers of consolidated tasks, for attach and eager autograd; the first for the other forms.
        samples: in the batch, None for those above.
        repeats: rounds in which all forms take their turn.
        limit: seconds after which no further round begins, once there are three.

    Returns:
        Numbers and words that JSON can hold. `bandwidth`: bytes per second, by kind of copy. `forms`: dicts
        with `name`, `tasks`, `over`, the form without a penalty that it is compared with, `seconds` of a step,
        `extra` and `extra_seconds`, by which share and by how much it is longer than `over`, paired within
        each repeat (all with median, low, high); bytes:
        `held` by the penalty's state, `peak` of a step above that at its begin, without gradients, and
        `extra_memory`, held + peak - the peak of `over`; `moved`: bytes that the penalty has to
        move at the least, and `fraction` = moved / extra_seconds / best bandwidth, both None where they
        can't be told. `skipped`: why a form is missing.

    Raises:
        ValueError: an argument that is not one of the choices.
        ImportError: a model that needs transformers, where that is not installed.
    """
    choices = (("model", model, WORKLOADS), ("optimizer", optimizer, OPTIMIZERS))
    for name, got, known in (*choices, ("dtype", dtype, DTYPES)):
        if got not in known:
            raise ValueError(f"{name}: got {got!r}, expected one of {', '.join(known)}")
    check_device(device)
    if repeats < 1 or min(tasks, default=0) < 1:
        raise ValueError(f"tasks, repeats: got {tasks}, {repeats}, expected numbers from 1 up")
    workload = build(model, samples, device, getattr(torch, dtype))
    skipped: dict[str, str] = {}
    forms = list(_forms(workload, optimizer, sorted(set(tasks)), skipped))
    parameters = [*named_parameters(workload.network).values()]
    peaks = [_peak(form, parameters, device) for form in forms]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        copies = plain_copies(COPIED_BYTES, device, pool, skipped)
        calls = [*copies.values(), *(form.step for form in forms)]
        samples_taken = in_turns(calls, repeats, device, lambda: None, SAMPLE_SECONDS, limit)
    copied = zip(copies, samples_taken, strict=False)
    bandwidth = {name: COPIED_BYTES / median(taken)["median"] for name, taken in copied}
    taken = samples_taken[len(copies) :]
    over = {form.name: i for i, form in enumerate(forms) if not form.tasks}
    rows = [
        _row(
            form,
            times,
            taken[over[form.over]],
            max(bandwidth.values()),
            peak,
            peaks[over[form.over]],
        )
        for form, times, peak in zip(forms, taken, peaks, strict=True)
    ]
    return {
        "model": model,
        "optimizer": optimizer,
        "dtype": dtype,
        "parameters": sum(p.numel() for p in parameters),
        "tensors": len(parameters),
        "shape": list(workload.x.shape),
        "device": device,
        "threads": torch.get_num_threads(),
        "repeats": len(taken[0]),
        "bandwidth": bandwidth,
        "forms": rows,
        "skipped": skipped,
    }


class Form(NamedTuple):
    """One way to make a training step; the penalty's bytes: held, and to be moved at the least (0: unknown)."""

    name: str
    tasks: int
    step: Callable[[], None]
    held: int = 0
    moved: int = 0
    over: str = PLAIN


def _row(
    form: Form,
    times: Sequence[float],
    plain: Sequence[float],
    bandwidth: float,
    peak: int,
    plain_peak: int,
) -> dict[str, Any]:
    longer = median([a - b for a, b in zip(times, plain, strict=True)])
    told = form.moved and longer["median"] > 0
    return {
        "name": form.name,
        "tasks": form.tasks,
        "over": form.over,
        "seconds": median(times),
        "extra": median([a / b - 1 for a, b in zip(times, plain, strict=True)]),
        "extra_seconds": longer,
        "held": form.held,
        "peak": peak,
        "extra_memory": form.held + peak - plain_peak,
        "moved": form.moved or None,
        "fraction": form.moved / longer["median"] / bandwidth if told else None,
    }


def _peak(form: Form, parameters: Sequence[Tensor], device: str) -> int:
    """Of a step that is not the first, which makes the optimizer's state."""
    form.step()
    for p in parameters:
        p.grad = None
    return memory.peak(form.step, device)


# -- forms -----------------------------------------------------------------------------------------


def _forms(
    workload: Workload, name: str, tasks: Sequence[int], skipped: dict[str, str]
) -> Iterator[Form]:
    """The step without a penalty comes first."""
    theta = named_parameters(workload.network)
    size, count = next(iter(theta.values())).element_size(), sum(p.numel() for p in theta.values())
    state: Any = OPTIMIZERS[name](theta.values(), LR).state

    def optimizer() -> Optimizer:
        """Hooks are each form's own; weights, gradients and momentum are everyone's."""
        made = OPTIMIZERS[name](theta.values(), LR)
        made.state = state
        return made

    plain = partial(_step, workload.loss, optimizer())
    yield Form(PLAIN, 0, plain)
    history: list[dict[str, tuple[Tensor, Tensor]]] = []
    fused: dict[Any, Any] = defaultdict(dict)
    for t, penalty in _penalties(workload.network, theta, tasks, history):
        held, read = held_bytes(penalty), size + state_bytes(penalty)
        attached = optimizer()
        penalty.attach(attached)
        step = partial(_step, workload.loss, attached)
        yield Form("attach", t, step, held, count * (read + 2 * size))
        if t == tasks[0]:
            attached = optimizer()
            penalty.attach(attached, mode="proximal")
            step = partial(_step, workload.loss, attached)
            moments = 0 if name == "sgd" else size
            yield Form("attach, proximal", t, step, held, count * (read + size + moments))
            step = partial(plain, after=penalty.add_grad_)
            yield Form("add_grad_", t, step, held, count * (read + 2 * size))
            step = partial(plain, before=partial(_add, penalty))
            yield Form("penalty() in the loss", t, step, held, count * (2 * read + 4 * size))
            if find_spec("avalanche") is None:
                skipped[AVALANCHE] = "avalanche-lib is not installed"
            else:
                step = partial(plain, before=_avalanche(workload.network, penalty, theta))
                yield Form(AVALANCHE, t, step, 2 * size * count)
        if len(history) == t:
            step = partial(plain, before=partial(_add, partial(_eager, theta, history[:t])))
            yield Form(EAGER, t, step, t * 2 * size * count)
        else:
            skipped[f"{EAGER}, {t} tasks"] = "needs more than half of the memory"
        if name in ONE_PASS:
            yield from _one_pass(
                workload.loss, [*theta.values()], name, penalty, t == tasks[0], fused
            )


def _one_pass(
    loss: Callable[[], Tensor],
    theta: Sequence[Tensor],
    name: str,
    penalty: FusedMASPenalty,
    first: bool,
    state: dict[Any, Any],
) -> Iterator[Form]:
    """Steps of optimizers that need one pass, all with this state; `first` brings those without a penalty."""
    read = sum(p.numel() for p in theta) * state_bytes(penalty)
    write = 2 * sum(p.numel() * p.element_size() for p in theta)

    def step(own: bool, mode: Mode | None = None) -> Callable[[], None]:
        made = ONE_PASS[name][own](theta)
        made.state = state
        if mode is not None:
            penalty.attach(made, mode=mode)
        return partial(_step, loss, made)

    held, t = held_bytes(penalty), penalty.num_tasks
    attached, ours, proximal = FUSED_FORMS
    if first:
        yield Form(FUSED, 0, step(False), over=FUSED)
        # The parameter, too, is read once more.
        moved = read + write + write // 2
        yield Form(attached, t, step(False, "gradient"), held, moved, FUSED)
        yield Form(proximal, t, step(True, "proximal"), held, read, FUSED)
    yield Form(ours, t, step(True, "gradient"), held, read, FUSED)


def _penalties(
    network: nn.Module,
    theta: Mapping[str, Tensor],
    tasks: Sequence[int],
    history: list[dict[str, tuple[Tensor, Tensor]]],
) -> Iterator[tuple[int, FusedMASPenalty]]:
    """One for each number of tasks; history gets (omega, anchor) of each task while they fit."""
    generator = torch.Generator().manual_seed(1)
    noise = {n: torch.rand(p.shape, generator=generator).to(p.device) for n, p in theta.items()}
    for number in tasks:
        penalty = FusedMASPenalty(network, LAM, merge="sum")
        fits = eager_fits(number, [*theta.values()])
        for t in range(number):
            omega = {n: w + t / 100 for n, w in noise.items()}
            penalty.consolidate(importance=omega)
            if fits and t == len(history):
                task = {n: (omega[n].to(p.dtype), p.detach().clone()) for n, p in theta.items()}
                history.append(task)
        yield number, penalty


def _step(
    loss: Callable[[], Tensor],
    optimizer: Optimizer,
    before: Before = lambda loss: loss,
    after: Callable[[], object] = lambda: None,
) -> None:
    optimizer.zero_grad()
    before(loss()).backward()
    after()
    optimizer.step()


def _add(penalty: Callable[[], Tensor], loss: Tensor) -> Tensor:
    return loss + penalty()


def _eager(
    theta: Mapping[str, Tensor], history: Sequence[Mapping[str, tuple[Tensor, Tensor]]]
) -> Tensor:
    """As FACIL writes it, over several tasks as Avalanche's EWC plugin; all in the parameters' dtype."""
    total = torch.zeros((), device=next(iter(theta.values())).device)
    for task in history:
        for name, (omega, anchor) in task.items():
            total = total + (omega * (theta[name] - anchor).pow(2)).sum()
    return LAM * total


def _avalanche(network: nn.Module, penalty: FusedMASPenalty, theta: Mapping[str, Tensor]) -> Before:
    """Avalanche's own code for the loss, without the rest of its loop; all in the parameters' dtype."""
    from avalanche.training.plugins import MASPlugin
    from avalanche.training.utils import ParamData

    plugin: Any = MASPlugin(lambda_reg=LAM)
    for held, tensors in (("importance", penalty.omega), ("params", penalty.anchor)):
        given = {n: ParamData(n, init_tensor=t.to(theta[n].dtype)) for n, t in tensors.items()}
        setattr(plugin, held, given)
    strategy = SimpleNamespace(clock=SimpleNamespace(train_exp_counter=1), model=network, loss=None)

    def before(loss: Tensor) -> Tensor:
        strategy.loss = loss
        plugin.before_backward(strategy)
        total: Tensor = strategy.loss
        return total

    return before


# -- words -----------------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """What `run` returns, as lines of text."""
    copies = ", ".join(f"{name} {b / 1e9:.1f}" for name, b in result["bandwidth"].items())
    lines = [
        f"{result['model']}, {result['optimizer']}, {result['dtype']}: {result['parameters']:,} parameters, "
        f"batch {tuple(result['shape'])}, {result['device']}, {result['threads']} threads, "
        f"{result['repeats']} repeats; medians with 95 % intervals; copies, GB/s read and written: {copies}",
        f"{'form':<24}{'tasks':>6}{'milliseconds a step':>28}{'more than without, %':>28}"
        f"{'of bandwidth':>14}{'more memory, MB':>17}",
    ]
    for row in result["forms"]:
        time = {key: 1e3 * seconds for key, seconds in row["seconds"].items()}
        extra = {key: 100 * share for key, share in row["extra"].items()}
        lines.append(
            f"{row['name']:<24}{row['tasks']:>6}"
            f"{'{median:.3f} ({low:.3f}-{high:.3f})'.format(**time):>28}"
            f"{'{median:.1f} ({low:.1f} to {high:.1f})'.format(**extra):>28}"
            f"{format(row['fraction'], '.2f') if row['fraction'] else '':>14}"
            f"{row['extra_memory'] / 1e6:>17.1f}"
        )
    lines += [f"{name}: left out, {reason}" for name, reason in result["skipped"].items()]
    return "\n".join(lines)
