#include "arguments.h"

#include <algorithm>

namespace py = pybind11;

namespace mas {

State read_state(py::handle state, const View& theta, std::int64_t end) {
  const auto fields = py::reinterpret_borrow<py::tuple>(state);
  const py::handle of_alpha = fields[3];
  const View alpha = read("alpha", of_alpha);
  const std::int64_t rows = alpha.numel;
  const DType theta_dtype = static_cast<DType>(theta.code);
  const bool wide = theta_dtype == DType::float64;
  const bool narrow = theta_dtype == DType::bfloat16 || theta_dtype == DType::float16;
  State found = {};
  found.theta_dtype = theta_dtype;
  found.rows = rows;
  found.alpha = static_cast<const double*>(read_array(
      "alpha", of_alpha, theta.device, DType::float64, {std::max<std::int64_t>(rows, 1)}));
  found.remainder = static_cast<const double*>(
      read_array("remainder", fields[4], theta.device, DType::float64, {}));
  const View omega = read("omega", fields[1]);
  const View anchor = read("anchor", fields[2]);
  const auto check = [&](const char* name, const View& view, bool right,
                         const std::string& dtypes) {
    if (!right || !same(view.device, theta.device) || view.ndim != 2 || view.shape[0] != rows ||
        view.shape[1] < end || !view.is_contiguous()) {
      refuse(
          "{}: got {} on {} of shape {}, strides {}, expected a contiguous ({}, at least {}) "
          "tensor "
          "on {} of {}",
          name, view.object.attr("dtype"), view.object.attr("device"), sizes_of(view.object),
          strides_of(view.object), rows, end, device_name(theta.device), dtypes);
    }
  };
  const auto is = [](const View& view, DType dtype) { return view.code == code_of(dtype); };
  check("omega", omega,
        is(omega, DType::float32) || is(omega, DType::bfloat16) || is(omega, DType::float8) ||
            (wide && is(omega, DType::float64)),
        std::string("torch.float32") + (wide ? " or torch.float64" : "") +
            " or torch.bfloat16 or torch.uint8");
  const DType of_anchor = wide ? DType::float64 : DType::float32;
  check("anchor", anchor, is(anchor, of_anchor) || (narrow && is(anchor, theta_dtype)),
        dtype_name(of_anchor) + (narrow ? std::string(" or ") + dtype_name(theta_dtype) : ""));
  if (!same_sizes(omega, anchor)) {
    refuse("anchor: got shape {}, expected {} like omega", sizes_of(anchor.object),
           sizes_of(omega.object));
  }
  found.omega_dtype = static_cast<DType>(omega.code);
  found.anchor_dtype = static_cast<DType>(anchor.code);
  found.omega = omega.data;
  found.anchor = anchor.data;
  found.stride = omega.shape[1];
  return found;
}

namespace {

// (samples, positions, columns), each row of columns without gaps.
void check_operand(const char* name, const View& t, std::int64_t columns, const View& like) {
  if (t.code != like.code || !same(t.device, like.device) || t.ndim != 3 || t.shape[2] != columns) {
    refuse("{}: got {} on {} of shape {}, expected {} on {} of shape (samples, positions, {})",
           name, t.object.attr("dtype"), t.object.attr("device"), sizes_of(t.object),
           like.object.attr("dtype"), like.object.attr("device"), columns);
  }
  if (columns > 1 && t.strides[2] != 1) {
    refuse("{}: got strides {}, expected 1 in the last dimension (contiguous rows)", name,
           strides_of(t.object));
  }
}

void check_rows(const View& rows, const View& grad, std::int64_t taps, std::int64_t seen,
                std::array<std::int64_t, 2> range) {
  const std::int64_t positions = grad.shape[1];
  if (rows.code != kInt32 || !same(rows.device, grad.device) || !rows.is({taps, positions}) ||
      !rows.is_contiguous()) {
    refuse(
        "rows: got {} on {} of shape {}, strides {}, expected contiguous torch.int32 on {} of "
        "shape "
        "{}",
        rows.object.attr("dtype"), rows.object.attr("device"), sizes_of(rows.object),
        strides_of(rows.object), grad.object.attr("device"), tuple_of({taps, positions}));
  }
  if (rows.device.type == dlpack::kCpu && rows.numel > 0) {
    const auto* first = static_cast<const std::int32_t*>(rows.data);
    const auto [least, greatest] = std::minmax_element(first, first + rows.numel);
    range = {*least, *greatest};
  }
  if (range[0] < -1 || range[1] >= seen) {
    refuse("rows: got numbers from {} to {}, expected -1 to {}, rows of input", range[0], range[1],
           seen - 1);
  }
}

}  // namespace

std::optional<PerSample> read_per_sample(py::handle omega_tensor, py::handle grad_tensor,
                                         py::handle input_tensor, py::handle rows_tensor,
                                         const std::array<std::int64_t, 2>& range,
                                         py::handle partial_tensor, std::int64_t splits,
                                         bool square) {
  const View omega = read("omega", omega_tensor);
  const View grad = read("grad", grad_tensor);
  const View input = read("input", input_tensor);
  if (grad.code == kNone || grad.code > code_of(DType::float16)) {
    refuse<py::type_error>(
        "grad: got {}, expected torch.float32, torch.float64, torch.bfloat16 or torch.float16",
        grad_tensor.attr("dtype"));
  }
  const DType dtype = static_cast<DType>(grad.code);
  const DType sum = dtype == DType::float64 ? dtype : DType::float32;
  if (omega.code != code_of(sum) || !same(omega.device, grad.device) || omega.ndim != 4 ||
      !omega.is_contiguous()) {
    refuse(
        "omega: got {} on {} of shape {}, strides {}, expected a contiguous (groups, outputs, "
        "taps, "
        "channels) tensor of {} on {}",
        omega_tensor.attr("dtype"), omega_tensor.attr("device"), sizes_of(omega_tensor),
        strides_of(omega_tensor), dtype_name(sum), grad_tensor.attr("device"));
  }
  const std::int64_t* sizes = omega.shape;
  check_operand("grad", grad, sizes[0] * sizes[1], grad);
  check_operand("input", input, sizes[0] * sizes[3], grad);
  if (input.shape[0] != grad.shape[0]) {
    refuse("input: got {} samples, expected {} like grad", input.shape[0], grad.shape[0]);
  }
  const std::int32_t* table = nullptr;
  if (!rows_tensor.is_none()) {
    const View rows = read("rows", rows_tensor);
    check_rows(rows, grad, sizes[2], input.shape[1], range);
    table = static_cast<const std::int32_t*>(rows.data);
  } else if (sizes[2] != 1) {
    refuse("rows: got None for {} taps, expected a ({}, P) tensor", sizes[2], sizes[2]);
  } else if (input.shape[1] != grad.shape[1]) {
    refuse("input: got {} positions, expected {} like grad", input.shape[1], grad.shape[1]);
  }
  std::int64_t room = 0;
  const std::int64_t most = std::max<std::int64_t>(1, grad.shape[0]);
  if (splits < 1 || splits > most || __builtin_mul_overflow(splits, omega.numel, &room)) {
    refuse("splits: got {}, expected 1 to {}", splits, most);
  }
  void* partial =
      splits == 1 ? nullptr : read_array("partial", partial_tensor, grad.device, sum, {room});
  if (omega.numel == 0 || grad.shape[0] == 0 || grad.shape[1] == 0) return std::nullopt;
  return PerSample{omega.data,      grad.data,        input.data,
                   table,           partial,          sizes[0],
                   sizes[1],        sizes[2],         sizes[3],
                   grad.shape[0],   grad.shape[1],    grad.strides[0],
                   grad.strides[1], input.strides[0], input.strides[1],
                   splits,          square,           dtype};
}

namespace {

// One matrix of a list: of a dtype, on a device, with these sizes (-1: any).
Strided matrix(const std::string& name, const View& view, DType dtype, dlpack::Device device,
               std::int64_t rows, std::int64_t columns) {
  const bool fits = view.ndim == 2 && (rows < 0 || view.shape[0] == rows) &&
                    (columns < 0 || view.shape[1] == columns);
  if (view.code != code_of(dtype) || !same(view.device, device) || !fits) {
    const auto size = [](std::int64_t n) { return n < 0 ? std::string("any") : std::to_string(n); };
    refuse("{}: got {} on {} of shape {}, expected {} on {} of shape ({}, {})", name,
           view.object.attr("dtype"), view.object.attr("device"), sizes_of(view.object),
           dtype_name(dtype), device_name(device), size(rows), size(columns));
  }
  return {view.data, view.strides[0], view.strides[1]};
}

// The tensor that a gradient is written to; none where an empty one stands for it.
Strided destination(const std::string& name, const View& view, const View& like, DType dtype) {
  if (view.numel == 0 && like.numel != 0) return {};
  const Strided found = matrix(name, view, dtype, like.device, like.shape[0], like.shape[1]);
  if (!is_dense(view)) {
    refuse("{}: got strides {} for shape {}, expected a dense tensor without overlap", name,
           strides_of(view.object), sizes_of(view.object));
  }
  return found;
}

}  // namespace

LowRankUpdates read_low_rank(const ProductLists& products, const ProductLists& anchors,
                             py::handle omega_list, const std::vector<double>& unit,
                             Gradient gradient, py::handle left_grad, py::handle right_grad) {
  LowRankUpdates found;
  const auto read_named = [&](const char* name, py::handle list, std::size_t count) {
    found.kept.push_back(read_all(name, list));
    const Views& all = found.kept.back();
    if (all.size() != count) refuse("{}: got {} tensors, expected {}", name, all.size(), count);
    return all;
  };
  const Views left = read_list("left", products.left, false);
  found.kept.push_back(left);
  found.dtype = static_cast<DType>(left[0].code);
  found.device = left[0].device;
  const Views right = read_named("right", products.right, left.size());
  const Views old_left = read_named("anchor_left", anchors.left, anchors.scale.size());
  const Views old_right = read_named("anchor_right", anchors.right, anchors.scale.size());
  const Views omega = read_named("omega", omega_list, unit.size());
  const bool written = gradient != Gradient::none;
  const bool wide = found.dtype == DType::float64;
  const DType grad_dtype = gradient == Gradient::add || wide ? found.dtype : DType::float32;
  const Views to_left = !written ? Views() : read_named("left_grad", left_grad, left.size());
  const Views to_right = !written ? Views() : read_named("right_grad", right_grad, left.size());
  const auto list_of = [](const std::vector<std::int64_t>& numbers) {
    py::list found;
    for (const std::int64_t n : numbers) found.append(n);
    return found;
  };
  const auto check_counts = [&](const char* name, const ProductLists& lists, std::size_t total) {
    std::size_t sum = 0;
    for (const std::int64_t count : lists.counts) {
      if (count < 0 || static_cast<std::size_t>(count) > total - sum) {
        refuse("{}: got {}, expected numbers that add up to {}", name, list_of(lists.counts),
               total);
      }
      sum += static_cast<std::size_t>(count);
    }
    if (lists.counts.size() != omega.size() || sum != total || lists.scale.size() != total) {
      refuse("{}: got {} and {} scales, expected {} numbers that add up to {}, and as many scales",
             name, list_of(lists.counts), lists.scale.size(), omega.size(), total);
    }
  };
  check_counts("counts", products, left.size());
  check_counts("anchor_counts", anchors, old_left.size());
  if (omega.empty()) refuse("omega: got an empty list, expected at least one tensor");
  const int code = omega[0].code;
  if (code == kNone || code > code_of(DType::float8) || code == code_of(DType::float16) ||
      (code == code_of(DType::float64) && !wide)) {
    refuse<py::type_error>(
        "omega[0]: got {}, expected float32, bfloat16 or uint8, or float64 beside float64",
        omega[0].object.attr("dtype"));
  }
  found.omega_dtype = static_cast<DType>(code);

  std::size_t next = 0;
  std::size_t next_old = 0;
  const auto named = [](const char* name, std::size_t i) {
    return std::string(name) + "[" + std::to_string(i) + "]";
  };
  for (std::size_t w = 0; w < omega.size(); ++w) {
    const View& weights = omega[w];
    matrix(named("omega", w), weights, found.omega_dtype, found.device, -1, -1);
    if (!weights.is_contiguous()) {
      refuse("omega[{}]: got strides {} for shape {}, expected a contiguous tensor", w,
             strides_of(weights.object), sizes_of(weights.object));
    }
    const std::int64_t rows = weights.shape[0];
    const std::int64_t columns = weights.shape[1];
    const auto first = static_cast<std::int64_t>(found.factors.size());
    const auto add = [&](const char* left_name, const char* right_name, std::size_t i,
                         const Views& lefts, const Views& rights, double scale) {
      Factor factor = {};
      factor.left = matrix(named(left_name, i), lefts[i], found.dtype, found.device, rows, -1);
      factor.rank = lefts[i].shape[1];
      factor.right =
          matrix(named(right_name, i), rights[i], found.dtype, found.device, factor.rank, columns);
      factor.scale = scale;
      found.factors.push_back(factor);
    };
    for (std::int64_t i = 0; i < products.counts[w]; ++i, ++next) {
      add("left", "right", next, left, right, products.scale[next]);
      if (written) {
        Factor& factor = found.factors.back();
        factor.left_grad =
            destination(named("left_grad", next), to_left[next], left[next], grad_dtype);
        factor.right_grad =
            destination(named("right_grad", next), to_right[next], right[next], grad_dtype);
      }
    }
    for (std::int64_t i = 0; i < anchors.counts[w]; ++i, ++next_old) {
      add("anchor_left", "anchor_right", next_old, old_left, old_right, -anchors.scale[next_old]);
    }
    found.weights.push_back({weights.data, rows, columns, unit[w], first,
                             products.counts[w] + anchors.counts[w], found.strips});
    found.strips += (rows + kStrip - 1) / kStrip;
  }
  return found;
}

}  // namespace mas
