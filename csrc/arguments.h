// Parts of a kernel's arguments (kernels.h) that are made of several of Python's tensors.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "tensors.h"

namespace mas {

// The flat state (omega, anchor, alpha, remainder behind offsets, see kernels/flat_state.py) of
// parameters like `theta`, with at least `end` elements in a row.
State read_state(pybind11::handle state, const View& theta, std::int64_t end);

// One use of a weight, see kernels/per_sample.py; none if there is nothing to sum. `range`: the
// least and the greatest of rows, where they can't be looked at from here.
std::optional<PerSample> read_per_sample(pybind11::handle omega, pybind11::handle grad,
                                         pybind11::handle input, pybind11::handle rows,
                                         const std::array<std::int64_t, 2>& range,
                                         pybind11::handle partial, std::int64_t splits,
                                         bool square);

// Low-rank updates of weights, see kernels/low_rank.py, with the tensors that they are made of.
struct LowRankUpdates {
  std::vector<AdaptedWeight> weights;
  std::vector<Factor> factors;
  std::vector<Views> kept;
  std::int64_t strips = 0;
  DType dtype = DType::float32;
  DType omega_dtype = DType::float32;
  dlpack::Device device = {};
};

// Some products of factors, `counts[w]` of them for weight w.
struct ProductLists {
  pybind11::handle left;
  pybind11::handle right;
  const std::vector<std::int64_t>& counts;
  const std::vector<double>& scale;
};

LowRankUpdates read_low_rank(const ProductLists& products, const ProductLists& anchors,
                             pybind11::handle omega, const std::vector<double>& unit,
                             Gradient gradient, pybind11::handle left_grad,
                             pybind11::handle right_grad);

}  // namespace mas
