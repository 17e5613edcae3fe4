// Penalty value, with its gradient written anew or added to an existing one, in one pass over
// memory. Twin of cuda/penalty.cu.
#include "level.h"

namespace mas::cpu::MAS_LEVEL {
namespace {

// Gradients are gathered in a tile that stays in the first-level cache while the tasks pass by.
constexpr std::int64_t kTile = 512;

template <class T, class O, Gradient G>
double penalty_chunk(Chunk chunk, const State& state, double grad_output) {
  using C = compute_t<T>;
  const T* theta = static_cast<const T*>(chunk.segment.x) + chunk.begin;
  T* grad = G == Gradient::none ? nullptr : static_cast<T*>(chunk.segment.y) + chunk.begin;
  const std::int64_t offset = chunk.segment.offset + chunk.begin;
  const O* omega = static_cast<const O*>(state.omega) + offset;
  const C* anchor = static_cast<const C*>(state.anchor) + offset;

  double value[kLanes] = {};
  C half[kTile];
  C gradient[kTile];
  for (std::int64_t start = 0; start < chunk.size; start += kTile) {
    const std::int64_t size = chunk.size - start < kTile ? chunk.size - start : kTile;
    for (std::int64_t row = 0; row < state.rows; ++row) {
      const T* x = theta + start;
      const O* w = omega + row * state.stride + start;
      const C* a = anchor + row * state.stride + start;
      const double alpha = state.alpha[row];
      const C factor = finite_factor<C>(2.0 * alpha * grad_output);
      in_lanes(size, [&](std::int64_t i, auto lanes) __attribute__((always_inline)) {
        for (std::int64_t l = 0; l < lanes; ++l) {
          const auto p = pull<C>(load(w[i + l]), load(x[i + l]), a[i + l]);
          value[l] += alpha * p.value;
          if constexpr (G != Gradient::none) half[i + l] = p.half_gradient;
        }
      });
      if constexpr (G != Gradient::none) {
        if (row == 0) {
          for (std::int64_t i = 0; i < size; ++i) gradient[i] = factor * half[i];
        } else {
          for (std::int64_t i = 0; i < size; ++i) gradient[i] += factor * half[i];
        }
      }
    }
    if constexpr (G != Gradient::none) {
      T* g = grad + start;
      for (std::int64_t i = 0; i < size; ++i) {
        const C before = G == Gradient::add ? load(g[i]) : C(0);
        g[i] = store<T>(before + gradient[i]);
      }
    }
  }
  double sum = 0;
  for (const double lane : value) sum += lane;
  return sum;
}

}  // namespace

void penalty(Segments segments, DType theta, State state, DType omega, Gradient gradient,
             const double* grad_output, double* partial, void* value, DType value_dtype,
             int threads) {
  const double upstream = grad_output == nullptr ? 1.0 : *grad_output;
  with_state(theta, omega, [&](auto t, auto o) {
    with_gradient(gradient, [&](auto g) {
      for_each_chunk(segments, threads, [&](Chunk chunk, std::int64_t c) {
        partial[c] = penalty_chunk<typename decltype(t)::type, typename decltype(o)::type, g()>(
            chunk, state, upstream);
      });
    });
  });
  double sum = state.alpha[0] * *state.remainder;
  for (std::int64_t c = 0; c < segments.chunks; ++c) sum += partial[c];
  if (value_dtype == DType::float64) *static_cast<double*>(value) = sum;
  if (value_dtype == DType::float32) *static_cast<float*>(value) = static_cast<float>(sum);
}

}  // namespace mas::cpu::MAS_LEVEL
