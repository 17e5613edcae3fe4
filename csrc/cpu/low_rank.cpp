// The penalty on low-rank updates of weights, its value and the gradients of the factors. The
// update is made a tile at a time, in registers, and no matrix of a weight's size is ever written.
// Twin of cuda/low_rank.cu.
//
// Compiled with fused multiply-add, as cpu/per_sample.cpp is: instruction sets agree only to
// rounding.
#include <new>

#include "vectors.h"

namespace mas::cpu::MAS_LEVEL {
namespace {

// A strip's pulls are made for so many panels of columns at a time, which stay in the second-level
// cache.
constexpr std::int64_t kPanels = 16;
// Strips whose gradients of right factors are added up apart, so that threads can share a weight.
constexpr std::int64_t kMostGroups = 16;
// A tile of a product that runs along the columns: kSide rows by kSide ranks, each a vector.
constexpr int kSide = kRows == 8 ? 4 : 2;

static_assert(kStrip % kRows == 0 && kRows % kSide == 0);

// How one weight's factors are packed: side by side, those with gradients first, `active` ranks of
// them, padded with zeros to whole tiles.
struct Plan {
  Plan(const LowRank& args, const AdaptedWeight& weight) : args(args), weight(weight) {
    for (std::int64_t f = 0; f < weight.count; ++f) {
      if (wants_gradient(f)) active += factor(f).rank;
      ranks += factor(f).rank;
    }
    const std::int64_t padding = quotient_up(active, kRows) * kRows - active;
    active += padding;
    ranks += padding;
    strips = quotient_up(weight.rows, kStrip);
    groups = least(strips, kMostGroups);
  }

  const Factor& factor(std::int64_t f) const { return args.factors[weight.first + f]; }

  bool wants_gradient(std::int64_t f) const {
    return args.gradient != Gradient::none &&
           (factor(f).left_grad.data != nullptr || factor(f).right_grad.data != nullptr);
  }

  // f(factor, the place of its first rank): those with gradients, or the others behind them.
  template <class F>
  void for_each_factor(bool with_gradient, F f) const {
    std::int64_t place = with_gradient ? 0 : active;
    for (std::int64_t i = 0; i < weight.count; ++i) {
      if (wants_gradient(i) != with_gradient) continue;
      f(factor(i), place);
      place += factor(i).rank;
    }
  }

  template <class F>
  void for_each_factor(F f) const {
    for_each_factor(true, f);
    for_each_factor(false, f);
  }

  std::int64_t group_begin(std::int64_t group) const { return strips * group / groups; }

  const LowRank& args;
  const AdaptedWeight& weight;
  std::int64_t active = 0;
  std::int64_t ranks = 0;
  std::int64_t strips = 0;
  std::int64_t groups = 0;
};

template <class C>
std::int64_t panels_of(const AdaptedWeight& weight) {
  return quotient_up(weight.columns, kWidth<C>);
}

// Where packed factors and sums lie: those that threads share, and each one's own.
template <class C>
struct Room {
  C* right;      // [panel][rank][kWidth]
  C* right_sum;  // [group][panel][active rank][kWidth]
};

template <class C>
struct Own {
  C* left;      // [tile of rows][rank][kRows], scaled
  C* turned;    // [tile of active ranks][row][kRows], scaled
  C* pull;      // [panel][row][kWidth]
  C* left_sum;  // [row][active rank][kLane]
};

template <class T>
MAS_FN const T* at(const Strided& matrix, std::int64_t row, std::int64_t column) {
  return static_cast<const T*>(matrix.data) + row * matrix.row + column * matrix.column;
}

template <class C, class T>
void pack_right(const Plan& plan, std::int64_t panel, C* to) noexcept {
  std::memset(to, 0, plan.ranks * kWidth<C> * sizeof(C));
  const std::int64_t column = panel * kWidth<C>;
  const std::int64_t width = least(kWidth<C>, plan.weight.columns - column);
  plan.for_each_factor([&](const Factor& factor, std::int64_t place) {
    for (std::int64_t k = 0; k < factor.rank; ++k) {
      const T* from = at<T>(factor.right, k, column);
      C* row = to + (place + k) * kWidth<C>;
      if (factor.right.column == 1) {
        convert(from, row, width);
      } else {
        for (std::int64_t c = 0; c < width; ++c) row[c] = load(from[c * factor.right.column]);
      }
    }
  });
}

template <class C, class T>
void pack_left(const Plan& plan, std::int64_t first, std::int64_t rows,
               const Own<C>& own) noexcept {
  std::memset(own.left, 0, kStrip * plan.ranks * sizeof(C));
  std::memset(own.turned, 0, kStrip * plan.active * sizeof(C));
  plan.for_each_factor([&](const Factor& factor, std::int64_t place) {
    const C scale = static_cast<C>(factor.scale);
    for (std::int64_t row = 0; row < rows; ++row) {
      C* left = own.left + row / kRows * plan.ranks * kRows + row % kRows;
      for (std::int64_t k = 0; k < factor.rank; ++k) {
        const std::int64_t rank = place + k;
        const C scaled = scale * load(*at<T>(factor.left, first + row, k));
        left[rank * kRows] = scaled;
        if (rank < plan.active) {
          own.turned[(rank / kRows * kStrip + row) * kRows + rank % kRows] = scaled;
        }
      }
    }
  });
}

// The pulls factor * Omega E of a tile, and alpha's share of the value.
template <class C, class O>
MAS_FN void pull_tile(const C* left, const C* right, std::int64_t ranks, const O* omega,
                      std::int64_t stride, C factor, C* pull, double* value) {
  using Vec = typename Vector<C>::type;
  Vec m[kRows][kVectors] = {};
  for (std::int64_t k = 0; k < ranks; ++k, left += kRows, right += kWidth<C>) {
    const Vec* columns = reinterpret_cast<const Vec*>(right);
    in_tile<kVectors>([&](int r, int v) { m[r][v] += left[r] * columns[v]; });
  }
  Vec total = {};
  in_tile<kVectors>([&](int r, int v) {
    C lanes[kLane<C>];
    for (std::int64_t l = 0; l < kLane<C>; ++l) {
      lanes[l] = static_cast<C>(load(omega[r * stride + v * kLane<C> + l]));
    }
    Vec weights;
    std::memcpy(&weights, lanes, sizeof(weights));
    const Vec half = weights * m[r][v];
    total += half * m[r][v];
    reinterpret_cast<Vec*>(pull)[r * kVectors + v] = factor * half;
  });
  for (std::int64_t l = 0; l < kLane<C>; ++l) value[l] += static_cast<double>(total[l]);
}

// right_sum += turned^T pull, for a tile of ranks.
template <class C>
MAS_FN void add_right(const C* turned, const C* pull, C* sum) {
  using Vec = typename Vector<C>::type;
  Vec* total = reinterpret_cast<Vec*>(sum);
  Vec m[kRows][kVectors];
  in_tile<kVectors>([&](int r, int v) { m[r][v] = total[r * kVectors + v]; });
  for (std::int64_t row = 0; row < kStrip; ++row, turned += kRows, pull += kWidth<C>) {
    const Vec* columns = reinterpret_cast<const Vec*>(pull);
    in_tile<kVectors>([&](int r, int v) { m[r][v] += turned[r] * columns[v]; });
  }
  in_tile<kVectors>([&](int r, int v) { total[r * kVectors + v] = m[r][v]; });
}

// left_sum += pull right^T, for a tile of rows and ranks, lane by lane, over some panels.
template <class C>
MAS_FN void add_left(const C* pull, const C* right, std::int64_t panels, std::int64_t ranks,
                     std::int64_t active, C* sum) {
  using Vec = typename Vector<C>::type;
  Vec* total = reinterpret_cast<Vec*>(sum);
  Vec m[kSide][kSide];
#pragma GCC unroll 4
  for (int r = 0; r < kSide; ++r) {
#pragma GCC unroll 4
    for (int k = 0; k < kSide; ++k) m[r][k] = total[r * active + k];
  }
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    const Vec* rows = reinterpret_cast<const Vec*>(pull + panel * kStrip * kWidth<C>);
    const Vec* columns = reinterpret_cast<const Vec*>(right + panel * ranks * kWidth<C>);
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
      for (int r = 0; r < kSide; ++r) {
#pragma GCC unroll 4
        for (int k = 0; k < kSide; ++k) {
          m[r][k] += rows[r * kVectors + v] * columns[k * kVectors + v];
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kSide; ++r) {
#pragma GCC unroll 4
    for (int k = 0; k < kSide; ++k) total[r * active + k] = m[r][k];
  }
}

// A gradient: written in the arithmetic's dtype, or added in the factors'.
template <class T, class C>
MAS_FN void put(Gradient gradient, const Strided& to, std::int64_t row, std::int64_t column,
                C change) {
  const std::int64_t at = row * to.row + column * to.column;
  if (gradient == Gradient::write) {
    static_cast<C*>(to.data)[at] = change;
  } else {
    T& sum = static_cast<T*>(to.data)[at];
    sum = store<T>(load(sum) + change);
  }
}

// One strip of a weight: its part of the value, its rows of the left factors' gradients, and what
// it adds to those of the right ones.
template <class C, class T, class O>
double strip(const Plan& plan, std::int64_t number, C factor, const C* right, C* right_sum,
             const Own<C>& own) noexcept {
  const AdaptedWeight& weight = plan.weight;
  const std::int64_t first = number * kStrip;
  const std::int64_t rows = least(kStrip, weight.rows - first);
  const std::int64_t all = panels_of<C>(weight);
  pack_left<C, T>(plan, first, rows, own);
  std::memset(own.left_sum, 0, kStrip * plan.active * kLane<C> * sizeof(C));
  double value[kLane<C>] = {};
  for (std::int64_t begin = 0; begin < all; begin += kPanels) {
    const std::int64_t panels = least(kPanels, all - begin);
    for (std::int64_t p = 0; p < panels; ++p) {
      const std::int64_t column = (begin + p) * kWidth<C>;
      const std::int64_t width = least(kWidth<C>, weight.columns - column);
      for (std::int64_t row = 0; row < kStrip; row += kRows) {
        const O* omega = static_cast<const O*>(weight.omega) +
                         least(first + row, weight.rows - 1) * weight.columns + column;
        std::int64_t stride = weight.columns;
        O room[kRows * kWidth<C>] = {};
        if (width < kWidth<C> || row + kRows > rows) {
          for (std::int64_t r = 0; r < kRows && row + r < rows; ++r) {
            for (std::int64_t c = 0; c < width; ++c)
              room[r * kWidth<C> + c] = omega[r * stride + c];
          }
          omega = room;
          stride = kWidth<C>;
        }
        pull_tile(own.left + row * plan.ranks, right + (begin + p) * plan.ranks * kWidth<C>,
                  plan.ranks, omega, stride, factor, own.pull + (p * kStrip + row) * kWidth<C>,
                  value);
      }
      for (std::int64_t k = 0; k < plan.active; k += kRows) {
        add_right(own.turned + k * kStrip, own.pull + p * kStrip * kWidth<C>,
                  right_sum + ((begin + p) * plan.active + k) * kWidth<C>);
      }
    }
    for (std::int64_t row = 0; row < kStrip; row += kSide) {
      for (std::int64_t k = 0; k < plan.active; k += kSide) {
        add_left(own.pull + row * kWidth<C>, right + (begin * plan.ranks + k) * kWidth<C>, panels,
                 plan.ranks, plan.active, own.left_sum + (row * plan.active + k) * kLane<C>);
      }
    }
  }
  plan.for_each_factor(true, [&](const Factor& f, std::int64_t place) {
    if (f.left_grad.data == nullptr) return;
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t k = 0; k < f.rank; ++k) {
        const C* lanes = own.left_sum + (row * plan.active + place + k) * kLane<C>;
        C sum = 0;
        for (std::int64_t l = 0; l < kLane<C>; ++l) sum += lanes[l];
        put<T>(plan.args.gradient, f.left_grad, first + row, k, static_cast<C>(f.scale) * sum);
      }
    }
  });
  double sum = 0;
  for (const double lane : value) sum += lane;
  return sum;
}

// The right factors' gradients in a panel of columns: the groups' sums, in order.
template <class C, class T>
void write_right(const Plan& plan, std::int64_t panel, const C* right_sum) noexcept {
  const std::int64_t column = panel * kWidth<C>;
  const std::int64_t width = least(kWidth<C>, plan.weight.columns - column);
  const std::int64_t size = panels_of<C>(plan.weight) * plan.active * kWidth<C>;
  plan.for_each_factor(true, [&](const Factor& f, std::int64_t place) {
    if (f.right_grad.data == nullptr) return;
    for (std::int64_t k = 0; k < f.rank; ++k) {
      const C* from = right_sum + (panel * plan.active + place + k) * kWidth<C>;
      for (std::int64_t c = 0; c < width; ++c) {
        C sum = 0;
        for (std::int64_t group = 0; group < plan.groups; ++group) sum += from[group * size + c];
        put<T>(plan.args.gradient, f.right_grad, k, column + c, sum);
      }
    }
  });
}

// Starting threads costs more than this many multiply-adds.
constexpr std::int64_t kSerialWork = 1 << 18;

template <class C, class T, class O>
void run_typed(const LowRank& args, int threads) {
  std::int64_t right_size = 0, sum_size = 0, ranks = 0, active = 0, work = 0;
  const auto most = [](std::int64_t& a, std::int64_t b) { a = a > b ? a : b; };
  for (std::int64_t w = 0; w < args.count; ++w) {
    const Plan plan(args, args.weights[w]);
    const std::int64_t width = panels_of<C>(plan.weight) * kWidth<C>;
    most(right_size, plan.ranks * width);
    most(sum_size, plan.groups * plan.active * width);
    most(ranks, plan.ranks);
    most(active, plan.active);
    work += plan.weight.rows * plan.weight.columns * plan.ranks;
  }
  const int team = work < kSerialWork ? 1 : threads;
  const std::int64_t pull_size = kPanels * kStrip * kWidth<C>;
  const std::int64_t own_size = kStrip * (ranks + active * (1 + kLane<C>)) + pull_size;
  constexpr std::align_val_t alignment{64};
  C* const room = static_cast<C*>(
      ::operator new((right_size + sum_size + team * own_size) * sizeof(C), alignment));
  C* const right = room;
  C* const right_sum = room + right_size;
  int thread_count = 0;
#pragma omp parallel num_threads(team) if (team > 1)
  {
    int thread;
#pragma omp atomic capture
    thread = thread_count++;
    C* const start = right_sum + sum_size + thread * own_size;
    const Own<C> own{start + pull_size, start + pull_size + kStrip * ranks, start,
                     start + pull_size + kStrip * (ranks + active)};
    for (std::int64_t w = 0; w < args.count; ++w) {
      const Plan plan(args, args.weights[w]);
      const std::int64_t panels = panels_of<C>(plan.weight);
      const C factor = finite_factor<C>(2.0 * *args.alpha * plan.weight.unit);
#pragma omp for schedule(static)
      for (std::int64_t p = 0; p < panels; ++p) {
        pack_right<C, T>(plan, p, right + p * plan.ranks * kWidth<C>);
      }
#pragma omp for schedule(dynamic)
      for (std::int64_t g = 0; g < plan.groups; ++g) {
        C* sum = right_sum + g * panels * plan.active * kWidth<C>;
        std::memset(sum, 0, panels * plan.active * kWidth<C> * sizeof(C));
        for (std::int64_t s = plan.group_begin(g); s < plan.group_begin(g + 1); ++s) {
          args.partial[plan.weight.first_strip + s] =
              *args.alpha * plan.weight.unit * strip<C, T, O>(plan, s, factor, right, sum, own);
        }
      }
#pragma omp for schedule(static)
      for (std::int64_t p = 0; p < panels; ++p) write_right<C, T>(plan, p, right_sum);
    }
  }
  ::operator delete(room, alignment);
}

}  // namespace

void run(const LowRank& args, int threads) {
  with_float(args.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    with_omega<typename decltype(t)::type>(args.omega_dtype, [&](auto o) {
      run_typed<compute_t<T>, T, typename decltype(o)::type>(args, threads);
    });
  });
  double sum = 0;
  for (std::int64_t s = 0; s < args.strips; ++s) sum += args.partial[s];
  put_value(args, sum);
}

}  // namespace mas::cpu::MAS_LEVEL
