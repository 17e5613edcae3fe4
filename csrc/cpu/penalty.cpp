// Penalty value, with its gradient written anew or added to an existing one, in one pass over
// memory. Twin of cuda/penalty.cu.
#include "level.h"

namespace mas::cpu::MAS_LEVEL {
namespace {

template <Gradient G, class T>
MAS_FN void put(T& grad, compute_t<T> change) {
  if constexpr (G == Gradient::write) grad = store<T>(change);
  if constexpr (G == Gradient::add) grad = store<T>(load(grad) + change);
}

// One task's part on some elements: its value is added lane by lane, its gradient goes to use(i,
// gradient).
template <class T, class O, class C, class Use>
MAS_FN void pull_of_task(double alpha, double grad_output, const T* theta, const O* omega,
                         const C* anchor, std::int64_t size, double* value, Use use) {
  const C factor = finite_factor<C>(2.0 * alpha * grad_output);
  in_lanes(size, [&](std::int64_t i, auto lanes) __attribute__((always_inline)) {
#pragma omp simd  // the compiler can't know that gradients lie apart from what is read
    for (std::int64_t l = 0; l < lanes; ++l) {
      const auto p = pull<C>(load(omega[i + l]), load(theta[i + l]), anchor[i + l]);
      value[l] += alpha * p.value;
      use(i + l, factor * p.half_gradient);
    }
  });
}

// Gradients of several tasks are gathered in a tile that stays in the first-level cache.
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
  if (state.rows == 1) {
    pull_of_task<T, O, C>(state.alpha[0], grad_output, theta, omega, anchor, chunk.size, value,
                          [&](std::int64_t i, C change) __attribute__((always_inline)) {
                            if constexpr (G != Gradient::none) put<G>(grad[i], change);
                          });
  } else {
    for (std::int64_t start = 0; start < chunk.size; start += kTile) {
      const std::int64_t size = chunk.size - start < kTile ? chunk.size - start : kTile;
      C gradient[kTile] = {};
      for (std::int64_t row = 0; row < state.rows; ++row) {
        const std::int64_t at = row * state.stride + start;
        pull_of_task<T, O, C>(state.alpha[row], grad_output, theta + start, omega + at, anchor + at,
                              size, value,
                              [&](std::int64_t i, C change) __attribute__((always_inline)) {
                                if constexpr (G != Gradient::none) gradient[i] += change;
                              });
      }
      if constexpr (G != Gradient::none) {
        for (std::int64_t i = 0; i < size; ++i) put<G>(grad[start + i], gradient[i]);
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
