// omega += weight * abs(grad). Twin of cpu/accumulate.cpp.
#include "launch.h"

namespace mas::cuda {
namespace {

template <class C, class T>
__global__ void accumulate_chunks(const Table __grid_constant__ table, C weight) {
  const Chunk chunk = chunk_of(table.segments, table.count, chunk_number(table));
  C* omega = static_cast<C*>(chunk.segment.x) + chunk.begin;
  const T* grad = static_cast<const T*>(chunk.segment.y) + chunk.begin;
  for_each_pack(chunk.size, aligned(omega, grad), [&](std::int64_t i, auto lanes) {
    constexpr int N = decltype(lanes)::value;
    auto w = read<N>(omega + i);
    const auto g = read<N>(grad + i);
    for (int l = 0; l < N; ++l) w.lane[l] += weight * std::abs(static_cast<C>(load(g.lane[l])));
    write(omega + i, w);
  });
}

}  // namespace

void accumulate(Segments segments, DType grad, double weight, void* stream) {
  with_float(grad, [&](auto t) {
    using T = typename decltype(t)::type;
    using C = compute_t<T>;
    for_each_table(segments, [&](const Table& table, std::int64_t chunks, std::int64_t) {
      launch(accumulate_chunks<C, T>, chunks, stream, table, static_cast<C>(weight));
    });
  });
}

}  // namespace mas::cuda
