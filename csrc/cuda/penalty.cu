// Penalty value, with its gradient written anew or added to an existing one, in one pass over
// memory. Twin of cpu/penalty.cpp.
#include "launch.h"

namespace mas::cuda {
namespace {

template <class T, class O, Gradient G>
__global__ void penalty_chunks(const Table __grid_constant__ table, State state,
                               const double* grad_output, double* partial) {
  using C = compute_t<T>;
  const std::int64_t c = chunk_number(table);
  const Chunk chunk = chunk_of(table.segments, table.count, c);
  const T* theta = static_cast<const T*>(chunk.segment.x) + chunk.begin;
  T* grad = G == Gradient::none ? nullptr : static_cast<T*>(chunk.segment.y) + chunk.begin;
  const std::int64_t offset = chunk.segment.offset + chunk.begin;
  const O* omega = static_cast<const O*>(state.omega) + offset;
  const C* anchor = static_cast<const C*>(state.anchor) + offset;
  const double upstream = grad_output == nullptr ? 1.0 : *grad_output;

  double value = 0;
  const bool packs = aligned(theta, grad, omega, anchor) && rows_aligned(state, omega, anchor);
  for_each_pack(chunk.size, packs, [&](std::int64_t i, auto lanes) {
    constexpr int N = decltype(lanes)::value;
    const auto x = read<N>(theta + i);
    Pack<T, N> g = {};
    if constexpr (G == Gradient::add) g = read<N>(grad + i);
    C gradient[N] = {};
    for_each_row<N>(state, omega + i, anchor + i, [&](double alpha, auto w, auto a) {
      const C factor = finite_factor<C>(2.0 * alpha * upstream);
      for (int l = 0; l < N; ++l) {
        const auto p = pull<C>(load(w.lane[l]), load(x.lane[l]), a.lane[l]);
        value += alpha * p.value;
        gradient[l] += factor * p.half_gradient;
      }
    });
    if constexpr (G != Gradient::none) {
      for (int l = 0; l < N; ++l) g.lane[l] = store<T>(load(g.lane[l]) + gradient[l]);
      write(grad + i, g);
    }
  });
  value = block_sum(value);
  if (threadIdx.x == 0) partial[c] = value;
}

__global__ void penalty_value(State state, const double* partial, std::int64_t chunks, void* value,
                              DType value_dtype) {
  const double sum = block_sum(partial, chunks) + state.alpha[0] * *state.remainder;
  if (threadIdx.x > 0) return;
  if (value_dtype == DType::float64) *static_cast<double*>(value) = sum;
  if (value_dtype == DType::float32) *static_cast<float*>(value) = static_cast<float>(sum);
}

}  // namespace

void penalty(Segments segments, DType theta, State state, DType omega, Gradient gradient,
             const double* grad_output, double* partial, void* value, DType value_dtype,
             void* stream) {
  with_state(theta, omega, [&](auto t, auto o) {
    with_gradient(gradient, [&](auto g) {
      using T = typename decltype(t)::type;
      using O = typename decltype(o)::type;
      for_each_table(segments, [&](const Table& table, std::int64_t chunks, std::int64_t) {
        launch(penalty_chunks<T, O, decltype(g)::value>, chunks, stream, table, state, grad_output,
               partial);
      });
    });
  });
  launch(penalty_value, 1, stream, state, partial, segments.chunks, value, value_dtype);
}

}  // namespace mas::cuda
