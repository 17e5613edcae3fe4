// Proximal step: every parameter to the exact minimiser of penalty plus squared distance, in place.
// Twin of cpu/proximal.cpp.
#include "launch.h"

namespace mas::cuda {
namespace {

template <class T, class O, class A>
__global__ void proximal_chunks(const Table __grid_constant__ table, Proximal args) {
  using C = compute_t<T>;
  const State& state = args.state;
  const Chunk chunk = own_chunk(table);
  T* theta = static_cast<T*>(chunk.segment.x) + chunk.begin;
  const T* moment = static_cast<const T*>(chunk.segment.y);
  if (moment != nullptr) moment += chunk.begin;
  const std::int64_t offset = chunk.segment.offset + chunk.begin;
  const O* omega = static_cast<const O*>(state.omega) + offset;
  const A* anchor = static_cast<const A*>(state.anchor) + offset;
  const double largest = largest_alpha(state.alpha, state.rows);
  const C strength = finite_factor<C>(2.0 * args.eta * largest);
  const C correction = finite_factor<C>(args.correction);
  const C eps = static_cast<C>(args.eps);

  const bool packs = aligned(theta, moment, omega, anchor) && rows_aligned(state, omega, anchor);
  for_each_pack(chunk.size, packs, [&](std::int64_t i, auto lanes) {
    constexpr int N = decltype(lanes)::value;
    auto x = read<N>(theta + i);
    Pack<T, N> v = {};
    if (moment != nullptr) v = read<N>(moment + i);
    C value[N];
    C strengths[N];
    for (int l = 0; l < N; ++l) {
      value[l] = load(x.lane[l]);
      strengths[l] = moment == nullptr
                         ? strength
                         : divided<C>(strength, adam_divisor<C>(load(v.lane[l]), correction, eps));
    }
    proximal_step(state, largest, omega + i, anchor + i, strengths, value);
    for (int l = 0; l < N; ++l) x.lane[l] = store<T>(value[l]);
    write(theta + i, x);
  });
}

}  // namespace

void run(const Proximal& args, void* stream) {
  launch_typed(args, stream, [](auto t, auto o, auto a) {
    return proximal_chunks<typename decltype(t)::type, typename decltype(o)::type,
                           typename decltype(a)::type>;
  });
}

}  // namespace mas::cuda
