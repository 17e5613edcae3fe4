"""Calls that several ranks make together: an error on one rank is an error on all, and none is left waiting.

Whatever ranks exchange comes after an agreement, one small message in which each says that it has come so far.
A rank that fails anywhere takes part in the next agreement, too, and says what happened; there the others raise
a RuntimeError. A call changes what is kept only after its last agreement.
"""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:  # torch may be built without it
    from torch.distributed import ProcessGroup

# How many numbers an agreement has room for, beside the rank that failed.
_NUMBERS = 4


class Agreement:
    """One call of all ranks in a group, as a context manager; without a group, of this rank alone.

    Args:
        call: its name, for messages.
        group: the ranks.
        device: where the group exchanges tensors.
    """

    def __init__(self, call: str, group: ProcessGroup | None, device: torch.device) -> None:
        self._call, self._group, self._device = call, group, device
        # What this rank raises at any later agreement: another one failed, or it has said that it did.
        self._failed: BaseException | None = None
        self._over = group is None
        # A Ctrl-C that waits.
        self._interrupt: Callable[[], Any] | None = None

    def __enter__(self) -> Agreement:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not self._over:
            with suppress(Exception):  # ranks that are gone can't be told
                self._exchange([], f"{type(error).__name__}: {error}")

    def largest(self, *numbers: int) -> list[int]:
        """The largest number of any rank in each place, of at most four.

        Raises:
            RuntimeError: another rank failed.
        """
        self._let_interrupt()
        if self._failed is not None:  # what raised this was caught
            raise self._failed
        if self._over:
            return [*numbers]
        found = self._exchange([*map(int, numbers)])
        if self._failed is not None:
            raise self._failed
        return found[: len(numbers)]

    def settle(self) -> None:
        """The last agreement: what follows on this rank can't fail, or is its own affair."""
        self.largest()
        self._over = True

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """An agreement, after which all ranks exchange something inside.

        Raises:
            RuntimeError: another rank failed.
        """
        with self.uninterrupted():
            self.largest()
            with self._speaking():
                yield

    def gather(self, said: Any) -> list[Any]:
        """What every rank says, by rank."""
        if self._group is None:
            return [said]
        found = [None] * dist.get_world_size(self._group)
        with self.exchanging():
            dist.all_gather_object(found, said, self._group)
        return found

    def said_by(self, rank: int, said: Any) -> Any:
        """What one rank says, to all; directly after an agreement."""
        if self._group is None:
            return said
        told = [said]
        with self._speaking():
            source = dist.get_global_rank(self._group, rank)
            dist.broadcast_object_list(told, source, self._group)
        return told[0]

    def refuse_different(self, describe: Callable[[], Mapping[str, object]]) -> None:
        """Raise a ValueError on every rank unless each describes the same; alone, nothing is described."""
        if self._group is None:
            return
        own = {key: repr(value) for key, value in describe().items()}
        digests = self.gather(hashlib.sha256(repr(sorted(own.items())).encode()).hexdigest())
        if len({*digests}) == 1:
            return
        first, *others = self.gather(own)
        for rank, other in enumerate(others, 1):
            for key in sorted(first.keys() | other.keys()):
                got, expected = (each.get(key, "none") for each in (other, first))
                if got != expected:
                    raise ValueError(
                        f"{key}: got {got} on rank {rank}, expected {expected} as on rank 0"
                    )

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """While it lasts, Ctrl-C waits for the next agreement, or for the end; pressed again it does not.

        Without it, an interruption between an agreement and what is exchanged after it would leave other ranks
        waiting.
        """
        before = signal.getsignal(signal.SIGINT)
        main = threading.current_thread() is threading.main_thread()
        if self._over or not main or not callable(before):
            yield
            return

        def pressed(*args: Any) -> None:
            if self._interrupt is not None:
                before(*args)
            self._interrupt = lambda: before(*args)

        signal.signal(signal.SIGINT, pressed)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            self._let_interrupt()

    def _let_interrupt(self) -> None:
        while self._interrupt is not None:
            interrupt, self._interrupt = self._interrupt, None
            interrupt()

    def _exchange(self, numbers: list[int], failure: str | None = None) -> list[int]:
        assert self._group is not None
        own = 0 if failure is None else dist.get_rank(self._group) + 1
        with self._speaking():
            flags = torch.tensor(
                [*numbers, *[0] * (_NUMBERS - len(numbers)), own], device=self._device
            )
            dist.all_reduce(flags, dist.ReduceOp.MAX, self._group)
            *found, failed = flags.tolist()
        if failed:
            text = self.said_by(failed - 1, failure)
            self._over = True
            self._failed = RuntimeError(f"{self._call}: rank {failed - 1} failed with {text}")
        return found

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """After an error inside there is nobody to agree with."""
        try:
            with quiet():
                yield
        except BaseException as error:
            self._over, self._failed = True, error
            raise


@contextmanager
def quiet() -> Iterator[None]:
    """Torch functions and operators inside are seen by no mode."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield
