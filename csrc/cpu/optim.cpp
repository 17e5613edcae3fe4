// Optimizers' steps with the penalty in them, in one pass over memory. Twin of cuda/optim.cu.
#include "level.h"

namespace mas::cpu::MAS_LEVEL {
namespace {

// What is between the gradient and the new parameter stays in the first-level cache.
constexpr std::int64_t kTile = 128;

template <class T, class O, int M, class Rule>
void optimize_chunk(ChunkOf<Trained> chunk, State state, const Rule& rule, bool proximal,
                    double scale, double largest) {
  using C = compute_t<T>;
  const Trained& segment = chunk.segment;
  const bool held = segment.offset >= 0;
  const std::int64_t rows = held ? state.rows : 0;
  const std::int64_t offset = held ? segment.offset + chunk.begin : 0;
  const O* omega = static_cast<const O*>(state.omega) + offset;
  const C* anchor = static_cast<const C*>(state.anchor) + offset;
  const auto step = step_of<C>(rule, segment.step);
  const C unscale = static_cast<C>(1.0 / scale);
  const C strength = finite_factor<C>(2.0 * eta_of(rule) * largest);

  C value[kTile];    // the gradient, then the parameter
  C divisor[kTile];  // then the strength
  C weight[kTile];
  C distance[kTile];
  for (std::int64_t start = 0; start < chunk.size; start += kTile) {
    const std::int64_t size = chunk.size - start < kTile ? chunk.size - start : kTile;
    const std::int64_t begin = chunk.begin + start;
    T* x = static_cast<T*>(segment.theta) + begin;
    const T* grad = static_cast<const T*>(segment.grad) + begin;
    T* first = M > 0 ? static_cast<T*>(segment.moments[0]) + begin : nullptr;
    T* second = M > 1 ? static_cast<T*>(segment.moments[1]) + begin : nullptr;
    T* third = M > 2 ? static_cast<T*>(segment.moments[2]) + begin : nullptr;

    for (std::int64_t i = 0; i < size; ++i) value[i] = unscale * load(grad[i]);
    for (std::int64_t row = 0; row < rows && !proximal; ++row) {
      const C factor = finite_factor<C>(2.0 * state.alpha[row]);
      const O* w = omega + row * state.stride + start;
      const C* a = anchor + row * state.stride + start;
      for (std::int64_t i = 0; i < size; ++i) {
        value[i] += factor * pull<C>(load(w[i]), load(x[i]), a[i]).half_gradient;
      }
    }
#pragma omp simd  // the compiler can't know that the tensors lie apart
    for (std::int64_t i = 0; i < size; ++i) {
      Moments<C> m = {};
      if constexpr (M > 0) m.first = load(first[i]);
      if constexpr (M > 1) m.second = load(second[i]);
      if constexpr (M > 2) m.third = load(third[i]);
      const Moved<C> next = moved<M, C>(step, load(x[i]), value[i], m);
      if constexpr (M > 0) first[i] = store<T>(m.first);
      if constexpr (M > 1) second[i] = store<T>(m.second);
      if constexpr (M > 2) third[i] = store<T>(m.third);
      value[i] = next.theta;
      divisor[i] = next.divisor;
    }
    if (proximal && rows > 0) {
      for (std::int64_t row = 0; row < rows; ++row) {
        const C share = static_cast<C>(relative_alpha(state.alpha[row], largest));
        const O* w = omega + row * state.stride + start;
        const C* a = anchor + row * state.stride + start;
        for (std::int64_t i = 0; i < size; ++i) {
          const C own_weight = share * static_cast<C>(load(w[i]));
          const C own_distance = a[i] - value[i];
          const auto target =
              row == 0 ? Target<C>{own_weight, own_distance}
                       : with_task<C>({weight[i], distance[i]}, own_weight, own_distance);
          weight[i] = target.weight;
          distance[i] = target.distance;
        }
      }
      for (std::int64_t i = 0; i < size; ++i) {
        value[i] = proximal_element<C>(value[i], {weight[i], distance[i]},
                                       divided<C>(strength, divisor[i]));
      }
    }
    for (std::int64_t i = 0; i < size; ++i) x[i] = store<T>(value[i]);
  }
}

template <int M, class Rule>
void optimize(ListOf<Trained> segments, DType theta, State state, DType omega, const Rule& rule,
              Entering entering, int threads) {
  const double largest = largest_alpha(state.alpha, state.rows);
  const double scale = entering.scale == nullptr ? 1.0 : static_cast<double>(*entering.scale);
  with_state(theta, omega, [&](auto t, auto o) {
    for_each_chunk(segments, threads, [&](ChunkOf<Trained> chunk, std::int64_t) {
      optimize_chunk<typename decltype(t)::type, typename decltype(o)::type, M>(
          chunk, state, rule, entering.proximal, scale, largest);
    });
  });
}

bool overflowed(Entering entering) {
  return entering.overflow != nullptr && *entering.overflow != 0.0F;
}

}  // namespace

void adamw(ListOf<Trained> segments, DType theta, State state, DType omega, AdamW rule,
           Entering entering, int threads) {
  if (overflowed(entering)) return;
  for (std::int64_t i = 0; i < segments.count; ++i) *segments.data[i].step += 1.0F;
  const auto run = rule.amsgrad ? optimize<3, AdamW> : optimize<2, AdamW>;
  run(segments, theta, state, omega, rule, entering, threads);
}

void sgd(ListOf<Trained> segments, DType theta, State state, DType omega, Sgd rule,
         Entering entering, int threads) {
  if (overflowed(entering)) return;
  const auto run = rule.momentum == 0.0 ? optimize<0, Sgd> : optimize<1, Sgd>;
  run(segments, theta, state, omega, rule, entering, threads);
}

}  // namespace mas::cpu::MAS_LEVEL
