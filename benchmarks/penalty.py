"""The penalty against other ways to compute it: prints a table, writes JSON and a picture.

python -m benchmarks.penalty --model resnet18

All forms take turns within every repeat, together with plain copies of memory, so that whatever else the
machine does hits all of them alike. Each form's result is checked against float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import pictures
from benchmarks.files import copies, measure, parser, report
from benchmarks.memory import element_bytes, plain_copies, storage_bytes
from mas_ext.comparison.bench import (
    ETA,
    FLOATS,
    LAM,
    SIZES,
    Form,
    TaskState,
    after_tasks,
    forms,
    official_loop,
    parameters_of,
    too_large,
)
from mas_ext.comparison.timing import in_turns, median, paired, spread
from mas_ext.penalty import FusedMASPenalty

# Behind the name of a form that is replayed.
GRAPH = ", graph"
VALUE, STEP, COMPILED = "penalty(), value only", "proximal_", "torch.compile"
# What the work between two cold calls reads and writes: more than caches hold.
OTHER_BYTES = 1 << 28
# Largest difference from the exact result, relative to its largest entry.
TOLERANCE = {
    torch.float64: 1e-5,  # its omega is float32
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}


# -- what is compared ------------------------------------------------------------------------------


def every_form(
    network: nn.Module, penalties: Mapping[int, FusedMASPenalty], history: Sequence[TaskState]
) -> Iterator[Form]:
    """Those of mas-ext bench and more; this library's on a GPU as CUDA graphs, too.

    Autograd's pass can't be one, as it has launches of its own.
    """
    theta = [*network.parameters()]
    grads = [p.grad for p in theta if p.grad is not None]
    state = [p.detach() for p in theta], grads, *history[0]
    for form in (
        *forms(network, penalties, history),
        Form(VALUE, 1, torch.no_grad()(penalties[1].forward)),
        Form("torch._foreach, gradient only", 1, partial(_foreach_gradient, *state)),
        Form(COMPILED, 1, partial(_compiled(_value_and_gradient), *state)),
        Form(f"{COMPILED}, gradient only", 1, partial(_compiled(official_loop), *state)),
    ):
        yield form
        if theta[0].is_cuda and moved_bytes(form.name, 1, 1) and "backward" not in form.name:
            yield _replayed(form)


def moved_bytes(name: str, size: int, state: int) -> int | None:
    """Bytes per parameter that one of this library's forms has to move at the least, None for other forms.

    size: of a parameter; state: of its omega and anchor.
    """
    read = size + state
    moved = {
        "add_grad_": read + 2 * size,
        # Reads everything forward and backward; autograd then adds a new gradient to the old one.
        "penalty() + backward": 2 * read + 4 * size,
        VALUE: read,
        STEP: read + size,
    }
    return moved.get(name.removesuffix(GRAPH))


def _compiled(compute: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(compute, fullgraph=True, dynamic=False)


def _replayed(form: Form) -> Form:
    """The form as a CUDA graph, which Python does not keep waiting."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        form.call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = form.call()

    def call() -> object:
        graph.replay()
        return result

    return form._replace(name=f"{form.name}{GRAPH}", call=call)


def _foreach_gradient(
    theta: list[Tensor], grad: list[Tensor], omega: list[Tensor], anchor: list[Tensor]
) -> None:
    distance = torch._foreach_sub(theta, anchor)
    torch._foreach_addcmul_(grad, distance, omega, value=2 * LAM)


def _value_and_gradient(
    theta: list[Tensor], grad: list[Tensor], omega: list[Tensor], anchor: list[Tensor]
) -> Tensor:
    total = torch.zeros((), device=theta[0].device)
    for p, g, w, a in zip(theta, grad, omega, anchor, strict=True):
        distance = p - a
        pull = w * distance
        g.add_(pull, alpha=2 * LAM)
        total = total + (pull * distance).sum()
    return LAM * total


# -- how it is measured ----------------------------------------------------------------------------


class Parameters:
    """Parameters away from their anchors, and gradients; both go back to their start before each measure."""

    def __init__(self, network: nn.Module) -> None:
        self.theta: list[Tensor] = [*network.parameters()]
        self.grads = [p.grad for p in self.theta if p.grad is not None]
        self.start = [p.detach() + 0.1 for p in self.theta]
        self.count = sum(p.numel() for p in self.theta)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the start."""
        torch._foreach_copy_(self.theta, self.start)
        torch._foreach_zero_(self.grads)


def run(
    model: str = "mlp",
    device: str = "cpu",
    dtype: str = "float32",
    tasks: Sequence[int] = (1, 10, 100),
    repeats: int = 31,
) -> dict[str, Any]:
    """Measure every form on the parameters of one network; arguments as of mas_ext.comparison.bench.bench.

    Returns:
        What JSON can hold. `bandwidth`: bytes per second, by kind of copy. `forms`, each called again and
        again: dicts with `name`, `tasks`, `seconds` and `ratio` (to add_grad_ after one task, paired within
        each repeat; both with median, low, high), bytes per parameter `held` by the state and `moved` at the
        least, and `fraction` = moved * parameters / seconds / best bandwidth. `cold`: both again, each call
        after other work has gone through the caches. `compile_seconds` by form, and `skipped`: why a form is
        missing.

    Raises:
        ValueError: an argument that is not one of the choices.
        AssertionError: a form whose result is wrong.
    """
    network = parameters_of(model, device, dtype)
    penalties, history = after_tasks(network, sorted({1, *tasks}))
    parameters = Parameters(network)
    skipped = too_large(penalties, history)
    found, compile_seconds = _usable(every_form(network, penalties, history), skipped)
    touched = 2 * sum(p.nbytes for p in parameters.theta) + storage_bytes(penalties[1])
    other = torch.ones(OTHER_BYTES // 4, device=device)

    def work() -> None:
        parameters.reset()
        other.neg_()

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        copied = plain_copies(touched, device, pool, skipped)
        calls = [*copied.values(), *(form.call for form in found)]
        warm = in_turns(calls, repeats, device, parameters.reset)
        cold = in_turns(calls, repeats, device, work, 0.0)
    # Only now: float64 copies change how the allocator serves whoever needs temporary tensors.
    for form in found:
        check(form, parameters, history[0])

    def summary(samples: Sequence[Sequence[float]]) -> dict[str, Any]:
        bandwidth = {
            name: touched / median(taken)["median"]
            for name, taken in zip(copied, samples, strict=False)
        }
        own = samples[len(copied)]
        size, state = parameters.theta[0].element_size(), element_bytes(penalties[1])
        rows = []
        for form, taken in zip(found, samples[len(copied) :], strict=True):
            time, moved = median(taken), moved_bytes(form.name, size, state)
            speed = moved and moved * parameters.count / time["median"]
            held = storage_bytes(penalties[form.tasks]) / parameters.count
            row = {
                "name": form.name,
                "tasks": form.tasks,
                "seconds": time,
                "ratio": paired(taken, own),
                "held": held if moved else 2 * size * form.tasks,
                "moved": moved,
                "fraction": speed and speed / max(bandwidth.values()),
            }
            rows.append(row)
        return {"bandwidth": bandwidth, "forms": rows}

    return {
        "model": model,
        "tensors": len(parameters.theta),
        "parameters": parameters.count,
        "device": device,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        **summary(warm),
        "cold": summary(cold),
        "compile_seconds": compile_seconds,
        "skipped": skipped,
    }


def _usable(
    candidates: Iterator[Form], skipped: dict[str, str]
) -> tuple[list[Form], dict[str, float]]:
    """The forms, and the seconds to compile; torch.compile needs a compiler and may fail."""
    found, compile_seconds = [], {}
    torch.compiler.reset()
    for form in candidates:
        begin = perf_counter()
        try:
            form.call()
        except RuntimeError as error:
            if not form.name.startswith(COMPILED):
                raise
            skipped[form.name] = str(error).strip().splitlines()[0]
        else:
            found.append(form)
            if form.name.startswith(COMPILED):
                compile_seconds[form.name] = perf_counter() - begin
    return found, compile_seconds


def exact_result(form: Form, start: Sequence[Tensor], first: TaskState) -> list[Tensor]:
    """The gradient, value or step that a form should compute, in float64, with the omegas of after_tasks."""
    count = form.tasks
    omega = [count * w.double() + count * (count - 1) / 200 for w in first[0]]
    distance = [p.double() - a.double() for p, a in zip(start, first[1], strict=True)]
    if form.name.startswith(VALUE):
        squares = [(w * d.square()).sum() for w, d in zip(omega, distance, strict=True)]
        return [LAM * torch.stack(squares).sum()]
    gradient = [2 * LAM * w * d for w, d in zip(omega, distance, strict=True)]
    if form.name.startswith(STEP):
        # The minimiser of penalty + |change|^2 / (2 eta), as a change.
        return [-ETA * g / (1 + 2 * ETA * LAM * w) for g, w in zip(gradient, omega, strict=True)]
    return gradient


def check(form: Form, parameters: Parameters, first: TaskState) -> None:
    """Raise an AssertionError unless the form's result is the exact one."""
    expected = exact_result(form, parameters.start, first)
    parameters.reset()
    result = form.call()
    if form.name.startswith(VALUE):
        got = [torch.as_tensor(result)]
    elif form.name.startswith(STEP):
        pairs = zip(parameters.theta, parameters.start, strict=True)
        got = [p.detach() - s for p, s in pairs]
    else:
        got = parameters.grads
    largest = max(float(e.abs().max()) for e in expected)
    errors = [float((g.to(e) - e).abs().max()) for g, e in zip(got, expected, strict=True)]
    tolerance = TOLERANCE[parameters.start[0].dtype]
    # max() could drop a NaN.
    if not all(error <= tolerance * largest for error in errors):
        raise AssertionError(
            f"{form.name}, {form.tasks} tasks: got a result that is {max(errors) / largest:.2g} off, "
            f"expected at most {tolerance:.2g}"
        )


# -- the command -----------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """What `run` returns, as lines of text."""
    lines = []
    cold = "after other work has gone through the caches"
    for words, part in (("called again and again", result), (cold, result["cold"])):
        lines += [
            "",
            f"{words}; copies of the same size, GB/s read and written: {copies(part)}",
            f"{'form':<30}{'tasks':>6}{'milliseconds':>36}{'x add_grad_':>26}{'of bandwidth':>14}"
            f"{'state B/param':>15}",
        ]
        for row in part["forms"]:
            fraction = f"{row['fraction']:.2f}" if row["fraction"] else ""
            lines.append(
                f"{row['name']:<30}{row['tasks']:>6}{spread(row['seconds'], 3, 1e3):>36}"
                f"{spread(row['ratio'], 2):>26}{fraction:>14}{row['held']:>15.1f}"
            )
    lines += [f"{name}: compiled in {s:.1f} s" for name, s in result["compile_seconds"].items()]
    return report(result, lines)


def main() -> None:
    """Measure, print, write, draw."""
    options = parser(__doc__, SIZES, 31)
    options.add_argument("--dtype", default="float32", choices=FLOATS)
    options.add_argument("--tasks", type=int, nargs="+", metavar="T", default=[1, 10, 100])
    result, path = measure(options, run, table, "penalty_{model}_{device}")
    pictures.penalty(result, path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
