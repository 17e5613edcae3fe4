// The merge of one task's importance into omega, anchor and remainder. Twin of cpu/merge.cpp.
#include "launch.h"

namespace mas::cuda {
namespace {

template <class T, class O, class A>
__global__ void merge_chunks(const Table __grid_constant__ table, Merge args) {
  using C = compute_t<T>;
  const Chunk chunk = own_chunk(table);
  const T* theta = static_cast<const T*>(chunk.segment.x) + chunk.begin;
  const C* importance = static_cast<const C*>(chunk.segment.y) + chunk.begin;
  const std::int64_t offset = chunk.segment.offset + chunk.begin;
  O* omega = static_cast<O*>(args.state.omega) + offset;
  A* anchor = static_cast<A*>(args.state.anchor) + offset;
  const C keep = static_cast<C>(args.keep);
  const C gain = finite_factor<C>(args.gain);

  double remainder = 0;
  const bool packs = aligned(theta, importance, omega, anchor);
  for_each_pack(chunk.size, packs, [&](std::int64_t i, auto lanes) {
    constexpr int N = decltype(lanes)::value;
    const auto x = read<N>(theta + i);
    const auto y = read<N>(importance + i);
    auto w = read<N>(omega + i);
    auto a = read<N>(anchor + i);
    for (int l = 0; l < N; ++l) {
      const auto m = merge_element<C>(static_cast<C>(load(w.lane[l])), load(a.lane[l]), y.lane[l],
                                      load(x.lane[l]), keep, gain, args.moves_anchor);
      w.lane[l] = store_omega<O>(m.omega, args.shift + offset + i + l, args.entry);
      a.lane[l] = store<A>(m.anchor);
      remainder += m.remainder;
    }
    write(omega + i, w);
    write(anchor + i, a);
  });
  remainder = block_sum(remainder);
  if (threadIdx.x == 0) args.partial[chunk_number(table)] = remainder;
}

// One block for each segment of the table.
__global__ void merge_remainders(const Table __grid_constant__ table, const double* partial,
                                 double* remainder) {
  const Segment& segment = table.segments[blockIdx.x];
  const std::int64_t chunks = quotient_up(segment.size, kChunk);
  const double sum = block_sum(partial + segment.first_chunk, chunks);
  if (threadIdx.x == 0) remainder[blockIdx.x] = sum;
}

}  // namespace

void run(const Merge& args, void* stream) {
  launch_typed(args, stream, [](auto t, auto o, auto a) {
    return merge_chunks<typename decltype(t)::type, typename decltype(o)::type,
                        typename decltype(a)::type>;
  });
  for_each_table(args.segments, [&](const Table& table, std::int64_t, std::int64_t first) {
    launch(merge_remainders, table.count, stream, table, args.partial, args.remainder + first);
  });
}

}  // namespace mas::cuda
