// Proximal step: every parameter to the exact minimiser of penalty plus squared distance, in place.
// Twin of cuda/proximal.cu.
#include "level.h"

namespace mas::cpu::MAS_LEVEL {
namespace {

// What the tasks add up to is gathered in tiles that stay in the first-level cache.
constexpr std::int64_t kTile = 512;

template <class T, class O>
void proximal_chunk(Chunk chunk, const State& state, const StepSize& step, double largest) {
  using C = compute_t<T>;
  T* theta = static_cast<T*>(chunk.segment.x) + chunk.begin;
  const T* moment = static_cast<const T*>(chunk.segment.y);
  const std::int64_t offset = chunk.segment.offset + chunk.begin;
  const O* omega = static_cast<const O*>(state.omega) + offset;
  const C* anchor = static_cast<const C*>(state.anchor) + offset;
  const C strength = finite_factor<C>(2.0 * step.eta * largest);
  const C correction = finite_factor<C>(step.correction);
  const C eps = static_cast<C>(step.eps);

  C weight[kTile];
  C distance[kTile];
  C pull[kTile];
  for (std::int64_t start = 0; start < chunk.size; start += kTile) {
    const std::int64_t size = chunk.size - start < kTile ? chunk.size - start : kTile;
    T* x = theta + start;
    for (std::int64_t row = 0; row < state.rows; ++row) {
      const C share = static_cast<C>(relative_alpha(state.alpha[row], largest));
      const O* w = omega + row * state.stride + start;
      const C* a = anchor + row * state.stride + start;
      for (std::int64_t i = 0; i < size; ++i) {
        const C own_weight = share * static_cast<C>(load(w[i]));
        const C own_distance = a[i] - static_cast<C>(load(x[i]));
        const auto target = row == 0
                                ? Target<C>{own_weight, own_distance}
                                : with_task<C>({weight[i], distance[i]}, own_weight, own_distance);
        weight[i] = target.weight;
        distance[i] = target.distance;
      }
    }
    for (std::int64_t i = 0; i < size; ++i) pull[i] = strength;
    if (moment != nullptr) {
      const T* v = moment + chunk.begin + start;
      for (std::int64_t i = 0; i < size; ++i) {
        pull[i] = adaptive<C>(strength, load(v[i]), correction, eps);
      }
    }
    for (std::int64_t i = 0; i < size; ++i) {
      x[i] = store<T>(proximal_element<C>(load(x[i]), {weight[i], distance[i]}, pull[i]));
    }
  }
}

}  // namespace

void proximal(Segments segments, DType theta, State state, DType omega, StepSize step,
              int threads) {
  const double largest = largest_alpha(state.alpha, state.rows);
  with_state(theta, omega, [&](auto t, auto o) {
    for_each_chunk(segments, threads, [&](Chunk chunk, std::int64_t) {
      proximal_chunk<typename decltype(t)::type, typename decltype(o)::type>(chunk, state, step,
                                                                             largest);
    });
  });
}

}  // namespace mas::cpu::MAS_LEVEL
