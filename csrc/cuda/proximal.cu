// Proximal step: every parameter to the exact minimiser of penalty plus squared distance, in place.
// Twin of cpu/proximal.cpp.
#include "launch.h"

namespace mas::cuda {
namespace {

template <class T, class O>
__global__ void proximal_chunks(const Table __grid_constant__ table, State state, StepSize step) {
  using C = compute_t<T>;
  const Chunk chunk = chunk_of(table.segments, table.count, chunk_number(table));
  T* theta = static_cast<T*>(chunk.segment.x) + chunk.begin;
  const T* moment = static_cast<const T*>(chunk.segment.y);
  if (moment != nullptr) moment += chunk.begin;
  const std::int64_t offset = chunk.segment.offset + chunk.begin;
  const O* omega = static_cast<const O*>(state.omega) + offset;
  const C* anchor = static_cast<const C*>(state.anchor) + offset;
  const double largest = largest_alpha(state.alpha, state.rows);
  const C strength = finite_factor<C>(2.0 * step.eta * largest);
  const C correction = finite_factor<C>(step.correction);
  const C eps = static_cast<C>(step.eps);

  const bool packs = aligned(theta, moment, omega, anchor) && rows_aligned(state, omega, anchor);
  for_each_pack(chunk.size, packs, [&](std::int64_t i, auto lanes) {
    constexpr int N = decltype(lanes)::value;
    auto x = read<N>(theta + i);
    Pack<T, N> v = {};
    if (moment != nullptr) v = read<N>(moment + i);
    Target<C> target[N] = {};
    bool first = true;
    for_each_row<N>(state, omega + i, anchor + i, [&](double alpha, auto w, auto a) {
      const C share = static_cast<C>(relative_alpha(alpha, largest));
      for (int l = 0; l < N; ++l) {
        const C weight = share * static_cast<C>(load(w.lane[l]));
        const C distance = a.lane[l] - static_cast<C>(load(x.lane[l]));
        target[l] = first ? Target<C>{weight, distance} : with_task<C>(target[l], weight, distance);
      }
      first = false;
    });
    for (int l = 0; l < N; ++l) {
      const C pull =
          moment == nullptr ? strength : adaptive<C>(strength, load(v.lane[l]), correction, eps);
      x.lane[l] = store<T>(proximal_element<C>(load(x.lane[l]), target[l], pull));
    }
    write(theta + i, x);
  });
}

}  // namespace

void proximal(Segments segments, DType theta, State state, DType omega, StepSize step,
              void* stream) {
  with_state(theta, omega, [&](auto t, auto o) {
    using T = typename decltype(t)::type;
    using O = typename decltype(o)::type;
    for_each_table(segments, [&](const Table& table, std::int64_t chunks, std::int64_t) {
      launch(proximal_chunks<T, O>, chunks, stream, table, state, step);
    });
  });
}

}  // namespace mas::cuda
