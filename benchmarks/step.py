"""Whole training steps without and with the penalty, this library's and others': prints a table, writes JSON.

python -m benchmarks.step --model resnet18 --optimizer adamw --dtype bfloat16

All forms train one network, whose weights hardly move, and take turns within every repeat, together with plain
copies of memory. ResNet-50, ViT-B/16 and GPT-2 need transformers; Avalanche's plugin takes part where
avalanche-lib is installed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from benchmarks import memory
from benchmarks.files import batch, copies, measure, parser, report
from benchmarks.memory import element_bytes, plain_copies, storage_bytes
from benchmarks.networks import STEP, build
from mas_ext import optim
from mas_ext.comparison.bench import EAGER, LAM, after_tasks, eager_loss, too_large
from mas_ext.comparison.timing import in_turns, median, spread
from mas_ext.optim.hooks import Mode
from mas_ext.penalty import FusedMASPenalty
from mas_ext.training.settings import OPTIMIZERS

PLAIN, AVALANCHE = "no penalty", "Avalanche's MASPlugin"
DTYPES = ("float32", "bfloat16")
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


# -- what is compared ------------------------------------------------------------------------------


def training(
    model: str, samples: int | None, device: str, dtype: torch.dtype
) -> tuple[nn.Module, Tensor, Callable[[], Tensor]]:
    """One of networks.STEP in train mode, its batch, and what computes its loss on random classes."""
    chosen = STEP[model]
    network, x = build(chosen, samples, device, dtype)
    network.train()
    size = x.shape if chosen.tokens else x.shape[:1]
    y = torch.randint(chosen.outputs, size, generator=torch.Generator().manual_seed(1)).to(device)
    return network, x, lambda: F.cross_entropy(network(x).flatten(0, -2), y.flatten())


class Step(NamedTuple):
    """One way to make a training step; the penalty's bytes: held, and to be moved at the least (0: unknown)."""

    name: str
    tasks: int
    call: Callable[[], None]
    held: int = 0
    moved: int = 0
    over: str = PLAIN


def every_step(
    network: nn.Module,
    loss: Callable[[], Tensor],
    name: str,
    tasks: Sequence[int],
    skipped: dict[str, str],
) -> Iterator[Step]:
    """The steps of the optimizer of this name; that without a penalty comes first."""
    theta = [*network.parameters()]
    size, count = theta[0].element_size(), sum(p.numel() for p in theta)
    penalties, history = after_tasks(network, tasks)
    first, penalty = next(iter(penalties.items()))
    held, read = storage_bytes(penalty), size + element_bytes(penalty)
    skipped.update(too_large(penalties, history))
    state: Any = OPTIMIZERS[name](theta, LR).state

    def optimizer() -> Optimizer:
        """Hooks are each form's own; weights, gradients and momentum are everyone's."""
        made = OPTIMIZERS[name](theta, LR)
        made.state = state
        return made

    def attached(penalty: FusedMASPenalty, mode: Mode) -> Callable[[], None]:
        made = optimizer()
        penalty.attach(made, mode=mode)
        return partial(_step, loss, made)

    plain = partial(_step, loss, optimizer())
    yield Step(PLAIN, 0, plain)
    for t, each in penalties.items():
        step = attached(each, "gradient")
        yield Step("attach", t, step, storage_bytes(each), count * (read + 2 * size))
        if t <= len(history):
            step = partial(plain, before=partial(_add, partial(eager_loss, theta, history[:t])))
            yield Step(EAGER, t, step, t * 2 * size * count)
    moments = 0 if name == "sgd" else size
    moved = count * (read + size + moments)
    yield Step("attach, proximal", first, attached(penalty, "proximal"), held, moved)
    step = partial(plain, after=penalty.add_grad_)
    yield Step("add_grad_", first, step, held, count * (read + 2 * size))
    step = partial(plain, before=partial(_add, penalty))
    yield Step("penalty() in the loss", first, step, held, count * (2 * read + 4 * size))
    if find_spec("avalanche") is None:
        skipped[AVALANCHE] = "avalanche-lib is not installed"
    else:
        step = partial(plain, before=_avalanche(network, penalty))
        yield Step(AVALANCHE, first, step, 2 * size * count)
    if name in ONE_PASS:
        yield from _one_pass(loss, theta, name, penalties)


def _one_pass(
    loss: Callable[[], Tensor],
    theta: Sequence[Tensor],
    name: str,
    penalties: Mapping[int, FusedMASPenalty],
) -> Iterator[Step]:
    """Steps of optimizers that need one pass; they share their state."""
    state: dict[Any, Any] = defaultdict(dict)
    first, penalty = next(iter(penalties.items()))
    read = sum(p.numel() for p in theta) * element_bytes(penalty)
    held, write = storage_bytes(penalty), 2 * sum(p.nbytes for p in theta)

    def step(
        own: bool, penalty: FusedMASPenalty | None = None, mode: Mode = "gradient"
    ) -> Callable[[], None]:
        made = ONE_PASS[name][own](theta)
        made.state = state
        if penalty is not None:
            penalty.attach(made, mode=mode)
        return partial(_step, loss, made)

    attached, ours, proximal = FUSED_FORMS
    yield Step(FUSED, 0, step(False), over=FUSED)
    # The parameter, too, is read once more.
    yield Step(attached, first, step(False, penalty), held, read + write + write // 2, FUSED)
    yield Step(proximal, first, step(True, penalty, "proximal"), held, read, FUSED)
    for t, each in penalties.items():
        yield Step(ours, t, step(True, each), storage_bytes(each), read, FUSED)


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


def _avalanche(network: nn.Module, penalty: FusedMASPenalty) -> Before:
    """Avalanche's own code for the loss, without the rest of its loop; all in the parameters' dtype."""
    from avalanche.training.plugins import MASPlugin
    from avalanche.training.utils import ParamData

    plugin: Any = MASPlugin(lambda_reg=LAM)
    theta = dict(network.named_parameters())
    for attribute, tensors in (("importance", penalty.omega), ("params", penalty.anchor)):
        given = {n: ParamData(n, init_tensor=t.to(theta[n].dtype)) for n, t in tensors.items()}
        setattr(plugin, attribute, given)
    strategy = SimpleNamespace(clock=SimpleNamespace(train_exp_counter=1), model=network, loss=None)

    def before(loss: Tensor) -> Tensor:
        strategy.loss = loss
        plugin.before_backward(strategy)
        total: Tensor = strategy.loss
        return total

    return before


# -- how it is measured ----------------------------------------------------------------------------


def run(
    model: str = "mlp",
    optimizer: str = "sgd",
    device: str = "cpu",
    dtype: str = "float32",
    tasks: Sequence[int] = (1, 10, 100),
    samples: int | None = None,
    repeats: int = 31,
) -> dict[str, Any]:
    """Measure the step of one network with every form.

    Args:
        model: one of networks.STEP; resnet50, vit_b and gpt2 need transformers.
        optimizer: "sgd" (momentum 0.9), "adam" or "adamw".
        device: "cpu" or "cuda".
        dtype: of the parameters, one of DTYPES; importance and anchors are float32 in both.
        tasks: numbers of consolidated tasks, for attach and eager autograd; the least for the other forms.
        samples: in the batch, by default as in networks.STEP.
        repeats: rounds in which all forms take their turn.

    Returns:
        What JSON can hold. `bandwidth`: bytes per second, by kind of copy. `forms`: dicts with `name`, `tasks`,
        `over`, the form without a penalty that it is compared with, `seconds` of a step, `extra` and
        `extra_seconds`, by which share and by how much it is longer than `over`, paired within each repeat (all
        with median, low, high); bytes: `held` by the penalty's state, `peak` of a step above that at its begin,
        without gradients, and `extra_memory`, held + peak - the peak of `over`; `moved`: bytes that the penalty
        has to move at the least, and `fraction` = moved / extra_seconds / best bandwidth, both None where they
        can't be told. `skipped`: why a form is missing.

    Raises:
        ValueError: tasks or repeats below 1.
        ImportError: a model that needs transformers, where that is not installed.
    """
    network, x, loss = training(model, samples, device, getattr(torch, dtype))
    skipped: dict[str, str] = {}
    steps = list(every_step(network, loss, optimizer, sorted(set(tasks)), skipped))
    parameters = [*network.parameters()]
    peaks = [_peak(step, parameters, device) for step in steps]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        copied = plain_copies(COPIED_BYTES, device, pool, skipped)
        calls = [*copied.values(), *(step.call for step in steps)]
        taken = in_turns(calls, repeats, device)
    speeds = [COPIED_BYTES / median(times)["median"] for times in taken[: len(copied)]]
    taken = taken[len(copied) :]
    without = {step.name: i for i, step in enumerate(steps) if not step.tasks}
    rows = []
    for step, times, peak in zip(steps, taken, peaks, strict=True):
        over = without[step.over]
        pairs = list(zip(times, taken[over], strict=True))
        longer = median([a - b for a, b in pairs])
        told = step.moved and longer["median"] > 0
        row = {
            "name": step.name,
            "tasks": step.tasks,
            "over": step.over,
            "seconds": median(times),
            "extra": median([a / b - 1 for a, b in pairs]),
            "extra_seconds": longer,
            "held": step.held,
            "peak": peak,
            "extra_memory": step.held + peak - peaks[over],
            "moved": step.moved or None,
            "fraction": step.moved / longer["median"] / max(speeds) if told else None,
        }
        rows.append(row)
    return {
        "model": model,
        "optimizer": optimizer,
        "dtype": dtype,
        "parameters": sum(p.numel() for p in parameters),
        "tensors": len(parameters),
        "shape": list(x.shape),
        "device": device,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "bandwidth": dict(zip(copied, speeds, strict=True)),
        "forms": rows,
        "skipped": skipped,
    }


def _peak(step: Step, parameters: Sequence[Tensor], device: str) -> int:
    """Bytes at the peak of a step that is not the first, which makes the optimizer's state."""
    step.call()
    for p in parameters:
        p.grad = None
    return memory.peak(step.call, device)


# -- the command -----------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """What `run` returns, as lines of text."""
    lines = [
        f"{result['optimizer']}, batch of {batch(result)}; copies, GB/s read and written: {copies(result)}",
        f"{'form':<24}{'tasks':>6}{'milliseconds a step':>34}{'more than without, %':>28}"
        f"{'of bandwidth':>14}{'more memory, MB':>17}",
    ]
    for row in result["forms"]:
        fraction = f"{row['fraction']:.2f}" if row["fraction"] else ""
        lines.append(
            f"{row['name']:<24}{row['tasks']:>6}{spread(row['seconds'], 3, 1e3):>34}"
            f"{spread(row['extra'], 1, 100):>28}{fraction:>14}{row['extra_memory'] / 1e6:>17.1f}"
        )
    return report(result, lines)


def main() -> None:
    """Measure, print, write."""
    options = parser(__doc__, STEP, 31)
    options.add_argument("--optimizer", default="sgd", choices=OPTIMIZERS)
    options.add_argument("--dtype", default="float32", choices=DTYPES)
    options.add_argument("--tasks", type=int, nargs="+", metavar="T", default=[1, 10, 100])
    options.add_argument("--samples", type=int, help="in the batch")
    measure(options, run, table, "step_{optimizer}_{dtype}_{model}_{device}")


if __name__ == "__main__":
    main()
