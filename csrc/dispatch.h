// What a kernel's arguments mean, for both devices: dtypes as template arguments (the bindings have
// refused every other combination, so nothing falls through), chunks of tensors, parts of a batch.
#pragma once

#include "elementwise.h"
#include "kernels.h"

namespace mas {
namespace {

template <class T>
struct Type {
  using type = T;
};

template <class F>
void with_float(DType dtype, F f) {
  if (dtype == DType::float32) f(Type<float>{});
  if (dtype == DType::float64) f(Type<double>{});
  if (dtype == DType::bfloat16) f(Type<bfloat16>{});
  if (dtype == DType::float16) f(Type<float16>{});
}

// f(omega's type) beside a theta of type T: float32, bfloat16 or float8, or float64 beside float64.
template <class T, class F>
void with_omega(DType omega, F f) {
  if (omega == DType::float32) f(Type<float>{});
  if (omega == DType::bfloat16) f(Type<bfloat16>{});
  if (omega == DType::float8) f(Type<float8>{});
  if constexpr (std::is_same_v<T, double>) {
    if (omega == DType::float64) f(Type<double>{});
  }
}

// f(the anchor's type) beside a theta of type T: that of its arithmetic, or T itself.
template <class T, class F>
void with_anchor(const State& state, F f) {
  if (state.anchor_dtype == state.theta_dtype) f(Type<T>{});
  if constexpr (!std::is_same_v<T, compute_t<T>>) {
    if (state.anchor_dtype == DType::float32) f(Type<float>{});
  }
}

// f(theta's type, omega's type, the anchor's type).
template <class F>
void with_state(const State& state, F f) {
  with_float(state.theta_dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    with_omega<T>(state.omega_dtype,
                  [&](auto o) { with_anchor<T>(state, [&](auto a) { f(t, o, a); }); });
  });
}

template <class F>
void with_gradient(Gradient gradient, F f) {
  if (gradient == Gradient::none) f(std::integral_constant<Gradient, Gradient::none>{});
  if (gradient == Gradient::write) f(std::integral_constant<Gradient, Gradient::write>{});
  if (gradient == Gradient::add) f(std::integral_constant<Gradient, Gradient::add>{});
}

// The segment that holds a chunk: the last one whose first chunk is not behind it. Empty tensors
// own no chunk and share the number of their successor, so they are never found.
template <class S>
MAS_FN const S& segment_of(const S* segments, std::int64_t count, std::int64_t chunk) {
  std::int64_t low = 0;
  std::int64_t high = count;
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    if (segments[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return segments[low];
}

// One chunk: `size` elements from `begin` on within its segment.
template <class S>
struct ChunkOf {
  const S& segment;
  std::int64_t begin;
  std::int64_t size;
};

using Chunk = ChunkOf<Segment>;

template <class S>
MAS_FN ChunkOf<S> chunk_of(const S* segments, std::int64_t count, std::int64_t chunk) {
  const S& segment = segment_of(segments, count, chunk);
  const std::int64_t begin = (chunk - segment.first_chunk) * kChunk;
  const std::int64_t left = segment.size - begin;
  return {segment, begin, left < kChunk ? left : kChunk};
}

template <class Kernel>
MAS_FN void put_value(const Kernel& args, double value) {
  if (args.value_dtype == DType::float64) *static_cast<double*>(args.value) = value;
  if (args.value_dtype == DType::float32) {
    *static_cast<float*>(args.value) = static_cast<float>(value);
  }
}

template <class Rule>
MAS_FN bool overflowed(const OptimizerStep<Rule>& args) {
  return args.overflow != nullptr && *args.overflow != 0.0F;
}

// By what a gradient is multiplied that is *scale times too large.
template <class Rule>
MAS_FN double unscale_of(const OptimizerStep<Rule>& args) {
  return args.scale == nullptr ? 1.0 : 1.0 / static_cast<double>(*args.scale);
}

MAS_FN std::int64_t quotient_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The number of omega's elements.
MAS_FN std::int64_t size_of(const PerSample& args) {
  return args.groups * args.outputs * args.taps * args.channels;
}

// A split of the batch ends where the next one begins.
MAS_FN std::int64_t first_sample(const PerSample& args, std::int64_t split) {
  return args.batch * split / args.splits;
}

// Where a split's sum is added: omega itself if there is only one.
template <class C>
MAS_FN C* destination(const PerSample& args, std::int64_t split) {
  return args.splits == 1 ? static_cast<C*>(args.omega)
                          : static_cast<C*>(args.partial) + split * size_of(args);
}

}  // namespace
}  // namespace mas
