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
  check("anchor", anchor, is(anchor, of_anchor), dtype_name(of_anchor));
  if (!same_sizes(omega, anchor)) {
    refuse("anchor: got shape {}, expected {} like omega", sizes_of(anchor.object),
           sizes_of(omega.object));
  }
  found.omega_dtype = static_cast<DType>(omega.code);
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

}  // namespace mas
