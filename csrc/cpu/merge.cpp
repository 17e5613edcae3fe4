// The merge of one task's importance into omega, anchor and remainder. Twin of cuda/merge.cu.
#include "level.h"

namespace mas::cpu::MAS_LEVEL {
namespace {

template <class T, class O>
double merge_chunk(Chunk chunk, const State& state, const MergeRule& rule) {
  using C = compute_t<T>;
  const T* theta = static_cast<const T*>(chunk.segment.x) + chunk.begin;
  const C* importance = static_cast<const C*>(chunk.segment.y) + chunk.begin;
  const std::int64_t offset = chunk.segment.offset + chunk.begin;
  O* omega = static_cast<O*>(state.omega) + offset;
  C* anchor = static_cast<C*>(state.anchor) + offset;
  const C keep = static_cast<C>(rule.keep);
  const C gain = finite_factor<C>(rule.gain);
  const bool mean = rule.anchor == Anchor::mean;
  const bool move = rule.anchor == Anchor::move;

  double remainder[kLanes] = {};
  in_lanes(chunk.size, [&](std::int64_t i, auto lanes) __attribute__((always_inline)) {
    for (std::int64_t l = 0; l < lanes; ++l) {
      const auto m =
          merge_element<C>(static_cast<C>(load(omega[i + l])), anchor[i + l], importance[i + l],
                           load(theta[i + l]), keep, gain, mean, move);
      omega[i + l] = store_omega<O>(m.omega, offset + i + l, rule.entry);
      anchor[i + l] = m.anchor;
      remainder[l] += m.remainder;
    }
  });
  double sum = 0;
  for (const double lane : remainder) sum += lane;
  return sum;
}

}  // namespace

void merge(Segments segments, DType theta, State state, DType omega, MergeRule rule,
           double* partial, double* remainder, int threads) {
  with_state(theta, omega, [&](auto t, auto o) {
    for_each_chunk(segments, threads, [&](Chunk chunk, std::int64_t c) {
      partial[c] =
          merge_chunk<typename decltype(t)::type, typename decltype(o)::type>(chunk, state, rule);
    });
  });
  for (std::int64_t s = 0; s < segments.count; ++s) {
    const std::int64_t end =
        s + 1 < segments.count ? segments.data[s + 1].first_chunk : segments.chunks;
    remainder[s] = 0;
    for (std::int64_t c = segments.data[s].first_chunk; c < end; ++c) remainder[s] += partial[c];
  }
}

}  // namespace mas::cpu::MAS_LEVEL
