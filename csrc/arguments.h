// Parts of a kernel's arguments (kernels.h) that are made of several of Python's tensors.
#pragma once

#include <array>
#include <optional>

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

}  // namespace mas
