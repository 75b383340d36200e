// headwise::project: products of few rows with one matrix per head.

#include <torch/csrc/stable/library.h>

#include "tensors.h"
#include "threads.h"

namespace headwise {
namespace {

constexpr const char* kProject = "headwise::project";
constexpr int64_t kMostProjected = 64;

// x [B,H,S,N] by weight [H,N,R] where `up`; x [B,H,S,R] by the transpose of weight [H,V,R] else.
Tensor project(Tensor x, Tensor weight, bool up, int64_t level) {
  const Kernels& kernels = kernels_of(level, kProject);
  STD_TORCH_CHECK(x.is_cpu() && weight.is_cpu(), "headwise::project: not on the CPU");
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 3, "headwise::project: x has ", x.dim(),
                  " dims and weight ", weight.dim(), ", expected 4 and 3");
  ProjectArgs args = {};
  args.up = up;
  args.batch = x.size(0);
  args.heads = x.size(1);
  args.length = x.size(2);
  args.rows = weight.size(1);
  args.width = weight.size(2);
  args.dtype = dtype_of(x, kProject, "x");
  STD_TORCH_CHECK(args.dtype != kFloat64 && x.scalar_type() == weight.scalar_type(),
                  "headwise::project: x and weight differ in dtype, or are float64");
  STD_TORCH_CHECK(weight.size(0) == args.heads && x.size(3) == (up ? args.rows : args.width),
                  "headwise::project: weight does not fit x");
  STD_TORCH_CHECK(args.batch * args.length <= kMostProjected,
                  "headwise::project: ", args.batch * args.length,
                  " rows per head, expected at most ", kMostProjected);
  STD_TORCH_CHECK(
      x.numel() == 0 || weight.numel() == 0 || (contiguous_rows(x) && contiguous_rows(weight)),
      "headwise::project: a last dim is not contiguous");
  Tensor out = new_tensor({args.batch, args.heads, args.length, up ? args.width : args.rows},
                          x.scalar_type());
  if (out.numel() == 0) return out;
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.out = out.mutable_data_ptr();
  take_strides(x, &args.x_batch, &args.x_head, &args.x_row);
  args.weight_head = weight.stride(0);
  args.weight_row = weight.stride(1);
  take_strides(out, &args.out_batch, &args.out_head, &args.out_row);
  const int64_t threads = most_threads() < args.heads ? most_threads() : args.heads;
  const int64_t bytes = aligned(scratch_bytes(args));
  share(args.heads, 1, threads, keep(threads * bytes), bytes,
        [&](int64_t head, char* scratch) { kernels.project(args, head, scratch); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headwise, m) {
  m.def("project(Tensor x, Tensor weight, bool up, int level) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(headwise, CPU, m) { m.impl("project", TORCH_BOX(&project)); }

}  // namespace headwise
