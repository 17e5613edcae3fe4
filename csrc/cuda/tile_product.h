// A block's tile of a product of matrices, sum over k of left[k]^T right[k], from shared memory
// into registers; and of many such products, one for each sample, the sum of their magnitudes.
// Element by element, or by tensor cores, which multiply 16-bit factors exactly,
// and add in float32.
#pragma once

#include "launch.h"

namespace mas::cuda {
namespace {

constexpr int square_root(int n) {
  int root = 0;
  while ((root + 1) * (root + 1) <= n) ++root;
  return root;
}

constexpr int kSide = square_root(kThreads);
constexpr int kTileRows = kSide * kPack;
constexpr int kTileColumns = 2 * kSide * kPack;
static_assert(kSide * kSide == kThreads && kThreads % kTileRows == 0);

// The factors of some k. Rows are padded, so that tensor cores find neighbouring ones in other
// banks.
template <class Factor, int kRows>
struct alignas(16) Panel {
  static constexpr int kPad = 16 / sizeof(Factor);
  Factor left[kRows][kTileRows + kPad];
  Factor right[kRows][kTileColumns + kPad];
};

template <class C>
MAS_DEVICE C magnitude(C m, bool square) {
  return square ? m * m : std::abs(m);
}

// So many k at a time: 16 bytes of features for every thread.
template <class T>
constexpr int kDepth = sizeof(T) == 2 ? 32 : 16;

// Both kinds of product have: add(panel, k), with kStep factors from k on; finish(), which ends a
// sample; for_each(f), f(row, column, sum) for every element of the tile.
// Threads form a square; each owns a pack of rows and two packs of columns.
template <class T>
class Elementwise {
 public:
  using Factor = compute_t<T>;
  using Factors = Panel<Factor, kDepth<T>>;
  static constexpr int kStep = 1;

  template <int N>
  static __device__ __forceinline__ Pack<Factor, N> factors(Pack<T, N> from) {
    Pack<Factor, N> to;
    for (int i = 0; i < N; ++i) to.lane[i] = load(from.lane[i]);
    return to;
  }

  __device__ __forceinline__ void add(const Factors& panel, int k) {
    const auto left = read<kPack>(&panel.left[k][y() * kPack]);
    for (int half = 0; half < 2; ++half) {
      const auto right = read<kPack>(&panel.right[k][(half * kSide + x()) * kPack]);
      for (int r = 0; r < kPack; ++r) {
        for (int c = 0; c < kPack; ++c) {
          Factor& m = m_[half][r][c];
          m = std::fma(left.lane[r], right.lane[c], m);
        }
      }
    }
  }

  __device__ __forceinline__ void finish(bool square) {
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < kPack; ++r) {
        for (int c = 0; c < kPack; ++c) {
          sum_[half][r][c] += magnitude(m_[half][r][c], square);
          m_[half][r][c] = 0;
        }
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < kPack; ++r) {
        for (int c = 0; c < kPack; ++c) {
          f(y() * kPack + r, (half * kSide + x()) * kPack + c, sum_[half][r][c]);
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ int x() { return threadIdx.x % kSide; }
  static __device__ __forceinline__ int y() { return threadIdx.x / kSide; }

  Factor m_[2][kPack][kPack] = {};
  Factor sum_[2][kPack][kPack] = {};
};

#ifndef MAS_EMULATE_CUDA  // else python_tests/emulation/cuda_emulation.h has these, too

// Four 8 x 8 matrices of 16-bit numbers in shared memory, of which each lane points to a row: lane
// 8 i + r to row r of matrix i. A lane gets of each, transposed, what multiply_add wants: column
// lane / 4, rows 2 (lane % 4) and the next.
MAS_DEVICE void load_transposed(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}

// c += a b, of 16 x 16 and 16 x 8 numbers of type T. The quarters of a are rows 0 to 7 and 8 to 15
// of columns 0 to 7, then of 8 to 15; the halves of b its rows 0 to 7 and 8 to 15.
template <class T>
MAS_DEVICE void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#define MAS_MMA(type)                                                        \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, float16>) {
    MAS_MMA("f16");
  } else {
    MAS_MMA("bf16");
  }
#undef MAS_MMA
}

#endif

// A warp owns a square of the tile, 2 x 4 products of 16 x 16 by 16 x 8 factors.
template <class T>
class TensorCores {
 public:
  using Factors = Panel<T, kDepth<T>>;
  static constexpr int kStep = 16;

  template <int N>
  static __device__ __forceinline__ Pack<T, N> factors(Pack<T, N> from) {
    return from;
  }

  __device__ __forceinline__ void add(const Factors& panel, int k) {
    // Of four matrices in turn, the left ones go on along the tile's rows first, the right ones
    // along k.
    const int r = lane() % 8;
    const int first = lane() / 8 % 2 * 8;
    const int second = lane() / 16 * 8;
    unsigned left[2][4];
    unsigned right[2][4];  // of two products each
    for (int i = 0; i < 2; ++i) {
      load_transposed(left[i], &panel.left[k + second + r][row() + 16 * i + first]);
      load_transposed(right[i], &panel.right[k + first + r][column() + 16 * i + second]);
    }
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) {
        const unsigned* b = &right[j / 2][j % 2 * 2];
        multiply_add<T>(m_[i][j], left[i], b[0], b[1]);
      }
    }
  }

  __device__ __forceinline__ void finish(bool square) {
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) {
        for (int e = 0; e < 4; ++e) {
          sum_[i][j][e] += magnitude(m_[i][j][e], square);
          m_[i][j][e] = 0;
        }
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) {
        for (int e = 0; e < 4; ++e) {
          f(row() + 16 * i + e / 2 * 8 + lane() / 4, column() + 8 * j + lane() % 4 * 2 + e % 2,
            sum_[i][j][e]);
        }
      }
    }
  }

 private:
  static constexpr int kSquare = 32;
  static constexpr int kAcross = kTileColumns / kSquare;
  static_assert(kTileRows / kSquare * kAcross == kThreads / kWarp);

  static __device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }
  static __device__ __forceinline__ int row() {
    return static_cast<int>(threadIdx.x / kWarp) / kAcross * kSquare;
  }
  static __device__ __forceinline__ int column() {
    return static_cast<int>(threadIdx.x / kWarp) % kAcross * kSquare;
  }

  float m_[2][4][4] = {};
  float sum_[2][4][4] = {};
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <class T>
constexpr bool kOnTensorCores = false;
#elif defined(MAS_EMULATE_CUDA)
template <class T>
constexpr bool kOnTensorCores = std::is_same_v<T, float16>;  // for tests to see both ways
#else
template <class T>
constexpr bool kOnTensorCores = sizeof(T) == 2;
#endif

template <class T>
using Product = std::conditional_t<kOnTensorCores<T>, TensorCores<T>, Elementwise<T>>;

}  // namespace
}  // namespace mas::cuda
