#include "tensors.h"

#include <algorithm>
#include <limits>

namespace py = pybind11;

namespace mas {
namespace {

const dlpack::ExchangeApi* api = nullptr;
PyTypeObject* tensor_type = nullptr;
PyObject* no_overrides = nullptr;  // torch._C.DisableTorchFunction

// Methods of tensors and storages.
PyObject* is_neg = nullptr;
PyObject* untyped_storage = nullptr;
PyObject* storage_offset = nullptr;
PyObject* nbytes = nullptr;

py::object ask(py::handle object, PyObject* method) {
  PyObject* found = PyObject_CallOneArg(method, object.ptr());
  if (found == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

std::int64_t ask_number(py::handle object, PyObject* method) {
  return PyLong_AsLongLong(ask(object, method).ptr());
}

int code_of(dlpack::DataType type) {
  if (type.lanes != 1) return kNone;
  if (type.code == 2 && type.bits == 32) return code_of(DType::float32);
  if (type.code == 2 && type.bits == 64) return code_of(DType::float64);
  if (type.code == 4 && type.bits == 16) return code_of(DType::bfloat16);
  if (type.code == 2 && type.bits == 16) return code_of(DType::float16);
  if (type.code == 1 && type.bits == 8) return code_of(DType::float8);
  if (type.code == 0 && type.bits == 32) return kInt32;
  return kNone;
}

std::int64_t size_of(int code) {
  constexpr std::int64_t sizes[] = {4, 8, 2, 2, 1, 4};
  return sizes[code];
}

// tuple(numbers), or that there are none, as of a nested tensor.
template <class Ask>
py::object numbers_of(Ask ask) {
  try {
    PyObject* plain =
        PyObject_CallOneArg(reinterpret_cast<PyObject*>(&PyTuple_Type), py::object(ask()).ptr());
    if (plain != nullptr) return py::reinterpret_steal<py::object>(plain);
    throw py::error_already_set();
  } catch (py::error_already_set&) {
    return py::str("(unknown)");
  }
}

std::string item(const char* name, std::ptrdiff_t i) {
  return i < 0 ? name : std::string(name) + "[" + std::to_string(i) + "]";
}

// What the exchange interface does not tell: values whose sign is turned when they are read, and a
// storage that was shrunk under its tensor.
void check_memory(const char* name, std::ptrdiff_t i, const View& view) {
  if (view.numel == 0) return;
  if (view.data == nullptr) {
    refuse("{}: got a tensor without memory (fake, freed, or of zeros), expected one with values",
           item(name, i));
  }
  if (ask(view.object, is_neg).ptr() == Py_True) {
    refuse("{}: got a tensor with a negative bit, expected values as they are: use resolve_neg()",
           item(name, i));
  }
  std::int64_t last = 0;  // what lies farthest
  for (int d = 0; d < view.ndim; ++d) last += (view.shape[d] - 1) * view.strides[d];
  const std::int64_t end = ask_number(view.object, storage_offset) + last + 1;
  const std::int64_t bytes = ask_number(ask(view.object, untyped_storage), nbytes);
  if (end > bytes / size_of(view.code)) {
    refuse("{}: got a storage of {} bytes, expected at least {}", item(name, i), bytes,
           end * size_of(view.code));
  }
}

bool same_strides(const View& a, const View& b) {
  if (a.numel == 0) return true;
  for (int d = 0; d < a.ndim; ++d) {
    if (a.shape[d] != 1 && a.strides[d] != b.strides[d]) return false;
  }
  return true;
}

}  // namespace

bool is_dense(const View& view) {
  if (view.numel == 0 || view.is_contiguous()) return true;
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;
  for (int d = 0; d < view.ndim; ++d) {
    if (view.shape[d] != 1) dims.emplace_back(view.strides[d], view.shape[d]);
  }
  std::sort(dims.begin(), dims.end());
  std::int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

Views read_all(const char* name, py::handle list) {
  Views found;
  found.owner = items(name, list);
  found.reserve(found.owner.size());
  for (const py::handle object : found.owner) {
    found.push_back(read(name, object, static_cast<std::ptrdiff_t>(found.size())));
  }
  return found;
}

const char* dtype_name(DType dtype) {
  constexpr const char* names[] = {"torch.float32", "torch.float64", "torch.bfloat16",
                                   "torch.float16", "torch.uint8"};
  return names[code_of(dtype)];
}

py::object sizes_of(py::handle object) {
  return numbers_of([&] { return object.attr("shape"); });
}

py::object strides_of(py::handle object) {
  return numbers_of([&] { return object.attr("stride")(); });
}

py::tuple tuple_of(std::initializer_list<std::int64_t> sizes) {
  py::list found;
  for (const std::int64_t size : sizes) found.append(size);
  return py::tuple(found);
}

std::string device_name(dlpack::Device device) {
  return device.type == dlpack::kCpu ? "cpu" : "cuda:" + std::to_string(device.id);
}

bool same(dlpack::Device a, dlpack::Device b) { return a.type == b.type && a.id == b.id; }

bool same_sizes(const View& a, const View& b) {
  return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

bool View::is(std::initializer_list<std::int64_t> sizes) const {
  return static_cast<std::size_t>(ndim) == sizes.size() &&
         std::equal(sizes.begin(), sizes.end(), shape);
}

bool View::is_contiguous() const {
  if (numel == 0) return true;
  std::int64_t expected = 1;
  for (int d = ndim; d-- > 0;) {
    if (shape[d] != 1 && strides[d] != expected) return false;
    expected *= shape[d];
  }
  return true;
}

Reading::Reading() : guard_(py::reinterpret_steal<py::object>(PyObject_CallNoArgs(no_overrides))) {
  guard_.attr("__enter__")();
}

Reading::~Reading() { guard_.attr("__exit__")(py::none(), py::none(), py::none()); }

void prepare_reading() {
  const py::module_ torch = py::module_::import("torch");
  const py::object tensor = torch.attr("Tensor");
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  api = capsule.is_none() ? nullptr
                          : static_cast<const dlpack::ExchangeApi*>(
                                PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  while (api != nullptr && api->version.major > dlpack::kMajor) api = api->previous;
  if (api == nullptr || api->version.major != dlpack::kMajor || api->read == nullptr) {
    refuse<py::import_error>(
        "torch: got {}, expected 2.10 or newer, whose tensors an extension can read by DLPack 1",
        torch.attr("__version__"));
  }
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.ptr());
  const auto kept = [](py::object found) { return found.release().ptr(); };
  no_overrides = kept(torch.attr("_C").attr("DisableTorchFunction"));
  is_neg = kept(tensor.attr("is_neg"));
  untyped_storage = kept(tensor.attr("untyped_storage"));
  storage_offset = kept(tensor.attr("storage_offset"));
  nbytes = kept(torch.attr("UntypedStorage").attr("nbytes"));
}

py::tuple items(const char* name, py::handle list) {
  if (!PyList_Check(list.ptr()) && !PyTuple_Check(list.ptr())) {
    refuse<py::type_error>("{}: got {}, expected a list", name,
                           py::type::of(list).attr("__name__"));
  }
  return py::reinterpret_steal<py::tuple>(PySequence_Tuple(list.ptr()));
}

namespace {

View look_at(const char* name, py::handle object, std::ptrdiff_t i) {
  if (!PyObject_TypeCheck(object.ptr(), tensor_type)) {
    refuse<py::type_error>("{}: got {}, expected a tensor", item(name, i),
                           py::type::of(object).attr("__name__"));
  }
  View view;
  view.object = object;
  dlpack::Tensor found = {};
  if (api->read(object.ptr(), &found) != 0) {
    PyErr_Clear();
    return view;
  }
  view.data = static_cast<char*>(found.data) + found.byte_offset;
  if (found.data == nullptr) view.data = nullptr;
  view.device = found.device;
  view.code = code_of(found.dtype);
  view.ndim = found.ndim;
  view.shape = found.shape;
  view.strides = found.strides;
  view.numel = 1;
  for (int d = 0; d < found.ndim; ++d) view.numel *= found.shape[d];
  return view;
}

}  // namespace

View read(const char* name, py::handle object, std::ptrdiff_t i) {
  const View view = look_at(name, object, i);
  if (view.code != kNone) check_memory(name, i, view);
  return view;
}

std::vector<std::int64_t> read_sizes(py::handle list) {
  const py::tuple all = items("theta", list);
  if (all.empty()) refuse("theta: got an empty list, expected at least one tensor");
  std::vector<std::int64_t> sizes;
  sizes.reserve(all.size());
  for (const py::handle object : all) {
    sizes.push_back(look_at("theta", object, static_cast<std::ptrdiff_t>(sizes.size())).numel);
  }
  return sizes;
}

py::object layout_key(py::handle list) {
  const py::tuple all = items("tensors", list);
  std::vector<std::int64_t> key;
  key.reserve(8 * all.size());
  for (const py::handle object : all) {
    const View view = look_at("tensors", object, -1);
    if (view.code == kNone) return py::none();
    key.insert(key.end(), {view.code, view.device.type, view.device.id, view.ndim});
    key.insert(key.end(), view.shape, view.shape + view.ndim);
    key.insert(key.end(), view.strides, view.strides + view.ndim);
  }
  return py::bytes(reinterpret_cast<const char*>(key.data()), key.size() * sizeof(std::int64_t));
}

Views read_list(const char* name, py::handle list, bool dense) {
  Views all = read_all(name, list);
  if (all.empty()) refuse("{}: got an empty list, expected at least one tensor", name);
  const View& first = all[0];
  if (first.code == kNone || first.code > code_of(DType::float16)) {
    if (!first.object.attr("is_floating_point")().cast<bool>() || first.code != kNone) {
      refuse<py::type_error>(
          "{}[0]: got {}, expected torch.float32, torch.float64, torch.bfloat16 or torch.float16",
          name, first.object.attr("dtype"));
    }
    refuse("{}[0]: got {} on {}, expected a dense tensor on a CPU or GPU", name,
           first.object.attr("dtype"), first.object.attr("device"));
  }
  for (std::size_t i = 0; i < all.size(); ++i) {
    const View& view = all[i];
    if (view.code != first.code || !same(view.device, first.device)) {
      refuse("{}[{}]: got {} on {}, expected {} on {} like {}[0]", name, i,
             view.object.attr("dtype"), view.object.attr("device"), first.object.attr("dtype"),
             first.object.attr("device"), name);
    }
    if (dense && !is_dense(view)) {
      refuse("{}[{}]: got strides {} for shape {}, expected a dense tensor without overlap", name,
             i, strides_of(view.object), sizes_of(view.object));
    }
  }
  return all;
}

Views read_like(const char* name, py::handle list, const Views& like, DType dtype,
                bool& reordered) {
  Views all = read_all(name, list);
  if (all.size() != like.size()) {
    refuse("{}: got {} tensors, expected {}", name, all.size(), like.size());
  }
  for (std::size_t i = 0; i < all.size(); ++i) {
    const View& view = all[i];
    if (view.code != code_of(dtype) || !same(view.device, like[i].device) ||
        !same_sizes(view, like[i])) {
      refuse("{}[{}]: got {} on {} of shape {}, expected {} on {} of shape {}", name, i,
             view.object.attr("dtype"), view.object.attr("device"), sizes_of(view.object),
             dtype_name(dtype), device_name(like[i].device), sizes_of(like[i].object));
    }
    reordered |= !same_strides(view, like[i]);
  }
  return all;
}

void* read_array(const char* name, py::handle object, dlpack::Device device, DType dtype,
                 std::initializer_list<std::int64_t> sizes) {
  const View view = read(name, object);
  if (view.code != code_of(dtype) || !same(view.device, device) || !view.is(sizes) ||
      !view.is_contiguous()) {
    refuse("{}: got {} on {} of shape {}, expected contiguous {} on {} of shape {}", name,
           object.attr("dtype"), object.attr("device"), sizes_of(object),
           std::string(dtype_name(dtype)).substr(6), device_name(device), tuple_of(sizes));
  }
  return view.data;
}

float* read_number(const char* name, py::handle object, dlpack::Device device) {
  if (object.is_none()) return nullptr;
  const View view = read(name, object);
  if (view.code != code_of(DType::float32) || !same(view.device, device) || view.numel != 1) {
    refuse("{}: got {} on {} of shape {}, expected one float32 number on {}", name,
           object.attr("dtype"), object.attr("device"), sizes_of(object), device_name(device));
  }
  return static_cast<float*>(view.data);
}

std::vector<std::int64_t> read_offsets(py::handle list, std::size_t count) {
  const py::tuple all = items("offsets", list);
  if (all.size() != count) {
    refuse("offsets: got {}, expected {}, one per tensor", all.size(), count);
  }
  std::vector<std::int64_t> found;
  found.reserve(count);
  for (const py::handle number : all) {
    const std::int64_t offset = PyLong_AsLongLong(number.ptr());
    if (offset < -1 || PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      refuse("offsets[{}]: got {}, expected a number from 0 up", found.size(), number);
    }
    found.push_back(offset);
  }
  return found;
}

}  // namespace mas
