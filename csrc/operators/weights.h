// Weights as the operators check them, and the division of their products into tasks.
#pragma once

#include <torch/csrc/stable/library.h>

#include <vector>

#include "tensors.h"
#include "threads.h"

namespace headwise {

typedef std::vector<MaybeTensor> MaybeTensors;

constexpr int64_t kMostRows = 64;

// A matrix in blocks of GGUF, [F,blocks,bytes of a block], whose groups lie as packed_formats.h
// says.
inline PackedMatrix check_packed(const Tensor& matrix, const char* operation) {
  const FormatSizes* sizes = matrix.dim() == 3 ? format_of_bytes(matrix.size(2)) : nullptr;
  STD_TORCH_CHECK(sizes != nullptr && matrix.is_cpu() && matrix.is_contiguous() &&
                      matrix.scalar_type() == ScalarType::Byte && matrix.numel() > 0,
                  operation,
                  ": a matrix of uint8 is not contiguous blocks [rows,blocks,bytes] of "
                  "a format that is known, on the CPU");
  return {static_cast<const unsigned char*>(matrix.const_data_ptr()), *sizes, matrix.size(0),
          matrix.size(1)};
}

inline const void* check_bias(const MaybeTensor& bias, const Tensor& weight, const Tensor& x,
                              int64_t rows, const char* operation) {
  if (!bias.has_value()) return nullptr;
  const bool stacked = weight.scalar_type() != ScalarType::Byte && weight.dim() == 3;
  STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == (stacked ? 2 : 1) &&
                      bias->size(bias->dim() - 1) == rows &&
                      (!stacked || bias->size(0) == weight.size(0)) &&
                      bias->scalar_type() == x.scalar_type() && contiguous_rows(*bias),
                  operation, ": a bias does not fit its weight: expected ", rows,
                  " contiguous elements on the CPU, of its dtype");
  return bias->const_data_ptr();
}

// A weight [F,width] and its bias [F]; with three dims the first of a stack [N,F,width] and [N,F].
inline LinearWeight check_plain(const Tensor& weight, const MaybeTensor& bias, const Tensor& x,
                                int64_t width, const char* operation, int64_t dims = 2) {
  const int64_t last = dims - 1, before = dims - 2;
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == dims && weight.size(last) == width &&
                      weight.scalar_type() == x.scalar_type(),
                  operation, ": a weight does not fit x: expected ", dims == 2 ? "two" : "three",
                  " dims, ", width, " columns, on the CPU, of its dtype");
  LinearWeight checked = {};
  checked.data = weight.const_data_ptr();
  checked.rows = weight.size(before);
  const bool one_column = width <= 1, one_row = checked.rows <= 1;
  checked.transposed = !(weight.stride(last) == 1 || one_column);
  checked.stride = weight.stride(checked.transposed ? last : before);
  STD_TORCH_CHECK(!checked.transposed || weight.stride(before) == 1 || one_row, operation,
                  ": neither the rows nor the columns of a weight are contiguous");
  checked.bias = check_bias(bias, weight, x, checked.rows, operation);
  return checked;
}

// The same, or a weight of uint8, which is packed.
inline LinearWeight check_weight(const Tensor& weight, const MaybeTensor& bias, const Tensor& x,
                                 int64_t width, const char* operation) {
  if (weight.scalar_type() != ScalarType::Byte)
    return check_plain(weight, bias, x, width, operation);
  LinearWeight checked = {};
  checked.packed = check_packed(weight, operation);
  checked.rows = checked.packed.rows;
  STD_TORCH_CHECK(checked.packed.blocks * checked.packed.sizes.columns == width, operation,
                  ": a weight of ", checked.packed.blocks, " blocks of ",
                  checked.packed.sizes.columns, " columns does not fit x: expected ", width);
  checked.bias = check_bias(bias, weight, x, checked.rows, operation);
  return checked;
}

// Whether weights that are multiplied with the same rows are packed, which all are or none.
inline bool all_packed(const LinearWeight* weights, size_t count, const char* operation) {
  for (size_t i = 1; i < count; ++i)
    STD_TORCH_CHECK(weights[i].is_packed() == weights[0].is_packed(), operation,
                    ": some weights are packed and others not");
  return count > 0 && weights[0].is_packed();
}

// Bytes of an element, of the three dtypes that products serve.
inline int64_t element_bytes(Dtype dtype) { return dtype == kFloat32 ? 4 : 2; }

inline int64_t bytes_of(const LinearWeight& weight, const LinearArgs& args) {
  const PackedMatrix& packed = weight.packed;
  return weight.is_packed() ? weight.rows * packed.blocks * packed.sizes.bytes
                            : weight.rows * args.width * element_bytes(args.dtype);
}

// Products with one or more weights in tasks of about the same size.
struct Division {
  struct Task {
    size_t weight;
    int64_t first, count;
  };
  std::vector<Task> tasks;
  int64_t threads, largest = 0;

  // Tasks of each thread: the fewer, the fewer rows are read that nothing asked for ahead; the
  // more, the less a thread waits for another that was held up.
  static constexpr int64_t kTasks = 2;
  // Of large weights a task takes as many bytes, up to so many tasks: a core of a shared machine
  // may be held up for a while.
  static constexpr int64_t kLargeBytes = 524288, kMostTasks = 16;
  // Bytes of weights below which another thread costs more than it saves.
  static constexpr int64_t kLeastBytes = 32768;
  // Outputs that tasks begin at multiples of: by rows, and by columns, of which a task reads a
  // stripe.
  static constexpr int64_t kRowStep = 16, kColumnStep = 64;

  // step: that of the outputs instead, where it is not 0.
  Division(const LinearWeight* weights, size_t count, int64_t bytes, int64_t step = 0) {
    const int64_t most = bytes / kLeastBytes < 1 ? 1 : bytes / kLeastBytes;
    threads = most_threads() < most ? most_threads() : most;
    int64_t outputs = 0;
    for (size_t i = 0; i < count; ++i) outputs += weights[i].rows;
    const int64_t large = bytes / (kLargeBytes * threads);
    const int64_t tasks_each = large < kTasks ? kTasks : large < kMostTasks ? large : kMostTasks;
    const int64_t each =
        threads == 1 ? outputs : (outputs + tasks_each * threads - 1) / (tasks_each * threads);
    for (size_t i = 0; i < count; ++i) {
      const int64_t own = step > 0 ? step : weights[i].transposed ? kColumnStep : kRowStep;
      const int64_t of_task = (each + own - 1) / own * own;
      largest = of_task > largest ? of_task : largest;
      for (int64_t first = 0; first < weights[i].rows; first += of_task) {
        const int64_t left = weights[i].rows - first;
        tasks.push_back({i, first, left < of_task ? left : of_task});
      }
    }
  }

  template <class What>
  void share(char* memory, int64_t scratch, const What& what) const {
    headwise::share(int64_t(tasks.size()), 1, threads, memory, scratch,
                    [&](int64_t index, char* own) { what(tasks[size_t(index)], own); });
  }
};

}  // namespace headwise
