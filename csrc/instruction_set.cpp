// Chooses, once, the best instruction set that this processor has, and runs its kernels.
// MAS_EXT_INSTRUCTION_SET may ask for less, to compare or to track down a fault: the best one up to
// the one named is chosen, so that it is no error to name one that this machine lacks. An unknown
// name is an error, at the first call: at import it would look like a missing extension.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace mas::cpu {

namespace baseline {
MAS_KERNELS(MAS_DECLARE_ON_CPU);
}
namespace avx2 {
MAS_KERNELS(MAS_DECLARE_ON_CPU);
}
namespace avx512 {
MAS_KERNELS(MAS_DECLARE_ON_CPU);
}

namespace {

enum Level : int { kBaseline, kAvx2, kAvx512 };

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

bool supported([[maybe_unused]] int level) {
#ifdef MAS_X86
  __builtin_cpu_init();  // which may not happen by itself on Windows
  if (level == kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (level == kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return level == kBaseline;
}

int choose() {
  int level = kAvx512;
  const char* wish = std::getenv("MAS_EXT_INSTRUCTION_SET");
  while (wish != nullptr && std::strcmp(wish, kNames[level]) != 0) {
    if (level == kBaseline) {
      throw std::invalid_argument("MAS_EXT_INSTRUCTION_SET: got '" + std::string(wish) +
                                  "', expected one of baseline, avx2, avx512");
    }
    --level;
  }
  while (!supported(level)) --level;
  return level;
}

int chosen() {
  static const int level = choose();
  return level;
}

template <class Kernel>
void run_chosen(const Kernel& args, int threads) {
  [[maybe_unused]] const int level = chosen();
#ifdef MAS_X86
  if (level == kAvx512) return avx512::run(args, threads);
  if (level == kAvx2) return avx2::run(args, threads);
#endif
  baseline::run(args, threads);
}

}  // namespace

const char* instruction_set() { return kNames[chosen()]; }

#define MAS_RUN(Kernel) \
  void run(const Kernel& args, int threads) { run_chosen(args, threads); }
MAS_KERNELS(MAS_RUN);

}  // namespace mas::cpu
