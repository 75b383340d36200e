// Tensors as the operators check, read and make them. A failed check is a RuntimeError in Python;
// everything is checked before memory is touched.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "../kernels.h"

namespace headwise {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
typedef std::optional<Tensor> MaybeTensor;

// `operation` is what the error begins with, `name` the tensor's.
inline Dtype dtype_of(const Tensor& tensor, const char* operation, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBfloat16;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::Double:
      return kFloat64;
    default:
      STD_TORCH_CHECK(false, operation, ": ", name, " has no floating dtype that is served");
  }
}

// What the errors of attention begin with.
constexpr const char* kAttend = "headwise::attend";

// A tensor of attention has four dims.
inline void check_tensor(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), kAttend, ": ", name, " is not on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 4, kAttend, ": ", name, " has ", tensor.dim(),
                  " dims, expected 4");
}

// Whether elements of the last dim lie side by side.
inline bool contiguous_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) == 1 || tensor.stride(last) == 1 || tensor.numel() == 0;
}

// A CPU tensor of `dims` dims whose last lies side by side.
inline void check_contiguous_rows(const Tensor& tensor, const char* operation, const char* name,
                                  int64_t dims) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == dims && contiguous_rows(tensor), operation,
                  ": ", name, " is not a CPU tensor of ", dims, " dims whose last is contiguous");
}

inline void take_strides(const Tensor& tensor, int64_t* batch, int64_t* head, int64_t* row) {
  *batch = tensor.stride(0);
  *head = tensor.stride(1);
  *row = tensor.stride(2);
}

// A new tensor on the CPU. `new_empty` would take a microsecond more: it goes through the
// dispatcher.
inline Tensor new_strided_tensor(const int64_t* sizes, const int64_t* strides, int64_t dims,
                                 ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor new_tensor(const int64_t* sizes, int64_t dims, ScalarType dtype) {
  int64_t strides[64], step = 1;  // PyTorch's tensors have at most 64 dims
  for (int64_t i = dims; i-- > 0; step *= sizes[i] > 1 ? sizes[i] : 1) strides[i] = step;
  return new_strided_tensor(sizes, strides, dims, dtype);
}

template <size_t DIMS>
Tensor new_tensor(const int64_t (&sizes)[DIMS], ScalarType dtype) {
  return new_tensor(sizes, DIMS, dtype);
}

// Whether the memory of two tensors, strides and all, may have bytes in common.
inline bool may_overlap(const Tensor& one, const Tensor& other) {
  const auto range = [](const Tensor& tensor, const char** first, const char** end) {
    int64_t elements = tensor.numel() == 0 ? 0 : 1;
    for (int64_t i = 0; elements > 0 && i < tensor.dim(); ++i)
      elements += (tensor.size(i) - 1) * tensor.stride(i);
    *first = static_cast<const char*>(tensor.const_data_ptr());
    *end = *first + elements * int64_t(tensor.element_size());
  };
  const char *first[2], *end[2];
  range(one, first, end);
  range(other, first + 1, end + 1);
  return first[0] < end[1] && first[1] < end[0];
}

// The kernels of a level, which this machine must have.
inline const Kernels& kernels_of(int64_t level, const char* operation) {
  const Kernels* table = level < 0 || level > kAmx ? nullptr : kernels(int(level));
  STD_TORCH_CHECK(table != nullptr, operation, ": level ", level, " does not run on this machine");
  return *table;
}

}  // namespace headwise
