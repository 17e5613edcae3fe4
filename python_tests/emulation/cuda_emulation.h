// CUDA for tests on machines without a GPU: maps a kernel's blocks and threads onto CPU threads, so
// that the very sources of csrc/cuda compile with `g++ -std=c++20 -x c++ -DMAS_EMULATE_CUDA
// -include` this file, run with host pointers, and can be checked by sanitizers. Blocks run one
// after another; the threads of a block run at once, so that a missing barrier is a data race here
// too.
#pragma once

#include <algorithm>
#include <array>
#include <barrier>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static    // one block runs at a time
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
  // Two sets of slots in turn: a thread can be one shuffle ahead of another, never two.
  std::array<std::array<double, kWarp>, 2> slots{};
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads) {
    for (unsigned t = 0; t < threads; t += kWarp) warps.emplace_back(std::min(kWarp, threads - t));
  }

  std::barrier<> barrier;
  std::deque<Warp> warps;
};

inline Block* block;
inline thread_local unsigned shuffles;
inline std::mutex one_launch_at_a_time;

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
#ifndef MAS_THREADS
#define MAS_THREADS 64  // two warps take every path that eight take, and a quarter of the time
#endif
#define MAS_MOST_BLOCKS 3  // so that kernels which loop over their work do

inline void __syncthreads() { cuda_emulation::block->barrier.arrive_and_wait(); }

inline double __shfl_down_sync(unsigned /*mask*/, double value, unsigned delta) {
  cuda_emulation::Warp& warp = cuda_emulation::block->warps[threadIdx.x / cuda_emulation::kWarp];
  const unsigned lane = threadIdx.x % cuda_emulation::kWarp;
  const unsigned source = lane + delta < cuda_emulation::kWarp ? lane + delta : lane;
  auto& slots = warp.slots[cuda_emulation::shuffles++ % 2];
  slots[lane] = value;
  warp.barrier.arrive_and_wait();
  return slots[source];
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
