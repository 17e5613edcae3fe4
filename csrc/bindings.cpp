// The Python module _C: lists of tensors in, exceptions out. With tensors.cpp the only file that
// knows Python. Everything that a kernel is called with is checked here, before the first byte is
// written.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "tensors.h"

namespace py = pybind11;

namespace {

using mas::code_of;
using mas::DType;
using mas::Views;

std::int64_t chunks_of(std::int64_t size) { return (size + mas::kChunk - 1) / mas::kChunk; }

DType dtype_of(const Views& tensors) { return static_cast<DType>(tensors[0].code); }
DType sum_dtype(DType dtype) { return dtype == DType::float64 ? dtype : DType::float32; }

// Some parameters, what lies beside each of them, and where their state starts.
template <class S>
struct Pass {
  std::vector<S> segments;
  std::int64_t chunks = 0;
  std::int64_t end = 0;  // elements that a row of the state must have
  bool whole = true;     // whether all have a state

  explicit Pass(const Views& theta, py::handle offsets = {}) {
    std::vector<std::int64_t> starts(theta.size());
    if (offsets) starts = mas::read_offsets(offsets, theta.size());
    segments.resize(theta.size());
    for (std::size_t i = 0; i < theta.size(); ++i) {
      mas::Segment& segment = segments[i];
      segment = {theta[i].data, nullptr, theta[i].numel, starts[i], chunks};
      chunks += chunks_of(segment.size);
      std::int64_t behind = 0;
      if (__builtin_add_overflow(segment.offset, segment.size, &behind)) behind = INT64_MAX;
      if (segment.offset >= 0) end = std::max(end, behind);
      whole = whole && segment.offset >= 0;
    }
  }

  void beside(const Views& y) {
    for (std::size_t i = 0; i < y.size(); ++i) segments[i].y = y[i].data;
  }

  mas::ListOf<S> list() const {
    return {segments.data(), static_cast<std::int64_t>(segments.size()), chunks};
  }

  // The state, of which every tensor has a part.
  mas::State state(py::handle fields, const Views& theta) const {
    for (std::size_t i = 0; !whole && i < segments.size(); ++i) {
      if (segments[i].offset < 0) {
        mas::refuse("offsets[{}]: got {}, expected a number from 0 up", i, segments[i].offset);
      }
    }
    return mas::read_state(fields, theta[0], end);
  }
};

using Tensors = Pass<mas::Segment>;
using Stepped = Pass<mas::OptimizerSegment>;

void refuse_other_strides(bool reordered) {
  if (reordered) throw mas::OtherStrides("tensors lie in memory in another order than the first");
}

double* scratch_of(py::handle object, mas::dlpack::Device device, std::int64_t chunks) {
  return static_cast<double*>(mas::read_array("scratch", object, device, DType::float64, {chunks}));
}

// Runs on a CPU, with a number of threads.
struct OnCpu {
  using Where = int;
  static constexpr mas::dlpack::DeviceType kDevice = mas::dlpack::kCpu;
  template <class Kernel>
  static void run(const Kernel& args, int threads) {
    if (threads < 1) throw std::invalid_argument("threads: expected at least 1");
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

template <class On>
Views read_first(const char* name, py::handle list) {
  Views found = mas::read_list(name, list);
  refuse_elsewhere<On>(name, found[0]);
  return found;
}

// theta, gradients and moments of an optimizer's step, and its state if there is one.
template <class On, class Rule, class Where>
void step(py::handle theta_list, py::handle grad_list,
          const std::vector<std::pair<std::string, py::object>>& moment_lists, py::handle step_list,
          const py::tuple& fields, const Rule& rule, bool proximal, py::handle scale,
          py::handle overflow, Where where) {
  const mas::Reading reading;
  const Views theta = read_first<On>("theta", theta_list);
  Stepped pass(theta, fields[0]);
  const DType dtype = dtype_of(theta);
  const auto device = theta[0].device;
  mas::State state = {};
  if (mas::read("alpha", fields[3]).numel != 0) {
    state = mas::read_state(fields, theta[0], pass.end);
  } else if (pass.end > 0) {
    mas::refuse("offsets: got some from 0 up, expected -1 without a state");
  }
  state.theta_dtype = dtype;
  bool reordered = false;
  const Views grad = mas::read_like("grad", grad_list, theta, dtype, reordered);
  pass.beside(grad);
  std::vector<Views> moments;
  for (const auto& [name, list] : moment_lists) {
    moments.push_back(mas::read_like(name.c_str(), list, theta, dtype, reordered));
    for (std::size_t i = 0; i < theta.size(); ++i) {
      pass.segments[i].moments[moments.size() - 1] = moments.back()[i].data;
    }
  }
  py::tuple steps;
  if (!step_list.is_none()) {
    steps = mas::items("step", step_list);
    if (steps.size() != theta.size()) {
      mas::refuse("step: got {} tensors, expected {}", steps.size(), theta.size());
    }
    for (std::size_t i = 0; i < theta.size(); ++i) {
      pass.segments[i].step = mas::read_number("step", steps[i], device);
    }
  }
  const mas::OptimizerStep<Rule> args = {pass.list(),
                                         state,
                                         rule,
                                         proximal,
                                         mas::read_number("scale", scale, device),
                                         mas::read_number("overflow", overflow, device)};
  refuse_other_strides(reordered);
  On::run(args, where);
}

using Moments = std::vector<std::pair<std::string, py::object>>;

template <class On>
void bind(py::module_ m, const char* name) {
  using Where = typename On::Where;
  using py::handle;
  py::module_ sub = m.def_submodule(name);

  sub.def("penalty", [](handle theta_list, handle grad_list, int mode, const py::tuple& fields,
                        handle grad_output, handle scratch, handle value, Where where) {
    const mas::Reading reading;
    const Views theta = read_first<On>("theta", theta_list);
    Tensors pass(theta, fields[0]);
    const DType dtype = dtype_of(theta);
    const auto device = theta[0].device;
    mas::Penalty args = {};
    args.state = pass.state(fields, theta);
    if (mode < 0 || mode > 2) throw std::invalid_argument("gradient: expected 0, 1 or 2");
    args.gradient = static_cast<mas::Gradient>(mode);
    bool reordered = false;
    Views grad;
    if (mode != 0) grad = mas::read_like("grad", grad_list, theta, dtype, reordered);
    pass.beside(grad);
    if (!grad_output.is_none()) {
      args.grad_output = static_cast<const double*>(
          mas::read_array("grad_output", grad_output, device, DType::float64, {}));
    }
    if (!value.is_none()) {
      args.value_dtype = sum_dtype(dtype);
      args.value = mas::read_array("value", value, device, args.value_dtype, {});
      args.partial = scratch_of(scratch, device, pass.chunks);
    }
    args.segments = pass.list();
    refuse_other_strides(reordered);
    On::run(args, where);
  });

  sub.def("proximal", [](handle theta_list, handle moment_list, const py::tuple& fields, double eta,
                         double correction, double eps, Where where) {
    const mas::Reading reading;
    const Views theta = read_first<On>("theta", theta_list);
    Tensors pass(theta, fields[0]);
    const mas::State state = pass.state(fields, theta);
    bool reordered = false;
    Views moments;
    if (!moment_list.is_none()) {
      moments = mas::read_like("second_moment", moment_list, theta, dtype_of(theta), reordered);
    }
    pass.beside(moments);
    refuse_other_strides(reordered);
    On::run(mas::Proximal{pass.list(), state, eta, correction, eps}, where);
  });

  sub.def("sgd", [](handle theta, handle grad, const Moments& moments, const py::tuple& state,
                    double lr, double momentum, double dampening, double decay, double eta,
                    bool nesterov, bool first, bool proximal, handle scale, handle overflow,
                    Where where) {
    if (moments.size() != (momentum == 0 ? 0U : 1U)) {
      throw std::invalid_argument("moments: expected one with momentum, none without");
    }
    const mas::Sgd rule = {lr, momentum, dampening, decay, eta, nesterov, first};
    step<On>(theta, grad, moments, py::none(), state, rule, proximal, scale, overflow, where);
  });

  sub.def("adamw", [](handle theta, handle grad, const Moments& moments, const py::object& steps,
                      const py::tuple& state, double lr, double beta1, double beta2, double eps,
                      double decay, bool proximal, handle scale, handle overflow, Where where) {
    if (moments.size() != 2 && moments.size() != 3) {
      throw std::invalid_argument("moments: expected two, or three with amsgrad");
    }
    if (steps.is_none()) throw std::invalid_argument("steps: expected one a tensor");
    const mas::AdamW rule = {lr, beta1, beta2, eps, decay, moments.size() == 3};
    step<On>(theta, grad, moments, steps, state, rule, proximal, scale, overflow, where);
  });

  sub.def("accumulate", [](handle omega_list, handle grad_list, double weight, Where where) {
    const mas::Reading reading;
    const Views omega = read_first<On>("omega", omega_list);
    Tensors pass(omega);
    const py::tuple grads = mas::items("grad", grad_list);
    const int code = grads.empty() ? omega[0].code : mas::read("grad", grads[0], 0).code;
    const bool known = code >= 0 && code <= code_of(DType::float16);
    if (!known || sum_dtype(static_cast<DType>(code)) != dtype_of(omega)) {
      mas::refuse("grad[0]: got {}, expected one that adds up in {}", grads[0].attr("dtype"),
                  omega[0].object.attr("dtype"));
    }
    bool reordered = false;
    const Views grad = mas::read_like("grad", grads, omega, static_cast<DType>(code), reordered);
    pass.beside(grad);
    refuse_other_strides(reordered);
    On::run(mas::Accumulate{pass.list(), static_cast<DType>(code), weight}, where);
  });

  sub.def("merge", [](const py::tuple& fields, handle theta_list, handle importance_list,
                      double keep, double gain, int anchor, std::int64_t entry, handle scratch,
                      handle remainder, Where where) {
    const mas::Reading reading;
    const Views theta = read_first<On>("theta", theta_list);
    Tensors pass(theta, fields[0]);
    const DType dtype = dtype_of(theta);
    const auto device = theta[0].device;
    mas::Merge args = {};
    args.state = pass.state(fields, theta);
    if (args.state.rows != 1) mas::refuse("alpha: got {} numbers, expected 1", args.state.rows);
    bool reordered = false;
    const Views importance =
        mas::read_like("importance", importance_list, theta, sum_dtype(dtype), reordered);
    pass.beside(importance);
    if (anchor < 0 || anchor > 2) throw std::invalid_argument("anchor: expected 0, 1 or 2");
    args.keep = keep;
    args.gain = gain;
    args.anchor = static_cast<mas::Anchor>(anchor);
    args.entry = entry;
    args.partial = scratch_of(scratch, device, pass.chunks);
    const auto count = static_cast<std::int64_t>(theta.size());
    args.remainder = static_cast<double*>(
        mas::read_array("remainder", remainder, device, DType::float64, {count}));
    args.segments = pass.list();
    refuse_other_strides(reordered);
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
  m.def("instruction_set", &mas::cpu::instruction_set);
  bind<OnCpu>(m, "cpu");
#ifdef MAS_CUDA
  bind<OnCuda>(m, "cuda");
  m.attr("cuda_architectures") = MAS_CUDA_ARCHITECTURES;
#endif
}
