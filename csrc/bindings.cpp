// The Python module _C: integers in, exceptions out. The only file that knows pybind11. Pointers
// come as integers from tensors that mas_ext/kernels/native.py has checked; nothing else may call
// this module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace {

using mas::DType;
using Pointer = std::uintptr_t;
using Pointers = std::vector<Pointer>;

template <class T>
T* as(Pointer pointer) {
  return reinterpret_cast<T*>(pointer);  // NOLINT: addresses are integers on the Python side
}

// Where each tensor's part of the flat state starts and which chunks are its own. Built once for a
// list of tensors, then used on every step.
class Layout {
 public:
  Layout(const std::vector<std::int64_t>& sizes, const std::vector<std::int64_t>& offsets) {
    if (sizes.size() != offsets.size()) {
      throw std::invalid_argument("offsets: got " + std::to_string(offsets.size()) +
                                  " numbers, expected one for each of " +
                                  std::to_string(sizes.size()) + " sizes");
    }
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      if (sizes[i] < 0 || offsets[i] < -1) {
        throw std::invalid_argument("sizes: expected numbers from 0 up; offsets: from -1 up");
      }
      whole_ = whole_ && offsets[i] >= 0;
      segments_.push_back({nullptr, nullptr, sizes[i], offsets[i], chunks_});
      chunks_ += (sizes[i] + mas::kChunk - 1) / mas::kChunk;
      if (offsets[i] >= 0) end_ = std::max(end_, offsets[i] + sizes[i]);
    }
  }

  std::int64_t chunks() const { return chunks_; }

  // Elements that a row of the state must have.
  std::int64_t end() const { return end_; }

  std::vector<mas::Segment> with(const Pointers& x, const Pointers& y) const {
    if (x.size() != segments_.size() || (!y.empty() && y.size() != x.size())) {
      throw std::invalid_argument("pointers: expected one for each of " +
                                  std::to_string(segments_.size()) + " tensors");
    }
    std::vector<mas::Segment> segments = segments_;
    for (std::size_t i = 0; i < x.size(); ++i) {
      segments[i].x = as<void>(x[i]);
      segments[i].y = y.empty() ? nullptr : as<void>(y[i]);
    }
    return segments;
  }

  // Whether every tensor has a part of the flat state.
  bool whole() const { return whole_; }

  std::vector<mas::Trained> trained(const Pointers& theta, const Pointers& grad,
                                    const std::vector<Pointers>& moments, std::size_t expected,
                                    const Pointers& steps) const {
    const std::size_t count = segments_.size();
    const auto wrong = [count](const Pointers& p) { return p.size() != count; };
    if (wrong(theta) || wrong(grad) || moments.size() != expected ||
        std::any_of(moments.begin(), moments.end(), wrong) || (!steps.empty() && wrong(steps))) {
      throw std::invalid_argument("pointers: expected one for each of " + std::to_string(count) +
                                  " tensors, and " + std::to_string(expected) + " moments");
    }
    std::vector<mas::Trained> trained;
    for (std::size_t i = 0; i < count; ++i) {
      const mas::Segment& s = segments_[i];
      mas::Trained t = {as<void>(theta[i]), as<const void>(grad[i]), {}, nullptr, s.size, s.offset,
                        s.first_chunk};
      for (std::size_t m = 0; m < expected; ++m) t.moments[m] = as<void>(moments[m][i]);
      if (!steps.empty()) t.step = as<float>(steps[i]);
      trained.push_back(t);
    }
    return trained;
  }

 private:
  std::vector<mas::Segment> segments_;
  bool whole_ = true;
  std::int64_t chunks_ = 0;
  std::int64_t end_ = 0;
};

DType dtype_of(int dtype) {
  if (dtype < 0 || dtype > 3) {
    throw std::invalid_argument("dtype: got " + std::to_string(dtype) + ", expected 0 to 3");
  }
  return static_cast<DType>(dtype);
}

// The flat state buffers of one group of parameters, with the dtypes that go with them.
struct State {
  State(int theta, int omega, Pointer omega_pointer, Pointer anchor, std::int64_t stride,
        std::int64_t rows, Pointer alpha, Pointer remainder)
      : theta_dtype(dtype_of(theta)),
        omega_dtype(omega == static_cast<int>(DType::float8) ? DType::float8 : dtype_of(omega)),
        pointers{as<void>(omega_pointer), as<void>(anchor),           stride, rows,
                 as<const double>(alpha), as<const double>(remainder)} {
    if (rows < 1) throw std::invalid_argument("rows: expected at least 1");
    const bool wide = omega_dtype == DType::float64 && theta_dtype == DType::float64;
    if (omega_dtype == DType::float16 || (omega_dtype == DType::float64 && !wide)) {
      throw std::invalid_argument(
          "omega: expected float32, bfloat16 or float8, or float64 beside float64 parameters");
    }
  }

  const mas::State& for_layout(const Layout& layout) const {
    if (!layout.whole()) throw std::invalid_argument("offsets: expected numbers from 0 up");
    return for_parts(layout);
  }

  // For kernels that know of tensors without a part of the state.
  const mas::State& for_parts(const Layout& layout) const {
    if (pointers.stride < layout.end()) {
      throw std::invalid_argument("omega: expected rows of at least " +
                                  std::to_string(layout.end()) + " elements");
    }
    return pointers;
  }

  DType theta_dtype;
  DType omega_dtype;
  mas::State pointers;
};

// Threads of a CPU kernel, or the stream of a CUDA kernel: the last argument of every call.
struct OnCpu {
  using Where = int;
  static constexpr auto penalty = mas::cpu::penalty;
  static constexpr auto proximal = mas::cpu::proximal;
  static constexpr auto adamw = mas::cpu::adamw;
  static constexpr auto sgd = mas::cpu::sgd;
  static constexpr auto accumulate = mas::cpu::accumulate;
  static constexpr auto merge = mas::cpu::merge;
  static constexpr auto per_sample = mas::cpu::per_sample;
  static int where(int threads) {
    if (threads < 1) throw std::invalid_argument("threads: expected at least 1");
    return threads;
  }
};

#ifdef MAS_CUDA
struct OnCuda {
  using Where = Pointer;
  static constexpr auto penalty = mas::cuda::penalty;
  static constexpr auto proximal = mas::cuda::proximal;
  static constexpr auto adamw = mas::cuda::adamw;
  static constexpr auto sgd = mas::cuda::sgd;
  static constexpr auto accumulate = mas::cuda::accumulate;
  static constexpr auto merge = mas::cuda::merge;
  static constexpr auto per_sample = mas::cuda::per_sample;
  static void* where(Pointer stream) { return as<void>(stream); }
};
#endif

// The state of an optimizer's call: without a penalty it has no rows.
struct Held {
  Held(const Layout& layout, const State* state)
      : omega(state == nullptr ? DType::float32 : state->omega_dtype),
        pointers(state == nullptr ? mas::State{} : state->for_parts(layout)) {
    if (state == nullptr && layout.end() > 0) {
      throw std::invalid_argument("offsets: expected -1 without a state");
    }
  }

  DType omega;
  mas::State pointers;
};

template <class Device>
void bind(py::module_ m, const char* name) {
  using Where = typename Device::Where;
  py::module_ sub = m.def_submodule(name);

  sub.def("penalty", [](const Layout& layout, const State& state, const Pointers& theta,
                        const Pointers& grad, int gradient, Pointer grad_output, Pointer partial,
                        Pointer value, int value_dtype, Where where) {
    const auto segments = layout.with(theta, grad);
    const auto mode = static_cast<mas::Gradient>(gradient);
    if (gradient < 0 || gradient > 2 || (gradient != 0 && grad.size() != theta.size())) {
      throw std::invalid_argument("gradient: expected 0, or 1 or 2 with one pointer a tensor");
    }
    if (value_dtype < 0 || value_dtype > 1) {
      throw std::invalid_argument("value: expected float32 or float64");
    }
    py::gil_scoped_release release;
    Device::penalty({segments.data(), static_cast<std::int64_t>(segments.size()), layout.chunks()},
                    state.theta_dtype, state.for_layout(layout), state.omega_dtype, mode,
                    as<const double>(grad_output), as<double>(partial), as<void>(value),
                    dtype_of(value_dtype), Device::where(where));
  });

  sub.def("proximal", [](const Layout& layout, const State& state, const Pointers& theta,
                         const Pointers& second_moment, double eta, double correction, double eps,
                         Where where) {
    const auto segments = layout.with(theta, second_moment);
    py::gil_scoped_release release;
    Device::proximal({segments.data(), static_cast<std::int64_t>(segments.size()), layout.chunks()},
                     state.theta_dtype, state.for_layout(layout), state.omega_dtype,
                     {eta, correction, eps}, Device::where(where));
  });

  sub.def(
      "sgd", [](const Layout& layout, int theta_dtype, const State* state, const Pointers& theta,
                const Pointers& grad, const std::vector<Pointers>& moments, double lr,
                double momentum, double dampening, double decay, double eta, bool nesterov,
                bool first, bool proximal, Pointer scale, Pointer overflow, Where where) {
        const auto trained = layout.trained(theta, grad, moments, momentum == 0 ? 0 : 1, {});
        const Held held(layout, state);
        py::gil_scoped_release release;
        Device::sgd({trained.data(), static_cast<std::int64_t>(trained.size()), layout.chunks()},
                    dtype_of(theta_dtype), held.pointers, held.omega,
                    {lr, momentum, dampening, decay, eta, nesterov, first},
                    {proximal, as<const float>(scale), as<const float>(overflow)},
                    Device::where(where));
      });

  sub.def("adamw", [](const Layout& layout, int theta_dtype, const State* state,
                      const Pointers& theta, const Pointers& grad,
                      const std::vector<Pointers>& moments, const Pointers& steps, double lr,
                      double beta1, double beta2, double eps, double decay, bool proximal,
                      Pointer scale, Pointer overflow, Where where) {
    const bool amsgrad = moments.size() == 3;
    const auto trained = layout.trained(theta, grad, moments, amsgrad ? 3 : 2, steps);
    if (steps.size() != theta.size()) throw std::invalid_argument("steps: expected one a tensor");
    const Held held(layout, state);
    py::gil_scoped_release release;
    Device::adamw(
        {trained.data(), static_cast<std::int64_t>(trained.size()), layout.chunks()},
        dtype_of(theta_dtype), held.pointers, held.omega, {lr, beta1, beta2, eps, decay, amsgrad},
        {proximal, as<const float>(scale), as<const float>(overflow)}, Device::where(where));
  });

  sub.def("accumulate", [](const Layout& layout, const Pointers& omega, const Pointers& grad,
                           int grad_dtype, double weight, Where where) {
    const auto segments = layout.with(omega, grad);
    py::gil_scoped_release release;
    Device::accumulate(
        {segments.data(), static_cast<std::int64_t>(segments.size()), layout.chunks()},
        dtype_of(grad_dtype), weight, Device::where(where));
  });

  sub.def("merge", [](const Layout& layout, const State& state, const Pointers& theta,
                      const Pointers& importance, double keep, double gain, int anchor,
                      std::int64_t entry, Pointer partial, Pointer remainder, Where where) {
    if (anchor < 0 || anchor > 2) throw std::invalid_argument("anchor: expected 0, 1 or 2");
    const auto segments = layout.with(theta, importance);
    py::gil_scoped_release release;
    Device::merge({segments.data(), static_cast<std::int64_t>(segments.size()), layout.chunks()},
                  state.theta_dtype, state.for_layout(layout), state.omega_dtype,
                  {keep, gain, static_cast<mas::Anchor>(anchor), entry}, as<double>(partial),
                  as<double>(remainder), Device::where(where));
  });

  sub.def("per_sample",
          [](Pointer omega, Pointer grad, Pointer input, Pointer rows, Pointer partial,
             const std::array<std::int64_t, 6>& sizes, const std::array<std::int64_t, 4>& strides,
             int dtype, std::int64_t splits, bool square, Where where) {
            const auto negative = [](std::int64_t n) { return n < 0; };
            if (std::any_of(sizes.begin(), sizes.end(), negative) ||
                std::any_of(strides.begin(), strides.end(), negative)) {
              throw std::invalid_argument("sizes and strides: expected numbers from 0 up");
            }
            if (splits < 1) throw std::invalid_argument("splits: expected at least 1");
            const auto [groups, outputs, taps, channels, batch, positions] = sizes;
            const auto [grad_sample, grad_position, input_sample, input_row] = strides;
            if (rows == 0 && taps > 1)
              throw std::invalid_argument("rows: expected one row for each tap");
            py::gil_scoped_release release;
            Device::per_sample({as<void>(omega), as<const void>(grad), as<const void>(input),
                                as<const std::int32_t>(rows), as<void>(partial), groups, outputs,
                                taps, channels, batch, positions, grad_sample, grad_position,
                                input_sample, input_row, splits, square},
                               dtype_of(dtype), Device::where(where));
          });
}

}  // namespace

PYBIND11_MODULE(MAS_MODULE_NAME, m) {
  py::class_<Layout>(m, "Layout", py::module_local())
      .def(py::init<const std::vector<std::int64_t>&, const std::vector<std::int64_t>&>())
      .def_property_readonly("chunks", &Layout::chunks);
  py::class_<State>(m, "State", py::module_local())
      .def(py::init<int, int, Pointer, Pointer, std::int64_t, std::int64_t, Pointer, Pointer>());
  m.def("instruction_set", &mas::cpu::instruction_set);
  bind<OnCpu>(m, "cpu");
#ifdef MAS_CUDA
  bind<OnCuda>(m, "cuda");
#endif
}
