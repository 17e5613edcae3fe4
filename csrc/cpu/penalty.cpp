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

// One task's part on some elements: its value is added lane by lane, its gradient goes to
// receive(i, gradient).
template <class C, class T, class O, class A, class Receive>
MAS_FN void add_task(double alpha, double grad_output, const T* theta, const O* omega,
                     const A* anchor, std::int64_t size, double* value, Receive receive) {
  const C factor = finite_factor<C>(2.0 * alpha * grad_output);
  in_lanes(size, [&](std::int64_t i, auto lanes) __attribute__((always_inline)) {
#pragma omp simd  // the compiler can't know that gradients lie apart from what is read
    for (std::int64_t l = 0; l < lanes; ++l) {
      const auto term =
          penalty_element<C>(load(omega[i + l]), load(theta[i + l]), load(anchor[i + l]));
      value[l] += alpha * term.value;
      receive(i + l, factor * term.half_gradient);
    }
  });
}

// Gradients of several tasks are gathered in a tile that stays in the first-level cache. Values are
// added up tile by tile: another size would give other bits.
constexpr std::int64_t kGradientTile = 512;

template <class T, class O, class A, Gradient G>
double penalty_chunk(Type<T>, Type<O>, Type<A>, std::integral_constant<Gradient, G>, Chunk chunk,
                     const Penalty& args) {
  using C = compute_t<T>;
  const State& state = args.state;
  const double grad_output = args.grad_output == nullptr ? 1.0 : *args.grad_output;
  const T* theta = static_cast<const T*>(chunk.segment.x) + chunk.begin;
  T* grad = G == Gradient::none ? nullptr : static_cast<T*>(chunk.segment.y) + chunk.begin;
  const std::int64_t offset = chunk.segment.offset + chunk.begin;
  const O* omega = static_cast<const O*>(state.omega) + offset;
  const A* anchor = static_cast<const A*>(state.anchor) + offset;

  double value[kLanes] = {};
  if (state.rows == 1) {
    add_task<C>(state.alpha[0], grad_output, theta, omega, anchor, chunk.size, value,
                [&](std::int64_t i, C change) __attribute__((always_inline)) {
                  if constexpr (G != Gradient::none) put<G>(grad[i], change);
                });
    return sum_of(value);
  }
  for (std::int64_t start = 0; start < chunk.size; start += kGradientTile) {
    const std::int64_t left = chunk.size - start;
    const std::int64_t size = left < kGradientTile ? left : kGradientTile;
    C gradient[kGradientTile] = {};
    for (std::int64_t row = 0; row < state.rows; ++row) {
      const std::int64_t at = row * state.stride + start;
      add_task<C>(state.alpha[row], grad_output, theta + start, omega + at, anchor + at, size,
                  value, [&](std::int64_t i, C change) __attribute__((always_inline)) {
                    if constexpr (G != Gradient::none) gradient[i] += change;
                  });
    }
    if constexpr (G != Gradient::none) {
      for (std::int64_t i = 0; i < size; ++i) put<G>(grad[start + i], gradient[i]);
    }
  }
  return sum_of(value);
}

}  // namespace

void run(const Penalty& args, int threads) {
  with_gradient(args.gradient, [&](auto g) {
    for_each_typed_chunk(args, threads, [&](auto t, auto o, auto a, Chunk chunk, std::int64_t c) {
      const double value = penalty_chunk(t, o, a, g, chunk, args);
      if (args.value != nullptr) args.partial[c] = value;
    });
  });
  if (args.value == nullptr) return;
  double sum = args.state.alpha[0] * *args.state.remainder;
  for (std::int64_t c = 0; c < args.segments.chunks; ++c) sum += args.partial[c];
  put_value(args, sum);
}

}  // namespace mas::cpu::MAS_LEVEL
