"""Two results side by side."""

from typing import Any

from benchmarks.ratios import ratios


def result(scale: float, *names: str) -> dict[str, Any]:
    """Forms whose shares of a copy are scale, scale + 0.1, ..., half of that with cold caches."""
    warm = [
        {"name": name, "tasks": 1, "moved": 8, "fraction": scale + i / 10}
        for i, name in enumerate(names)
    ]
    other = {"name": "torch._foreach", "tasks": 1, "moved": None, "fraction": None}
    machine = {"cpu": "A", "gpu": None, "instruction_set": "avx2", "torch": "2.13", "date": "today"}
    cold = [{**row, "fraction": row["fraction"] / 2} for row in warm]
    about = {"machine": machine, "model": "mlp", "device": "cpu", "threads": 2}
    return {**about, "forms": [*warm, other], "cold": {"forms": [*cold, other]}}


def test_a_line_for_each_form_that_moves_bytes() -> None:
    lines = ratios(result(0.5, "add_grad_"), result(0.8, "add_grad_", "new")).splitlines()
    assert lines[2:] == [
        "| `add_grad_` | 1 | 0.50 | 0.80 | 0.25 | 0.40 |",
        "| `new` | 1 |  | 0.90 |  | 0.45 |",
        "",
        "MLP 784-400-400-10, A (2 threads, avx2), torch 2.13, today; "
        "bytes per second over those of a plain copy.",
    ]
