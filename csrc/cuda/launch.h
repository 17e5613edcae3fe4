// What the CUDA kernels share: the table of segments that travels in a kernel's arguments, the
// launch over it, and what a block does with its chunk: elements in packs, and sums in a fixed
// order.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../dispatch.h"

#ifndef MAS_EMULATE_CUDA  // else python_tests/emulation/cuda_emulation.h has all of this
#include <cuda_runtime.h>
#define MAS_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#define MAS_UNROLL _Pragma("unroll")
// For loops over packs and tasks: many threads hide their latency already, and unrolled copies
// would only take registers from those threads.
#define MAS_NO_UNROLL _Pragma("unroll 1")
#define MAS_THREADS 256
#define MAS_MOST_BLOCKS 2147483647
#endif

#define MAS_DEVICE static __device__ __forceinline__

namespace mas::cuda {
namespace {

constexpr int kThreads = MAS_THREADS;
constexpr int kWarp = 32;

// Kernel arguments may take 32,764 bytes; this leaves room for a kernel's other ones. Pointers in
// the arguments need neither a copy nor memory on the device, so that a CUDA graph can capture a
// launch.
constexpr std::int64_t kTableBytes = 800 * sizeof(Segment);

template <class S>
struct TableOf {
  static constexpr std::int64_t kSize = kTableBytes / sizeof(S);
  S segments[kSize];
  std::int64_t count;
};

using Table = TableOf<Segment>;

// f(table, its number of chunks, the index of its first segment), for as many tables as it takes.
template <class S, class F>
void for_each_table(ListOf<S> segments, F f) {
  constexpr std::int64_t most = TableOf<S>::kSize;
  for (std::int64_t first = 0; first < segments.count; first += most) {
    const std::int64_t last = std::min(first + most, segments.count);
    const std::int64_t end =
        last < segments.count ? segments.data[last].first_chunk : segments.chunks;
    TableOf<S> table = {};
    table.count = last - first;
    std::copy(segments.data + first, segments.data + last, table.segments);
    f(table, end - table.segments[0].first_chunk, first);
  }
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), std::int64_t blocks, void* stream,
            const Arguments&... arguments) {
  if (blocks == 0) return;  // an empty grid is an error to CUDA
  MAS_LAUNCH(kernel, static_cast<unsigned>(blocks), kThreads, static_cast<cudaStream_t>(stream),
             arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("mas_ext could not launch a CUDA kernel: ") +
                             cudaGetErrorString(error));
  }
}

// Launches kernel(theta's type, omega's type, the anchor's type) over all chunks, for kernels with
// a state.
template <class Kernel, class F>
void launch_typed(const Kernel& args, void* stream, F kernel) {
  with_state(args.state, [&](auto theta, auto omega, auto anchor) {
    for_each_table(args.segments, [&](const auto& table, std::int64_t chunks, std::int64_t) {
      launch(kernel(theta, omega, anchor), chunks, stream, table, args);
    });
  });
}

// The number of this block's chunk, which is also its slot among the partial sums.
template <class S>
MAS_DEVICE std::int64_t chunk_number(const TableOf<S>& table) {
  return table.segments[0].first_chunk + blockIdx.x;
}

template <class S>
MAS_DEVICE ChunkOf<S> own_chunk(const TableOf<S>& table) {
  return chunk_of(table.segments, table.count, chunk_number(table));
}

// Elements that a thread handles together: 16 bytes of float32.
constexpr int kPack = 4;

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T lane[N];
};

template <int N, class T>
MAS_DEVICE Pack<T, N> read(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <class T, int N>
MAS_DEVICE void write(T* to, Pack<T, N> pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

template <class... T>
MAS_DEVICE bool aligned(const T*... pointers) {
  return (... && (reinterpret_cast<std::uintptr_t>(pointers) % alignof(Pack<T, kPack>) == 0));
}

// The rows behind the first, whose own pointers are aligned.
template <class O, class A>
MAS_DEVICE bool rows_aligned(const State& state, const O* omega, const A* anchor) {
  return state.rows <= 1 || aligned(omega + state.stride, anchor + state.stride);
}

// f(the task's number, a pack of omega, a pack of the anchor) for each task.
template <int N, class O, class A, class F>
MAS_DEVICE void for_each_row(const State& state, const O* omega, const A* anchor, F f) {
  MAS_NO_UNROLL
  for (std::int64_t row = 0; row < state.rows; ++row) {
    f(row, read<N>(omega + row * state.stride), read<N>(anchor + row * state.stride));
  }
}

// The proximal step of a pack of parameters, in place. Twin of the one in cpu/level.h.
template <int N, class O, class A, class C>
MAS_DEVICE void proximal_step(const State& state, double largest, const O* omega, const A* anchor,
                              const C (&strengths)[N], C (&theta)[N]) {
  Target<C> target[N] = {};
  for_each_row<N>(state, omega, anchor, [&](std::int64_t row, auto w, auto a) {
    const C share = static_cast<C>(relative_alpha(state.alpha[row], largest));
    for (int l = 0; l < N; ++l) {
      const C own_weight = share * static_cast<C>(load(w.lane[l]));
      target[l] = with_task<C>(target[l], row == 0, own_weight, load(a.lane[l]) - theta[l]);
    }
  });
  for (int l = 0; l < N; ++l) {
    theta[l] = proximal_element<C>(theta[l], target[l], strengths[l]);
  }
}

// f(i, lanes) over this thread's elements of [0, size): whole packs where the pointers allow it,
// else one by one. Either way a thread meets the same elements in the same order, so that alignment
// changes no bit of a sum.
template <class F>
MAS_DEVICE void for_each_pack(std::int64_t size, bool packs, F f) {
  MAS_NO_UNROLL
  for (std::int64_t i = threadIdx.x * kPack; i < size; i += kThreads * kPack) {
    if (packs && i + kPack <= size) {
      f(i, std::integral_constant<int, kPack>{});
    } else {
      MAS_NO_UNROLL
      for (std::int64_t j = i; j < i + kPack && j < size; ++j) {
        f(j, std::integral_constant<int, 1>{});
      }
    }
  }
}

// The sum over the threads of a block, in a fixed order. At most once in a kernel: a second call
// would overwrite what slower threads still read.
MAS_DEVICE double block_sum(double x) {
  __shared__ double warps[kThreads / kWarp];
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_down_sync(~0u, x, step);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0;
  for (const double warp : warps) sum += warp;
  return sum;
}

MAS_DEVICE double block_sum(const double* from, std::int64_t count) {
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) sum += from[i];
  return block_sum(sum);
}

}  // namespace
}  // namespace mas::cuda
