// Optimizers' steps with the penalty in them, in one pass over memory. Twin of cpu/optim.cpp.
#include "launch.h"

namespace mas::cuda {
namespace {

template <class T, class O, class A, int M, class Rule>
__global__ void optimize_chunks(const TableOf<OptimizerSegment<Rule>> __grid_constant__ table,
                                OptimizerStep<Rule> args) {
  using C = compute_t<T>;
  if (overflowed(args)) return;
  const auto chunk = own_chunk(table);
  const OptimizerSegment<Rule>& segment = chunk.segment;
  const bool penalized = segment.offset >= 0;
  State state = args.state;
  if (!penalized) state.rows = 0;
  const std::int64_t offset = penalized ? segment.offset + chunk.begin : 0;
  T* theta = static_cast<T*>(segment.x) + chunk.begin;
  const T* grad = static_cast<const T*>(segment.y) + chunk.begin;
  const O* omega = static_cast<const O*>(state.omega) + offset;
  const A* anchor = static_cast<const A*>(state.anchor) + offset;
  const double largest = largest_alpha(state.alpha, state.rows);
  const auto step = step_of<C>(segment.rule, segment.step);
  const C unscale = static_cast<C>(unscale_of(args));
  const C strength = finite_factor<C>(2.0 * eta_of(segment.rule) * largest);

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
    if (!args.proximal) {
      for_each_row<N>(state, omega + i, anchor + i, [&](std::int64_t row, auto w, auto a) {
        const C factor = finite_factor<C>(2.0 * state.alpha[row]);
        for (int l = 0; l < N; ++l) {
          const auto term = penalty_element<C>(load(w.lane[l]), load(x.lane[l]), load(a.lane[l]));
          gradient[l] += factor * term.half_gradient;
        }
      });
    }
    C value[N];
    C divisor[N];
    for (int l = 0; l < N; ++l) {
      Moments<C> m = {load(own[0].lane[l]), load(own[1].lane[l]), load(own[2].lane[l])};
      const Stepped<C> next = step_element<M, C>(step, load(x.lane[l]), gradient[l], m);
      own[0].lane[l] = store<T>(m.first);
      own[1].lane[l] = store<T>(m.second);
      own[2].lane[l] = store<T>(m.third);
      value[l] = next.theta;
      divisor[l] = next.divisor;
    }
    if (args.proximal && state.rows > 0) {
      C strengths[N];
      for (int l = 0; l < N; ++l) strengths[l] = divided<C>(strength, divisor[l]);
      proximal_step(state, largest, omega + i, anchor + i, strengths, value);
    }
    for (int l = 0; l < N; ++l) x.lane[l] = store<T>(value[l]);
    write(theta + i, x);
    for (int m = 0; m < M; ++m) write(moments[m] + i, own[m]);
  });
}

__global__ void count_steps(const TableOf<OptimizerSegment<AdamW>> __grid_constant__ table,
                            OptimizerStep<AdamW> args) {
  if (overflowed(args)) return;
  for (std::int64_t i = threadIdx.x; i < table.count; i += kThreads) {
    *table.segments[i].step += 1.0F;
  }
}

template <int M, class Rule>
void optimize(const OptimizerStep<Rule>& args, void* stream) {
  launch_typed(args, stream, [](auto t, auto o, auto a) {
    return optimize_chunks<typename decltype(t)::type, typename decltype(o)::type,
                           typename decltype(a)::type, M, Rule>;
  });
}

}  // namespace

void run(const OptimizerStep<AdamW>& args, void* stream) {
  for_each_table(args.segments, [&](const auto& table, std::int64_t, std::int64_t) {
    launch(count_steps, 1, stream, table, args);
  });
  const auto step = args.moments == 3 ? optimize<3, AdamW> : optimize<2, AdamW>;
  step(args, stream);
}

void run(const OptimizerStep<Sgd>& args, void* stream) {
  const auto step = args.moments == 0 ? optimize<0, Sgd> : optimize<1, Sgd>;
  step(args, stream);
}

}  // namespace mas::cuda
