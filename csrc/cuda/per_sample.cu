// Sums over samples of abs, or of the square, of each sample's gradient of a weight. That gradient
// is a product of matrices, whose elements go from registers into the sum. Twin of
// cpu/per_sample.cpp.
#include "tile_product.h"

namespace mas::cuda {
namespace {

// These are counted in 32 bits: samples, channels, taps times positions.
constexpr std::int64_t kMost = 1 << 30;

// Blocks (or threads) beyond the largest grid take their turn in a loop.
void launch_for(std::int64_t blocks, void (*kernel)(PerSample), PerSample args, void* stream) {
  launch(kernel, std::min<std::int64_t>(blocks, MAS_MOST_BLOCKS), stream, args);
}

// The number of tiles that cover one group's outputs, its columns, and all of omega.
struct Tiles {
  std::int64_t rows, columns, count;
};

MAS_FN Tiles tiles_of(const PerSample& args) {
  const std::int64_t rows = quotient_up(args.outputs, kTileRows);
  const std::int64_t columns = quotient_up(args.taps * args.channels, kTileColumns);
  return {rows, columns, args.groups * rows * columns};
}

// What a tap sees at a position, in one channel of all groups' channels.
template <class T>
MAS_DEVICE compute_t<T> seen(const PerSample& args, std::int64_t sample, std::int64_t tap,
                             std::int64_t position, std::int64_t channel) {
  const std::int64_t row =
      args.rows == nullptr ? position : args.rows[tap * args.positions + position];
  if (row < 0) return 0;
  return load(static_cast<const T*>(
      args.input)[sample * args.input_sample + row * args.input_row + channel]);
}

template <class T>
MAS_DEVICE compute_t<T> gradient(const PerSample& args, std::int64_t sample, std::int64_t position,
                                 std::int64_t output) {
  return load(static_cast<const T*>(
      args.grad)[sample * args.grad_sample + position * args.grad_position + output]);
}

// A number of rows, as whole samples and what is left.
struct Stride {
  int samples, rows;
};

MAS_DEVICE Stride stride_of(int rows, int padded) { return {rows / padded, rows % padded}; }

// One of the product's factors, whose rows are the positions of one sample after another: a thread
// brings N features of every n-th row to shared memory.
template <class T>
struct Walk {
  const T* sample;
  int samples;  // that are left
  int position;

  // In a sample there are rows of zeros behind its positions, `padded` rows in all.
  __device__ __forceinline__ void advance(Stride stride, int padded, std::int64_t sample_stride) {
    position += stride.rows;
    const int passed = stride.samples + (position >= padded ? 1 : 0);
    if (position >= padded) position -= padded;
    sample += passed * sample_stride;
    samples -= passed;
  }

  __device__ __forceinline__ bool inside(int positions) const {
    return samples > 0 && position < positions;
  }
};

// Output `first` and the N - 1 behind it, as far as they are there.
template <class T, int N, bool kWhole>
MAS_DEVICE Pack<T, N> outputs_of(const PerSample& args, const Walk<T>& walk, std::int64_t group,
                                 std::int64_t first) {
  Pack<T, N> found{};
  if (!walk.inside(static_cast<int>(args.positions)) || first >= args.outputs) return found;
  const T* from = walk.sample + walk.position * args.grad_position + group * args.outputs + first;
  if constexpr (kWhole) {
    found = read<N>(from);
  } else {
    for (int i = 0; i < N; ++i) {
      if (first + i < args.outputs) found.lane[i] = from[i];
    }
  }
  return found;
}

// N columns of the product, (tap, channel): where their rows are in the table, and their channels
// among those of all groups. -1: behind the last one.
template <int N>
struct Columns {
  int table[N];
  int channel[N];
};

template <int N>
MAS_DEVICE Columns<N> columns_from(const PerSample& args, std::int64_t group, std::int64_t first) {
  Columns<N> found;
  for (int i = 0; i < N; ++i) {
    const std::int64_t column = first + i;
    const bool there = column < args.taps * args.channels;
    found.table[i] = there ? static_cast<int>(column / args.channels * args.positions) : 0;
    found.channel[i] =
        there ? static_cast<int>(group * args.channels + column % args.channels) : -1;
  }
  return found;
}

template <class T, int N, bool kWhole>
MAS_DEVICE Pack<T, N> inputs_of(const PerSample& args, const Walk<T>& walk,
                                const Columns<kWhole ? 1 : N>& columns) {
  Pack<T, N> found{};
  if (!walk.inside(static_cast<int>(args.positions))) return found;
  for (int i = 0; i < (kWhole ? 1 : N); ++i) {
    if (columns.channel[i] < 0) continue;
    const int row =
        args.rows == nullptr ? walk.position : args.rows[columns.table[i] + walk.position];
    if (row < 0) continue;
    const T* from = walk.sample + row * args.input_row + columns.channel[i];
    if constexpr (kWhole) {
      found = read<N>(from);
    } else {
      found.lane[i] = *from;
    }
  }
  return found;
}

// kWhole: N features lie behind one another, at an address that is a multiple of their size.
template <class T, int N, bool kWhole>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2) add_tiles(PerSample args) {
  using C = compute_t<T>;
  using P = Product<T>;
  constexpr int depth = kDepth<T>;
  // So many rows are brought at a time.
  constexpr int left_step = kThreads / (kTileRows / N);
  constexpr int right_step = kThreads / (kTileColumns / N);
  static_assert(depth % left_step == 0 && depth % right_step == 0);
  __shared__ typename P::Factors panel;
  const Tiles tiles = tiles_of(args);
  const std::int64_t columns = args.taps * args.channels;
  const auto padded = static_cast<int>(quotient_up(args.positions, P::kStep) * P::kStep);
  const Stride left_stride = stride_of(left_step, padded);
  const Stride right_stride = stride_of(right_step, padded);
  const int left_row = threadIdx.x / (kTileRows / N);
  const int left_lane = threadIdx.x % (kTileRows / N) * N;
  const int right_row = threadIdx.x / (kTileColumns / N);
  const int right_lane = threadIdx.x % (kTileColumns / N) * N;
  for (std::int64_t i = blockIdx.x; i < tiles.count * args.splits; i += gridDim.x) {
    const std::int64_t split = i / tiles.count;
    const std::int64_t group = i / (tiles.rows * tiles.columns) % args.groups;
    const std::int64_t first_output = i / tiles.columns % tiles.rows * kTileRows;
    const std::int64_t first_column = i % tiles.columns * kTileColumns;
    const std::int64_t first = first_sample(args, split);
    const auto samples = static_cast<int>(first_sample(args, split + 1) - first);
    Walk<T> grad = {static_cast<const T*>(args.grad) + first * args.grad_sample, samples, 0};
    Walk<T> input = {static_cast<const T*>(args.input) + first * args.input_sample, samples, 0};
    grad.advance(stride_of(left_row, padded), padded, args.grad_sample);
    input.advance(stride_of(right_row, padded), padded, args.input_sample);
    const auto own = columns_from<kWhole ? 1 : N>(args, group, first_column + right_lane);

    Pack<T, N> left[depth / left_step];
    Pack<T, N> right[depth / right_step];
    const auto fetch = [&] {
      for (auto& pack : left) {
        pack = outputs_of<T, N, kWhole>(args, grad, group, first_output + left_lane);
        grad.advance(left_stride, padded, args.grad_sample);
      }
      for (auto& pack : right) {
        pack = inputs_of<T, N, kWhole>(args, input, own);
        input.advance(right_stride, padded, args.input_sample);
      }
    };
    P product;
    int unfinished = padded;  // of the sample
    fetch();
    for (std::int64_t rows = std::int64_t{samples} * padded; rows > 0; rows -= depth) {
      __syncthreads();  // nobody reads the last factors any more
      for (int k = 0; k < depth / left_step; ++k) {
        write(&panel.left[k * left_step + left_row][left_lane], P::factors(left[k]));
      }
      for (int k = 0; k < depth / right_step; ++k) {
        write(&panel.right[k * right_step + right_row][right_lane], P::factors(right[k]));
      }
      __syncthreads();
      fetch();  // the next ones arrive while these are multiplied
      for (int k = 0; k < depth;) {
        const int stop = unfinished < depth - k ? k + unfinished : depth;
        unfinished -= stop - k;
        if (stop - k == depth) {
          MAS_UNROLL
          for (int all = 0; all < depth; all += P::kStep) product.add(panel, all);
          k = depth;
        } else {
          MAS_NO_UNROLL
          for (; k < stop; k += P::kStep) product.add(panel, k);
        }
        if (unfinished == 0) {
          product.finish(args.square);
          unfinished = padded;
        }
      }
    }
    C* to = destination<C>(args, split) + group * args.outputs * columns;
    product.for_each([&](int r, int c, C sum) {
      const std::int64_t row = first_output + r;
      const std::int64_t at = first_column + c;
      if (row < args.outputs && at < columns) to[row * columns + at] += sum;
    });
  }
}

template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class T>
bool in_whole_vectors(const PerSample& args) {
  std::uintptr_t all = reinterpret_cast<std::uintptr_t>(args.grad) / sizeof(T) |
                       reinterpret_cast<std::uintptr_t>(args.input) / sizeof(T);
  for (const std::int64_t n : {args.outputs, args.channels, args.grad_sample, args.grad_position,
                               args.input_sample, args.input_row}) {
    all |= static_cast<std::uintptr_t>(n);
  }
  return all % kVector<T> == 0;
}

// One output and one channel a group: a thread for each tap of a group, neighbours in neighbouring
// groups.
template <class C, class T>
__global__ void add_depthwise(PerSample args) {
  const std::int64_t size = args.groups * args.taps;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < size * args.splits; i += stride) {
    const std::int64_t split = i / size;
    const std::int64_t tap = i / args.groups % args.taps;
    const std::int64_t group = i % args.groups;
    C sum = 0;
    for (std::int64_t b = first_sample(args, split); b < first_sample(args, split + 1); ++b) {
      C m = 0;
      for (std::int64_t p = 0; p < args.positions; ++p) {
        m = std::fma(gradient<T>(args, b, p, group), seen<T>(args, b, tap, p, group), m);
      }
      sum += magnitude(m, args.square);
    }
    destination<C>(args, split)[group * args.taps + tap] += sum;
  }
}

// In ascending order, for the same bits on every run.
template <class C>
__global__ void add_splits(PerSample args) {
  const std::int64_t size = size_of(args);
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < size;
       i += stride) {
    C sum = static_cast<C*>(args.omega)[i];
    for (std::int64_t split = 0; split < args.splits; ++split) {
      sum += static_cast<const C*>(args.partial)[split * size + i];
    }
    static_cast<C*>(args.omega)[i] = sum;
  }
}

}  // namespace

void run(const PerSample& args, void* stream) {
  if (args.batch == 0 || args.positions == 0 || size_of(args) == 0) return;
  if (std::max({args.batch, args.taps * args.positions, args.groups * args.channels}) >= kMost) {
    throw std::invalid_argument("grad, input: expected less than " + std::to_string(kMost) +
                                " samples, channels, and taps times positions on a GPU");
  }
  with_float(args.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    using C = compute_t<T>;
    if (args.outputs == 1 && args.channels == 1) {
      launch_for(quotient_up(size_of(args) * args.splits, kThreads), add_depthwise<C, T>, args,
                 stream);
    } else {
      const auto add =
          in_whole_vectors<T>(args) ? add_tiles<T, kVector<T>, true> : add_tiles<T, kPack, false>;
      launch_for(tiles_of(args).count * args.splits, add, args, stream);
    }
    if (args.splits > 1) {
      launch_for(quotient_up(size_of(args), kThreads), add_splits<C>, args, stream);
    }
  });
}

}  // namespace mas::cuda
