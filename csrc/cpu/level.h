// What the CPU kernels share. Each kernel file is compiled once per instruction set (MAS_LEVEL
// names it); dispatch.cpp chooses among them at run time. No inline function of the standard
// library may be used in such a file: the linker keeps one copy of those, perhaps one that an older
// processor can't run.
#pragma once

#include "../dispatch.h"

namespace mas::cpu {
namespace {

// Elements handled together. The same on every instruction set, and sums are kept lane by lane, so
// that every instruction set gives the same bits.
constexpr std::int64_t kLanes = 16;

// f(i, lanes) over [0, size): whole groups first, with a constant count that the compiler turns
// into vector instructions, then the tail.
template <class F>
MAS_FN void in_lanes(std::int64_t size, F f) {
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) f(i, std::integral_constant<std::int64_t, kLanes>{});
  if (i < size) f(i, size - i);
}

// Starting threads costs more than this many elements of work.
constexpr std::int64_t kSerialElements = 4 * kChunk;

template <class S, class F>
void for_each_chunk(ListOf<S> segments, int threads, F f) {
  std::int64_t elements = 0;
  for (std::int64_t i = 0; i < segments.count; ++i) elements += segments.data[i].size;
  [[maybe_unused]] const int team = elements <= kSerialElements ? 1 : threads;
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (std::int64_t c = 0; c < segments.chunks; ++c) {
    f(chunk_of(segments.data, segments.count, c), c);
  }
}

}  // namespace
}  // namespace mas::cpu
