// Chooses, once, the best instruction set that this processor has, and forwards to its kernels.
#include <cstdlib>
#include <cstring>

#include "../kernels.h"

namespace mas::cpu {

#define MAS_DECLARE_LEVEL(level)        \
  namespace level {                     \
  decltype(cpu::penalty) penalty;       \
  decltype(cpu::proximal) proximal;     \
  decltype(cpu::adamw) adamw;           \
  decltype(cpu::sgd) sgd;               \
  decltype(cpu::accumulate) accumulate; \
  decltype(cpu::merge) merge;           \
  decltype(cpu::per_sample) per_sample; \
  }

MAS_DECLARE_LEVEL(baseline)
#ifdef MAS_X86
MAS_DECLARE_LEVEL(avx2)
MAS_DECLARE_LEVEL(avx512)
#endif

namespace {

struct Level {
  const char* name;
  decltype(&cpu::penalty) penalty;
  decltype(&cpu::proximal) proximal;
  decltype(&cpu::adamw) adamw;
  decltype(&cpu::sgd) sgd;
  decltype(&cpu::accumulate) accumulate;
  decltype(&cpu::merge) merge;
  decltype(&cpu::per_sample) per_sample;
};

#define MAS_LEVEL_TABLE(level)                                                            \
  Level {                                                                                 \
    #level, level::penalty, level::proximal, level::adamw, level::sgd, level::accumulate, \
        level::merge, level::per_sample                                                   \
  }

// MAS_EXT_INSTRUCTION_SET may ask for less than the processor has, to compare or to track down a
// fault.
Level choose() {
#ifdef MAS_X86
  const char* wish = std::getenv("MAS_EXT_INSTRUCTION_SET");
  const auto allowed = [wish](const char* name) {
    return wish == nullptr || std::strcmp(wish, name) == 0;
  };
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return MAS_LEVEL_TABLE(avx512);
  }
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return MAS_LEVEL_TABLE(avx2);
#endif
  return MAS_LEVEL_TABLE(baseline);
}

const Level level = choose();

}  // namespace

const char* instruction_set() { return level.name; }

void penalty(Segments segments, DType theta, State state, DType omega, Gradient gradient,
             const double* grad_output, double* partial, void* value, DType value_dtype,
             int threads) {
  level.penalty(segments, theta, state, omega, gradient, grad_output, partial, value, value_dtype,
                threads);
}

void proximal(Segments segments, DType theta, State state, DType omega, StepSize step,
              int threads) {
  level.proximal(segments, theta, state, omega, step, threads);
}

void adamw(ListOf<Trained> segments, DType theta, State state, DType omega, AdamW rule,
           Entering entering, int threads) {
  level.adamw(segments, theta, state, omega, rule, entering, threads);
}

void sgd(ListOf<Trained> segments, DType theta, State state, DType omega, Sgd rule,
         Entering entering, int threads) {
  level.sgd(segments, theta, state, omega, rule, entering, threads);
}

void accumulate(Segments segments, DType grad, double weight, int threads) {
  level.accumulate(segments, grad, weight, threads);
}

void merge(Segments segments, DType theta, State state, DType omega, MergeRule rule,
           double* partial, double* remainder, int threads) {
  level.merge(segments, theta, state, omega, rule, partial, remainder, threads);
}

void per_sample(PerSample use, DType dtype, int threads) { level.per_sample(use, dtype, threads); }

}  // namespace mas::cpu
