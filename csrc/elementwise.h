// The maths of one element, once, for both devices: conversions between storage and arithmetic
// types, the penalty, the proximal step, optimizers' steps and the merge. Everything has
// internal linkage: these functions are compiled for several instruction sets, and the linker must
// never pick one set's copy for another.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#if defined(__CUDACC__) || defined(MAS_EMULATE_CUDA)
#define MAS_FN static __host__ __device__ __forceinline__
#else
#define MAS_FN static inline __attribute__((always_inline))
#endif

namespace mas {
namespace {

struct bfloat16 {
  std::uint16_t bits;
};

struct float16 {
  std::uint16_t bits;
};

// Omega in 8 bits: 0, or (1 + m / 8) 2^(e - 15) with 5 bits of e above 3 of m. No sign, and no
// other special value: what is too large, or NaN, is the largest.
struct float8 {
  std::uint8_t bits;
};

constexpr int kFloat8Cut = 20;                       // bits of a float32 that it lacks
constexpr std::uint32_t kFloat8Lowest = 112u << 23;  // the float32 2^-15, which would be code 0

// The arithmetic type of a storage type: float64 stays, everything else is float32.
template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From>
MAS_FN To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

MAS_FN double load(double x) { return x; }

MAS_FN float load(float x) { return x; }

MAS_FN float load(bfloat16 x) { return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }

MAS_FN float load(float16 x) {
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t shifted = magnitude << 13;
  const std::uint32_t normal = shifted + (112u << 23);
  const std::uint32_t special = shifted | 0x7f800000u;
  // A subnormal is read through a normal number, so that flush-to-zero modes do not touch it.
  const float subnormal = bit_cast<float>(shifted + (113u << 23)) - bit_cast<float>(113u << 23);
  const std::uint32_t bits = magnitude >= 0x7c00u  ? special
                             : magnitude < 0x0400u ? bit_cast<std::uint32_t>(subnormal)
                                                   : normal;
  return bit_cast<float>(bits | sign);
}

MAS_FN float load(float8 x) {
  const std::uint32_t code = x.bits;
  return bit_cast<float>(code == 0 ? 0u : (code << kFloat8Cut) + kFloat8Lowest);
}

template <class T>
MAS_FN T store(compute_t<T> x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const auto u = bit_cast<std::uint32_t>(x);
    const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return {static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
  } else if constexpr (std::is_same_v<T, float16>) {
    const auto u = bit_cast<std::uint32_t>(x);
    const std::uint32_t a = u & 0x7fffffffu;
    const std::uint32_t large = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const std::uint32_t normal = (a + ((a >> 13) & 1u) - (112u << 23) + 0xfffu) >> 13;
    const float shifted = bit_cast<float>(a) + 0.5f;  // rounds to a multiple of 2^-24
    const std::uint32_t subnormal = bit_cast<std::uint32_t>(shifted) - (126u << 23);
    const std::uint32_t half = a >= 0x47800000u ? large : a < 0x38800000u ? subnormal : normal;
    return {static_cast<std::uint16_t>(half | ((u >> 16) & 0x8000u))};
  } else {
    return x;
  }
}

// A hash of (index, entry), uniform in 32 bits: the finaliser of MurmurHash3 over both numbers.
MAS_FN std::uint32_t hash(std::int64_t index, std::int64_t entry) {
  const auto i = static_cast<std::uint64_t>(index);
  std::uint32_t h = static_cast<std::uint32_t>(i) * 0x9e3779b9u ^
                    static_cast<std::uint32_t>(i >> 32) * 0x85ebca6bu ^
                    static_cast<std::uint32_t>(entry) * 0xc2b2ae35u;
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

// Omega's own rounding. bfloat16 and float8 are rounded up with the probability of the cut-off
// part: rounding to nearest would stop growing after some 250 or 10 entries of equal size.
template <class O, class C>
MAS_FN O store_omega(C x, std::int64_t index, std::int64_t entry) {
  if constexpr (std::is_same_v<O, bfloat16>) {
    const auto u = bit_cast<std::uint32_t>(static_cast<float>(x));
    const bool finite = (u & 0x7f800000u) != 0x7f800000u;
    const std::uint32_t raised = u + (hash(index, entry) & 0xffffu);
    return finite ? bfloat16{static_cast<std::uint16_t>(raised >> 16)}
                  : store<bfloat16>(static_cast<float>(x));
  } else if constexpr (std::is_same_v<O, float8>) {
    const std::uint32_t random = hash(index, entry);
    const auto least = bit_cast<float>(kFloat8Lowest + (1u << kFloat8Cut));
    const float w = static_cast<float>(x);
    const bool up = static_cast<float>(random >> 8) * 0x1p-24f * least < w;
    const std::uint32_t raised =
        bit_cast<std::uint32_t>(w) - kFloat8Lowest + (random & ((1u << kFloat8Cut) - 1u));
    const std::uint32_t code = raised >> kFloat8Cut;
    return {static_cast<std::uint8_t>(w < least ? up : code < 255u ? code : 255u)};
  } else {
    return static_cast<O>(x);
  }
}

// A factor that is finite in C, so that a huge lam times a zero pull stays zero and not NaN.
template <class C>
MAS_FN C finite_factor(double x) {
  constexpr double largest = std::is_same_v<C, double> ? DBL_MAX : FLT_MAX;
  return static_cast<C>(x > largest ? largest : x < -largest ? -largest : x);
}

// One task's part of the penalty at one element: Omega (theta - A)^2 and half its gradient.
template <class C>
struct PenaltyTerm {
  C half_gradient;
  double value;
};

template <class C>
MAS_FN PenaltyTerm<C> penalty_element(C omega, C theta, C anchor) {
  const C distance = theta - anchor;
  const C half_gradient = omega * distance;
  return {half_gradient, static_cast<double>(half_gradient) * static_cast<double>(distance)};
}

// The running minimiser of a sum of quadratics, relative to theta, in a form that moves nothing
// (not even by rounding) while theta lies on the anchor.
template <class C>
struct Target {
  C weight;
  C distance;  // minimiser - theta
};

template <class C>
MAS_FN Target<C> with_task(Target<C> target, bool first, C omega, C distance) {
  if (first) return {omega, distance};
  const C weight = target.weight + omega;
  const C share = weight > C(0) ? omega / weight : C(0);
  return {weight, target.distance + share * (distance - target.distance)};
}

// Tasks enter the target by their share of the largest alpha, so that a huge lam can't overflow.
MAS_FN double largest_alpha(const double* alpha, std::int64_t rows) {
  double largest = 0;
  for (std::int64_t row = 0; row < rows; ++row)
    largest = alpha[row] > largest ? alpha[row] : largest;
  return largest;
}

MAS_FN double relative_alpha(double alpha, double largest) {
  return largest > 0 ? alpha / largest : 0.0;
}

constexpr double kLargestPull = 1e30;

// theta + c / (1 + c) (minimiser - theta), c = strength * weight. A c that overflows, or is NaN for
// lack of any step length, counts as the largest pull.
template <class C>
MAS_FN C proximal_element(C theta, Target<C> target, C strength) {
  const C product = strength * target.weight;
  const C c = product < C(kLargestPull) ? product : C(kLargestPull);
  return theta + c / (C(1) + c) * target.distance;
}

// A strength divided by what Adam divides its steps by. A strength of zero stays zero, also where
// the divisor is zero.
template <class C>
MAS_FN C divided(C strength, C divisor) {
  return strength > C(0) ? strength / divisor : C(0);
}

// What Adam divides its step at one element by.
template <class C>
MAS_FN C adam_divisor(C second_moment, C correction, C eps) {
  return std::sqrt(second_moment * correction) + eps;
}

// An optimizer's moments at one element, in the order in which kernels.h names them. Three members
// and no array, which would keep compilers from making vectors of them.
template <class C>
struct Moments {
  C first;
  C second;
  C third;
};

// The parameter after an optimizer's step, and by what the step length was divided there.
template <class C>
struct Stepped {
  C theta;
  C divisor;
};

template <class C>
struct SgdStep {
  C lr;
  C momentum;
  C undamped;
  C decay;
  bool nesterov;
  bool first;
};

template <class C>
MAS_FN SgdStep<C> step_of(const Sgd& rule, const float* /*step*/) {
  return {static_cast<C>(rule.lr),
          static_cast<C>(rule.momentum),
          static_cast<C>(1.0 - rule.dampening),
          static_cast<C>(rule.decay),
          rule.nesterov,
          rule.first};
}

template <int M, class C>
MAS_FN Stepped<C> step_element(const SgdStep<C>& step, C theta, C gradient, Moments<C>& m) {
  const C g = gradient + step.decay * theta;
  if constexpr (M == 0) {
    return {theta - step.lr * g, C(1)};
  } else {
    m.first = step.first ? g : step.momentum * m.first + step.undamped * g;
    const C direction = step.nesterov ? g + step.momentum * m.first : m.first;
    return {theta - step.lr * direction, C(1)};
  }
}

template <class C>
struct AdamWStep {
  C keep;
  C rate;
  C share1;
  C beta2;
  C share2;
  C correction;
  C eps;
  C l2;
};

template <class C>
MAS_FN AdamWStep<C> step_of(const AdamW& rule, const float* step) {
  const double steps = *step;
  return {static_cast<C>(1.0 - rule.lr * rule.decay),
          static_cast<C>(rule.lr / (1.0 - std::pow(rule.beta1, steps))),
          static_cast<C>(1.0 - rule.beta1),
          static_cast<C>(rule.beta2),
          static_cast<C>(1.0 - rule.beta2),
          static_cast<C>(1.0 / (1.0 - std::pow(rule.beta2, steps))),
          static_cast<C>(rule.eps),
          static_cast<C>(rule.l2)};
}

template <int M, class C>
MAS_FN Stepped<C> step_element(const AdamWStep<C>& step, C theta, C gradient, Moments<C>& m) {
  // Without l2 the gradient stays as it is also where theta is not finite.
  const C g = step.l2 == C(0) ? gradient : gradient + step.l2 * theta;
  m.first = m.first + step.share1 * (g - m.first);
  m.second = step.beta2 * m.second + step.share2 * g * g;
  C square = m.second;
  if constexpr (M == 3) {
    m.third = m.third > square ? m.third : square;
    square = m.third;
  }
  const C divisor = adam_divisor<C>(square, step.correction, step.eps);
  return {theta * step.keep - step.rate * m.first / divisor, divisor};
}

// The step length, but for the divisor.
MAS_FN double eta_of(const Sgd& rule) { return rule.eta; }

MAS_FN double eta_of(const AdamW& rule) { return rule.lr; }

template <class C>
struct Merged {
  C omega;
  C anchor;
  double remainder;
};

// W' = max(0, keep W + gain Omega_t). Where it moves, the anchor becomes the mean weighted by
// keep W and gain Omega_t, and the remainder takes up what the two quadratics cost at their common
// minimum.
template <class C>
MAS_FN Merged<C> merge_element(C omega, C anchor, C importance, C theta, C keep, C gain,
                               bool moves_anchor) {
  const C entry = gain * importance;
  const C kept = keep * omega;
  const C sum = kept + entry;
  const C total = sum < C(0) ? C(0) : sum;  // NaN stays
  if (!moves_anchor) return {total, anchor, 0.0};
  const C share = kept > C(0) && total > C(0) ? entry / total : C(1);
  const C distance = theta - anchor;
  const C moved = kept > C(0) ? anchor + share * distance : theta;
  const C half = kept * share * distance;
  return {total, moved, static_cast<double>(half) * static_cast<double>(distance)};
}

}  // namespace
}  // namespace mas
