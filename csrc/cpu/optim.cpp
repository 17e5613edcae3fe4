// Optimizers' steps with the penalty in them, in one pass over memory. Twin of cuda/optim.cu.
#include "level.h"

namespace mas::cpu::MAS_LEVEL {
namespace {

// The penalty's part of a tile, in functions of their own: what optimizers do is then compiled once
// for all dtypes of omega and anchor.
template <class T, class O, class A, class C>
__attribute__((noinline)) void add_gradient(const State& state, const T* theta, const O* omega,
                                            const A* anchor, std::int64_t size, C* gradient) {
  for (std::int64_t row = 0; row < state.rows; ++row) {
    const C factor = finite_factor<C>(2.0 * state.alpha[row]);
    const O* w = omega + row * state.stride;
    const A* a = anchor + row * state.stride;
#pragma omp simd  // the compiler can't know that the tensors lie apart
    for (std::int64_t i = 0; i < size; ++i) {
      gradient[i] +=
          factor * penalty_element<C>(load(w[i]), load(theta[i]), load(a[i])).half_gradient;
    }
  }
}

template <class O, class A, class C>
__attribute__((noinline)) void pull(const State& state, double largest, const O* omega,
                                    const A* anchor, std::int64_t size, const C* strengths,
                                    C* theta) {
  proximal_step(state, largest, omega, anchor, size, strengths, theta);
}

// f(omega, anchor), from an element on.
template <class T, class F>
void with_penalty(const State& state, std::int64_t offset, F f) {
  with_omega<T>(state.omega_dtype, [&](auto o) {
    with_anchor<T>(state, [&](auto a) {
      f(static_cast<const typename decltype(o)::type*>(state.omega) + offset,
        static_cast<const typename decltype(a)::type*>(state.anchor) + offset);
    });
  });
}

// Steps a tile by the gradient(i) of each element; put(i, theta, divisor) takes what it becomes.
// All comes by value, or the compiler would have to think that what is written changes it.
template <int M, class T, class Step, class Gradient, class Put>
void step_tile(const Step step, std::int64_t size, const T* theta, T* first, T* second, T* third,
               Gradient gradient, Put put) {
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) {
    using C = compute_t<T>;
    Moments<C> m = {};
    if constexpr (M > 0) m.first = load(first[i]);
    if constexpr (M > 1) m.second = load(second[i]);
    if constexpr (M > 2) m.third = load(third[i]);
    const Stepped<C> next = step_element<M, C>(step, load(theta[i]), gradient(i), m);
    if constexpr (M > 0) first[i] = store<T>(m.first);
    if constexpr (M > 1) second[i] = store<T>(m.second);
    if constexpr (M > 2) third[i] = store<T>(m.third);
    put(i, next.theta, next.divisor);
  }
}

template <class T, int M, class Rule>
void optimize_chunk(ChunkOf<OptimizerSegment<Rule>> chunk, const OptimizerStep<Rule>& args) {
  using C = compute_t<T>;
  const OptimizerSegment<Rule>& segment = chunk.segment;
  const bool penalized = segment.offset >= 0;
  State state = args.state;
  if (!penalized) state.rows = 0;
  const std::int64_t offset = penalized ? segment.offset + chunk.begin : 0;
  const auto step = step_of<C>(segment.rule, segment.step);
  const C unscale = static_cast<C>(unscale_of(args));
  const double largest = largest_alpha(state.alpha, state.rows);
  const C strength = finite_factor<C>(2.0 * eta_of(segment.rule) * largest);

  C values[kTile];  // gradients, or parameters before their proximal step
  C all_strengths[kTile];
  C* const value = values;
  C* const strengths = all_strengths;
  for (std::int64_t start = 0; start < chunk.size; start += kTile) {
    const std::int64_t size = chunk.size - start < kTile ? chunk.size - start : kTile;
    const std::int64_t begin = chunk.begin + start;
    T* theta = static_cast<T*>(segment.x) + begin;
    const T* grad = static_cast<const T*>(segment.y) + begin;
    T* first = M > 0 ? static_cast<T*>(segment.moments[0]) + begin : nullptr;
    T* second = M > 1 ? static_cast<T*>(segment.moments[1]) + begin : nullptr;
    T* third = M > 2 ? static_cast<T*>(segment.moments[2]) + begin : nullptr;

    const auto step_all = [=](auto gradient, auto put) {
      step_tile<M>(step, size, theta, first, second, third, gradient, put);
    };
    const auto loss_gradient = [=](std::int64_t i) { return unscale * load(grad[i]); };
    const auto put = [=](std::int64_t i, C stepped, C) { theta[i] = store<T>(stepped); };
    if (state.rows == 0) {
      step_all(loss_gradient, put);
    } else if (args.proximal) {
      step_all(loss_gradient, [=](std::int64_t i, C stepped, C divisor) {
        value[i] = stepped;
        strengths[i] = divided<C>(strength, divisor);
      });
      with_penalty<T>(state, offset + start, [&](auto omega, auto anchor) {
        pull(state, largest, omega, anchor, size, strengths, value);
      });
      for (std::int64_t i = 0; i < size; ++i) theta[i] = store<T>(value[i]);
    } else {
      for (std::int64_t i = 0; i < size; ++i) value[i] = loss_gradient(i);
      with_penalty<T>(state, offset + start, [&](auto omega, auto anchor) {
        add_gradient(state, theta, omega, anchor, size, value);
      });
      step_all([=](std::int64_t i) { return value[i]; }, put);
    }
  }
}

template <int M, class Rule>
void optimize(const OptimizerStep<Rule>& args, int threads) {
  with_float(args.state.theta_dtype, [&](auto t) {
    for_each_chunk(args.segments, threads, [&](auto chunk, std::int64_t) {
      optimize_chunk<typename decltype(t)::type, M>(chunk, args);
    });
  });
}

}  // namespace

void run(const OptimizerStep<AdamW>& args, int threads) {
  if (overflowed(args)) return;
  for (std::int64_t i = 0; i < args.segments.count; ++i) *args.segments.data[i].step += 1.0F;
  const auto step = args.moments == 3 ? optimize<3, AdamW> : optimize<2, AdamW>;
  step(args, threads);
}

void run(const OptimizerStep<Sgd>& args, int threads) {
  if (overflowed(args)) return;
  const auto step = args.moments == 0 ? optimize<0, Sgd> : optimize<1, Sgd>;
  step(args, threads);
}

}  // namespace mas::cpu::MAS_LEVEL
