// Sums over samples of abs, or of the square, of each sample's gradient of a weight. That gradient
// is a product of matrices, whose elements go from registers into the sum. Twin of
// cuda/per_sample.cu.
//
// Compiled with fused multiply-add, without which it takes twice as long: here, instruction sets
// agree only to rounding. Every element is summed over positions and then over samples, each in
// ascending order, whatever the number of threads.
#include <new>

#include "vectors.h"

namespace mas::cpu::MAS_LEVEL {
namespace {

// What a thread works on at a time lies in the second-level cache: a block of omega, and panels of
// the two operands for it. Columns are (tap, channel) pairs, flattened.
constexpr std::int64_t kBlockRows = 256;
constexpr std::int64_t kBlockColumns = 384;
constexpr std::int64_t kDepth = 128;  // positions
constexpr std::int64_t kPad = 16;     // panels a power of two apart would compete for cache lines

template <class C>
struct alignas(64) Scratch {
  C left[kBlockRows / kRows][kDepth * kRows + kPad];
  C right[kBlockColumns / kWidth<C>][kDepth * kWidth<C> + kPad];
  C product[kBlockColumns / kWidth<C>][kBlockRows / kRows][kRows * kWidth<C>];
  C sum[kBlockColumns / kWidth<C>][kBlockRows / kRows][kRows * kWidth<C>];
};

// One thread's piece of work: a block of one group's omega, and a part of the batch.
struct Item {
  std::int64_t split, group, row, rows, column, columns;
};

// Some samples' positions, those that the panels hold at a time: `samples` times `depth`.
struct Stage {
  std::int64_t sample, samples, position, depth;
};

template <class C, class T>
void pack_left(const PerSample& args, const Item& item, const Stage& stage, Scratch<C>& scratch) {
  for (std::int64_t s = 0; s < stage.samples; ++s) {
    const T* from = static_cast<const T*>(args.grad) + (stage.sample + s) * args.grad_sample +
                    stage.position * args.grad_position + item.group * args.outputs + item.row;
    for (std::int64_t k = 0; k < stage.depth; ++k, from += args.grad_position) {
      const std::int64_t at = (s * stage.depth + k) * kRows;
      std::int64_t row = 0;
      for (; row + kRows <= item.rows; row += kRows) {
        convert(from + row, &scratch.left[row / kRows][at], Constant<kRows>{});
      }
      if (row < item.rows) convert(from + row, &scratch.left[row / kRows][at], item.rows - row);
    }
  }
}

// The rows that the taps see are gathered as they are packed: no unfolded input is ever made.
template <class C, class T>
void pack_right(const PerSample& args, const Item& item, const Stage& stage, Scratch<C>& scratch) {
  static const T zeros[kWidth<C>] = {};
  for (std::int64_t column = 0, width; column < item.columns; column += width) {
    const std::int64_t tap = (item.column + column) / args.channels;
    const std::int64_t channel = (item.column + column) % args.channels;
    const std::int64_t lane = column % kWidth<C>;
    width = least(least(args.channels - channel, kWidth<C> - lane), item.columns - column);
    const std::int32_t* rows =
        args.rows == nullptr ? nullptr : args.rows + tap * args.positions + stage.position;
    C* to = &scratch.right[column / kWidth<C>][lane];
    const auto gather = [&](auto lanes) __attribute__((always_inline)) {
      for (std::int64_t s = 0; s < stage.samples; ++s) {
        const T* sample = static_cast<const T*>(args.input) +
                          (stage.sample + s) * args.input_sample + item.group * args.channels +
                          channel;
        for (std::int64_t k = 0; k < stage.depth; ++k, to += kWidth<C>) {
          const std::int64_t row = rows == nullptr ? stage.position + k : rows[k];
          convert(row < 0 ? zeros : sample + row * args.input_row, to, lanes);
        }
      }
    };
    if (width == kWidth<C>) {
      gather(Constant<kWidth<C>>{});
    } else if (width == 1) {
      gather(Constant<1>{});  // grey images
    } else if (width == 3) {
      gather(Constant<3>{});  // colour images
    } else {
      gather(width);
    }
  }
}

// sum += abs(m), or its square.
template <class Vec>
MAS_FN void add(Vec& sum, const Vec& m, bool square) {
  using Bits = decltype(m < m);
  const Bits all_but_sign = ~reinterpret_cast<Bits>(-Vec{});
  sum += square ? m * m : reinterpret_cast<Vec>(reinterpret_cast<Bits>(m) & all_but_sign);
}

// The panels become their abs, or squares.
template <class C>
void measure_panels(const Item& item, const Stage& stage, bool square, Scratch<C>& scratch) {
  using Vec = typename Vector<C>::type;
  const auto measure = [&](C* panel, std::int64_t size) {
    for (std::int64_t i = 0; i < size; i += kLane<C>) {
      Vec* vector = reinterpret_cast<Vec*>(panel + i);
      Vec measured = {};
      add(measured, *vector, square);
      *vector = measured;
    }
  };
  for (std::int64_t i = 0; i * kRows < item.rows; ++i) {
    measure(scratch.left[i], quotient_up(stage.depth * kRows, kLane<C>) * kLane<C>);
  }
  for (std::int64_t j = 0; j * kWidth<C> < item.columns; ++j) {
    measure(scratch.right[j], stage.depth * kWidth<C>);
  }
}

// One tile of the product, for one sample after another; from one stage to the next when a sample
// has more positions than a stage.
template <class C, int V>
void multiply(const C* left, const C* right, const Stage& stage, bool first, bool last, bool square,
              C* product, C* sum) noexcept {
  using Vec = typename Vector<C>::type;
  Vec* kept = reinterpret_cast<Vec*>(product);
  Vec* total = reinterpret_cast<Vec*>(sum);
  for (std::int64_t s = 0; s < stage.samples; ++s) {
    Vec m[kRows][V] = {};
    if (!first) in_tile<V>([&](int r, int v) { m[r][v] = kept[r * kVectors + v]; });
    for (std::int64_t k = 0; k < stage.depth; ++k, left += kRows, right += kWidth<C>) {
      const Vec* columns = reinterpret_cast<const Vec*>(right);
      in_tile<V>([&](int r, int v) { m[r][v] += left[r] * columns[v]; });
    }
    if (last) {
      in_tile<V>([&](int r, int v) { add(total[r * kVectors + v], m[r][v], square); });
    } else {
      in_tile<V>([&](int r, int v) { kept[r * kVectors + v] = m[r][v]; });
    }
  }
}

template <class C>
void multiply_block(const Item& item, const Stage& stage, bool first, bool last, bool square,
                    Scratch<C>& scratch) {
  for (std::int64_t j = 0; j * kWidth<C> < item.columns; ++j) {
    const std::int64_t vectors = quotient_up(item.columns - j * kWidth<C>, kLane<C>);
    const auto tile = vectors == 1   ? multiply<C, 1>
                      : vectors == 2 ? multiply<C, 2>
                                     : multiply<C, kVectors>;
    for (std::int64_t i = 0; i * kRows < item.rows; ++i) {
      tile(scratch.left[i], scratch.right[j], stage, first, last, square, scratch.product[j][i],
           scratch.sum[j][i]);
    }
  }
}

// Where a sample has one position, abs(l r) = abs(l) abs(r), and the sum over samples is a product
// of matrices itself: samples take the place of positions, and the operands are measured instead.
PerSample as_positions(PerSample args) {
  args.positions = args.batch;
  args.grad_position = args.grad_sample;
  args.input_row = args.input_sample;
  args.batch = 1;
  return args;
}

template <bool measured, class C, class T>
void add_block(const PerSample& args, const Item& item, Scratch<C>& scratch) {
  const std::int64_t tiles = quotient_up(item.rows, kRows);
  for (std::int64_t j = 0; j * kWidth<C> < item.columns; ++j) {
    std::memset(scratch.sum[j], 0, tiles * sizeof(scratch.sum[j][0]));
  }
  // The edges of a block that is no whole number of tiles are multiplied too, and dropped.
  const std::int64_t ragged_row = item.rows / kRows, ragged_column = item.columns / kWidth<C>;
  if (item.rows % kRows > 0) std::memset(scratch.left[ragged_row], 0, sizeof(scratch.left[0]));
  if (item.columns % kWidth<C> > 0) {
    std::memset(scratch.right[ragged_column], 0, sizeof(scratch.right[0]));
  }
  const Cut depths(args.positions, kDepth, 1);
  const std::int64_t samples = kDepth / least(args.positions, kDepth);
  const std::int64_t end = first_sample(args, item.split + 1);
  for (std::int64_t b = first_sample(args, item.split); b < end; b += samples) {
    for (std::int64_t d = 0; d < depths.count; ++d) {
      const Stage stage{b, least(samples, end - b), depths.begin(d), depths.size_of(d)};
      pack_left<C, T>(args, item, stage, scratch);
      pack_right<C, T>(args, item, stage, scratch);
      if (measured) measure_panels(item, stage, args.square, scratch);
      multiply_block(item, stage, d == 0, d + 1 == depths.count, args.square && !measured, scratch);
    }
  }
  const std::int64_t columns = args.taps * args.channels;
  C* to = destination<C>(args, item.split) + (item.group * args.outputs + item.row) * columns +
          item.column;
  for (std::int64_t r = 0; r < item.rows; ++r, to += columns) {
    for (std::int64_t c = 0; c < item.columns; ++c) {
      to[c] += scratch.sum[c / kWidth<C>][r / kRows][r % kRows * kWidth<C> + c % kWidth<C>];
    }
  }
}

// One output and one channel a group: vectors run over groups instead, which lie side by side. A
// few taps at once, because they see the same gradient.
constexpr int kBlockVectors = 4;
constexpr int kBlockTaps = 3;
template <class C>
constexpr std::int64_t kBlockGroups = kBlockVectors * kLane<C>;

template <class C, class T>
MAS_FN typename Vector<C>::type vector_at(const T* from) {
  C lanes[kLane<C>];
  for (int l = 0; l < kLane<C>; ++l) lanes[l] = load(from[l]);
  typename Vector<C>::type vector;
  std::memcpy(&vector, lanes, sizeof(vector));
  return vector;
}

// What a last block has of `groups` is moved to where whole vectors can be read.
template <bool last, class T>
MAS_FN const T* whole(const T* from, std::int64_t groups, T* room) {
  if constexpr (!last) return from;
  for (std::int64_t i = 0; i < groups; ++i) room[i] = from[i];
  return room;
}

template <bool last, class C, class T>
void add_depthwise(const PerSample& args, std::int64_t split, std::int64_t group,
                   std::int64_t first_tap) noexcept {
  const std::int64_t groups = last ? args.groups - group : kBlockGroups<C>;
  using Vec = typename Vector<C>::type;
  static const T zeros[kBlockGroups<C>] = {};
  T left_room[kBlockGroups<C>] = {};
  T right_room[kBlockGroups<C>] = {};
  Vec sum[kBlockTaps][kBlockVectors] = {};
  for (std::int64_t b = first_sample(args, split); b < first_sample(args, split + 1); ++b) {
    const T* grad = static_cast<const T*>(args.grad) + b * args.grad_sample + group;
    const T* input = static_cast<const T*>(args.input) + b * args.input_sample + group;
    Vec m[kBlockTaps][kBlockVectors] = {};
    for (std::int64_t p = 0; p < args.positions; ++p) {
      const T* left = whole<last>(grad + p * args.grad_position, groups, left_room);
#pragma GCC unroll 3
      for (int t = 0; t < kBlockTaps; ++t) {
        const std::int64_t tap = first_tap + t;
        const std::int64_t row = tap >= args.taps       ? -1
                                 : args.rows == nullptr ? p
                                                        : args.rows[tap * args.positions + p];
        const T* right =
            whole<last>(row < 0 ? zeros : input + row * args.input_row, groups, right_room);
#pragma GCC unroll 4
        for (int v = 0; v < kBlockVectors; ++v) {
          m[t][v] += vector_at<C>(left + v * kLane<C>) * vector_at<C>(right + v * kLane<C>);
        }
      }
    }
    for (int t = 0; t < kBlockTaps; ++t) {
      for (int v = 0; v < kBlockVectors; ++v) add(sum[t][v], m[t][v], args.square);
    }
  }
  C* to = destination<C>(args, split) + group * args.taps + first_tap;
  for (std::int64_t t = 0; t < least(kBlockTaps, args.taps - first_tap); ++t) {
    const C* element = reinterpret_cast<const C*>(sum[t]);
    for (std::int64_t i = 0; i < groups; ++i) to[i * args.taps + t] += element[i];
  }
}

template <class C>
void add_splits(const PerSample& args, [[maybe_unused]] int team) {
  const Cut parts(size_of(args), kChunk, 1);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (std::int64_t part = 0; part < parts.count; ++part) {
    C* omega = static_cast<C*>(args.omega) + parts.begin(part);
    for (std::int64_t split = 0; split < args.splits; ++split) {
      const C* from = destination<C>(args, split) + parts.begin(part);
      for (std::int64_t i = 0; i < parts.size_of(part); ++i) omega[i] += from[i];
    }
  }
}

template <class C, class T>
void run_depthwise(const PerSample& args, [[maybe_unused]] int team) {
  const std::int64_t blocks = quotient_up(args.groups, kBlockGroups<C>);
  const std::int64_t taps = quotient_up(args.taps, kBlockTaps);
#pragma omp parallel for num_threads(team) schedule(dynamic) if (team > 1)
  for (std::int64_t i = 0; i < blocks * taps * args.splits; ++i) {
    const std::int64_t group = i / taps % blocks * kBlockGroups<C>;
    const auto add = group + kBlockGroups<C> > args.groups ? add_depthwise<true, C, T>
                                                           : add_depthwise<false, C, T>;
    add(args, i / (blocks * taps), group, i % taps * kBlockTaps);
  }
}

template <bool measured, class C, class T>
void run_blocks(const PerSample& args, int team) {
  Cut rows(args.outputs, kBlockRows, kRows);
  Cut columns(args.taps * args.channels, kBlockColumns, kLane<C>);
  const auto items = [&] { return args.splits * args.groups * rows.count * columns.count; };
  // Smaller blocks have the operands read more often, but threads that idle are worse. No bit
  // depends on it.
  for (int shrink = 2; shrink <= 4 && items() < 4 * (team - 1); shrink *= 2) {
    rows = Cut(args.outputs, kBlockRows / shrink, kRows);
    columns = Cut(args.taps * args.channels, kBlockColumns / shrink, kLane<C>);
  }
  team = static_cast<int>(least(team, items()));
  constexpr std::align_val_t alignment{alignof(Scratch<C>)};
  auto* scratch = static_cast<Scratch<C>*>(::operator new(team * sizeof(Scratch<C>), alignment));
  int threads = 0;
#pragma omp parallel num_threads(team) if (team > 1)
  {
    int thread;
#pragma omp atomic capture
    thread = threads++;
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < items(); ++i) {
      const std::int64_t column = i % columns.count;
      const std::int64_t row = i / columns.count % rows.count;
      const std::int64_t group = i / columns.count / rows.count % args.groups;
      const std::int64_t split = i / columns.count / rows.count / args.groups;
      add_block<measured, C, T>(args,
                                {split, group, rows.begin(row), rows.size_of(row),
                                 columns.begin(column), columns.size_of(column)},
                                scratch[thread]);
    }
  }
  ::operator delete(scratch, alignment);
}

// Starting threads costs more than this many multiply-adds.
constexpr std::int64_t kSerialWork = 1 << 18;

template <class C, class T>
void add_all(const PerSample& args, int threads) {
  const int team = args.batch * args.positions * size_of(args) < kSerialWork ? 1 : threads;
  if (args.outputs == 1 && args.channels == 1) {
    run_depthwise<C, T>(args, team);
  } else if (args.positions == 1 && args.rows == nullptr && args.splits == 1) {
    run_blocks<true, C, T>(as_positions(args), team);
  } else {
    run_blocks<false, C, T>(args, team);
  }
  if (args.splits > 1) add_splits<C>(args, team);
}

}  // namespace

void run(const PerSample& args, int threads) {
  if (args.batch == 0 || args.positions == 0 || size_of(args) == 0) return;
  with_float(args.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    add_all<compute_t<T>, T>(args, threads);
  });
}

}  // namespace mas::cpu::MAS_LEVEL
