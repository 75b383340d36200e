// headwise::quantize: rows as integers with scales.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "tensors.h"
#include "threads.h"

namespace headwise {
namespace {

constexpr const char* kQuantize = "headwise::quantize";
constexpr int64_t kTaskRows = 256;

// rows [B,heads,S,D] give integers [B,heads,S,D * bits / 8] and scales [B,heads,S,groups].
std::tuple<Tensor, Tensor> quantize(Tensor rows, int64_t bits, int64_t level) {
  const Kernels& kernels = kernels_of(level, kQuantize);
  STD_TORCH_CHECK(bits == 8 || bits == 4, "headwise::quantize: ", bits, " bits, expected 8 or 4");
  STD_TORCH_CHECK(rows.is_cpu() && rows.dim() == 4, "headwise::quantize: rows have ", rows.dim(),
                  " dims, expected 4, on the CPU");
  QuantizeArgs args = {};
  args.dtype = dtype_of(rows, kQuantize, "rows");
  args.bits = int(bits);
  args.heads = rows.size(1);
  args.length = rows.size(2);
  args.dim = rows.size(3);
  STD_TORCH_CHECK(
      args.dtype != kFloat64 && args.dim >= 1 && args.dim <= kMostDim && args.dim % (8 / bits) == 0,
      "headwise::quantize: rows of ", args.dim, " elements, or of float64");
  STD_TORCH_CHECK(contiguous_rows(rows),
                  "headwise::quantize: the last dim of rows is not contiguous");
  const int64_t batch = rows.size(0), all = batch * args.heads * args.length;
  Tensor integers = new_tensor({batch, args.heads, args.length, args.dim * bits / 8},
                               bits == 8 ? ScalarType::Char : ScalarType::Byte);
  Tensor scales =
      new_tensor({batch, args.heads, args.length, scale_groups(bits, args.dim)}, ScalarType::Float);
  if (all == 0) return {integers, scales};
  args.rows = rows.const_data_ptr();
  take_strides(rows, &args.row_batch, &args.row_head, &args.row_row);
  args.integers = static_cast<unsigned char*>(integers.mutable_data_ptr());
  args.scales = static_cast<float*>(scales.mutable_data_ptr());
  const int64_t tasks = (all + kTaskRows - 1) / kTaskRows;
  const int64_t threads = most_threads() < tasks ? most_threads() : tasks;
  const int64_t bytes = aligned(scratch_bytes(args));
  share(tasks, 1, threads, keep(threads * bytes), bytes, [&](int64_t task, char* scratch) {
    const int64_t first = task * kTaskRows;
    kernels.quantize(args, first, all - first < kTaskRows ? all - first : kTaskRows, scratch);
  });
  return {integers, scales};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headwise, m) {
  m.def("quantize(Tensor rows, int bits, int level) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(headwise, CPU, m) { m.impl("quantize", TORCH_BOX(&quantize)); }

}  // namespace headwise
