// The part of DLPack 1.x by which a C extension reads a Python tensor without linking its library:
// the published layout of https://github.com/dmlc/dlpack, dlpack.h, exchange interface 1.3.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mas::dlpack {

constexpr std::uint32_t kMajor = 1;
constexpr const char* kCapsule = "dlpack_exchange_api";

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2 };

struct Device {
  std::int32_t type;
  std::int32_t id;
};

// Codes: 0 int, 1 uint, 2 float, 4 bfloat16, 5 complex, 6 bool.
struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;    // these two belong to the tensor
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

struct Version {
  std::uint32_t major;
  std::uint32_t minor;
};

struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* allocate;
  void* to_managed;
  void* from_managed;
  // 0, or -1 with a Python error set. Owns nothing: the object must outlive what was read.
  int (*read)(void* object, Tensor* out);
  void* current_stream;
};

static_assert(sizeof(Tensor) == 48 && offsetof(Tensor, ndim) == 16 &&
              offsetof(Tensor, dtype) == 20 && offsetof(Tensor, shape) == 24 &&
              offsetof(Tensor, byte_offset) == 40);
static_assert(sizeof(ExchangeApi) == 56 && offsetof(ExchangeApi, previous) == 8 &&
              offsetof(ExchangeApi, read) == 40);

}  // namespace mas::dlpack
