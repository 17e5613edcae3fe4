// CUDA for tests on machines without a GPU: maps a kernel's blocks and threads onto CPU threads, so
// that the very sources of csrc/cuda compile with `g++ -std=c++20 -x c++ -DMAS_EMULATE_CUDA
// -include` this file, run with host pointers, and can be checked by sanitizers. Blocks run one
// after another; the threads of a block run at once, so that a missing barrier is a data race here
// too.
#pragma once

#include <algorithm>
#include <array>
#include <barrier>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(...)
#define __grid_constant__ &  // as on the GPU: every thread reads the same copy of the argument

struct Index {
  unsigned x;
};

inline thread_local Index threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulation {

constexpr unsigned kWarp = 32;

struct Warp {
  explicit Warp(unsigned threads) : barrier(threads) {}

  std::barrier<> barrier;
  // Two sets of slots in turn: a thread can be one exchange ahead of another, never two.
  std::array<std::array<std::array<std::byte, 32>, kWarp>, 2> slots{};
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads) {
    for (unsigned t = 0; t < threads; t += kWarp) warps.emplace_back(std::min(kWarp, threads - t));
  }

  std::barrier<> barrier;
  std::deque<Warp> warps;
};

inline Block* block;
inline thread_local unsigned exchanges;
inline std::mutex one_launch_at_a_time;

// What every lane of this thread's warp brings.
template <class X>
std::array<X, kWarp> exchanged(X own) {
  static_assert(sizeof(X) <= 32);
  Warp& warp = block->warps[threadIdx.x / kWarp];
  auto& slots = warp.slots[exchanges++ % 2];
  std::memcpy(&slots[threadIdx.x % kWarp], &own, sizeof(X));
  warp.barrier.arrive_and_wait();
  std::array<X, kWarp> all;
  for (unsigned lane = 0; lane < kWarp; ++lane) std::memcpy(&all[lane], &slots[lane], sizeof(X));
  return all;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, void* /*stream*/,
            const Arguments&... arguments) {
  const std::lock_guard lock(one_launch_at_a_time);
  Block shared(threads);
  block = &shared;
  std::vector<std::jthread> team;
  for (unsigned t = 0; t < threads; ++t) {
    team.emplace_back([&, t] {
      threadIdx = {t};
      blockDim = {threads};
      gridDim = {blocks};
      for (unsigned b = 0; b < blocks; ++b) {
        blockIdx = {b};
        kernel(arguments...);
        shared.barrier.arrive_and_wait();
      }
    });
  }
}

}  // namespace cuda_emulation

#define MAS_LAUNCH(kernel, blocks, threads, stream, ...) \
  cuda_emulation::launch(kernel, blocks, threads, stream, __VA_ARGS__)
#define MAS_NO_UNROLL
#define MAS_UNROLL
#ifndef MAS_THREADS
#define MAS_THREADS 64  // two warps take every path that eight take, and a quarter of the time
#endif
#define MAS_MOST_BLOCKS 3  // so that kernels which loop over their work do

inline void __syncthreads() { cuda_emulation::block->barrier.arrive_and_wait(); }

inline double __shfl_down_sync(unsigned /*mask*/, double value, unsigned delta) {
  const unsigned lane = threadIdx.x % cuda_emulation::kWarp;
  const auto values = cuda_emulation::exchanged(value);
  return values[lane + delta < cuda_emulation::kWarp ? lane + delta : lane];
}

// What csrc/cuda/tile_product.h has of tensor cores.
inline void load_transposed(unsigned (&to)[4], const void* row) {
  const auto rows = cuda_emulation::exchanged(row);
  const unsigned lane = threadIdx.x % cuda_emulation::kWarp;
  for (unsigned i = 0; i < 4; ++i) {
    std::array<std::uint16_t, 2> pair;
    for (unsigned half = 0; half < 2; ++half) {
      const unsigned r = lane % 4 * 2 + half;
      pair[half] = static_cast<const std::uint16_t*>(rows[8 * i + r])[lane / 4];
    }
    to[i] = std::bit_cast<unsigned>(pair);
  }
}

template <class T>
void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  struct Operands {
    unsigned a[4], b[2];
  };
  const auto operands = cuda_emulation::exchanged(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const unsigned lane = threadIdx.x % cuda_emulation::kWarp;
  const auto number = [](unsigned pair, unsigned half) {
    return load(T{static_cast<std::uint16_t>(pair >> (half * 16))});
  };
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned row = lane / 4 + e / 2 * 8;
    const unsigned column = lane % 4 * 2 + e % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned left = operands[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
      const unsigned right = operands[column * 4 + k % 8 / 2].b[k / 8];
      c[e] += number(left, k % 2) * number(right, k % 2);
    }
  }
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
