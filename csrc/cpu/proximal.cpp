// Proximal step: every parameter to the exact minimiser of penalty plus squared distance, in place.
// Twin of cuda/proximal.cu.
#include "level.h"

namespace mas::cpu::MAS_LEVEL {
namespace {

template <class T, class O, class A>
void proximal_chunk(Type<T>, Type<O>, Type<A>, Chunk chunk, const Proximal& args) {
  using C = compute_t<T>;
  const std::int64_t offset = chunk.segment.offset + chunk.begin;
  const O* omega = static_cast<const O*>(args.state.omega) + offset;
  const A* anchor = static_cast<const A*>(args.state.anchor) + offset;
  const double largest = largest_alpha(args.state.alpha, args.state.rows);
  const C strength = finite_factor<C>(2.0 * args.eta * largest);
  const C correction = finite_factor<C>(args.correction);
  const C eps = static_cast<C>(args.eps);

  C value[kTile];
  C strengths[kTile];
  for (std::int64_t start = 0; start < chunk.size; start += kTile) {
    const std::int64_t size = chunk.size - start < kTile ? chunk.size - start : kTile;
    T* theta = static_cast<T*>(chunk.segment.x) + chunk.begin + start;
    for (std::int64_t i = 0; i < size; ++i) {
      value[i] = load(theta[i]);
      strengths[i] = strength;
    }
    if (chunk.segment.y != nullptr) {
      const T* moment = static_cast<const T*>(chunk.segment.y) + chunk.begin + start;
      for (std::int64_t i = 0; i < size; ++i) {
        strengths[i] = divided<C>(strength, adam_divisor<C>(load(moment[i]), correction, eps));
      }
    }
    proximal_step(args.state, largest, omega + start, anchor + start, size, strengths, value);
    for (std::int64_t i = 0; i < size; ++i) theta[i] = store<T>(value[i]);
  }
}

}  // namespace

void run(const Proximal& args, int threads) {
  for_each_typed_chunk(args, threads, [&](auto t, auto o, auto a, Chunk chunk, std::int64_t) {
    proximal_chunk(t, o, a, chunk, args);
  });
}

}  // namespace mas::cpu::MAS_LEVEL
