// headwise::linear: products of few rows with weights as they are stored.

#include <torch/csrc/stable/library.h>

#include "weights.h"

namespace headwise {
namespace {

constexpr const char* kLinear = "headwise::linear";
// Rows of x that are integers at a time, of any number, where weights are packed.
constexpr int64_t kRowsAtOnce = 256;

// x [...,width] by the transposes of weights [rows,width], or packed ones, plus biases [rows].
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
  std::vector<LinearWeight> checked;
  std::vector<Tensor> outs;
  int64_t bytes = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    checked.push_back(check_weight(weights[i], biases[i], x, args.width, kLinear));
    bytes += bytes_of(checked[i], args);
  }
  args.packed = all_packed(checked.data(), checked.size(), kLinear);
  STD_TORCH_CHECK(args.packed || args.rows <= kMostRows, kLinear, ": ", args.rows,
                  " rows, expected at most ", kMostRows);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i <= last; ++i) sizes.push_back(x.size(i));
  for (LinearWeight& weight : checked) {
    sizes.back() = weight.rows;
    outs.push_back(new_tensor(sizes.data(), x.dim(), x.scalar_type()));
    weight.out = outs.back().mutable_data_ptr();
  }
  if (args.rows == 0) return outs;

  const Division division(checked.data(), checked.size(), args.packed ? args.rows * bytes : bytes);
  const int64_t all = args.rows, size = element_bytes(args.dtype);
  args.rows = all < kRowsAtOnce ? all : kRowsAtOnce;
  const int64_t taken = aligned(taken_bytes(args));
  const int64_t scratch = aligned(scratch_bytes(args, division.largest)) + take_bytes(args);
  char* memory = keep(taken + division.threads * scratch);
  char* own = memory + taken;
  for (int64_t first = 0; first < all; first += kRowsAtOnce) {
    args.rows = all - first < kRowsAtOnce ? all - first : kRowsAtOnce;
    const int64_t each = args.rows > kMostRows ? 16 : args.rows;
    share((args.rows + each - 1) / each, 1, args.rows > each ? division.threads : 1, own, scratch,
          [&](int64_t task, char* row) {
            const int64_t left = args.rows - task * each;
            kernels.take(args, task * each, left < each ? left : each, memory, row);
          });
    division.share(own, scratch, [&](const Division::Task& task, char* each) {
      kernels.linear(args, checked[task.weight], task.first, task.count, memory, each);
    });
    args.x = static_cast<const char*>(args.x) + args.rows * args.x_row * size;
    for (LinearWeight& weight : checked)
      weight.out = static_cast<char*>(weight.out) + args.rows * weight.rows * size;
  }
  return outs;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headwise, m) {
  m.def("linear(Tensor x, Tensor[] weights, Tensor?[] biases, int level) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(headwise, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }

}  // namespace headwise
