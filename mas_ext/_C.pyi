"""The compiled kernels: tensors in, exceptions out. They check all that they are called with."""

from collections.abc import Sequence

from torch import Tensor

from mas_ext.kernels.flat_state import State

class OtherStrides(Exception):
    """Tensors lie in memory in another order than the first: to be called again with copies."""

def chunks(theta: Sequence[Tensor]) -> int:
    """How many float64 numbers a sum over these tensors needs as scratch."""

def layout_key(tensors: Sequence[Tensor]) -> bytes | None:
    """Equal for equal dtypes, devices, shapes and strides; None where a tensor has none that can be read."""

def instruction_set() -> str: ...

# So many rows of a weight have their part of a low-rank penalty added up at once.
strip: int

# What the CUDA kernels were built for: machine code ("-real"), PTX ("-virtual"), or both. Absent without them.
cuda_architectures: str

class cpu:
    """The kernels; `where` is the number of threads here and the stream in `cuda`."""

    @staticmethod
    def penalty(
        theta: Sequence[Tensor],
        grad: Sequence[Tensor],
        gradient: int,
        state: State,
        grad_output: Tensor | None,
        scratch: Tensor | None,
        value: Tensor | None,
        where: int,
    ) -> None: ...
    @staticmethod
    def proximal(
        theta: Sequence[Tensor],
        second_moment: Sequence[Tensor] | None,
        state: State,
        eta: float,
        correction: float,
        eps: float,
        where: int,
    ) -> None: ...
    @staticmethod
    def sgd(
        theta: Sequence[Tensor],
        grad: Sequence[Tensor],
        moments: Sequence[tuple[str, Sequence[Tensor]]],
        state: State,
        rules: Sequence[float],
        counts: Sequence[int],
        proximal: bool,
        scale: Tensor | None,
        overflow: Tensor | None,
        where: int,
    ) -> None: ...
    @staticmethod
    def adamw(
        theta: Sequence[Tensor],
        grad: Sequence[Tensor],
        moments: Sequence[tuple[str, Sequence[Tensor]]],
        step: Sequence[Tensor],
        state: State,
        rules: Sequence[float],
        counts: Sequence[int],
        proximal: bool,
        scale: Tensor | None,
        overflow: Tensor | None,
        where: int,
    ) -> None: ...
    @staticmethod
    def accumulate(
        omega: Sequence[Tensor], grad: Sequence[Tensor], weight: float, where: int
    ) -> None: ...
    @staticmethod
    def merge(
        state: State,
        theta: Sequence[Tensor],
        importance: Sequence[Tensor],
        keep: float,
        gain: float,
        moves_anchor: bool,
        entry: int,
        shift: int,
        scratch: Tensor,
        remainder: Tensor,
        where: int,
    ) -> None: ...
    @staticmethod
    def low_rank(
        left: Sequence[Tensor],
        right: Sequence[Tensor],
        left_grad: Sequence[Tensor],
        right_grad: Sequence[Tensor],
        gradient: int,
        omega: Sequence[Tensor],
        unit: Sequence[float],
        counts: Sequence[int],
        scale: Sequence[float],
        anchor_left: Sequence[Tensor],
        anchor_right: Sequence[Tensor],
        anchor_counts: Sequence[int],
        anchor_scale: Sequence[float],
        alpha: Tensor,
        scratch: Tensor,
        value: Tensor,
        where: int,
    ) -> None: ...
    @staticmethod
    def per_sample(
        omega: Tensor,
        grad: Tensor,
        input: Tensor,
        rows: Tensor | None,
        range: tuple[int, int],
        partial: Tensor,
        splits: int,
        square: bool,
        where: int,
    ) -> None: ...

class cuda(cpu):
    """Absent where the extension was built without nvcc."""
