// Penalty value, with its gradient written anew or added to an existing one, in one pass over
// memory. Twin of cpu/penalty.cpp.
#include "launch.h"

namespace mas::cuda {
namespace {

template <class T, class O, class A, Gradient G>
__global__ void penalty_chunks(const Table __grid_constant__ table, Penalty args) {
  using C = compute_t<T>;
  const State& state = args.state;
  const Chunk chunk = own_chunk(table);
  const T* theta = static_cast<const T*>(chunk.segment.x) + chunk.begin;
  T* grad = G == Gradient::none ? nullptr : static_cast<T*>(chunk.segment.y) + chunk.begin;
  const std::int64_t offset = chunk.segment.offset + chunk.begin;
  const O* omega = static_cast<const O*>(state.omega) + offset;
  const A* anchor = static_cast<const A*>(state.anchor) + offset;
  const double grad_output = args.grad_output == nullptr ? 1.0 : *args.grad_output;

  double value = 0;
  const bool packs = aligned(theta, grad, omega, anchor) && rows_aligned(state, omega, anchor);
  for_each_pack(chunk.size, packs, [&](std::int64_t i, auto lanes) {
    constexpr int N = decltype(lanes)::value;
    const auto x = read<N>(theta + i);
    Pack<T, N> g = {};
    if constexpr (G == Gradient::add) g = read<N>(grad + i);
    C gradient[N] = {};
    for_each_row<N>(state, omega + i, anchor + i, [&](std::int64_t row, auto w, auto a) {
      const double alpha = state.alpha[row];
      const C factor = finite_factor<C>(2.0 * alpha * grad_output);
      for (int l = 0; l < N; ++l) {
        const auto term = penalty_element<C>(load(w.lane[l]), load(x.lane[l]), load(a.lane[l]));
        value += alpha * term.value;
        gradient[l] += factor * term.half_gradient;
      }
    });
    if constexpr (G != Gradient::none) {
      for (int l = 0; l < N; ++l) g.lane[l] = store<T>(load(g.lane[l]) + gradient[l]);
      write(grad + i, g);
    }
  });
  if (args.value == nullptr) return;
  value = block_sum(value);
  if (threadIdx.x == 0) args.partial[chunk_number(table)] = value;
}

__global__ void penalty_value(Penalty args) {
  const double sum =
      block_sum(args.partial, args.segments.chunks) + args.state.alpha[0] * *args.state.remainder;
  if (threadIdx.x == 0) put_value(args, sum);
}

}  // namespace

void run(const Penalty& args, void* stream) {
  with_gradient(args.gradient, [&](auto g) {
    launch_typed(args, stream, [&](auto t, auto o, auto a) {
      return penalty_chunks<typename decltype(t)::type, typename decltype(o)::type,
                            typename decltype(a)::type, decltype(g)::value>;
    });
  });
  if (args.value != nullptr) launch(penalty_value, 1, stream, args);
}

}  // namespace mas::cuda
