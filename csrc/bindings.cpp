// The Python module _C: integers in, exceptions out. The only file that knows pybind11. Pointers
// come as integers from tensors that the files of mas_ext/kernels/ have checked; nothing else may
// call this module.
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

DType dtype_of(int dtype) {
  if (dtype < 0 || dtype > 3) {
    throw std::invalid_argument("dtype: got " + std::to_string(dtype) + ", expected 0 to 3");
  }
  return static_cast<DType>(dtype);
}

// The flat state buffers of one group of parameters, with the dtypes that go with them.
mas::State state_of(int theta_dtype, int omega_dtype, Pointer omega, Pointer anchor,
                    std::int64_t stride, std::int64_t rows, Pointer alpha, Pointer remainder) {
  const DType of_theta = dtype_of(theta_dtype);
  const bool coded = omega_dtype == static_cast<int>(DType::float8);
  const DType of_omega = coded ? DType::float8 : dtype_of(omega_dtype);
  if (rows < 1) throw std::invalid_argument("rows: expected at least 1");
  if (of_omega == DType::float16 || (of_omega == DType::float64 && of_theta != DType::float64)) {
    throw std::invalid_argument(
        "omega: expected float32, bfloat16 or float8, or float64 beside float64 parameters");
  }
  return {of_theta, of_omega, as<void>(omega),         as<void>(anchor),
          stride,   rows,     as<const double>(alpha), as<const double>(remainder)};
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

  std::vector<mas::OptimizerSegment> with(const Pointers& theta, const Pointers& grad,
                                          const std::vector<Pointers>& moments,
                                          std::size_t expected, const Pointers& steps) const {
    const std::size_t count = segments_.size();
    const auto wrong = [count](const Pointers& p) { return p.size() != count; };
    if (wrong(grad) || moments.size() != expected ||
        std::any_of(moments.begin(), moments.end(), wrong) || (!steps.empty() && wrong(steps))) {
      throw std::invalid_argument("pointers: expected one for each of " + std::to_string(count) +
                                  " tensors, and " + std::to_string(expected) + " moments");
    }
    std::vector<mas::OptimizerSegment> segments;
    for (const mas::Segment& segment : with(theta, grad)) {
      const std::size_t i = segments.size();
      segments.push_back({segment, {}, steps.empty() ? nullptr : as<float>(steps[i])});
      for (std::size_t m = 0; m < expected; ++m) {
        segments[i].moments[m] = as<void>(moments[m][i]);
      }
    }
    return segments;
  }

  // As a kernel gets it; `segments` must live longer.
  template <class S>
  mas::ListOf<S> list(const std::vector<S>& segments) const {
    return {segments.data(), static_cast<std::int64_t>(segments.size()), chunks_};
  }

  // The state, with a part for every tensor.
  const mas::State& whole(const mas::State& state) const {
    if (!whole_) throw std::invalid_argument("offsets: expected numbers from 0 up");
    return partial(state);
  }

  // The state, with a part for some of the tensors.
  const mas::State& partial(const mas::State& state) const {
    if (state.stride < end_) {
      throw std::invalid_argument("omega: expected rows of at least " + std::to_string(end_) +
                                  " elements");
    }
    return state;
  }

  // The same for an optimizer, which may have none.
  mas::State partial(const mas::State* state, int theta_dtype) const {
    if (state == nullptr && end_ > 0) {
      throw std::invalid_argument("offsets: expected -1 without a state");
    }
    mas::State found = state == nullptr ? mas::State{} : partial(*state);
    found.theta_dtype = dtype_of(theta_dtype);
    return found;
  }

 private:
  std::vector<mas::Segment> segments_;
  bool whole_ = true;
  std::int64_t chunks_ = 0;
  std::int64_t end_ = 0;  // elements that a row of the state must have
};

// On a CPU, with a number of threads.
template <class Kernel>
void run(const Kernel& args, int threads) {
  if (threads < 1) throw std::invalid_argument("threads: expected at least 1");
  py::gil_scoped_release release;
  mas::cpu::run(args, threads);
}

// On the current CUDA device, in a stream.
#ifdef MAS_CUDA
template <class Kernel>
void run(const Kernel& args, Pointer stream) {
  py::gil_scoped_release release;
  mas::cuda::run(args, as<void>(stream));
}
#endif

// Where: threads or a stream, the last argument of every call.
template <class Where>
void bind(py::module_ m, const char* name) {
  using mas::State;
  py::module_ sub = m.def_submodule(name);

  sub.def("penalty", [](const Layout& layout, const State& state, const Pointers& theta,
                        const Pointers& grad, int gradient, Pointer grad_output, Pointer partial,
                        Pointer value, int value_dtype, Where where) {
    const auto segments = layout.with(theta, grad);
    if (gradient < 0 || gradient > 2 || (gradient != 0 && grad.size() != theta.size())) {
      throw std::invalid_argument("gradient: expected 0, or 1 or 2 with one pointer a tensor");
    }
    if (value_dtype < 0 || value_dtype > 1) {
      throw std::invalid_argument("value: expected float32 or float64");
    }
    run(mas::Penalty{layout.list(segments), layout.whole(state),
                     static_cast<mas::Gradient>(gradient), as<const double>(grad_output),
                     as<double>(partial), as<void>(value), dtype_of(value_dtype)},
        where);
  });

  sub.def("proximal", [](const Layout& layout, const State& state, const Pointers& theta,
                         const Pointers& second_moment, double eta, double correction, double eps,
                         Where where) {
    const auto segments = layout.with(theta, second_moment);
    run(mas::Proximal{layout.list(segments), layout.whole(state), eta, correction, eps}, where);
  });

  sub.def("sgd",
          [](const Layout& layout, int theta_dtype, const State* state, const Pointers& theta,
             const Pointers& grad, const std::vector<Pointers>& moments, double lr, double momentum,
             double dampening, double decay, double eta, bool nesterov, bool first, bool proximal,
             Pointer scale, Pointer overflow, Where where) {
            const auto segments = layout.with(theta, grad, moments, momentum == 0 ? 0 : 1, {});
            const mas::Sgd rule = {lr, momentum, dampening, decay, eta, nesterov, first};
            run(mas::OptimizerStep<mas::Sgd>{layout.list(segments),
                                             layout.partial(state, theta_dtype), rule, proximal,
                                             as<const float>(scale), as<const float>(overflow)},
                where);
          });

  sub.def("adamw",
          [](const Layout& layout, int theta_dtype, const State* state, const Pointers& theta,
             const Pointers& grad, const std::vector<Pointers>& moments, const Pointers& steps,
             double lr, double beta1, double beta2, double eps, double decay, bool proximal,
             Pointer scale, Pointer overflow, Where where) {
            const bool amsgrad = moments.size() == 3;
            const auto segments = layout.with(theta, grad, moments, amsgrad ? 3 : 2, steps);
            if (steps.size() != theta.size())
              throw std::invalid_argument("steps: expected one a tensor");
            const mas::AdamW rule = {lr, beta1, beta2, eps, decay, amsgrad};
            run(mas::OptimizerStep<mas::AdamW>{layout.list(segments),
                                               layout.partial(state, theta_dtype), rule, proximal,
                                               as<const float>(scale), as<const float>(overflow)},
                where);
          });

  sub.def("accumulate", [](const Layout& layout, const Pointers& omega, const Pointers& grad,
                           int grad_dtype, double weight, Where where) {
    const auto segments = layout.with(omega, grad);
    run(mas::Accumulate{layout.list(segments), dtype_of(grad_dtype), weight}, where);
  });

  sub.def("merge", [](const Layout& layout, const State& state, const Pointers& theta,
                      const Pointers& importance, double keep, double gain, int anchor,
                      std::int64_t entry, Pointer partial, Pointer remainder, Where where) {
    if (anchor < 0 || anchor > 2) throw std::invalid_argument("anchor: expected 0, 1 or 2");
    const auto segments = layout.with(theta, importance);
    run(mas::Merge{layout.list(segments), layout.whole(state), keep, gain,
                   static_cast<mas::Anchor>(anchor), entry, as<double>(partial),
                   as<double>(remainder)},
        where);
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
            run(mas::PerSample{as<void>(omega), as<const void>(grad), as<const void>(input),
                               as<const std::int32_t>(rows), as<void>(partial), groups, outputs,
                               taps, channels, batch, positions, grad_sample, grad_position,
                               input_sample, input_row, splits, square, dtype_of(dtype)},
                where);
          });
}

}  // namespace

PYBIND11_MODULE(MAS_MODULE_NAME, m) {
  py::class_<Layout>(m, "Layout", py::module_local())
      .def(py::init<const std::vector<std::int64_t>&, const std::vector<std::int64_t>&>())
      .def_property_readonly("chunks", &Layout::chunks);
  py::class_<mas::State>(m, "State", py::module_local()).def(py::init(&state_of));
  m.def("instruction_set", &mas::cpu::instruction_set);
  bind<int>(m, "cpu");
#ifdef MAS_CUDA
  bind<Pointer>(m, "cuda");
  m.attr("cuda_architectures") = MAS_CUDA_ARCHITECTURES;
#endif
}
