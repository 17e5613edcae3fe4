"""Measures exact importance against other ways to per-sample gradients, and against the approximation.

Each form is checked against a float64 loop first. Then all take turns within every repeat, and each shows
its peak of memory in a process of its own.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import textwrap
import warnings
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory as allocator
from benchmarks.gradients import APPROXIMATION, FORMS, OWN, TRAINING, Call, loop
from benchmarks.networks import NETWORKS, build
from benchmarks.timing import SAMPLE_SECONDS, check_device, in_turns, median, seconds
from mas_ext.metrics import rank_correlation

Omega = dict[str, Tensor]

# Relative L2 distance from the float64 loop that rounding may make: in float32, and in TF32, which
# convolutions on a GPU have by default.
TOLERANCE = {"cpu": 1e-3, "cuda": 1e-2}
# Linux counts the peak of a process, and can be told to start anew.
RESET_PEAK, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
M_MMAP_THRESHOLD = -3  # from malloc.h
# A first call may also meet a cold cache: the median of so many.
FIRST_CALLS = 5


def run(
    model: str = "mlp",
    device: str = "cpu",
    samples: int | None = None,
    repeats: int = 15,
    memory: bool = True,
) -> dict[str, Any]:
    """Measure every form on one batch of one network.

    Args:
        model: "mlp" (784-400-400-10), "cnn" (VGG-like, 32 x 32), "transformer" (4 layers of width 256, 64
            positions) or "resnet18" (64 x 64).
        device: "cpu" or "cuda".
        samples: in the batch; by default 512, 128, 32 and 32.
        repeats: rounds in which all forms take their turn.
        memory: whether to measure memory, which starts a process for every form on the CPU; needs Linux there.

    Returns:
        Numbers and words that JSON can hold. `forms`: dicts with `name`, `seconds`, `to_batch` and
        `to_training` (ratios to the batch approximation and to an ordinary forward and backward pass, paired
        within each repeat; all with median, low, high), `error` (relative L2, from the float64 loop; None for
        the training pass), `memory` (bytes at the peak, above those before) and `memory_to_training`.
        `self_check`: seconds that the first batch of a model takes longer than a later one. `batch`: the part
        of all importance that the approximation `kept`, and its `rank_correlation` with the exact one.
        `skipped`: why a form is missing. `warnings`: what this library's form had to say.

    Raises:
        ValueError: an argument that is not one of the choices.
        AssertionError: a form whose result is wrong.
    """
    if model not in NETWORKS:
        raise ValueError(f"model: got {model!r}, expected one of {', '.join(NETWORKS)}")
    check_device(device)
    if repeats < 1 or (samples is not None and samples < 1):
        raise ValueError(f"samples, repeats: got {samples}, {repeats}, expected numbers from 1 up")
    network, x = build(model, samples, device)
    skipped: dict[str, str] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        calls, found = _usable(model, samples, device, skipped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        taken = in_turns([*calls.values()], repeats, device, lambda: None, SAMPLE_SECONDS)
    times = dict(zip(calls, taken, strict=True))
    if memory and device == "cpu" and not RESET_PEAK.exists():
        memory, skipped["memory"] = False, f"there is no {RESET_PEAK}"
    peaks = {name: peak(model, samples, device, name) for name in calls} if memory else {}
    exact = _double_loop(model, samples, device)
    errors = {name: _error(omega, exact) for name, omega in found.items() if name != TRAINING}
    tolerance = TOLERANCE[torch.device(device).type]
    for name, error in errors.items():
        # Also where it is NaN.
        if name != APPROXIMATION and not error <= tolerance:
            raise AssertionError(
                f"{name}: got importance that is {error:.2g} off, expected at most {tolerance}"
            )
    rows = [
        {
            "name": name,
            "seconds": median(one),
            "to_batch": median([a / b for a, b in zip(one, times[APPROXIMATION], strict=True)]),
            "to_training": median([a / b for a, b in zip(one, times[TRAINING], strict=True)]),
            "error": errors.get(name),
            "memory": peaks.get(name),
            "memory_to_training": peaks[name] / max(1, peaks[TRAINING]) if peaks else None,
        }
        for name, one in times.items()
    ]
    flat, approximate = (_flat(omega) for omega in (exact, found[APPROXIMATION]))
    return {
        "model": model,
        "parameters": sum(p.numel() for p in network.parameters()),
        "shape": list(x.shape),
        "device": device,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "forms": rows,
        "self_check": _self_check(model, samples, device),
        "batch": {
            "kept": float(approximate.sum() / flat.sum()),
            "rank_correlation": rank_correlation(approximate, flat),
        },
        "skipped": skipped,
        "warnings": sorted(
            {str(w.message) for w in caught if "takes the fallback" in str(w.message)}
        ),
    }


def _usable(
    model: str, samples: int | None, device: str, skipped: dict[str, str]
) -> tuple[dict[str, Call], dict[str, Omega]]:
    """The forms that can take the network, and what they found."""
    calls, found = {}, {}
    for name, form in FORMS.items():
        try:
            call = form(*build(model, samples, device))
            omega = call()
        except Exception as error:  # other packages say in many ways that they can't
            if name in (OWN, APPROXIMATION, TRAINING):
                raise
            skipped[name] = textwrap.shorten(f"{type(error).__name__}: {error}", 160)
        else:
            calls[name], found[name] = call, {key: t.clone() for key, t in omega.items()}
    return calls, found


def _double_loop(model: str, samples: int | None, device: str) -> Omega:
    network, x = build(model, samples, device)
    return loop(network.double(), x.double())()


def _flat(omega: Omega) -> Tensor:
    return torch.cat([t.flatten().double() for t in omega.values()])


def _error(omega: Omega, exact: Omega) -> float:
    difference = _flat({name: omega[name] - t for name, t in exact.items()})
    return float(difference.norm() / _flat(exact).norm())


def _self_check(model: str, samples: int | None, device: str) -> dict[str, float]:
    """Seconds by which the first call on a new model is longer than those after it."""
    longer = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(FIRST_CALLS):
            call = FORMS[OWN](*build(model, samples, device))
            first, *later = (seconds(call, 1, device) for _ in range(4))
            longer.append(first - median(later)["median"])
    return median(longer)


# -- memory ----------------------------------------------------------------------------------------


def peak(model: str, samples: int | None, device: str, form: str) -> int:
    """Bytes at the peak of two calls, above those that model and batch took before.

    On the CPU this is what the system counts for a new process, since allocators keep what others freed.
    """
    if device != "cpu":
        return _peak_cuda(model, samples, device, form)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_cpu, model, samples, form, torch.get_num_threads()).result()


def _peak_cuda(model: str, samples: int | None, device: str, form: str) -> int:
    network, x = build(model, samples, device)
    torch.cuda.empty_cache()
    return allocator.peak(lambda: _call_twice(form, network, x), device)


def _peak_cpu(model: str, samples: int | None, form: str, threads: int) -> int:
    torch.set_num_threads(threads)
    # Freed memory goes back to the system at once, or what the calls below reuse would not be seen.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    network, x = build(model, samples)
    # Libraries make buffers of their own on first use.
    _call_twice(form, network, x[:2])
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    before = _resident("VmRSS")
    RESET_PEAK.write_text("5")
    _call_twice(form, network, x)
    return max(0, _resident("VmHWM") - before)


def _call_twice(form: str, network: torch.nn.Module, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        call = FORMS[form](network, x)
        call()
        call()


def _resident(field: str) -> int:
    """Bytes now (VmRSS) or at the peak (VmHWM)."""
    (line,) = (x for x in STATUS.read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


# -- words -----------------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """What `run` returns, as lines of text."""
    batch, check = result["batch"], result["self_check"]
    return "\n".join(
        [
            f"{result['model']}: {result['parameters']:,} parameters, input "
            f"{' x '.join(map(str, result['shape']))}, {result['dtype']}, {result['device']}, "
            f"{result['threads']} threads, {result['repeats']} repeats; medians with 95 % intervals",
            "",
            f"{'form':<26}{'milliseconds':>26}{'x batch approximation':>24}{'x forward + backward':>22}"
            f"{'peak MB':>10}{'x fwd+bwd':>12}{'error':>10}",
            *(_line(row) for row in result["forms"]),
            "",
            f"once a model, to check itself: {1e3 * check['median']:.1f} ms "
            f"({1e3 * check['low']:.1f} to {1e3 * check['high']:.1f})",
            f"the batch approximation keeps {100 * batch['kept']:.0f} % of the importance; its rank "
            f"correlation with it is {batch['rank_correlation']:.2f}",
            *(f"{name}: left out, {reason}" for name, reason in result["skipped"].items()),
            *result["warnings"],
        ]
    )


def _line(row: Mapping[str, Any]) -> str:
    time = {key: 1e3 * value for key, value in row["seconds"].items()}
    spread = "{median:.2f} ({low:.2f}-{high:.2f})"
    memory = "" if row["memory"] is None else f"{row['memory'] / 1e6:.0f}"
    ratio = "" if row["memory_to_training"] is None else f"{row['memory_to_training']:.2f}"
    return (
        f"{row['name']:<26}{spread.format(**time):>26}{spread.format(**row['to_batch']):>24}"
        f"{spread.format(**row['to_training']):>22}{memory:>10}{ratio:>12}"
        f"{'' if row['error'] is None else format(row['error'], '.1e'):>10}"
    )
