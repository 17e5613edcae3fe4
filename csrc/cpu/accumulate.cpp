// omega += weight * abs(grad). Twin of cuda/accumulate.cu.
#include "level.h"

namespace mas::cpu::MAS_LEVEL {
namespace {

template <class T>
void accumulate_chunk(Type<T>, Chunk chunk, double weight) {
  using C = compute_t<T>;
  C* omega = static_cast<C*>(chunk.segment.x) + chunk.begin;
  const T* grad = static_cast<const T*>(chunk.segment.y) + chunk.begin;
  const C factor = static_cast<C>(weight);
  in_lanes(chunk.size, [&](std::int64_t i, auto lanes) __attribute__((always_inline)) {
    for (std::int64_t l = 0; l < lanes; ++l) {
      omega[i + l] += factor * std::abs(static_cast<C>(load(grad[i + l])));
    }
  });
}

}  // namespace

void run(const Accumulate& args, int threads) {
  with_float(args.grad_dtype, [&](auto t) {
    for_each_chunk(args.segments, threads,
                   [&](Chunk chunk, std::int64_t) { accumulate_chunk(t, chunk, args.weight); });
  });
}

}  // namespace mas::cpu::MAS_LEVEL
