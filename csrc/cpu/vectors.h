// Products of matrices on a CPU: tiles that stay in vector registers, and panels that are packed
// for them. For files that are compiled with fused multiply-add.
#pragma once

#include "level.h"

namespace mas::cpu::MAS_LEVEL {
namespace {

// A tile of the product is kept in registers: kRows outputs by kVectors vectors of columns. As many
// as an instruction set has registers for, and enough to hide the latency of a multiply-add.
#if defined(__AVX512F__)
constexpr int kBytes = 64, kRows = 8, kVectors = 3;
#elif defined(__AVX2__)
constexpr int kBytes = 32, kRows = 4, kVectors = 3;
#else
constexpr int kBytes = 16, kRows = 4, kVectors = 2;
#endif

template <class C>
struct Vector {
  typedef C type __attribute__((vector_size(kBytes), may_alias));
};
template <class C>
constexpr std::int64_t kLane = kBytes / sizeof(C);
template <class C>
constexpr std::int64_t kWidth = kVectors * kLane<C>;

MAS_FN std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// `total` cut into equal parts of at most `most`, in whole units.
struct Cut {
  Cut(std::int64_t total, std::int64_t most, std::int64_t unit)
      : total(total),
        count(quotient_up(total, most)),
        size(quotient_up(quotient_up(total, count), unit) * unit) {}

  std::int64_t begin(std::int64_t part) const { return part * size; }
  std::int64_t size_of(std::int64_t part) const { return least(size, total - begin(part)); }

  std::int64_t total, count, size;
};

template <std::int64_t N>
using Constant = std::integral_constant<std::int64_t, N>;

// Reads all before it writes any, so that the compiler may take vectors, although it can't know
// that the two lie apart.
template <class T, class C, std::int64_t N>
MAS_FN void convert(const T* from, C* to, Constant<N>) {
  C lanes[N];
  for (std::int64_t l = 0; l < N; ++l) lanes[l] = load(from[l]);
  std::memcpy(to, lanes, sizeof(lanes));
}

template <class T, class C>
MAS_FN void convert(const T* from, C* to, std::int64_t count) {
  std::int64_t l = 0;
  for (; l + 16 <= count; l += 16) convert(from + l, to + l, Constant<16>{});
  for (; l + 4 <= count; l += 4) convert(from + l, to + l, Constant<4>{});
  for (; l < count; ++l) to[l] = load(from[l]);
}

// f(r, v) for each vector of a tile, unrolled so that all of them stay in registers.
template <int V, class F>
MAS_FN void in_tile(F f) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) f(r, v);
  }
}

}  // namespace
}  // namespace mas::cpu::MAS_LEVEL
