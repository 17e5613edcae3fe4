// omega += weight * abs(grad). Twin of cuda/accumulate.cu.
#include "level.h"

namespace mas::cpu::MAS_LEVEL {
namespace {

template <class C, class T>
void accumulate_chunk(Chunk chunk, C weight) {
  C* omega = static_cast<C*>(chunk.segment.x) + chunk.begin;
  const T* grad = static_cast<const T*>(chunk.segment.y) + chunk.begin;
  in_lanes(chunk.size, [&](std::int64_t i, auto lanes) __attribute__((always_inline)) {
    for (std::int64_t l = 0; l < lanes; ++l) {
      omega[i + l] += weight * std::abs(static_cast<C>(load(grad[i + l])));
    }
  });
}

}  // namespace

void accumulate(Segments segments, DType grad, double weight, int threads) {
  with_float(grad, [&](auto t) {
    using T = typename decltype(t)::type;
    using C = compute_t<T>;
    for_each_chunk(segments, threads, [&](Chunk chunk, std::int64_t) {
      accumulate_chunk<C, T>(chunk, static_cast<C>(weight));
    });
  });
}

}  // namespace mas::cpu::MAS_LEVEL
