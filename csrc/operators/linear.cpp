// headwise::linear: products of few rows with weights as they are stored.

#include <torch/csrc/stable/library.h>

#include <vector>

#include "tensors.h"
#include "threads.h"

namespace headwise {
namespace {

constexpr const char* kLinear = "headwise::linear";
constexpr int64_t kMostRows = 64;
// Bytes of a weight below which another thread costs more than it saves.
constexpr int64_t kLeastBytes = 32768;
// Outputs that tasks begin at multiples of: by rows, and by columns, of which a task reads a
// stripe.
constexpr int64_t kRowStep = 16, kColumnStep = 64;

typedef std::vector<std::optional<Tensor>> MaybeTensors;

LinearWeight check_weight(const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& x,
                          int64_t width) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 2 && weight.size(1) == width &&
                      weight.scalar_type() == x.scalar_type(),
                  kLinear, ": a weight does not fit x: expected two dims, ", width,
                  " columns, on the CPU, of its dtype");
  LinearWeight checked = {};
  checked.data = weight.const_data_ptr();
  checked.rows = weight.size(0);
  const bool one_column = width <= 1, one_row = checked.rows <= 1;
  checked.transposed = !(weight.stride(1) == 1 || one_column);
  checked.stride = weight.stride(checked.transposed ? 1 : 0);
  STD_TORCH_CHECK(!checked.transposed || weight.stride(0) == 1 || one_row, kLinear,
                  ": neither the rows nor the columns of a weight are contiguous");
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == checked.rows &&
                        bias->scalar_type() == x.scalar_type() && contiguous_rows(*bias),
                    kLinear, ": a bias does not fit its weight: expected ", checked.rows,
                    " contiguous elements on the CPU, of its dtype");
    checked.bias = bias->const_data_ptr();
  }
  return checked;
}

// x [...,width] by the transposes of weights [rows,width], plus biases [rows].
std::vector<Tensor> linear(Tensor x, std::vector<Tensor> weights, MaybeTensors biases,
                           int64_t level) {
  const Kernels& kernels = kernels_of(level, kLinear);
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1 && x.is_contiguous(), kLinear,
                  ": x is not a contiguous tensor on the CPU");
  STD_TORCH_CHECK(weights.size() == biases.size(), kLinear, ": ", weights.size(), " weights and ",
                  biases.size(), " biases");
  const int64_t last = x.dim() - 1;
  LinearArgs args = {};
  args.dtype = dtype_of(x, kLinear, "x");
  STD_TORCH_CHECK(args.dtype != kFloat64, kLinear, ": x is float64");
  args.width = x.size(last);
  args.rows = 1;
  for (int64_t i = 0; i < last; ++i) args.rows *= x.size(i);
  args.x_row = args.width;
  args.x = x.const_data_ptr();
  STD_TORCH_CHECK(args.rows <= kMostRows, kLinear, ": ", args.rows, " rows, expected at most ",
                  kMostRows);

  std::vector<LinearWeight> checked;
  std::vector<Tensor> outs;
  int64_t bytes = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    checked.push_back(check_weight(weights[i], biases[i], x, args.width));
    bytes += checked[i].rows * args.width * (args.dtype == kFloat32 ? 4 : 2);
  }
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i <= last; ++i) sizes.push_back(x.size(i));
  for (LinearWeight& weight : checked) {
    sizes.back() = weight.rows;
    outs.push_back(new_tensor(sizes.data(), x.dim(), x.scalar_type()));
    weight.out = outs.back().mutable_data_ptr();
  }
  if (args.rows == 0) return outs;

  const int64_t most = bytes / kLeastBytes < 1 ? 1 : bytes / kLeastBytes;
  const int64_t threads = most_threads() < most ? most_threads() : most;
  int64_t outputs = 0;
  for (const LinearWeight& weight : checked) outputs += weight.rows;
  const int64_t each = threads == 1 ? outputs : (outputs + 4 * threads - 1) / (4 * threads);
  struct Task {
    const LinearWeight* weight;
    int64_t first, count;
  };
  std::vector<Task> tasks;
  int64_t largest = 0;
  for (const LinearWeight& weight : checked) {
    const int64_t step = weight.transposed ? kColumnStep : kRowStep;
    const int64_t of_task = (each + step - 1) / step * step;
    largest = of_task > largest ? of_task : largest;
    for (int64_t first = 0; first < weight.rows; first += of_task) {
      const int64_t left = weight.rows - first;
      tasks.push_back({&weight, first, left < of_task ? left : of_task});
    }
  }
  const int64_t taken = aligned(taken_bytes(args));
  const int64_t scratch = aligned(scratch_bytes(args, largest));
  char* memory = keep(taken + threads * scratch);
  kernels.take(args, memory);
  share(int64_t(tasks.size()), 1, threads, memory + taken, scratch, [&](int64_t index, char* own) {
    const Task& task = tasks[size_t(index)];
    kernels.linear(args, *task.weight, task.first, task.count, memory, own);
  });
  return outs;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headwise, m) {
  m.def("linear(Tensor x, Tensor[] weights, Tensor?[] biases, int level) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(headwise, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }

}  // namespace headwise
