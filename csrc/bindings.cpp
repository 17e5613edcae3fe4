// The Python module _C: lists of tensors in, exceptions out. With tensors.cpp and arguments.cpp the
// only file that knows Python. Everything that a kernel is called with is checked before the first
// byte is written.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"

namespace py = pybind11;

namespace {

using mas::code_of;
using mas::DType;
using mas::Views;

std::int64_t chunks_of(std::int64_t size) {
  return size / mas::kChunk + (size % mas::kChunk != 0 ? 1 : 0);
}

DType sum_dtype(DType dtype) { return dtype == DType::float64 ? dtype : DType::float32; }

// Runs on a CPU, with a number of threads.
struct OnCpu {
  using Where = int;
  static constexpr mas::dlpack::DeviceType kDevice = mas::dlpack::kCpu;
  template <class Kernel>
  static void run(const Kernel& args, int threads) {
    // OpenMP ends the process where it can't start so many.
    if (threads < 1 || threads > 4096) {
      throw std::invalid_argument("threads: expected a number from 1 to 4096");
    }
    py::gil_scoped_release release;
    mas::cpu::run(args, threads);
  }
};

#ifdef MAS_CUDA
// Runs on the current CUDA device, in a stream.
struct OnCuda {
  using Where = std::uintptr_t;
#ifdef MAS_EMULATE_CUDA
  static constexpr mas::dlpack::DeviceType kDevice = mas::dlpack::kCpu;
#else
  static constexpr mas::dlpack::DeviceType kDevice = mas::dlpack::kCuda;
#endif
  template <class Kernel>
  static void run(const Kernel& args, std::uintptr_t stream) {
    py::gil_scoped_release release;
    mas::cuda::run(args, reinterpret_cast<void*>(stream));  // NOLINT: torch gives it as an integer
  }
};
#endif

template <class On>
void refuse_elsewhere(const char* name, const mas::View& first) {
  if (first.device.type != On::kDevice) {
    mas::refuse("{}: got a tensor on {}, expected one on the device of these kernels", name,
                first.object.attr("device"));
  }
}

// One call: a list of parameters, what lies beside each of them, and where their state starts.
template <class On, class S = mas::Segment>
class Call {
 public:
  Call(const char* name, py::handle theta, py::handle offsets = {})
      : theta_(mas::read_list(name, theta)) {
    refuse_elsewhere<On>(name, theta_[0]);
    std::vector<std::int64_t> starts(theta_.size());
    if (offsets) starts = mas::read_offsets(offsets, theta_.size());
    segments.resize(theta_.size());
    for (std::size_t i = 0; i < theta_.size(); ++i) {
      mas::Segment& segment = segments[i];
      segment = {theta_[i].data, nullptr, theta_[i].numel, starts[i], chunks_};
      chunks_ += chunks_of(segment.size);
      std::int64_t behind = 0;
      if (__builtin_add_overflow(segment.offset, segment.size, &behind)) behind = INT64_MAX;
      if (segment.offset >= 0) end_ = std::max(end_, behind);
    }
  }

  std::vector<S> segments;

  std::size_t size() const { return theta_.size(); }
  DType dtype() const { return static_cast<DType>(theta_[0].code); }
  mas::dlpack::Device device() const { return theta_[0].device; }
  const mas::View& first() const { return theta_[0]; }

  // Tensors like the parameters, of a dtype, which are kept until the end.
  const Views& like(const char* name, py::handle list, DType dtype) {
    beside_.push_back(mas::read_like(name, list, theta_, dtype, reordered_));
    return beside_.back();
  }

  // The second tensor of each segment.
  void beside(const char* name, py::handle list, DType dtype) {
    const Views& tensors = like(name, list, dtype);
    for (std::size_t i = 0; i < size(); ++i) segments[i].y = tensors[i].data;
  }

  // The state, of which every parameter has a part.
  mas::State state(py::handle fields) const {
    for (std::size_t i = 0; i < size(); ++i) {
      if (segments[i].offset < 0) {
        mas::refuse("offsets[{}]: got {}, expected a number from 0 up", i, segments[i].offset);
      }
    }
    return mas::read_state(fields, first(), end_);
  }

  // The state, of which some may have none; without rows there is none for any.
  mas::State partial_state(const py::tuple& fields) const {
    if (mas::read("alpha", fields[3]).numel != 0) return mas::read_state(fields, first(), end_);
    if (end_ > 0) mas::refuse("offsets: got some from 0 up, expected -1 without a state");
    mas::State found = {};
    found.theta_dtype = found.anchor_dtype = dtype();
    return found;
  }

  void* number(const char* name, py::handle object, DType dtype,
               std::initializer_list<std::int64_t> sizes = {}) const {
    return mas::read_array(name, object, device(), dtype, sizes);
  }

  double* scratch(py::handle object) const {
    return static_cast<double*>(number("scratch", object, DType::float64, {chunks_}));
  }

  mas::ListOf<S> list() const {
    return {segments.data(), static_cast<std::int64_t>(size()), chunks_};
  }

  template <class Kernel>
  void run(const Kernel& args, typename On::Where where) const {
    if (reordered_) {
      throw mas::OtherStrides("tensors lie in memory in another order than the first");
    }
    On::run(args, where);
  }

 private:
  const mas::Reading reading_;
  const Views theta_;
  std::vector<Views> beside_;
  bool reordered_ = false;
  std::int64_t chunks_ = 0;
  std::int64_t end_ = 0;  // elements that a row of the state must have
};

using Moments = std::vector<std::pair<std::string, py::object>>;

// Optimizers' numbers, row by row, each row for as many tensors as its count says.
struct Rules {
  const std::vector<double>& numbers;
  const std::vector<std::int64_t>& counts;
};

template <class Rule>
Rule rule_of(const double* x);

template <>
mas::Sgd rule_of(const double* x) {
  return {x[0], x[1], x[2], x[3], x[4], x[5] != 0, x[6] != 0};
}

template <>
mas::AdamW rule_of(const double* x) {
  return {x[0], x[1], x[2], x[3], x[4], x[5]};
}

// A step of an optimizer whose rule has `width` numbers.
template <class Rule, std::size_t width, class On>
void step(py::handle theta, py::handle grad, const Moments& moments, py::handle step_list,
          const py::tuple& fields, const Rules& rules, bool proximal, py::handle scale,
          py::handle overflow, typename On::Where where) {
  Call<On, mas::OptimizerSegment<Rule>> call("theta", theta, fields[0]);
  const mas::State state = call.partial_state(fields);
  if (rules.numbers.size() != width * rules.counts.size()) {
    mas::refuse("rules: got {} numbers, expected {} for each of {} counts", rules.numbers.size(),
                width, rules.counts.size());
  }
  std::size_t next = 0;
  for (std::size_t r = 0; r < rules.counts.size(); ++r) {
    const std::int64_t count = rules.counts[r];
    if (count < 0 || static_cast<std::size_t>(count) > call.size() - next) {
      mas::refuse("counts: got {} tensors more, expected from 0 to {}", count, call.size() - next);
    }
    const Rule rule = rule_of<Rule>(&rules.numbers[width * r]);
    for (std::int64_t i = 0; i < count; ++i) call.segments[next++].rule = rule;
  }
  if (next != call.size()) {
    mas::refuse("counts: got {} tensors in all, expected {}", next, call.size());
  }
  call.beside("grad", grad, call.dtype());
  for (std::size_t m = 0; m < moments.size(); ++m) {
    const Views& found = call.like(moments[m].first.c_str(), moments[m].second, call.dtype());
    for (std::size_t i = 0; i < call.size(); ++i) call.segments[i].moments[m] = found[i].data;
  }
  py::tuple steps;
  if (!step_list.is_none()) {
    steps = mas::items("step", step_list);
    if (steps.size() != call.size()) {
      mas::refuse("step: got {} tensors, expected {}", steps.size(), call.size());
    }
    for (std::size_t i = 0; i < call.size(); ++i) {
      call.segments[i].step = mas::read_number("step", steps[i], call.device());
    }
  }
  const mas::OptimizerStep<Rule> args = {call.list(),
                                         state,
                                         static_cast<std::int64_t>(moments.size()),
                                         proximal,
                                         mas::read_number("scale", scale, call.device()),
                                         mas::read_number("overflow", overflow, call.device())};
  call.run(args, where);
}

template <class On>
void bind(py::module_ m, const char* name) {
  using Where = typename On::Where;
  using py::handle;
  py::module_ sub = m.def_submodule(name);

  sub.def("penalty", [](handle theta, handle grad, int mode, const py::tuple& fields,
                        handle grad_output, handle scratch, handle value, Where where) {
    Call<On> call("theta", theta, fields[0]);
    mas::Penalty args = {};
    args.state = call.state(fields);
    if (mode < 0 || mode > 2) throw std::invalid_argument("gradient: expected 0, 1 or 2");
    args.gradient = static_cast<mas::Gradient>(mode);
    if (mode != 0) call.beside("grad", grad, call.dtype());
    if (!grad_output.is_none()) {
      args.grad_output =
          static_cast<const double*>(call.number("grad_output", grad_output, DType::float64));
    }
    if (!value.is_none()) {
      args.value_dtype = sum_dtype(call.dtype());
      args.value = call.number("value", value, args.value_dtype);
      args.partial = call.scratch(scratch);
    }
    args.segments = call.list();
    call.run(args, where);
  });

  sub.def("proximal", [](handle theta, handle second_moment, const py::tuple& fields, double eta,
                         double correction, double eps, Where where) {
    Call<On> call("theta", theta, fields[0]);
    const mas::State state = call.state(fields);
    if (!second_moment.is_none()) call.beside("second_moment", second_moment, call.dtype());
    call.run(mas::Proximal{call.list(), state, eta, correction, eps}, where);
  });

  sub.def("sgd", [](handle theta, handle grad, const Moments& moments, const py::tuple& state,
                    const std::vector<double>& rules, const std::vector<std::int64_t>& counts,
                    bool proximal, handle scale, handle overflow, Where where) {
    if (moments.size() > 1) throw std::invalid_argument("moments: expected at most one");
    step<mas::Sgd, 7, On>(theta, grad, moments, py::none(), state, {rules, counts}, proximal, scale,
                          overflow, where);
  });

  sub.def("adamw", [](handle theta, handle grad, const Moments& moments, const py::object& steps,
                      const py::tuple& state, const std::vector<double>& rules,
                      const std::vector<std::int64_t>& counts, bool proximal, handle scale,
                      handle overflow, Where where) {
    if (moments.size() != 2 && moments.size() != 3) {
      throw std::invalid_argument("moments: expected two, or three with amsgrad");
    }
    if (steps.is_none()) throw std::invalid_argument("steps: expected one a tensor");
    step<mas::AdamW, 6, On>(theta, grad, moments, steps, state, {rules, counts}, proximal, scale,
                            overflow, where);
  });

  sub.def("accumulate", [](handle omega, handle grad, double weight, Where where) {
    Call<On> call("omega", omega);
    const py::tuple grads = mas::items("grad", grad);
    const int code = grads.empty() ? call.first().code : mas::read("grad", grads[0], 0).code;
    const bool known = code >= 0 && code <= code_of(DType::float16);
    if (!known || sum_dtype(static_cast<DType>(code)) != call.dtype()) {
      mas::refuse("grad[0]: got {}, expected one that adds up in {}", grads[0].attr("dtype"),
                  call.first().object.attr("dtype"));
    }
    call.beside("grad", grads, static_cast<DType>(code));
    call.run(mas::Accumulate{call.list(), static_cast<DType>(code), weight}, where);
  });

  sub.def("merge", [](const py::tuple& fields, handle theta, handle importance, double keep,
                      double gain, bool moves_anchor, std::int64_t entry, std::int64_t shift,
                      handle scratch, handle remainder, Where where) {
    Call<On> call("theta", theta, fields[0]);
    mas::Merge args = {};
    args.state = call.state(fields);
    if (args.state.rows != 1) mas::refuse("alpha: got {} numbers, expected 1", args.state.rows);
    call.beside("importance", importance, sum_dtype(call.dtype()));
    constexpr std::int64_t most = std::int64_t{1} << 62;
    if (shift < -most || shift > most) {
      throw std::invalid_argument("shift: expected a number of up to 2^62");
    }
    args.keep = keep;
    args.gain = gain;
    args.moves_anchor = moves_anchor;
    args.entry = entry;
    args.shift = shift;
    args.partial = call.scratch(scratch);
    args.remainder = static_cast<double*>(call.number("remainder", remainder, DType::float64,
                                                      {static_cast<std::int64_t>(call.size())}));
    args.segments = call.list();
    call.run(args, where);
  });

  sub.def("low_rank", [](handle left, handle right, handle left_grad, handle right_grad, int mode,
                         handle omega, const std::vector<double>& unit,
                         const std::vector<std::int64_t>& counts, const std::vector<double>& scale,
                         handle anchor_left, handle anchor_right,
                         const std::vector<std::int64_t>& anchor_counts,
                         const std::vector<double>& anchor_scale, handle alpha, handle scratch,
                         handle value, Where where) {
    const mas::Reading reading;
    if (mode < 0 || mode > 2) throw std::invalid_argument("gradient: expected 0, 1 or 2");
    const auto gradient = static_cast<mas::Gradient>(mode);
    const mas::LowRankUpdates found = mas::read_low_rank(
        {left, right, counts, scale}, {anchor_left, anchor_right, anchor_counts, anchor_scale},
        omega, unit, gradient, left_grad, right_grad);
    refuse_elsewhere<On>("left", mas::read("left", mas::items("left", left)[0], 0));
    const auto number = [&](const char* name, handle object, DType dtype,
                            std::initializer_list<std::int64_t> sizes) {
      return mas::read_array(name, object, found.device, dtype, sizes);
    };
    mas::LowRank args = {};
    args.weights = found.weights.data();
    args.count = static_cast<std::int64_t>(found.weights.size());
    args.factors = found.factors.data();
    args.strips = found.strips;
    args.dtype = found.dtype;
    args.omega_dtype = found.omega_dtype;
    args.alpha = static_cast<const double*>(number("alpha", alpha, DType::float64, {}));
    args.gradient = gradient;
    args.partial = static_cast<double*>(number("scratch", scratch, DType::float64, {found.strips}));
    args.value_dtype = sum_dtype(found.dtype);
    args.value = number("value", value, args.value_dtype, {});
    On::run(args, where);
  });

  sub.def("per_sample", [](handle omega, handle grad, handle input, handle rows,
                           const std::array<std::int64_t, 2>& range, handle partial,
                           std::int64_t splits, bool square, Where where) {
    const mas::Reading reading;
    refuse_elsewhere<On>("grad", mas::read("grad", grad));
    const auto args =
        mas::read_per_sample(omega, grad, input, rows, range, partial, splits, square);
    if (args) On::run(*args, where);
  });
}

}  // namespace

PYBIND11_MODULE(MAS_MODULE_NAME, m) {
  mas::prepare_reading();
  py::register_local_exception<mas::OtherStrides>(m, "OtherStrides");
  m.def("chunks", [](py::handle tensors) {
    std::int64_t chunks = 0;
    for (const std::int64_t size : mas::read_sizes(tensors)) chunks += chunks_of(size);
    return chunks;
  });
  m.def("layout_key", &mas::layout_key);
  m.attr("strip") = mas::kStrip;
  m.def("instruction_set", &mas::cpu::instruction_set);
  bind<OnCpu>(m, "cpu");
#ifdef MAS_CUDA
  bind<OnCuda>(m, "cuda");
  m.attr("cuda_architectures") = MAS_CUDA_ARCHITECTURES;
#endif
}
