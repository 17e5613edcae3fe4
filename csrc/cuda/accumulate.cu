// omega += weight * abs(grad). Twin of cpu/accumulate.cpp.
#include "launch.h"

namespace mas::cuda {
namespace {

template <class T>
__global__ void accumulate_chunks(const Table __grid_constant__ table, double weight) {
  using C = compute_t<T>;
  const Chunk chunk = own_chunk(table);
  C* omega = static_cast<C*>(chunk.segment.x) + chunk.begin;
  const T* grad = static_cast<const T*>(chunk.segment.y) + chunk.begin;
  const C factor = static_cast<C>(weight);
  for_each_pack(chunk.size, aligned(omega, grad), [&](std::int64_t i, auto lanes) {
    constexpr int N = decltype(lanes)::value;
    auto w = read<N>(omega + i);
    const auto g = read<N>(grad + i);
    for (int l = 0; l < N; ++l) w.lane[l] += factor * std::abs(static_cast<C>(load(g.lane[l])));
    write(omega + i, w);
  });
}

}  // namespace

void run(const Accumulate& args, void* stream) {
  with_float(args.grad_dtype, [&](auto t) {
    for_each_table(args.segments, [&](const Table& table, std::int64_t chunks, std::int64_t) {
      launch(accumulate_chunks<typename decltype(t)::type>, chunks, stream, table, args.weight);
    });
  });
}

}  // namespace mas::cuda
