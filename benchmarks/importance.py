"""Exact importance against other ways to per-sample gradients: prints a table, writes JSON and a picture.

python -m benchmarks.importance --model transformer

Each form is checked against a float64 loop. Then all take turns within every repeat, and each shows its peak of
memory in a process of its own. BackPACK and Opacus take part where they are installed. Networks are CNNs and
transformers by their real architectures: some need transformers, torchvision or peft, and say so.
"""

from __future__ import annotations

import copy
import multiprocessing
import textwrap
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import files, memory, pictures
from benchmarks.files import batch, measure, parser, report
from benchmarks.networks import IMPORTANCE, build
from mas_ext.comparison.timing import in_turns, median, paired, seconds, spread
from mas_ext.importance import ImportanceSum
from mas_ext.metrics import rank_correlation

Omega = dict[str, Tensor]
Call = Callable[[], Omega]
Make = Callable[[], tuple[nn.Module, Tensor]]

# What per-sample gradients of one chunk may take: all that vmap's user can set.
CHUNK_BYTES = 1 << 28
# Relative L2 distance from the float64 loop that rounding may make: in float32, and in TF32, which
# convolutions on a GPU have by default.
TOLERANCE = {"cpu": 1e-3, "cuda": 1e-2}
# A first call may also meet a cold cache: the median of so many.
FIRST_CALLS = 3


# -- what is compared ------------------------------------------------------------------------------
#
# Each takes a model and a batch and returns a call, which computes anew and returns importance by name; the
# objective is the squared norm of the output. Packages that aren't there, and networks that one can't take,
# raise when the call is made or first used.


def exact(model: nn.Module, x: Tensor) -> Call:
    """This library's."""
    checked = ImportanceSum("exact")

    def call() -> Omega:
        total = checked.empty()
        total.add(model, x)
        return total.into_mean()

    return call


def batch_approximation(model: nn.Module, x: Tensor) -> Call:
    """|gradient of the batch|, as other libraries compute it."""
    return lambda: _means({n: g.abs() for n, g in _gradients(model, x).items()}, x)


def training(model: nn.Module, x: Tensor) -> Call:
    """An ordinary forward and backward pass; its result is no importance."""
    return lambda: _gradients(model, x)


def loop(model: nn.Module, x: Tensor) -> Call:
    """The definition: one backward pass per sample."""

    def call() -> Omega:
        total = {name: torch.zeros_like(p) for name, p in _trained(model).items()}
        with torch.no_grad():
            for sample in x.split(1):
                for name, g in _gradients(model, sample).items():
                    total[name] += g.abs_()
        return _means(total, x)

    return call


def vmap(model: nn.Module, x: Tensor) -> Call:
    """torch.func.vmap(grad) in chunks: B x P numbers, as many at a time as CHUNK_BYTES hold."""
    theta = {name: p.detach() for name, p in _trained(model).items()}
    buffers = dict(model.named_buffers())

    def value(theta: Omega, sample: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(model, (theta, buffers), (sample[None],))
        return output.square().sum()

    per_sample = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0))
    chunk = max(1, CHUNK_BYTES // sum(p.nbytes for p in theta.values()))

    def call() -> Omega:
        total = {name: torch.zeros_like(p) for name, p in theta.items()}
        for samples in x.split(chunk):
            for name, g in per_sample(theta, samples).items():
                total[name] += g.abs_().sum(0)
        return _means(total, x)

    return call


def backpack(model: nn.Module, x: Tensor) -> Call:
    """BackPACK's BatchGrad, which keeps B x P numbers."""
    import backpack
    from backpack.extensions import BatchGrad

    extended = backpack.extend(copy.deepcopy(model))

    def call() -> Omega:
        with backpack.backpack(BatchGrad()):
            extended(x).square().sum().backward()
        return _means(_taken(extended, "grad_batch"), x)

    return call


def opacus(model: nn.Module, x: Tensor) -> Call:
    """Opacus's GradSampleModule, which keeps B x P numbers."""
    from opacus import GradSampleModule

    # It looks at modules in train mode only; dropout is 0 here, and BatchNorm it doesn't take.
    wrapped = GradSampleModule(copy.deepcopy(model).train(), loss_reduction="sum")

    def call() -> Omega:
        wrapped(x).square().sum().backward()
        return _means(_taken(wrapped._module, "grad_sample"), x)

    return call


FORMS: dict[str, Callable[[nn.Module, Tensor], Call]] = {
    "exact": exact,
    "batch approximation": batch_approximation,
    "forward + backward": training,
    "loop, one by one": loop,
    "vmap(grad), chunks": vmap,
    "BackPACK BatchGrad": backpack,
    "Opacus GradSampleModule": opacus,
}
OWN, APPROXIMATION, TRAINING = [*FORMS][:3]


def _trained(model: nn.Module) -> Omega:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _gradients(model: nn.Module, x: Tensor) -> Omega:
    theta = _trained(model)
    with torch.enable_grad():
        value = model(x).square().sum()
    return dict(zip(theta, torch.autograd.grad(value, list(theta.values())), strict=True))


def _means(sums: Omega, x: Tensor) -> Omega:
    return {name: t / len(x) for name, t in sums.items()}


def _taken(model: nn.Module, attribute: str) -> Omega:
    """The sum of |per-sample gradients| in an attribute of the parameters, which lose it."""
    sums = {}
    for name, p in _trained(model).items():
        per_sample: Tensor | None = getattr(p, attribute, None)
        if per_sample is None:
            raise NotImplementedError(f"no per-sample gradient of {name}")
        sums[name] = per_sample.abs().sum(0)
        setattr(p, attribute, None)
        p.grad = None
    return sums


# -- how it is measured ----------------------------------------------------------------------------


def run(
    model: str = "mlp",
    device: str = "cpu",
    samples: int | None = None,
    repeats: int = 15,
    with_memory: bool = True,
) -> dict[str, Any]:
    """Measure every form on one batch of one network.

    Args:
        model: one of networks.IMPORTANCE.
        device: "cpu" or "cuda".
        samples: in the batch, by default as in networks.IMPORTANCE.
        repeats: rounds in which all forms take their turn.
        with_memory: starts a process for every form on the CPU; needs Linux there.

    Returns:
        What JSON can hold. `forms`: dicts with `name`, `seconds`, `to_batch` and `to_training` (ratios to the
        batch approximation and to an ordinary forward and backward pass, paired within each repeat; all with
        median, low, high), `error` (relative L2, from the float64 loop; None for the training pass), `memory`
        (bytes at the peak of two calls, above those before) and `memory_to_training`. `self_check`: seconds
        that the first batch of a model takes longer than a later one. `batch`: the part of all importance that
        the approximation `kept`, and its `rank_correlation` with the exact one. `skipped`: why a form is
        missing. `warnings`: what this library's form had to say.

    Raises:
        AssertionError: a form whose result is wrong.
    """
    make = partial(build, IMPORTANCE[model], samples, device)
    network, x = make()
    skipped: dict[str, str] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        calls, found = _usable(make, skipped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        taken = in_turns([*calls.values()], repeats, device)
        self_check = _self_check(make, device)
    times = dict(zip(calls, taken, strict=True))
    if with_memory and device == "cpu" and not memory.RESET_PEAK.exists():
        with_memory, skipped["memory"] = False, f"there is no {memory.RESET_PEAK}"
    peaks = {name: peak(make, device, name) for name in calls} if with_memory else {}
    network, x = make()
    reference = loop(network.double(), x.double() if x.is_floating_point() else x)()
    errors = {name: _error(omega, reference) for name, omega in found.items() if name != TRAINING}
    for name, error in errors.items():
        # Also where it is NaN.
        if name != APPROXIMATION and not error <= TOLERANCE[device]:
            raise AssertionError(
                f"{name}: got importance that is {error:.2g} off, expected at most {TOLERANCE[device]}"
            )
    rows = [
        {
            "name": name,
            "seconds": median(one),
            "to_batch": paired(one, times[APPROXIMATION]),
            "to_training": paired(one, times[TRAINING]),
            "error": errors.get(name),
            "memory": peaks.get(name),
            "memory_to_training": peaks[name] / max(1, peaks[TRAINING]) if peaks else None,
        }
        for name, one in times.items()
    ]
    flat, approximate = (_flat(omega) for omega in (reference, found[APPROXIMATION]))
    return {
        "model": model,
        "parameters": len(flat),
        "shape": list(x.shape),
        "device": device,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "forms": rows,
        "self_check": self_check,
        "batch": {
            "kept": float(approximate.sum() / flat.sum()),
            "rank_correlation": rank_correlation(approximate, flat),
        },
        "skipped": skipped,
        "warnings": sorted(
            {str(w.message) for w in caught if str(w.message).startswith("importance of")}
        ),
    }


def _usable(make: Make, skipped: dict[str, str]) -> tuple[dict[str, Call], dict[str, Omega]]:
    """The forms that can take the network, and what they found."""
    calls, found = {}, {}
    for name, form in FORMS.items():
        try:
            call = form(*make())
            omega = call()
        except Exception as error:  # other packages say in many ways that they can't
            if name in (OWN, APPROXIMATION, TRAINING):
                raise
            skipped[name] = textwrap.shorten(f"{type(error).__name__}: {error}", 160)
        else:
            calls[name], found[name] = call, {key: t.clone() for key, t in omega.items()}
    return calls, found


def _flat(omega: Omega) -> Tensor:
    return torch.cat([t.flatten().double() for t in omega.values()])


def _error(omega: Omega, reference: Omega) -> float:
    difference = _flat({name: omega[name] - t for name, t in reference.items()})
    return float(difference.norm() / _flat(reference).norm())


def _self_check(make: Make, device: str) -> dict[str, float]:
    """Seconds by which the first call on a new model is longer than those after it."""
    longer = []
    for _ in range(FIRST_CALLS):
        call = exact(*make())
        first, *later = (seconds(call, 1, device) for _ in range(4))
        longer.append(first - median(later)["median"])
    return median(longer)


def peak(make: Make, device: str, form: str) -> int:
    """Bytes at the peak of two calls, above those that model and batch took before."""
    if device == "cuda":
        network, x = make()
        torch.cuda.empty_cache()
        return memory.peak(partial(_call_twice, form, network, x), device)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_of_process, make, form, torch.get_num_threads()).result()


def _peak_of_process(make: Make, form: str, threads: int) -> int:
    torch.set_num_threads(threads)

    def prepare() -> Callable[[], None]:
        network, x = make()
        # Libraries make buffers of their own on first use.
        _call_twice(form, network, x[:2])
        return partial(_call_twice, form, network, x)

    return memory.process_peak(prepare)


def _call_twice(form: str, network: nn.Module, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        call = FORMS[form](network, x)
        call()
        call()


def first_batch(result: Mapping[str, Any]) -> float:
    """What the first batch of a model takes, in ordinary forward and backward passes."""
    own, ordinary = (files.row(result, name)["seconds"]["median"] for name in (OWN, TRAINING))
    return float((own + result["self_check"]["median"]) / ordinary)


# -- the command -----------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """What `run` returns, as lines of text."""
    approximation = result["batch"]
    lines = [
        f"batch of {batch(result)}",
        f"{'form':<24}{'milliseconds':>34}{'x batch approximation':>28}{'x forward + backward':>28}"
        f"{'peak MB':>10}{'x fwd+bwd':>12}{'error':>10}",
    ]
    for row in result["forms"]:
        size, ratio, error = (row[key] for key in ("memory", "memory_to_training", "error"))
        lines.append(
            f"{row['name']:<24}{spread(row['seconds'], 2, 1e3):>34}{spread(row['to_batch'], 2):>28}"
            f"{spread(row['to_training'], 2):>28}{'' if size is None else f'{size / 1e6:.0f}':>10}"
            f"{'' if ratio is None else f'{ratio:.2f}':>12}{'' if error is None else f'{error:.1e}':>10}"
        )
    lines += [
        f"once per model, to check itself: {spread(result['self_check'], 1, 1e3)} ms; the first batch takes "
        f"{first_batch(result):.1f} forward and backward passes",
        f"the batch approximation keeps {100 * approximation['kept']:.0f} % of the importance; its rank "
        f"correlation with it is {approximation['rank_correlation']:.2f}",
        *result["warnings"],
    ]
    return report(result, lines)


def main() -> None:
    """Measure, print, write, draw."""
    options = parser(__doc__, IMPORTANCE, 15)
    options.add_argument("--samples", type=int, help="in the batch")
    result, path = measure(options, run, table, "importance_{model}_{device}")
    pictures.importance(result, path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
