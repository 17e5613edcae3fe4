// Sums over samples of abs, or of the square, of each sample's gradient of a weight. That gradient
// is a product of matrices, whose elements go from registers into the sum. Twin of
// cpu/per_sample.cpp.
#include "launch.h"

namespace mas::cuda {
namespace {

constexpr int square_root(int n) {
  int root = 0;
  while ((root + 1) * (root + 1) <= n) ++root;
  return root;
}

// A block owns a square tile of the product, outputs by flattened (tap, channel) columns; a thread
// kOwn x kOwn of its elements, kSide apart so that neighbours read neighbouring shared memory.
constexpr int kSide = square_root(kThreads);
constexpr int kOwn = 4;
constexpr int kTile = kSide * kOwn;
constexpr int kDepth = 16;  // positions in shared memory at a time
static_assert(kSide * kSide == kThreads && kThreads % kTile == 0);

// Blocks (or threads) beyond the largest grid take their turn in a loop.
void launch_for(std::int64_t blocks, void (*kernel)(PerSample), PerSample use, void* stream) {
  launch(kernel, std::min<std::int64_t>(blocks, MAS_MOST_BLOCKS), stream, use);
}

// The number of tiles that cover one group's outputs, its columns, and all of omega.
struct Tiles {
  std::int64_t rows, columns, count;
};

MAS_FN Tiles tiles_of(const PerSample& use) {
  const std::int64_t rows = quotient_up(use.outputs, kTile);
  const std::int64_t columns = quotient_up(use.taps * use.channels, kTile);
  return {rows, columns, use.groups * rows * columns};
}

template <class C>
MAS_DEVICE C magnitude(C m, bool square) {
  return square ? m * m : std::abs(m);
}

// Where a split's sum is added: omega itself if there is only one.
template <class C>
MAS_DEVICE C* destination(const PerSample& use, std::int64_t split) {
  return use.splits == 1 ? static_cast<C*>(use.omega)
                         : static_cast<C*>(use.partial) + split * size_of(use);
}

// What a tap sees at a position, in one channel of all groups' channels.
template <class T>
MAS_DEVICE compute_t<T> seen(const PerSample& use, std::int64_t sample, std::int64_t tap,
                             std::int64_t position, std::int64_t channel) {
  const std::int64_t row =
      use.rows == nullptr ? position : use.rows[tap * use.positions + position];
  if (row < 0) return 0;
  return load(
      static_cast<const T*>(use.input)[sample * use.input_sample + row * use.input_row + channel]);
}

template <class T>
MAS_DEVICE compute_t<T> gradient(const PerSample& use, std::int64_t sample, std::int64_t position,
                                 std::int64_t output) {
  return load(static_cast<const T*>(
      use.grad)[sample * use.grad_sample + position * use.grad_position + output]);
}

template <class C, class T>
__global__ void add_tiles(PerSample use) {
  __shared__ C left[kDepth][kTile];
  __shared__ C right[kDepth][kTile];
  const Tiles tiles = tiles_of(use);
  const std::int64_t columns = use.taps * use.channels;
  const int x = threadIdx.x % kSide;
  const int y = threadIdx.x / kSide;
  const int lane = threadIdx.x % kTile;
  for (std::int64_t i = blockIdx.x; i < tiles.count * use.splits; i += gridDim.x) {
    const std::int64_t split = i / tiles.count;
    const std::int64_t group = i / (tiles.rows * tiles.columns) % use.groups;
    const std::int64_t first_output = i / tiles.columns % tiles.rows * kTile;
    const std::int64_t first_column = i % tiles.columns * kTile;
    // The output and the column that this thread brings into shared memory.
    const std::int64_t output = first_output + lane;
    const std::int64_t column = first_column + lane;
    const std::int64_t tap = column / use.channels;
    const std::int64_t channel = group * use.channels + column % use.channels;

    C sum[kOwn][kOwn] = {};
    for (std::int64_t b = first_sample(use, split); b < first_sample(use, split + 1); ++b) {
      C m[kOwn][kOwn] = {};
      for (std::int64_t start = 0; start < use.positions; start += kDepth) {
        for (int k = threadIdx.x / kTile; k < kDepth; k += kThreads / kTile) {
          const std::int64_t p = start + k;
          const bool inside = p < use.positions;
          left[k][lane] = inside && output < use.outputs
                              ? gradient<T>(use, b, p, group * use.outputs + output)
                              : C(0);
          right[k][lane] = inside && column < columns ? seen<T>(use, b, tap, p, channel) : C(0);
        }
        __syncthreads();
        for (int k = 0; k < kDepth; ++k) {
          for (int r = 0; r < kOwn; ++r) {
            for (int c = 0; c < kOwn; ++c) {
              m[r][c] = std::fma(left[k][y + r * kSide], right[k][x + c * kSide], m[r][c]);
            }
          }
        }
        __syncthreads();  // before the next positions overwrite these
      }
      for (int r = 0; r < kOwn; ++r) {
        for (int c = 0; c < kOwn; ++c) sum[r][c] += magnitude(m[r][c], use.square);
      }
    }
    for (int r = 0; r < kOwn; ++r) {
      for (int c = 0; c < kOwn; ++c) {
        const std::int64_t row = first_output + y + r * kSide;
        const std::int64_t at = first_column + x + c * kSide;
        if (row < use.outputs && at < columns) {
          destination<C>(use, split)[(group * use.outputs + row) * columns + at] += sum[r][c];
        }
      }
    }
  }
}

// One output and one channel a group: a thread for each tap of a group, neighbours in neighbouring
// groups.
template <class C, class T>
__global__ void add_depthwise(PerSample use) {
  const std::int64_t size = use.groups * use.taps;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < size * use.splits; i += stride) {
    const std::int64_t split = i / size;
    const std::int64_t tap = i / use.groups % use.taps;
    const std::int64_t group = i % use.groups;
    C sum = 0;
    for (std::int64_t b = first_sample(use, split); b < first_sample(use, split + 1); ++b) {
      C m = 0;
      for (std::int64_t p = 0; p < use.positions; ++p) {
        m = std::fma(gradient<T>(use, b, p, group), seen<T>(use, b, tap, p, group), m);
      }
      sum += magnitude(m, use.square);
    }
    destination<C>(use, split)[group * use.taps + tap] += sum;
  }
}

// In ascending order, for the same bits on every run.
template <class C>
__global__ void add_splits(PerSample use) {
  const std::int64_t size = size_of(use);
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < size;
       i += stride) {
    C sum = static_cast<C*>(use.omega)[i];
    for (std::int64_t split = 0; split < use.splits; ++split) {
      sum += static_cast<const C*>(use.partial)[split * size + i];
    }
    static_cast<C*>(use.omega)[i] = sum;
  }
}

}  // namespace

void per_sample(PerSample use, DType dtype, void* stream) {
  if (use.batch == 0 || use.positions == 0 || size_of(use) == 0) return;
  with_float(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    using C = compute_t<T>;
    if (use.outputs == 1 && use.channels == 1) {
      launch_for(quotient_up(size_of(use) * use.splits, kThreads), add_depthwise<C, T>, use,
                 stream);
    } else {
      launch_for(tiles_of(use).count * use.splits, add_tiles<C, T>, use, stream);
    }
    if (use.splits > 1) {
      launch_for(quotient_up(size_of(use), kThreads), add_splits<C>, use, stream);
    }
  });
}

}  // namespace mas::cuda
