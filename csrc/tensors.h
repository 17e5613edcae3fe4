// Python's tensors as the kernels take them. Every tensor is read and checked in the call that uses
// its address: nothing is remembered, and no caller can make a kernel touch memory that is not its
// own. All of it happens before the GIL is released, and no Python code runs in between.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "dlpack.h"
#include "kernels.h"

namespace mas {

// What was read of a tensor. One that is no tensor with numbers in memory (meta, sparse, nested,
// ...) could not be read: `code` is kNone then.
struct View {
  pybind11::handle object;
  void* data = nullptr;
  dlpack::Device device = {};
  int code = -1;
  int ndim = 0;
  std::int64_t numel = 0;
  const std::int64_t* shape = nullptr;  // these two belong to the tensor
  const std::int64_t* strides = nullptr;

  bool is(std::initializer_list<std::int64_t> sizes) const;
  bool is_contiguous() const;
};

// `code` of a View: the numbers of DType, of which float8 are the bytes of uint8, and others.
constexpr int kNone = -1;
constexpr int kInt32 = 5;
constexpr int code_of(DType dtype) { return static_cast<int>(dtype); }

// A list of tensors, which are kept for as long as it lives.
struct Views : std::vector<View> {
  pybind11::tuple owner;
};

// While one lives, no torch function is overridden: reading tensors runs no Python code.
class Reading {
 public:
  Reading();
  ~Reading();
  Reading(const Reading&) = delete;
  Reading& operator=(const Reading&) = delete;

 private:
  pybind11::object guard_;
};

// Tensors have the same sizes, but lie in memory in another order: the caller is to copy them.
struct OtherStrides : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Finds torch's exchange interface; once, at import.
void prepare_reading();

// The items of a list, which are kept for as long as it lives.
pybind11::tuple items(const char* name, pybind11::handle list);

// One tensor, or number i of a list; `name` is the caller's word for it in errors.
View read(const char* name, pybind11::handle object, std::ptrdiff_t i = -1);

// How many elements each tensor of a list has; their memory is not looked at.
std::vector<std::int64_t> read_sizes(pybind11::handle list);

// Equal for lists of tensors with equal dtypes, devices, sizes and strides; None where one has
// none.
pybind11::object layout_key(pybind11::handle list);

// Any tensors.
Views read_all(const char* name, pybind11::handle list);

// At least one tensor: of one device and one floating dtype; dense, unless said otherwise.
Views read_list(const char* name, pybind11::handle list, bool dense = true);

// As many tensors as `like`, with its sizes and device, and a dtype. Sets `reordered` if strides
// differ.
Views read_like(const char* name, pybind11::handle list, const Views& like, DType dtype,
                bool& reordered);

// A tensor of one dtype and contiguous, on a device, with these sizes; its address.
void* read_array(const char* name, pybind11::handle object, dlpack::Device device, DType dtype,
                 std::initializer_list<std::int64_t> sizes);

// One float32 number on a device, or none: null.
float* read_number(const char* name, pybind11::handle object, dlpack::Device device);

// Where the state of each tensor starts; -1: it has none.
std::vector<std::int64_t> read_offsets(pybind11::handle list, std::size_t count);

// In errors: a dtype, a device, and a tensor's sizes and strides as tuples.
const char* dtype_name(DType dtype);
std::string device_name(dlpack::Device device);
pybind11::object sizes_of(pybind11::handle object);
pybind11::object strides_of(pybind11::handle object);
pybind11::tuple tuple_of(std::initializer_list<std::int64_t> sizes);

// Whether all elements lie side by side, in whatever order.
bool is_dense(const View& view);

bool same(dlpack::Device a, dlpack::Device b);
bool same_sizes(const View& a, const View& b);

// A ValueError (or another) whose text is `format` filled in by Python's str.format.
template <class Error = pybind11::value_error, class... Args>
[[noreturn]] void refuse(const char* format, Args&&... args) {
  throw Error(
      pybind11::str(pybind11::str(format).format(std::forward<Args>(args)...)).cast<std::string>());
}

}  // namespace mas
