"""Measures whole training steps: without a penalty, with each of this library's forms, and as others write it.

Every form has a model and an optimizer of its own, all with the same first weights and the same batch; all take
turns within every repeat.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mas_ext import models
from mas_ext.benchmarks.timing import SAMPLE_SECONDS, check_device, in_turns, median
from mas_ext.penalty import FusedMASPenalty
from mas_ext.settings import OPTIMIZERS

PLAIN, EAGER = "no penalty", "eager autograd"
LAM = 0.1
# Network of `models.MODELS`, the shape of one sample, and the number of samples in a batch.
NETWORKS = {"mlp": ((784,), 128), "resnet18": ((3, 32, 32), 32), "resnet32": ((3, 32, 32), 32)}


def run(
    model: str = "mlp",
    optimizer: str = "sgd",
    device: str = "cpu",
    tasks: Sequence[int] = (1, 10, 100),
    repeats: int = 31,
) -> dict[str, Any]:
    """Measure the step of one network with every form.

    Args:
        model: "mlp" (784-400-400-10, 128 samples), "resnet18" or "resnet32" (32 x 32, 32 samples).
        optimizer: "sgd" (momentum 0.9), "adam" or "adamw".
        device: "cpu" or a CUDA device.
        tasks: numbers of consolidated tasks for attach, the first of them for the other forms.
        repeats: rounds in which all forms take their turn.

    Returns:
        Numbers and words that JSON can hold. `forms`: dicts with `name`, `tasks`, `seconds` of a step, and
        `extra`: by which share it is longer than without a penalty, paired within each repeat (both with
        median, low, high).

    Raises:
        ValueError: an argument that is not one of the choices.
    """
    if model not in NETWORKS:
        raise ValueError(f"model: got {model!r}, expected one of {', '.join(NETWORKS)}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer: got {optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
    check_device(device)
    if repeats < 1 or min(tasks, default=0) < 1:
        raise ValueError(f"tasks, repeats: got {tasks}, {repeats}, expected numbers from 1 up")
    shape, samples = NETWORKS[model]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = models.build(model, shape)
        network.add_head(10)
        x, y = torch.randn(samples, *shape).to(device), torch.randint(10, (samples,)).to(device)
    network.to(device)
    first = min(tasks)
    forms = [(name, 0 if name == PLAIN else first) for name in FORMS]
    forms += [("attach", t) for t in sorted(tasks) if t != first]
    calls = [
        _step(name, t, copy.deepcopy(network), optimizer, partial(F.cross_entropy, target=y), x)
        for name, t in forms
    ]
    taken = in_turns(calls, repeats, device, lambda: None, SAMPLE_SECONDS)
    rows = [
        {
            "name": name,
            "tasks": t,
            "seconds": median(times),
            "extra": median([a / b - 1 for a, b in zip(times, taken[0], strict=True)]),
        }
        for (name, t), times in zip(forms, taken, strict=True)
    ]
    return {
        "model": model,
        "optimizer": optimizer,
        "parameters": sum(p.numel() for p in network.parameters()),
        "shape": list(x.shape),
        "device": device,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "forms": rows,
    }


def _step(
    name: str,
    tasks: int,
    network: models.MultiHead,
    optimizer: str,
    criterion: Callable[[Tensor], Tensor],
    x: Tensor,
) -> Callable[[], None]:
    """One training step of a model of its own."""
    # Too small a step to change what is measured: weights stay what they are.
    training = OPTIMIZERS[optimizer](network.parameters(), 1e-9)
    penalty = FusedMASPenalty(network, LAM, merge="sum")
    generator = torch.Generator().manual_seed(1)
    noise = {n: torch.rand(p.shape, generator=generator) for n, p in network.named_parameters()}
    for t in range(tasks):
        penalty.consolidate(importance={n: (w + t / 100).to(x.device) for n, w in noise.items()})
    before, after = FORMS[name](network, penalty, training)

    def step() -> None:
        training.zero_grad()
        loss = criterion(network(x, 0))
        added = before()
        (loss if added is None else loss + added).backward()
        after()
        training.step()

    return step


Hooks = tuple[Callable[[], Tensor | None], Callable[[], object]]


def _nothing() -> None:
    pass


def _plain(_: nn.Module, penalty: FusedMASPenalty, training: Any) -> Hooks:
    return _nothing, _nothing


def _attach(mode: str, _: nn.Module, penalty: FusedMASPenalty, training: Any) -> Hooks:
    penalty.attach(training, mode=mode)  # type: ignore[arg-type]
    return _nothing, _nothing


def _add_grad(_: nn.Module, penalty: FusedMASPenalty, training: Any) -> Hooks:
    return _nothing, penalty.add_grad_


def _loss(_: nn.Module, penalty: FusedMASPenalty, training: Any) -> Hooks:
    return penalty, _nothing


def _eager(network: nn.Module, penalty: FusedMASPenalty, training: Any) -> Hooks:
    """As Avalanche and FACIL write it, for one task."""
    theta = dict(network.named_parameters())
    state = [(theta[n], w.clone(), penalty.anchor[n].clone()) for n, w in penalty.omega.items()]

    def value() -> Tensor:
        loss = torch.zeros((), device=state[0][0].device)
        for p, w, a in state:
            loss = loss + (w * (p - a).pow(2)).sum()
        return LAM * loss

    return value, _nothing


FORMS: Mapping[str, Callable[[nn.Module, FusedMASPenalty, Any], Hooks]] = {
    PLAIN: _plain,
    "attach": partial(_attach, "gradient"),
    "attach, proximal": partial(_attach, "proximal"),
    "add_grad_": _add_grad,
    "penalty() in the loss": _loss,
    EAGER: _eager,
}


def table(result: Mapping[str, Any]) -> str:
    """What `run` returns, as lines of text."""
    lines = [
        f"{result['model']}, {result['optimizer']}: {result['parameters']:,} parameters, batch "
        f"{tuple(result['shape'])}, {result['device']}, {result['threads']} threads, {result['repeats']} "
        "repeats; medians with 95 % intervals",
        f"{'form':<24}{'tasks':>6}{'milliseconds a step':>28}{'more than without, %':>28}",
    ]
    for row in result["forms"]:
        time = {key: 1e3 * seconds for key, seconds in row["seconds"].items()}
        extra = {key: 100 * share for key, share in row["extra"].items()}
        lines.append(
            f"{row['name']:<24}{row['tasks']:>6}"
            f"{'{median:.3f} ({low:.3f}-{high:.3f})'.format(**time):>28}"
            f"{'{median:.1f} ({low:.1f} to {high:.1f})'.format(**extra):>28}"
        )
    return "\n".join(lines)
