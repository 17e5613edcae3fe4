// Optimizers' steps with the penalty in them, in one pass over memory. Twin of cuda/optim.cu.
#include "level.h"

namespace mas::cpu::MAS_LEVEL {
namespace {

template <class T, class O, int M, class Rule>
void optimize_chunk(ChunkOf<OptimizerSegment> chunk, const OptimizerStep<Rule>& args) {
  using C = compute_t<T>;
  const OptimizerSegment& segment = chunk.segment;
  const bool penalized = segment.offset >= 0;
  State state = args.state;
  if (!penalized) state.rows = 0;
  const std::int64_t offset = penalized ? segment.offset + chunk.begin : 0;
  const O* omega = static_cast<const O*>(state.omega) + offset;
  const C* anchor = static_cast<const C*>(state.anchor) + offset;
  const auto step = step_of<C>(args.rule, segment.step);
  const C unscale = static_cast<C>(unscale_of(args));
  const double largest = largest_alpha(state.alpha, state.rows);
  const C strength = finite_factor<C>(2.0 * eta_of(args.rule) * largest);

  C value[kTile];  // the gradient, then the parameter
  C divisor[kTile];
  for (std::int64_t start = 0; start < chunk.size; start += kTile) {
    const std::int64_t size = chunk.size - start < kTile ? chunk.size - start : kTile;
    const std::int64_t begin = chunk.begin + start;
    T* theta = static_cast<T*>(segment.x) + begin;
    const T* grad = static_cast<const T*>(segment.y) + begin;
    T* first = M > 0 ? static_cast<T*>(segment.moments[0]) + begin : nullptr;
    T* second = M > 1 ? static_cast<T*>(segment.moments[1]) + begin : nullptr;
    T* third = M > 2 ? static_cast<T*>(segment.moments[2]) + begin : nullptr;

    for (std::int64_t i = 0; i < size; ++i) value[i] = unscale * load(grad[i]);
    for (std::int64_t row = 0; row < state.rows && !args.proximal; ++row) {
      const C factor = finite_factor<C>(2.0 * state.alpha[row]);
      const O* w = omega + row * state.stride + start;
      const C* a = anchor + row * state.stride + start;
      for (std::int64_t i = 0; i < size; ++i) {
        value[i] += factor * penalty_element<C>(load(w[i]), load(theta[i]), a[i]).half_gradient;
      }
    }
#pragma omp simd  // the compiler can't know that the tensors lie apart
    for (std::int64_t i = 0; i < size; ++i) {
      Moments<C> m = {};
      if constexpr (M > 0) m.first = load(first[i]);
      if constexpr (M > 1) m.second = load(second[i]);
      if constexpr (M > 2) m.third = load(third[i]);
      const Stepped<C> next = step_element<M, C>(step, load(theta[i]), value[i], m);
      if constexpr (M > 0) first[i] = store<T>(m.first);
      if constexpr (M > 1) second[i] = store<T>(m.second);
      if constexpr (M > 2) third[i] = store<T>(m.third);
      value[i] = next.theta;
      divisor[i] = next.divisor;
    }
    if (args.proximal && state.rows > 0) {
      C strengths[kTile];
      for (std::int64_t i = 0; i < size; ++i) strengths[i] = divided<C>(strength, divisor[i]);
      proximal_step(state, largest, omega + start, anchor + start, size, strengths, value);
    }
    for (std::int64_t i = 0; i < size; ++i) theta[i] = store<T>(value[i]);
  }
}

template <int M, class Rule>
void optimize(const OptimizerStep<Rule>& args, int threads) {
  for_each_typed_chunk(args, threads, [&](auto t, auto o, auto chunk, std::int64_t) {
    optimize_chunk<typename decltype(t)::type, typename decltype(o)::type, M>(chunk, args);
  });
}

}  // namespace

void run(const OptimizerStep<AdamW>& args, int threads) {
  if (overflowed(args)) return;
  for (std::int64_t i = 0; i < args.segments.count; ++i) *args.segments.data[i].step += 1.0F;
  const auto step = args.rule.amsgrad ? optimize<3, AdamW> : optimize<2, AdamW>;
  step(args, threads);
}

void run(const OptimizerStep<Sgd>& args, int threads) {
  if (overflowed(args)) return;
  const auto step = args.rule.momentum == 0.0 ? optimize<0, Sgd> : optimize<1, Sgd>;
  step(args, threads);
}

}  // namespace mas::cpu::MAS_LEVEL
