// The merge of one task's importance into omega, anchor and remainder. Twin of cpu/merge.cpp.
#include "launch.h"

namespace mas::cuda {
namespace {

template <class T, class O>
__global__ void merge_chunks(const Table __grid_constant__ table, State state, MergeRule rule,
                             double* partial) {
  using C = compute_t<T>;
  const std::int64_t c = chunk_number(table);
  const Chunk chunk = chunk_of(table.segments, table.count, c);
  const T* theta = static_cast<const T*>(chunk.segment.x) + chunk.begin;
  const C* importance = static_cast<const C*>(chunk.segment.y) + chunk.begin;
  const std::int64_t offset = chunk.segment.offset + chunk.begin;
  O* omega = static_cast<O*>(state.omega) + offset;
  C* anchor = static_cast<C*>(state.anchor) + offset;
  const C keep = static_cast<C>(rule.keep);
  const C gain = finite_factor<C>(rule.gain);
  const bool mean = rule.anchor == Anchor::mean;
  const bool move = rule.anchor == Anchor::move;

  double remainder = 0;
  const bool packs = aligned(theta, importance, omega, anchor);
  for_each_pack(chunk.size, packs, [&](std::int64_t i, auto lanes) {
    constexpr int N = decltype(lanes)::value;
    const auto x = read<N>(theta + i);
    const auto y = read<N>(importance + i);
    auto w = read<N>(omega + i);
    auto a = read<N>(anchor + i);
    for (int l = 0; l < N; ++l) {
      const auto m = merge_element<C>(static_cast<C>(load(w.lane[l])), a.lane[l], y.lane[l],
                                      load(x.lane[l]), keep, gain, mean, move);
      w.lane[l] = store_omega<O>(m.omega, offset + i + l, rule.entry);
      a.lane[l] = m.anchor;
      remainder += m.remainder;
    }
    write(omega + i, w);
    write(anchor + i, a);
  });
  remainder = block_sum(remainder);
  if (threadIdx.x == 0) partial[c] = remainder;
}

// One block for each segment of the table.
__global__ void merge_remainders(const Table __grid_constant__ table, const double* partial,
                                 double* remainder) {
  const Segment& segment = table.segments[blockIdx.x];
  const std::int64_t chunks = (segment.size + kChunk - 1) / kChunk;
  const double sum = block_sum(partial + segment.first_chunk, chunks);
  if (threadIdx.x == 0) remainder[blockIdx.x] = sum;
}

}  // namespace

void merge(Segments segments, DType theta, State state, DType omega, MergeRule rule,
           double* partial, double* remainder, void* stream) {
  for_each_table(segments, [&](const Table& table, std::int64_t chunks, std::int64_t first) {
    with_state(theta, omega, [&](auto t, auto o) {
      using T = typename decltype(t)::type;
      using O = typename decltype(o)::type;
      launch(merge_chunks<T, O>, chunks, stream, table, state, rule, partial);
    });
    launch(merge_remainders, table.count, stream, table, partial, remainder + first);
  });
}

}  // namespace mas::cuda
