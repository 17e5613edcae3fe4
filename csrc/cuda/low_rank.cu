// The penalty on low-rank updates of weights, its value and the gradients of the factors. A block
// owns a strip of rows and goes along the columns, a tile of the update at a time in shared memory;
// for the right factors' gradients, the same is done with rows and columns exchanged. No matrix of
// a weight's size is ever written. Twin of cpu/low_rank.cpp.
#include "launch.h"

namespace mas::cuda {
namespace {

// Of a tile: columns; of the factors: ranks that are in shared memory at a time; ranks whose
// gradients are. Where there are more, the update is made once more for each such part.
template <class C>
constexpr int kColumns = sizeof(C) == 8 ? 32 : 64;
constexpr int kDepth = 16;
template <class C>
constexpr int kGradients = sizeof(C) == 8 ? 16 : 64;

// As many weights and factors as travel in a kernel's arguments.
struct Batch {
  static constexpr int kWeights = 96;
  static constexpr int kFactors = 176;
  AdaptedWeight weights[kWeights];
  Factor factors[kFactors];
  std::int64_t first_block[kWeights];
  int count;
};
static_assert(sizeof(Batch) <= kTableBytes);

// A weight as its owner sees it: with rows and columns exchanged where columns are owned.
template <bool kExchanged>
struct Side {
  MAS_FN const Strided& own(const Factor& f) { return kExchanged ? f.right : f.left; }
  MAS_FN const Strided& other(const Factor& f) { return kExchanged ? f.left : f.right; }
  MAS_FN const Strided& grad(const Factor& f) { return kExchanged ? f.right_grad : f.left_grad; }

  MAS_FN std::int64_t rows(const AdaptedWeight& w) { return kExchanged ? w.columns : w.rows; }
  MAS_FN std::int64_t columns(const AdaptedWeight& w) { return kExchanged ? w.rows : w.columns; }

  // Element k of an owned row, or of a column, of a factor.
  template <class T>
  MAS_FN T* at(const Strided& matrix, std::int64_t i, std::int64_t k, bool first_is_row) {
    return static_cast<T*>(matrix.data) +
           (first_is_row ? i * matrix.row + k * matrix.column : k * matrix.row + i * matrix.column);
  }
  template <class T>
  MAS_FN T* own_at(const Strided& matrix, std::int64_t row, std::int64_t k) {
    return at<T>(matrix, row, k, !kExchanged);
  }
  template <class T>
  MAS_FN T* other_at(const Strided& matrix, std::int64_t column, std::int64_t k) {
    return at<T>(matrix, column, k, kExchanged);
  }

  template <class O>
  MAS_FN const O& omega(const AdaptedWeight& w, std::int64_t row, std::int64_t column) {
    return static_cast<const O*>(
        w.omega)[kExchanged ? column * w.columns + row : row * w.columns + column];
  }
};

template <class C>
struct Tile {
  C own[kDepth][kStrip];
  C other[kDepth][kColumns<C> + 1];
  C pull[kStrip][kColumns<C> + 1];
  C sum[kGradients<C>][kStrip];
};

// kDepth ranks of a factor, from `rank` on, for a strip of rows and a tile of columns; zeros where
// there are none.
template <bool kExchanged, class C, class T>
MAS_DEVICE void bring(const Factor& f, std::int64_t rank, std::int64_t row, std::int64_t rows,
                      std::int64_t column, std::int64_t columns, Tile<C>& tile) {
  using S = Side<kExchanged>;
  __syncthreads();  // slower threads still read
  for (int i = threadIdx.x; i < kDepth * kStrip; i += kThreads) {
    const int k = i % kDepth;
    const int r = i / kDepth;
    const bool inside = row + r < rows && rank + k < f.rank;
    tile.own[k][r] = inside ? static_cast<C>(f.scale) *
                                  load(*S::template own_at<const T>(S::own(f), row + r, rank + k))
                            : C(0);
  }
  for (int i = threadIdx.x; i < kDepth * kColumns<C>; i += kThreads) {
    const int k = i / kColumns<C>;
    const int c = i % kColumns<C>;
    const bool inside = column + c < columns && rank + k < f.rank;
    tile.other[k][c] =
        inside ? load(*S::template other_at<const T>(S::other(f), column + c, rank + k)) : C(0);
  }
  __syncthreads();
}

// The gradients of `count` ranks of one factor, from `rank` on, for a strip of rows; count 0: none.
// Returns this thread's share of the value.
template <bool kExchanged, class C, class T, class O>
MAS_DEVICE double along(const AdaptedWeight& weight, const Factor* factors, const LowRank& args,
                        const Factor* wanted, std::int64_t rank, int count, std::int64_t row,
                        Tile<C>& tile) {
  using S = Side<kExchanged>;
  constexpr int kOwn = static_cast<int>(kStrip * kColumns<C>) / kThreads;
  constexpr int kApart = kThreads / kColumns<C>;
  const int own_column = threadIdx.x % kColumns<C>;
  const int own_row = threadIdx.x / kColumns<C>;
  const std::int64_t rows = S::rows(weight);
  const std::int64_t columns = S::columns(weight);
  const C factor = finite_factor<C>(2.0 * *args.alpha * weight.unit);
  double value = 0;
  for (int i = threadIdx.x; i < count * kStrip; i += kThreads) {
    tile.sum[i / kStrip][i % kStrip] = 0;
  }
  for (std::int64_t column = 0; column < columns; column += kColumns<C>) {
    C m[kOwn] = {};
    for (std::int64_t f = 0; f < weight.count; ++f) {
      for (std::int64_t k0 = 0; k0 < factors[f].rank; k0 += kDepth) {
        bring<kExchanged, C, T>(factors[f], k0, row, rows, column, columns, tile);
        for (int k = 0; k < kDepth; ++k) {
          const C other = tile.other[k][own_column];
          for (int i = 0; i < kOwn; ++i) {
            m[i] = std::fma(tile.own[k][own_row + i * kApart], other, m[i]);
          }
        }
      }
    }
    for (int i = 0; i < kOwn; ++i) {
      const int r = own_row + i * kApart;
      C half = 0;
      if (row + r < rows && column + own_column < columns) {
        half =
            static_cast<C>(load(S::template omega<O>(weight, row + r, column + own_column))) * m[i];
      }
      value += static_cast<double>(half) * static_cast<double>(m[i]);
      tile.pull[r][own_column] = factor * half;
    }
    for (int k0 = 0; k0 < count; k0 += kDepth) {
      bring<kExchanged, C, T>(*wanted, rank + k0, row, rows, column, columns, tile);
      for (int i = threadIdx.x; i < kDepth * kStrip; i += kThreads) {
        const int k = i / kStrip;
        const int r = i % kStrip;
        if (k0 + k >= count) continue;
        C sum = tile.sum[k0 + k][r];
        for (int c = 0; c < kColumns<C>; ++c) {
          sum = std::fma(tile.pull[r][c], tile.other[k][c], sum);
        }
        tile.sum[k0 + k][r] = sum;
      }
    }
    __syncthreads();  // before the next tile's pulls
  }
  return value;
}

// Gradients are written in the arithmetic's dtype, or added in the factors'.
template <bool kExchanged, class C, class T>
MAS_DEVICE void put(const Factor& f, std::int64_t rank, int count, std::int64_t row,
                    std::int64_t rows, Gradient gradient, const Tile<C>& tile) {
  using S = Side<kExchanged>;
  __syncthreads();
  for (int i = threadIdx.x; i < count * kStrip; i += kThreads) {
    const int k = i / kStrip;
    const int r = i % kStrip;
    if (row + r >= rows) continue;
    const C change = static_cast<C>(f.scale) * tile.sum[k][r];
    if (gradient == Gradient::write) {
      *S::template own_at<C>(S::grad(f), row + r, rank + k) = change;
    } else {
      T& sum = *S::template own_at<T>(S::grad(f), row + r, rank + k);
      sum = store<T>(load(sum) + change);
    }
  }
  __syncthreads();
}

template <bool kExchanged, class T, class O>
__global__ void strips(const Batch __grid_constant__ batch, LowRank args) {
  using C = compute_t<T>;
  using S = Side<kExchanged>;
  __shared__ Tile<C> tile;
  int w = 0;
  while (w + 1 < batch.count && batch.first_block[w + 1] <= blockIdx.x) ++w;
  const AdaptedWeight& weight = batch.weights[w];
  const Factor* factors = batch.factors + weight.first;
  const std::int64_t strip = blockIdx.x - batch.first_block[w];
  const std::int64_t row = strip * kStrip;
  const std::int64_t rows = S::rows(weight);

  double value = 0;
  bool valued = kExchanged;
  if (args.gradient != Gradient::none) {
    for (std::int64_t f = 0; f < weight.count; ++f) {
      if (S::grad(factors[f]).data == nullptr) continue;
      for (std::int64_t rank = 0; rank < factors[f].rank; rank += kGradients<C>) {
        const std::int64_t left = factors[f].rank - rank;
        const int count = static_cast<int>(left < kGradients<C> ? left : kGradients<C>);
        const double found =
            along<kExchanged, C, T, O>(weight, factors, args, &factors[f], rank, count, row, tile);
        if (!valued) value = found;
        valued = true;
        put<kExchanged, C, T>(factors[f], rank, count, row, rows, args.gradient, tile);
      }
    }
  }
  if (kExchanged) return;
  if (!valued) {
    value = along<kExchanged, C, T, O>(weight, factors, args, nullptr, 0, 0, row, tile);
  }
  value = block_sum(value);
  if (threadIdx.x == 0)
    args.partial[weight.first_strip + strip] = *args.alpha * weight.unit * value;
}

__global__ void low_rank_value(LowRank args) {
  const double sum = block_sum(args.partial, args.strips);
  if (threadIdx.x == 0) put_value(args, sum);
}

// One launch over all strips of rows, or of columns, for as many weights as fit its arguments.
template <bool kExchanged, class T, class O>
void launch_strips(const LowRank& args, void* stream) {
  for (std::int64_t w = 0; w < args.count;) {
    Batch batch = {};
    std::int64_t factors = 0;
    std::int64_t blocks = 0;
    for (; w < args.count && batch.count < Batch::kWeights; ++w) {
      AdaptedWeight weight = args.weights[w];
      if (factors + weight.count > Batch::kFactors) break;
      std::copy_n(args.factors + weight.first, weight.count, batch.factors + factors);
      weight.first = factors;
      factors += weight.count;
      batch.weights[batch.count] = weight;
      batch.first_block[batch.count++] = blocks;
      blocks += quotient_up(Side<kExchanged>::rows(weight), kStrip);
    }
    launch(strips<kExchanged, T, O>, blocks, stream, batch, args);
  }
}

}  // namespace

void run(const LowRank& args, void* stream) {
  for (std::int64_t w = 0; w < args.count; ++w) {
    if (args.weights[w].count > Batch::kFactors) {
      throw std::invalid_argument("left: got " + std::to_string(args.weights[w].count) +
                                  " products for one weight, expected at most " +
                                  std::to_string(Batch::kFactors));
    }
  }
  with_float(args.dtype, [&](auto t) {
    with_omega<typename decltype(t)::type>(args.omega_dtype, [&](auto o) {
      using T = typename decltype(t)::type;
      using O = typename decltype(o)::type;
      launch_strips<false, T, O>(args, stream);
      if (args.gradient != Gradient::none) launch_strips<true, T, O>(args, stream);
    });
  });
  launch(low_rank_value, 1, stream, args);
}

}  // namespace mas::cuda
