// The options of attention as arguments of the operator. Whatever Options::each visits is written
// into the schema, taken from a call and checked here, by the type of its field.
#pragma once

#include <torch/csrc/stable/library.h>

#include <array>
#include <string>

#include "tensors.h"

namespace headwise {

// Takes the next argument off a call's stack, and its ownership.
template <class T>
T take(StableIValue*& stack) {
  return torch::stable::detail::to<T>(*stack++);
}

// Writes the schema of the options. The default of each means that it is not used.
struct DescribeOptions {
  std::string schema;

  void operator()(const char* name, bool) { add("bool", name, "False"); }
  void operator()(const char* name, int64_t) { add("int", name, "0"); }
  void operator()(const char* name, double) { add("float", name, "0.0"); }
  template <class OfTensor>
  void operator()(const char* name, const OfTensor&) {
    add("Tensor?", name, "None");
  }

  void add(const char* type, const char* name, const char* value) {
    schema = schema + ", " + type + " " + name + "=" + value;
  }
};

// Counts the options that are tensors.
struct CountTensors {
  int tensors = 0;

  constexpr void operator()(const char*, bool) {}
  constexpr void operator()(const char*, int64_t) {}
  constexpr void operator()(const char*, double) {}
  template <class OfTensor>
  constexpr void operator()(const char*, const OfTensor&) {
    ++tensors;
  }
};

constexpr int count_tensors() {
  Options options = {};
  CountTensors count;
  options.each(count);
  return count.tensors;
}

typedef std::array<MaybeTensor, count_tensors()> OptionTensors;

// Takes the options off a call's stack: numbers into their fields, and tensors to keep, since every
// argument must have an owner before a check may fail.
struct TakeOptions {
  StableIValue*& stack;
  MaybeTensor* next;

  void operator()(const char*, bool& field) { field = take<bool>(stack); }
  void operator()(const char*, int64_t& field) { field = take<int64_t>(stack); }
  void operator()(const char*, double& field) { field = take<double>(stack); }
  template <class OfTensor>
  void operator()(const char*, OfTensor&) {
    *next++ = take<MaybeTensor>(stack);
  }
};

inline OptionTensors take_options(StableIValue*& stack, Options* options) {
  OptionTensors tensors;
  options->each(TakeOptions{stack, tensors.data()});
  return tensors;
}

// Checks the tensors that were taken, and points their fields to them.
struct CheckOptions {
  const AttendArgs& args;
  const MaybeTensor* next;

  void operator()(const char*, bool) {}
  void operator()(const char*, int64_t) {}
  void operator()(const char*, double) {}

  void operator()(const char* name, PerHead& field) {
    const MaybeTensor& tensor = *next++;
    if (!tensor.has_value()) return;
    STD_TORCH_CHECK(tensor->is_cpu() && tensor->scalar_type() == ScalarType::Float &&
                        tensor->dim() == 1 && tensor->size(0) == args.heads &&
                        contiguous_rows(*tensor),
                    kAttend, ": ", name, " is not a contiguous float32 vector of ", args.heads);
    field.data = static_cast<const float*>(tensor->const_data_ptr());
  }

  void operator()(const char* name, Bias& field) {
    const MaybeTensor& tensor = *next++;
    if (!tensor.has_value()) return;
    field.strides = broadcast(*tensor, name);
    field.dtype = dtype_of(*tensor, kAttend, name);
    field.data = tensor->const_data_ptr();
  }

  void operator()(const char* name, Mask& field) {
    const MaybeTensor& tensor = *next++;
    if (!tensor.has_value()) return;
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Bool, kAttend, ": ", name, " is not bool");
    field.strides = broadcast(*tensor, name);
    field.data = static_cast<const unsigned char*>(tensor->const_data_ptr());
  }

  void operator()(const char* name, Chosen& field) {
    const MaybeTensor& tensor = *next++;
    if (!tensor.has_value()) return;
    check_tensor(*tensor, name);
    const int64_t heads = tensor->size(1);
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Int && tensor->size(0) == args.batch &&
                        (heads == 1 || heads == args.kv_heads) && tensor->size(2) == args.queries &&
                        contiguous_rows(*tensor),
                    kAttend, ": ", name,
                    " is not int32 [B, 1 or K, S, count], its rows contiguous");
    field.data = static_cast<const int32_t*>(tensor->const_data_ptr());
    field.heads = heads;
    field.count = tensor->size(3);
    take_strides(*tensor, &field.batch, &field.head, &field.query);
  }

  // The strides of a tensor that broadcasts to [B,H,S,L].
  ScoreStrides broadcast(const Tensor& tensor, const char* name) const {
    check_tensor(tensor, name);
    const int64_t full[4] = {args.batch, args.heads, args.queries, args.context};
    int64_t strides[4];
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t size = tensor.size(i);
      STD_TORCH_CHECK(size == full[i] || size == 1, kAttend, ": dim ", i, " of ", name,
                      " has size ", size, ", expected 1 or ", full[i]);
      strides[i] = size == 1 ? 0 : tensor.stride(i);
    }
    return {strides[0], strides[1], strides[2], strides[3]};
  }
};

}  // namespace headwise
