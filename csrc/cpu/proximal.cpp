// Proximal step: every parameter to the exact minimiser of penalty plus squared distance, in place.
// Twin of cuda/proximal.cu.
#include "level.h"

namespace mas::cpu::MAS_LEVEL {
namespace {

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

  in_lanes(chunk.size, [&](std::int64_t i, auto lanes) __attribute__((always_inline)) {
    Target<C> target[kLanes] = {};
    for (std::int64_t row = 0; row < state.rows; ++row) {
      const C share = static_cast<C>(relative_alpha(state.alpha[row], largest));
      const std::int64_t at = row * state.stride + i;
      for (std::int64_t l = 0; l < lanes; ++l) {
        target[l] = with_task<C>(target[l], share * static_cast<C>(load(omega[at + l])),
                                 load(theta[i + l]), anchor[at + l]);
      }
    }
    for (std::int64_t l = 0; l < lanes; ++l) {
      const C pull = moment == nullptr ? strength
                                       : adaptive<C>(strength, load(moment[chunk.begin + i + l]),
                                                     correction, eps);
      theta[i + l] = store<T>(proximal_element<C>(load(theta[i + l]), target[l], pull));
    }
  });
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
