"""Measures the penalty against other ways to compute it.

All forms take turns within every repeat, together with plain copies of memory, so that whatever else
the machine does hits all of them alike. Then each form's result is checked against float64.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.copies import plain_copies
from benchmarks.timing import SAMPLE_SECONDS, check_device, in_turns, median
from mas_ext.compare.bench import (
    MODELS,
    Case,
    Form,
    build,
    exact_results,
    other_forms,
    own_forms,
)

# What the work between two cold calls reads and writes: more than caches hold.
OTHER_BYTES = 1 << 28
# Largest difference from the exact result, relative to its largest entry.
TOLERANCE = {
    torch.float64: 1e-5,  # its omega is float32
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}


def run(
    model: str = "mlp",
    device: str = "cpu",
    dtype: str = "float32",
    tasks: Sequence[int] = (1, 10, 100),
    repeats: int = 31,
) -> dict[str, Any]:
    """Measure every form on the shapes of one model.

    Args:
        model: "mlp" (784-400-400-10), "resnet18", "vit_b" (ViT-B/16) or "gpt2" (small).
        device: "cpu" or "cuda".
        dtype: of the parameters: "float32", "float64", "bfloat16" or "float16".
        tasks: numbers of merged tasks; 1 is always among them.
        repeats: rounds in which all forms take their turn.

    Returns:
        Numbers and words that JSON can hold. `bandwidth`: bytes per second, by kind of copy. `forms`, each
        called again and again: dicts with `name`, `tasks`, `seconds` and `ratio` (to add_grad_ after one
        task, paired within each repeat; both with median, low, high), bytes per parameter `held` by the
        state and `moved` at the least, and `fraction` = moved * parameters / seconds / best bandwidth.
        `cold`: both again, each call after other work has gone through the caches.
        `launches` by form on a GPU, `compile_seconds` by form, and `skipped`: why a form is missing.

    Raises:
        ValueError: an argument that is not one of the choices.
        AssertionError: a form whose result is wrong.
    """
    if model not in MODELS:
        raise ValueError(f"model: got {model!r}, expected one of {', '.join(MODELS)}")
    check_device(device)
    if getattr(torch, dtype, None) not in TOLERANCE:
        raise ValueError(f"dtype: got {dtype!r}, expected float32, float64, bfloat16 or float16")
    if repeats < 1 or min(tasks, default=1) < 1:
        raise ValueError(f"tasks, repeats: got {tasks}, {repeats}, expected numbers from 1 up")
    case = build(model, device, getattr(torch, dtype), sorted({1, *tasks}))
    skipped = {
        f"eager autograd, {t} tasks": "needs more than half of the memory"
        for t in case.merged
        if t > len(case.history)
    }
    forms, compile_seconds = _usable(case, skipped)
    touched = (forms[0].moved - case.element_size) * case.parameters
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        moved = plain_copies(touched, device, pool, skipped)
        calls = [*moved.values(), *(form.call for form in forms)]
        warm = in_turns(calls, repeats, device, case.reset, SAMPLE_SECONDS)
        other = torch.ones(OTHER_BYTES // 4, device=device)

        def work() -> None:
            case.reset()
            other.neg_()

        cold = in_turns(calls, repeats, device, work, 0.0)
    # Only now: float64 copies change how the allocator serves whoever needs temporary tensors.
    exact = exact_results(case)
    for form in forms:
        _check(case, form, exact[form.kind, form.tasks])
    result = {
        "model": model,
        "tensors": len(case.theta),
        "parameters": case.parameters,
        "device": device,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        **_summary(case, forms, [*moved], touched, warm),
        "cold": _summary(case, forms, [*moved], touched, cold),
        "compile_seconds": compile_seconds,
        "skipped": skipped,
    }
    if device != "cpu":
        result["launches"] = {f"{f.name}, {f.tasks} tasks": _launches(f.call) for f in forms}
    return result


def _summary(
    case: Case,
    forms: Sequence[Form],
    copies: Sequence[str],
    touched: int,
    samples: Sequence[Sequence[float]],
) -> dict[str, Any]:
    """Bandwidth by copy, and a row for every form; the copies' samples come first."""
    copied = dict(zip(copies, samples, strict=False))
    bandwidth = {name: touched / statistics.median(s) for name, s in copied.items()}
    own = samples[len(copies)]
    rows = []
    for form, seconds in zip(forms, samples[len(copies) :], strict=True):
        time = median(seconds)
        fraction = form.moved * case.parameters / time["median"] / max(bandwidth.values())
        row = {
            "name": form.name,
            "tasks": form.tasks,
            "seconds": time,
            "ratio": median([s / b for s, b in zip(seconds, own, strict=True)]),
            "held": form.held,
            "moved": form.moved or None,
            "fraction": fraction or None,
        }
        rows.append(row)
    return {"bandwidth": bandwidth, "forms": rows}


def _usable(case: Case, skipped: dict[str, str]) -> tuple[list[Form], dict[str, float]]:
    """The forms, and the seconds to compile; torch.compile needs a compiler and may fail."""
    forms, compile_seconds = [], {}
    torch.compiler.reset()
    for form in [*own_forms(case), *other_forms(case)]:
        begin = perf_counter()
        try:
            form.call()
        except RuntimeError as error:
            if not form.compiled:
                raise
            skipped[form.name] = str(error).strip().splitlines()[0]
        else:
            forms.append(form)
            if form.compiled:
                compile_seconds[form.name] = perf_counter() - begin
    return forms, compile_seconds


def _check(case: Case, form: Form, expected: Sequence[Tensor]) -> None:
    """Raise an AssertionError unless the form's result is the exact one."""
    case.reset()
    result = form.call()
    if form.kind == "gradient":
        got = case.grads
    elif form.kind == "step":
        got = [p.detach() - s for p, s in zip(case.theta, case.start, strict=True)]
    else:
        got = [torch.as_tensor(result)]
    largest = max(float(e.abs().max()) for e in expected)
    errors = [float((g.to(e) - e).abs().max()) for g, e in zip(got, expected, strict=True)]
    tolerance = TOLERANCE[case.start[0].dtype]
    # max() could drop a NaN.
    if not all(error <= tolerance * largest for error in errors):
        raise AssertionError(
            f"{form.name}, {form.tasks} tasks: got a {form.kind} that is {max(errors) / largest:.2g} "
            f"off, expected at most {tolerance:.2g}"
        )


def _launches(call: Callable[[], object]) -> int:
    """Kernels and copies that one call starts on the GPU."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events())


def table(result: Mapping[str, Any]) -> str:
    """What `run` returns, as lines of text."""
    lines = [
        f"{result['model']}: {result['parameters']:,} parameters in {result['tensors']} tensors, "
        f"{result['dtype']}, {result['device']}, {result['threads']} threads, "
        f"{result['repeats']} repeats; medians with 95 % intervals",
    ]
    cold = "after other work has gone through the caches"
    for words, part in (("called again and again", result), (cold, result["cold"])):
        copies = ", ".join(f"{name} {b / 1e9:.1f}" for name, b in part["bandwidth"].items())
        lines += [
            "",
            f"{words}; copies of the same size, GB/s read and written: {copies}",
            f"{'form':<30}{'tasks':>6}{'milliseconds':>26}{'x add_grad_':>22}{'of bandwidth':>14}"
            f"{'state B/param':>15}",
            *(_line(row) for row in part["forms"]),
        ]
    lines += [f"{name}: left out, {reason}" for name, reason in result["skipped"].items()]
    lines += [f"{name}: compiled in {s:.1f} s" for name, s in result["compile_seconds"].items()]
    return "\n".join(lines)


def _line(row: Mapping[str, Any]) -> str:
    time = {key: 1e3 * seconds for key, seconds in row["seconds"].items()}
    return (
        f"{row['name']:<30}{row['tasks']:>6}"
        f"{'{median:.3f} ({low:.3f}-{high:.3f})'.format(**time):>26}"
        f"{'{median:.2f} ({low:.2f}-{high:.2f})'.format(**row['ratio']):>22}"
        f"{format(row['fraction'], '.2f') if row['fraction'] else '':>14}"
        f"{row['held']:>15.1f}"
    )
