"""How the benchmarks measure memory: what is taken of it, what a penalty's state takes, and how fast it is."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch

from mas_ext.penalty import FusedMASPenalty

# Linux counts the peak of a process, and can be told to start anew.
RESET_PEAK, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
M_MMAP_THRESHOLD = -3  # from malloc.h
STREAMING_COPY = """
#include <emmintrin.h>
void copy(float *to, const float *from, long size) {
  for (long i = 0; i < size; i += 4) _mm_stream_ps(to + i, _mm_load_ps(from + i));
  _mm_sfence();
}
"""


def peak(act: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes at once, above those before; a library's own buffers are not among them."""
    if device == "cpu":
        return max(accumulate(changes(act)), default=0)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    act()
    return torch.cuda.max_memory_allocated(device) - before


def changes(act: Callable[[], object]) -> list[int]:
    """Bytes taken on the CPU, and given back (negative), in their order."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        profile_memory=True,
        acc_events=True,  # without it some versions of torch warn
    ) as profile:
        act()
    events = profile.profiler.kineto_results.events()
    found = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return [size for _, size in sorted(found, key=lambda event: event[0])]


def process_peak(prepare: Callable[[], Callable[[], object]]) -> int:
    """The most bytes that this process has while what `prepare` returns runs, above those before.

    The system counts them, so that every library's buffers are among them. To be called in a new process, as
    allocators keep what was freed.
    """
    libc = ctypes.CDLL(None)
    # Freed memory goes back to the system at once, or what is used again would not be seen.
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    act = prepare()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    before = _resident("VmRSS")
    RESET_PEAK.write_text("5")
    act()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    """Bytes now (VmRSS) or at the peak (VmHWM)."""
    (line,) = (x for x in STATUS.read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def storage_bytes(penalty: FusedMASPenalty) -> int:
    """Bytes of all omegas and anchors of a penalty."""
    states = [*penalty.omega.values(), *penalty.anchor.values()]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in states)}
    return sum(storages.values())


def element_bytes(penalty: FusedMASPenalty) -> int:
    """Bytes of one omega and one anchor."""
    states = [*penalty.omega.values(), *penalty.anchor.values()]
    return states[0].element_size() + states[-1].element_size()


def plain_copies(
    size: int, device: str, pool: ThreadPoolExecutor, skipped: dict[str, str]
) -> dict[str, Callable[[], object]]:
    """Copies that read and write `size` bytes in all, on as many threads as torch uses.

    No kernel that reads and writes is faster.
    """
    threads = torch.get_num_threads()
    part = size // 8 // threads // 4 * 4
    # Written to, because untouched pages are all one page, which stays in the cache.
    source, target = (torch.ones(part * threads, device=device) for _ in range(2))
    found: dict[str, Callable[[], object]] = {"Tensor.copy_": partial(target.copy_, source)}
    if device == "cpu":
        try:
            stream = _streaming_copy()
        except (OSError, subprocess.CalledProcessError) as error:
            skipped["streaming copy"] = str(error)
        else:

            def move(i: int) -> None:
                begin = 4 * part * i
                stream(target.data_ptr() + begin, source.data_ptr() + begin, part)

            found["streaming copy"] = lambda: [*pool.map(move, range(threads))]
    return found


def _streaming_copy() -> Callable[[int, int, int], None]:
    """copy(to, from, floats) past the caches, which no library at hand does: compiled here."""
    with tempfile.TemporaryDirectory() as folder:
        library = os.path.join(folder, "copy.so")
        compiler = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-x", "c", "-"]
        subprocess.run(
            [*compiler, "-o", library],
            input=STREAMING_COPY,
            text=True,
            check=True,
            capture_output=True,
        )
        copy = ctypes.CDLL(library).copy
    copy.argtypes, copy.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long), None
    return copy
