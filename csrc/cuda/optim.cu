// Optimizers' steps with the penalty in them, in one pass over memory. Twin of cpu/optim.cpp.
#include "launch.h"

namespace mas::cuda {
namespace {

MAS_DEVICE bool overflowed(const Entering& entering) {
  return entering.overflow != nullptr && *entering.overflow != 0.0F;
}

template <class T, class O, int M, class Rule>
__global__ void optimize_chunks(const TableOf<Trained> __grid_constant__ table, State state,
                                Rule rule, Entering entering) {
  using C = compute_t<T>;
  if (overflowed(entering)) return;
  const auto chunk = chunk_of(table.segments, table.count, chunk_number(table));
  const Trained& segment = chunk.segment;
  const bool held = segment.offset >= 0;
  if (!held) state.rows = 0;
  const std::int64_t offset = held ? segment.offset + chunk.begin : 0;
  T* theta = static_cast<T*>(segment.theta) + chunk.begin;
  const T* grad = static_cast<const T*>(segment.grad) + chunk.begin;
  const O* omega = static_cast<const O*>(state.omega) + offset;
  const C* anchor = static_cast<const C*>(state.anchor) + offset;
  const double largest = largest_alpha(state.alpha, state.rows);
  const double scale = entering.scale == nullptr ? 1.0 : static_cast<double>(*entering.scale);
  const auto step = step_of<C>(rule, segment.step);
  const C unscale = static_cast<C>(1.0 / scale);
  const C strength = finite_factor<C>(2.0 * eta_of(rule) * largest);

  T* moments[kMoments] = {};
  bool packs = aligned(theta, grad, omega, anchor) && rows_aligned(state, omega, anchor);
  for (int m = 0; m < M; ++m) {
    moments[m] = static_cast<T*>(segment.moments[m]) + chunk.begin;
    packs = packs && aligned(moments[m]);
  }
  for_each_pack(chunk.size, packs, [&](std::int64_t i, auto lanes) {
    constexpr int N = decltype(lanes)::value;
    auto x = read<N>(theta + i);
    const auto g = read<N>(grad + i);
    Pack<T, N> own[kMoments] = {};
    for (int m = 0; m < M; ++m) own[m] = read<N>(moments[m] + i);
    C gradient[N];
    for (int l = 0; l < N; ++l) gradient[l] = unscale * load(g.lane[l]);
    if (!entering.proximal) {
      for_each_row<N>(state, omega + i, anchor + i, [&](double alpha, auto w, auto a) {
        const C factor = finite_factor<C>(2.0 * alpha);
        for (int l = 0; l < N; ++l) {
          const auto p = pull<C>(load(w.lane[l]), load(x.lane[l]), a.lane[l]);
          gradient[l] += factor * p.half_gradient;
        }
      });
    }
    Moved<C> next[N];
    for (int l = 0; l < N; ++l) {
      Moments<C> m = {load(own[0].lane[l]), load(own[1].lane[l]), load(own[2].lane[l])};
      next[l] = moved<M, C>(step, load(x.lane[l]), gradient[l], m);
      own[0].lane[l] = store<T>(m.first);
      own[1].lane[l] = store<T>(m.second);
      own[2].lane[l] = store<T>(m.third);
    }
    if (entering.proximal && state.rows > 0) {
      Target<C> target[N] = {};
      bool first = true;
      for_each_row<N>(state, omega + i, anchor + i, [&](double alpha, auto w, auto a) {
        const C share = static_cast<C>(relative_alpha(alpha, largest));
        for (int l = 0; l < N; ++l) {
          const C weight = share * static_cast<C>(load(w.lane[l]));
          const C distance = a.lane[l] - next[l].theta;
          target[l] =
              first ? Target<C>{weight, distance} : with_task<C>(target[l], weight, distance);
        }
        first = false;
      });
      for (int l = 0; l < N; ++l) {
        next[l].theta =
            proximal_element<C>(next[l].theta, target[l], divided<C>(strength, next[l].divisor));
      }
    }
    for (int l = 0; l < N; ++l) x.lane[l] = store<T>(next[l].theta);
    write(theta + i, x);
    for (int m = 0; m < M; ++m) write(moments[m] + i, own[m]);
  });
}

__global__ void count_steps(const TableOf<Trained> __grid_constant__ table, Entering entering) {
  if (overflowed(entering)) return;
  for (std::int64_t i = threadIdx.x; i < table.count; i += kThreads) {
    *table.segments[i].step += 1.0F;
  }
}

template <int M, class Rule>
void optimize(ListOf<Trained> segments, DType theta, State state, DType omega, const Rule& rule,
              Entering entering, void* stream) {
  with_state(theta, omega, [&](auto t, auto o) {
    using T = typename decltype(t)::type;
    using O = typename decltype(o)::type;
    for_each_table(segments, [&](const auto& table, std::int64_t chunks, std::int64_t) {
      launch(optimize_chunks<T, O, M, Rule>, chunks, stream, table, state, rule, entering);
    });
  });
}

}  // namespace

void adamw(ListOf<Trained> segments, DType theta, State state, DType omega, AdamW rule,
           Entering entering, void* stream) {
  for_each_table(segments, [&](const auto& table, std::int64_t, std::int64_t) {
    launch(count_steps, 1, stream, table, entering);
  });
  const auto run = rule.amsgrad ? optimize<3, AdamW> : optimize<2, AdamW>;
  run(segments, theta, state, omega, rule, entering, stream);
}

void sgd(ListOf<Trained> segments, DType theta, State state, DType omega, Sgd rule,
         Entering entering, void* stream) {
  const auto run = rule.momentum == 0.0 ? optimize<0, Sgd> : optimize<1, Sgd>;
  run(segments, theta, state, omega, rule, entering, stream);
}

}  // namespace mas::cuda
