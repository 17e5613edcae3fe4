"""Exact per-sample importance of one use of a weight, against a loop in NumPy's float64."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import backends
import numpy as np
import pytest
import torch
from backends import EMULATED, SANITIZED, Backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import naive
from torch import Tensor

from mas_ext.kernels import per_sample
from mas_ext.kernels.dtypes import compute_dtype
from mas_ext.kernels.per_sample import per_sample_

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Of the sum of the absolute values of all terms.
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-14}


class Sizes(NamedTuple):
    batch: int
    positions: int
    seen: int  # rows of the input
    groups: int
    outputs: int
    taps: int
    channels: int


class Use(NamedTuple):
    """The operator's tensors."""

    omega: Tensor
    grad: Tensor
    input: Tensor
    rows: Tensor | None


def make(
    sizes: Sizes, dtype: torch.dtype = torch.float32, device: str = "cpu", table: bool = True
) -> Use:
    generator = torch.Generator().manual_seed(3)
    batch, positions, seen, groups, outputs, taps, channels = sizes

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows = torch.randint(-1, seen, (taps, positions), generator=generator, dtype=torch.int32)
    return Use(
        random(groups, outputs, taps, channels).abs().to(compute_dtype(dtype)).to(device),
        random(batch, positions, groups * outputs).to(dtype).to(device),
        random(batch, seen, groups * channels).to(dtype).to(device),
        rows.to(device) if table else None,
    )


def array(t: Tensor) -> naive.Array:
    return t.double().cpu().numpy().copy()


def check(use: Use, square: bool, compiled: bool) -> None:
    before = array(use.omega)
    operands = [array(use.grad), array(use.input)]
    taps, positions = use.omega.shape[2], use.grad.shape[1]
    rows = np.arange(positions)[None] if use.rows is None else use.rows.cpu().numpy()
    assert rows.shape == (taps, positions)
    per_sample_(*use, square, compiled)
    shape = list(use.omega.shape)
    expected = before + naive.per_sample(*operands, rows, shape, square)
    terms = before + naive.per_sample(*map(np.abs, operands), rows, shape, square)
    error = np.abs(array(use.omega) - expected)
    assert np.all(error <= ROUNDING[use.omega.dtype] * terms), np.max(error)


# Whole and ragged tiles and blocks, one and several splits of the batch, samples that share a panel
# of the CPU kernel and samples that need several.
SIZES = {
    "one": Sizes(1, 1, 1, 1, 1, 1, 1),
    "ragged tiles": Sizes(3, 19, 7, 1, 33, 3, 11),
    "whole tiles": Sizes(2, 16, 16, 1, 32, 2, 32),
    "whole vectors, ragged tiles": Sizes(3, 19, 7, 2, 24, 3, 40),
    "groups": Sizes(5, 7, 9, 3, 5, 2, 4),
    "depthwise": Sizes(9, 5, 6, 67, 1, 3, 1),
    "one channel": Sizes(2, 20, 30, 1, 6, 9, 1),
    "few positions": Sizes(43, 2, 2, 1, 9, 1, 17),
    "no batch": Sizes(0, 3, 4, 1, 2, 2, 3),
    "no positions": Sizes(2, 0, 4, 1, 2, 2, 3),
    "no input": Sizes(2, 3, 0, 1, 2, 2, 3),
    "no taps": Sizes(2, 3, 4, 1, 2, 0, 3),
    "no groups": Sizes(2, 3, 4, 0, 2, 2, 3),
}
LARGE = {
    "several blocks": Sizes(2, 40, 50, 1, 263, 3, 131),
    "several panels": Sizes(2, 389, 400, 2, 9, 2, 67),
    "whole panels": Sizes(2, 256, 256, 1, 128, 1, 192),
    "many groups": Sizes(5, 40, 31, 150, 1, 2, 1),
    "one column": Sizes(13, 130, 130, 1, 130, 1, 1),
}

each_square = pytest.mark.parametrize("square", [False, True], ids=["abs", "square"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(SIZES))
@each_square
def test_sizes(backend: Backend, name: str, dtype: torch.dtype, square: bool) -> None:
    check(make(SIZES[name], dtype, backend.device), square, backend.native)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(LARGE))
def test_large_sizes(backend: Backend, name: str, dtype: torch.dtype) -> None:
    check(make(LARGE[name], dtype, backend.device), False, backend.native)


@each_square
def test_without_rows(backend: Backend, square: bool) -> None:
    for groups, outputs, channels in ((1, 7, 40), (70, 1, 1)):
        sizes = Sizes(5, 21, 21, groups, outputs, 1, channels)
        check(make(sizes, device=backend.device, table=False), square, backend.native)


def test_a_convolution(backend: Backend) -> None:
    """The table of rows as a convolution would make it, against PyTorch's own gradient."""
    image, grad = torch.randn(4, 6, 5, 7), torch.randn(4, 4, 3, 4)
    pixels = torch.arange(5 * 7, dtype=torch.float32).view(1, 1, 5, 7)
    padded = torch.nn.functional.pad(pixels, (1, 1, 1, 1), value=-1)
    rows = torch.nn.functional.unfold(padded, 3, stride=2)[0].to(torch.int32)
    omega = torch.zeros(2, 2, 9, 3, device=backend.device)
    operands = [t.flatten(2).transpose(1, 2).to(backend.device) for t in (grad, image)]
    operands = [t.contiguous() for t in operands]
    per_sample_(omega, *operands, rows.to(backend.device), False, backend.native)
    expected = sum(
        torch.nn.grad.conv2d_weight(i[None], (4, 3, 3, 3), g[None], 2, 1, groups=2).abs()
        for i, g in zip(image.double(), grad.double(), strict=True)
    )
    got = omega.cpu().view(2, 2, 3, 3, 3).movedim(4, 2).reshape(4, 3, 3, 3)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


def test_chunks_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_sample, "_TEMPORARY", 2000)
    check(make(SIZES["few positions"]), False, False)
    monkeypatch.setattr(per_sample, "_TEMPORARY", 1)
    check(make(SIZES["groups"]), True, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["ragged tiles", "whole tiles", "depthwise"])
def test_misaligned_tensors(backend: Backend, name: str, dtype: torch.dtype) -> None:
    use = make(SIZES[name], dtype, backend.device)
    rooms = []
    moved = []
    for t in use[:3]:
        room = torch.full((t.numel() + 9,), float("nan"), dtype=t.dtype, device=backend.device)
        rooms.append(room)
        moved.append(room[3 : t.numel() + 3].view(t.shape).copy_(t))
    check(Use(*moved, use.rows), False, backend.native)
    for room in rooms:
        assert room.isnan().sum() == 9


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["groups", "whole vectors, ragged tiles", "depthwise"])
def test_what_is_not_finite_shows(
    backend: Backend, name: str, dtype: torch.dtype, bad: float
) -> None:
    for square in (False, True):
        use = make(SIZES[name], dtype, backend.device)
        use.grad[0, 0, 0] = bad
        per_sample_(*use, square, backend.native)
        # inf times a row of zeros is NaN.
        assert not use.omega[0, 0].isfinite().any()
        assert use.omega[0, 1:].isfinite().all()
        assert use.omega[1:].isfinite().all()


@pytest.mark.parametrize("sizes", [Sizes(43, 40, 30, 1, 24, 2, 17), Sizes(40, 50, 30, 67, 1, 3, 1)])
def test_the_same_bits_on_every_run(backend: Backend, sizes: Sizes) -> None:
    uses = [make(sizes, device=backend.device) for _ in range(3)]
    for use in uses:
        per_sample_(*use, False, backend.native)
    assert all(torch.equal(use.omega, uses[0].omega) for use in uses)


@pytest.mark.parametrize(
    "sizes",
    [Sizes(9, 129, 129, 1, 150, 2, 110), Sizes(40, 99, 50, 1, 9, 9, 3), LARGE["many groups"]],
)
def test_the_same_bits_for_every_thread_count(sizes: Sizes) -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            use = make(sizes)
            per_sample_(*use, False, True)
            results.append(use.omega)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


def test_uninitialised_memory_is_never_read(backend: Backend) -> None:
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        for name in ("few positions", "depthwise"):
            check(make(SIZES[name], device=backend.device), False, backend.native)
    finally:
        torch.use_deterministic_algorithms(False)


SNIPPET = """
import sys, torch
from mas_ext.kernels.backends import instruction_set
from mas_ext.kernels.per_sample import per_sample_
results = []
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for groups, outputs, channels in ((1, 137, 70), (2, 3, 5), (70, 1, 1)):
        torch.manual_seed(0)
        grad, input = (torch.randn(9, 50, groups * n).to(dtype) for n in (outputs, channels))
        rows = torch.randint(-1, 50, (3, 50), dtype=torch.int32)
        wide = dtype == torch.float64
        omega = torch.zeros(groups, outputs, 3, channels, dtype=dtype if wide else torch.float32)
        per_sample_(omega, grad, input, rows, False, True)
        results.append(omega)
torch.save((instruction_set(), results), sys.argv[1])
"""


def test_every_instruction_set_agrees_to_rounding(tmp_path: Path) -> None:
    seen = {}
    for wish in ("baseline", "avx2", "avx512"):
        environment = {**os.environ, "MAS_EXT_INSTRUCTION_SET": wish}
        environment.pop("LD_PRELOAD", None)
        file = tmp_path / wish
        subprocess.run([sys.executable, "-c", SNIPPET, file], env=environment, check=True)
        name, results = torch.load(file)
        seen[name] = results
    assert "baseline" in seen
    for results in seen.values():
        for got, expected in zip(results, seen["baseline"], strict=True):
            rounding = 1e-13 if expected.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(got, expected, rtol=rounding, atol=rounding)


# -- what is refused -------------------------------------------------------------------------------


def with_row(use: Use, row: int) -> Use:
    rows = torch.zeros(2, 7, dtype=torch.int32)
    rows[1, 3] = row
    return use._replace(rows=rows)


BAD_USES: dict[str, tuple[Callable[[Use], Use], str]] = {
    "integers": (lambda u: u._replace(grad=u.grad.int()), "grad: got torch.int32"),
    "mixed dtypes": (lambda u: u._replace(input=u.input.half()), "input: got torch.float16"),
    "other device": (lambda u: u._replace(input=u.input.to("meta")), "input: got .* on meta"),
    "narrow omega": (lambda u: u._replace(omega=u.omega.half()), "omega: got torch.float16"),
    "wide omega": (lambda u: u._replace(omega=u.omega.double()), "omega: got torch.float64"),
    "flat omega": (lambda u: u._replace(omega=u.omega.flatten(1)), "omega: got .*, 40"),
    "strided omega": (
        lambda u: u._replace(omega=u.omega.transpose(1, 3).contiguous().transpose(1, 3)),
        "omega: got .* strides",
    ),
    "other outputs": (lambda u: u._replace(grad=u.grad[:, :, 1:]), "grad: got .*, 14.*, 15"),
    "other channels": (lambda u: u._replace(input=u.input[:, :, 1:]), "input: got .*, 11.*, 12"),
    "flat grad": (lambda u: u._replace(grad=u.grad.flatten(0, 1)), "grad: got .*35, 15"),
    "flat input": (lambda u: u._replace(input=u.input.flatten(0, 1)), "input: got .*45, 12"),
    "expanded grad": (
        lambda u: u._replace(grad=torch.ones(1).expand(u.grad.shape)),
        "grad: got strides .0, 0, 0., expected 1",
    ),
    "channels first": (
        lambda u: u._replace(input=u.input.transpose(1, 2).contiguous().transpose(1, 2)),
        "input: got strides .*, expected 1",
    ),
    "other batch": (lambda u: u._replace(input=u.input[1:]), "input: got 4 samples, expected 5"),
    "no rows": (lambda u: u._replace(rows=None), "rows: got None for 2 taps"),
    "no rows for other positions": (
        lambda u: u._replace(rows=None, omega=u.omega[:, :, :1].contiguous()),
        "input: got 9 positions, expected 7",
    ),
    "long rows": (lambda u: u._replace(rows=torch.zeros(2, 7).long()), "rows: got torch.int64"),
    "rows elsewhere": (
        lambda u: u._replace(rows=torch.zeros(2, 7, dtype=torch.int32, device="meta")),
        "rows: got .* on meta",
    ),
    "rows of other taps": (
        lambda u: u._replace(rows=torch.zeros(3, 7, dtype=torch.int32)),
        "rows: got .*3, 7.*expected .*2, 7",
    ),
    "strided rows": (
        lambda u: u._replace(rows=torch.zeros(7, 2, dtype=torch.int32).t()),
        "rows: got .*strides .1, 2.",
    ),
    "row below": (lambda u: with_row(u, -2), "rows: got numbers from -2 to 0, expected -1 to 8"),
    "row above": (lambda u: with_row(u, 9), "rows: got numbers from 0 to 9, expected -1 to 8"),
}


def test_what_a_gpu_can_not_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.choose("emulated", monkeypatch)
    many = torch.zeros(1, 1, 1).expand(1, 1 << 30, 1)
    with pytest.raises(ValueError, match="expected less than 1073741824 samples, channels, and"):
        per_sample_(torch.zeros(1, 1, 1, 1), many, many, None, False, True)


@pytest.mark.parametrize("name", list(BAD_USES))
def test_bad_uses_are_refused_before_anything_is_written(name: str) -> None:
    change, message = BAD_USES[name]
    use = change(make(SIZES["groups"]))
    before = use.omega.clone()
    with pytest.raises((ValueError, TypeError), match=message):
        inspect.unwrap(per_sample_)(*use, False, True)
    assert torch.equal(use.omega, before)


def test_rows_are_looked_at_in_every_call() -> None:
    """Also where they were written past their version, as by NumPy."""
    use = make(SIZES["groups"])
    assert use.rows is not None
    per_sample_(*use, False, True)
    before = use.omega.clone()
    use.rows.numpy()[1, 3] = 9
    with pytest.raises(ValueError, match="to 9, expected"):
        per_sample_(*use, False, True)
    use.rows.data = torch.full_like(use.rows, 10)
    with pytest.raises(ValueError, match="from 10 to 10"):
        per_sample_(*use, False, True)
    assert torch.equal(use.omega, before)


def test_a_table_on_a_gpu_is_looked_at_again_when_it_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked = []
    aminmax = Tensor.aminmax
    monkeypatch.setattr(Tensor, "aminmax", lambda t: looked.append(t) or aminmax(t))
    rows = torch.arange(6, dtype=torch.int32).view(2, 3)
    assert [per_sample._range(rows) for _ in range(2)] == 2 * [(0, 5)]
    assert len(looked) == 1
    rows[1, 1] = 9
    assert per_sample._range(rows) == (0, 9)
    rows.data = torch.full_like(rows, 10)
    assert per_sample._range(rows) == (10, 10)
    with torch.inference_mode():
        rows = torch.zeros_like(rows)
        assert per_sample._range(rows) == (0, 0)
        rows.fill_(11)
        assert per_sample._range(rows) == (11, 11)


def test_a_batch_is_split_where_omega_is_small_and_there_is_enough_for_each_part() -> None:
    splits = per_sample._splits
    # 4,194,304 elements at once on a GPU, 262,144 on a CPU, over the 36,864 of a 3 x 3 convolution by 64.
    assert splits("cuda", 36_864, 128, 256) == 114
    assert splits("cpu", 36_864, 128, 256) == 8
    # At least 256 positions in a part on a GPU, four samples on a CPU, and never less than a sample.
    assert splits("cuda", 10, 100, 8) == 3
    assert splits("cuda", 10, 5, 100_000) == 5
    assert splits("cpu", 10, 100, 8) == 25
    assert splits("cuda", 1 << 30, 100, 8) == splits("cpu", 10, 3, 8) == 1


def test_tables_are_forgotten_with_their_tensors() -> None:
    rows = torch.zeros(2, dtype=torch.int32)
    per_sample._range(rows)
    known = len(per_sample._seen)
    del rows
    assert len(per_sample._seen) == known - 1


def test_the_extension_refuses_what_its_caller_should_have() -> None:
    use = make(SIZES["groups"])
    none = use.omega.new_zeros(0)
    for compiled in (EMULATED.cpu, EMULATED.cuda):
        with pytest.raises(ValueError, match="splits: got 0, expected 1 to"):
            compiled.per_sample(*use, (0, -1), none, 0, False, 1)
        with pytest.raises(ValueError, match="partial: got"):
            compiled.per_sample(*use, (0, -1), none, 2, False, 1)


# -- any shape -------------------------------------------------------------------------------------


def laid_out(t: Tensor, order: str) -> Tensor:
    """The same numbers in other strides, the last of them 1."""
    if order == "positions first":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if order == "part of a larger tensor":
        room = torch.full((t.shape[0] + 1, t.shape[1] + 2, t.shape[2] + 3), float("nan"))
        room = room.to(t.dtype).to(t.device)
        return room[1:, 1:-1, 2:-1].copy_(t)
    if order == "one sample for all":
        return t[:1].expand(t.shape)
    if order == "one position for all":
        return t[:, :1].expand(t.shape)
    return t


@settings(
    max_examples=15 if SANITIZED else 60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_shape(backend: Backend, data: Any) -> None:
    number = st.sampled_from([0, 1, 1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 37])
    few = st.sampled_from([0, 1, 1, 1, 2, 2, 3, 3])
    sizes = Sizes(
        data.draw(number), data.draw(number), data.draw(number), data.draw(few),
        data.draw(number), data.draw(few), data.draw(number),
    )  # fmt: skip
    table = data.draw(st.booleans())
    if not table:
        sizes = sizes._replace(taps=1, seen=sizes.positions)
    use = make(sizes, data.draw(st.sampled_from(DTYPES)), backend.device, table)
    orders = st.sampled_from(
        [
            "as it is",
            "positions first",
            "part of a larger tensor",
            "one sample for all",
            "one position for all",
        ]
    )
    grad, input = laid_out(use.grad, data.draw(orders)), laid_out(use.input, data.draw(orders))
    check(use._replace(grad=grad, input=input), data.draw(st.booleans()), backend.native)
