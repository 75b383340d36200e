// Weights as the operators check them, and the division of their products into tasks.
#pragma once

#include <torch/csrc/stable/library.h>

#include <vector>

#include "tensors.h"
#include "threads.h"

namespace headwise {

typedef std::vector<MaybeTensor> MaybeTensors;

// A weight [F,width] and its bias [F]; with three dims the first of a stack [N,F,width] and [N,F].
inline LinearWeight check_weight(const Tensor& weight, const MaybeTensor& bias, const Tensor& x,
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
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == last && bias->size(before) == checked.rows &&
                        (dims == 2 || bias->size(0) == weight.size(0)) &&
                        bias->scalar_type() == x.scalar_type() && contiguous_rows(*bias),
                    operation, ": a bias does not fit its weight: expected ", checked.rows,
                    " contiguous elements on the CPU, of its dtype");
    checked.bias = bias->const_data_ptr();
  }
  return checked;
}

// Bytes of an element, of the three dtypes that products serve.
inline int64_t element_bytes(Dtype dtype) { return dtype == kFloat32 ? 4 : 2; }

inline int64_t bytes_of(const LinearWeight& weight, const LinearArgs& args) {
  return weight.rows * args.width * element_bytes(args.dtype);
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
    const int64_t each =
        threads == 1 ? outputs : (outputs + kTasks * threads - 1) / (kTasks * threads);
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
