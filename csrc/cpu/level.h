// What the CPU kernels share. Each kernel file is compiled once per instruction set (MAS_LEVEL
// names it); instruction_set.cpp chooses among them at run time. No inline function of the standard
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

// f(theta's type, omega's type, the anchor's type, a chunk, its number), for kernels with a state.
template <class Kernel, class F>
void for_each_typed_chunk(const Kernel& args, int threads, F f) {
  with_state(args.state, [&](auto theta, auto omega, auto anchor) {
    for_each_chunk(args.segments, threads,
                   [&](auto chunk, std::int64_t c) { f(theta, omega, anchor, chunk, c); });
  });
}

MAS_FN double sum_of(const double (&lanes)[kLanes]) {
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

// So many elements of a chunk stay in the first-level cache, with all that is computed of them.
constexpr std::int64_t kTile = 128;

// The proximal step of a tile of parameters, in place, each with a strength of its own: 2 eta_i
// times the largest alpha. Twin of the one in cuda/launch.h.
template <class O, class A, class C>
MAS_FN void proximal_step(const State& state, double largest, const O* omega, const A* anchor,
                          std::int64_t size, const C* strengths, C* theta) {
  C weight[kTile];
  C distance[kTile];
  for (std::int64_t row = 0; row < state.rows; ++row) {
    const C share = static_cast<C>(relative_alpha(state.alpha[row], largest));
    const O* w = omega + row * state.stride;
    const A* a = anchor + row * state.stride;
    for (std::int64_t i = 0; i < size; ++i) {
      const C own_weight = share * static_cast<C>(load(w[i]));
      const auto target =
          with_task<C>({weight[i], distance[i]}, row == 0, own_weight, load(a[i]) - theta[i]);
      weight[i] = target.weight;
      distance[i] = target.distance;
    }
  }
  for (std::int64_t i = 0; i < size; ++i) {
    theta[i] = proximal_element<C>(theta[i], {weight[i], distance[i]}, strengths[i]);
  }
}

}  // namespace
}  // namespace mas::cpu
