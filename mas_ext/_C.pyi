"""The compiled kernels: integers in, exceptions out. Only mas_ext/kernels/ calls them, after its checks."""

from collections.abc import Sequence

class Layout:
    """Sizes of the tensors of one call and where each one's part of the flat state starts."""

    def __init__(self, sizes: Sequence[int], offsets: Sequence[int]) -> None: ...
    @property
    def chunks(self) -> int: ...

class State:
    """Pointers to the flat state buffers of one group, with the dtypes that go with them."""

    def __init__(
        self,
        theta_dtype: int,
        omega_dtype: int,
        omega: int,
        anchor: int,
        stride: int,
        rows: int,
        alpha: int,
        remainder: int,
    ) -> None: ...

def instruction_set() -> str: ...

# What the CUDA kernels were built for: machine code ("-real"), PTX ("-virtual"), or both. Absent without them.
cuda_architectures: str

class cpu:
    """The kernels; `where` is the number of threads here and the stream in `cuda`."""

    @staticmethod
    def penalty(
        layout: Layout,
        state: State,
        theta: Sequence[int],
        grad: Sequence[int],
        gradient: int,
        grad_output: int,
        partial: int,
        value: int,
        value_dtype: int,
        where: int,
    ) -> None: ...
    @staticmethod
    def proximal(
        layout: Layout,
        state: State,
        theta: Sequence[int],
        second_moment: Sequence[int],
        eta: float,
        correction: float,
        eps: float,
        where: int,
    ) -> None: ...
    @staticmethod
    def sgd(
        layout: Layout,
        theta_dtype: int,
        state: State | None,
        theta: Sequence[int],
        grad: Sequence[int],
        moments: Sequence[Sequence[int]],
        lr: float,
        momentum: float,
        dampening: float,
        decay: float,
        eta: float,
        nesterov: bool,
        first: bool,
        proximal: bool,
        scale: int,
        overflow: int,
        where: int,
    ) -> None: ...
    @staticmethod
    def adamw(
        layout: Layout,
        theta_dtype: int,
        state: State | None,
        theta: Sequence[int],
        grad: Sequence[int],
        moments: Sequence[Sequence[int]],
        steps: Sequence[int],
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        decay: float,
        proximal: bool,
        scale: int,
        overflow: int,
        where: int,
    ) -> None: ...
    @staticmethod
    def accumulate(
        layout: Layout,
        omega: Sequence[int],
        grad: Sequence[int],
        grad_dtype: int,
        weight: float,
        where: int,
    ) -> None: ...
    @staticmethod
    def merge(
        layout: Layout,
        state: State,
        theta: Sequence[int],
        importance: Sequence[int],
        keep: float,
        gain: float,
        anchor: int,
        entry: int,
        partial: int,
        remainder: int,
        where: int,
    ) -> None: ...
    @staticmethod
    def per_sample(
        omega: int,
        grad: int,
        input: int,
        rows: int,
        partial: int,
        sizes: Sequence[int],
        strides: Sequence[int],
        dtype: int,
        splits: int,
        square: bool,
        where: int,
    ) -> None: ...

class cuda(cpu):
    """Absent where the extension was built without nvcc."""
