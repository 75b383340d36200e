// headwise::norm and headwise::mlp: what the small modules of a decoder layer compute, alone.

#include <torch/csrc/stable/library.h>

#include "layer_parts.h"

namespace headwise {
namespace {

constexpr const char* kNorm = "headwise::norm";
constexpr const char* kMlp = "headwise::mlp";

void sizes_of(const Tensor& x, std::vector<int64_t>* sizes) {
  for (int64_t i = 0; i < x.dim(); ++i) sizes->push_back(x.size(i));
}

// The rows of x [...,E] normalised.
Tensor norm(Tensor x, int64_t kind, MaybeTensor weight, MaybeTensor bias, double eps,
            int64_t level) {
  const Kernels& kernels = kernels_of(level, kNorm);
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1 && x.is_contiguous(), kNorm,
                  ": x is not a contiguous tensor on the CPU");
  const int64_t width = x.size(x.dim() - 1);
  JoinArgs all = {};
  all.dtype = dtype_of(x, kNorm, "x");
  STD_TORCH_CHECK(all.dtype != kFloat64, kNorm, ": x is float64");
  all.width = width;
  all.next = check_norm(kind, weight, bias, eps, x, width, kNorm);
  std::vector<int64_t> sizes;
  sizes_of(x, &sizes);
  Tensor out = new_tensor(sizes.data(), x.dim(), x.scalar_type());
  const int64_t rows = width == 0 ? 0 : x.numel() / width;
  if (rows == 0) return out;
  // elements below which another thread costs more than it saves
  constexpr int64_t kLeast = 65536;
  const int64_t most = x.numel() / kLeast < 1 ? 1 : x.numel() / kLeast;
  const int64_t threads = most_threads() < most ? most_threads() : most;
  const int64_t each = threads == 1 ? rows : (rows + 4 * threads - 1) / (4 * threads);
  const int64_t scratch = aligned(join_bytes(all)), size = element_bytes(all.dtype);
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  share((rows + each - 1) / each, 1, threads, keep(threads * scratch), scratch,
        [&](int64_t task, char* own) {
          JoinArgs part = all;
          const int64_t first = task * each;
          part.rows = rows - first < each ? rows - first : each;
          part.x = from + first * width * size;
          part.normed = to + first * width * size;
          kernels.join(part, own);
        });
  return out;
}

// x [...,E], of few rows, through an MLP.
Tensor mlp(Tensor x, std::vector<Tensor> weights, MaybeTensors biases, bool gates,
           int64_t activation, int64_t level) {
  const Kernels& kernels = kernels_of(level, kMlp);
  Mlp mlp(x, check_rows(x, kMlp), weights, biases, 0, gates, activation, kMlp);
  const LinearArgs& rows = mlp.rows;
  std::vector<int64_t> sizes;
  sizes_of(x, &sizes);
  Tensor out = new_tensor(sizes.data(), x.dim(), x.scalar_type());
  const int64_t taken = aligned(taken_bytes(rows)), scratch = mlp.scratch() + take_bytes(rows);
  char* memory = keep(taken + mlp.of_middle + most_threads() * scratch);
  kernels.take(rows, 0, rows.rows, memory, memory + taken + mlp.of_middle);
  mlp.down.out = out.mutable_data_ptr();
  mlp.run(kernels, memory, memory + taken, memory + taken + mlp.of_middle, scratch);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headwise, m) {
  m.def("norm(Tensor x, int kind, Tensor? weight, Tensor? bias, float eps, int level) -> Tensor");
  m.def(
      "mlp(Tensor x, Tensor[] weights, Tensor?[] biases, bool gates, int activation, int level) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(headwise, CPU, m) {
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("mlp", TORCH_BOX(&mlp));
}

}  // namespace headwise
