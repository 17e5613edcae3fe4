// The merge of one task's importance into omega, anchor and remainder. Twin of cuda/merge.cu.
#include "level.h"

namespace mas::cpu::MAS_LEVEL {
namespace {

template <class T, class O, class A>
double merge_chunk(Type<T>, Type<O>, Type<A>, Chunk chunk, const Merge& args) {
  using C = compute_t<T>;
  const T* theta = static_cast<const T*>(chunk.segment.x) + chunk.begin;
  const C* importance = static_cast<const C*>(chunk.segment.y) + chunk.begin;
  const std::int64_t offset = chunk.segment.offset + chunk.begin;
  O* omega = static_cast<O*>(args.state.omega) + offset;
  A* anchor = static_cast<A*>(args.state.anchor) + offset;
  const C keep = static_cast<C>(args.keep);
  const C gain = finite_factor<C>(args.gain);

  double remainder[kLanes] = {};
  in_lanes(chunk.size, [&](std::int64_t i, auto lanes) __attribute__((always_inline)) {
    for (std::int64_t l = 0; l < lanes; ++l) {
      const auto m =
          merge_element<C>(static_cast<C>(load(omega[i + l])), load(anchor[i + l]),
                           importance[i + l], load(theta[i + l]), keep, gain, args.moves_anchor);
      omega[i + l] = store_omega<O>(m.omega, args.shift + offset + i + l, args.entry);
      anchor[i + l] = store<A>(m.anchor);
      remainder[l] += m.remainder;
    }
  });
  return sum_of(remainder);
}

}  // namespace

void run(const Merge& args, int threads) {
  for_each_typed_chunk(args, threads, [&](auto t, auto o, auto a, Chunk chunk, std::int64_t c) {
    args.partial[c] = merge_chunk(t, o, a, chunk, args);
  });
  const Segments& segments = args.segments;
  for (std::int64_t s = 0; s < segments.count; ++s) {
    const std::int64_t end =
        s + 1 < segments.count ? segments.data[s + 1].first_chunk : segments.chunks;
    double sum = 0;
    for (std::int64_t c = segments.data[s].first_chunk; c < end; ++c) sum += args.partial[c];
    args.remainder[s] = sum;
  }
}

}  // namespace mas::cpu::MAS_LEVEL
