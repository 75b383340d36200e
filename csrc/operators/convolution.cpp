// headwise::causal_conv1d: each channel over its last inputs; and the same on a state in its place.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "tensors.h"
#include "threads.h"

namespace headwise {
namespace {

constexpr const char* kConvolution = "headwise::causal_conv1d";
constexpr int64_t kMostKept = int64_t(1) << 20;
// Products that are worth another thread.
constexpr int64_t kLeastProducts = int64_t(1) << 14;

void check_same(const Tensor& tensor, const Tensor& x, const char* name, const int64_t* sizes,
                int64_t dims) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == x.scalar_type() &&
                      tensor.dim() == dims && tensor.is_contiguous(),
                  kConvolution, ": ", name, " is not a contiguous CPU tensor of ", dims,
                  " dims in the dtype of x");
  for (int64_t i = 0; i < dims; ++i)
    STD_TORCH_CHECK(tensor.size(i) == sizes[i], kConvolution, ": dim ", i, " of ", name, " is ",
                    tensor.size(i), ", expected ", sizes[i]);
}

// What both operators check, and the result; `after` may be `state`.
Tensor convolved(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                 const Tensor* state, const MaybeTensor& lengths, int64_t kept, bool silu,
                 int64_t level, const Tensor* after) {
  const Kernels& kernels = kernels_of(level, kConvolution);
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3, kConvolution, ": x is not a CPU tensor of 3 dims");
  STD_TORCH_CHECK(weight.dim() == 2, kConvolution, ": weight has ", weight.dim(),
                  " dims, expected 2");
  ConvolutionArgs args = {};
  args.dtype = dtype_of(x, kConvolution, "x");
  STD_TORCH_CHECK(args.dtype != kFloat64, kConvolution, ": x is float64");
  args.silu = silu;
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.tokens = x.size(2);
  args.width = weight.size(1);
  args.kept = kept;
  STD_TORCH_CHECK(args.width >= 1 && args.width <= kMostWidth, kConvolution, ": the width is ",
                  args.width, ", expected 1 to ", kMostWidth);
  const int64_t of_weight[2] = {args.channels, args.width};
  check_same(weight, x, "weight", of_weight, 2);
  args.weight = weight.const_data_ptr();
  if (bias.has_value()) {
    check_same(*bias, x, "bias", of_weight, 1);
    args.bias = bias->const_data_ptr();
  }
  const int64_t of_state[3] = {args.batch, args.channels, kept};
  if (state != nullptr) {
    STD_TORCH_CHECK(kept >= args.width - 1, kConvolution, ": a state of ", kept,
                    " inputs, expected ", args.width - 1, " or more");
    check_same(*state, x, "state", of_state, 3);
    args.state = state->const_data_ptr();
  }
  if (lengths.has_value()) {
    STD_TORCH_CHECK(lengths->is_cpu() && lengths->scalar_type() == ScalarType::Long &&
                        lengths->dim() == 1 && lengths->size(0) == args.batch &&
                        contiguous_rows(*lengths),
                    kConvolution, ": lengths is not a contiguous int64 vector of ", args.batch);
    args.lengths = static_cast<const int64_t*>(lengths->const_data_ptr());
    for (int64_t b = 0; b < args.batch; ++b)
      STD_TORCH_CHECK(args.lengths[b] >= 0 && args.lengths[b] <= args.tokens, kConvolution,
                      ": a length is ", args.lengths[b], ", expected 0 to ", args.tokens);
  }
  STD_TORCH_CHECK(state != after || !may_overlap(x, *after), kConvolution,
                  ": the state that is changed in its place shares memory with x");
  args.x_batch = x.stride(0);
  args.x_channel = args.channels == 1 ? 1 : x.stride(1);
  args.x_token = x.stride(2);
  const bool last = args.channels_last();
  const int64_t sizes[3] = {args.batch, args.channels, args.tokens};
  const int64_t most = args.channels * args.tokens;
  const int64_t strides[3] = {most > 1 ? most : 1,
                              last              ? 1
                              : args.tokens > 1 ? args.tokens
                                                : 1,
                              last ? args.channels > 1 ? args.channels : 1 : 1};
  Tensor out = new_strided_tensor(sizes, strides, 3, x.scalar_type());
  if (args.batch * args.channels == 0) return out;
  args.x = x.const_data_ptr();
  args.out = out.mutable_data_ptr();
  if (kept > 0) args.after = after->mutable_data_ptr();
  const int64_t tasks = args.batch * args.blocks(), bytes = aligned(scratch_bytes(args));
  const int64_t wanted =
      1 + args.batch * args.channels * (args.tokens * args.width + 8) / kLeastProducts;
  int64_t threads = most_threads() < tasks ? most_threads() : tasks;
  if (wanted < threads) threads = wanted;
  share(tasks, 1, threads, keep(threads * bytes), bytes,
        [&](int64_t task, char* scratch) { kernels.convolution(args, task, scratch); });
  return out;
}

// x [B,C,S], weight [C,width], bias [C], state [B,C,kept], lengths [B] in int64: out [B,C,S] and
// the last `kept` inputs.
std::tuple<Tensor, Tensor> causal_conv1d(Tensor x, Tensor weight, MaybeTensor bias,
                                         MaybeTensor state, MaybeTensor lengths, int64_t kept,
                                         bool silu, int64_t level) {
  STD_TORCH_CHECK(x.dim() == 3, kConvolution, ": x has ", x.dim(), " dims, expected 3");
  STD_TORCH_CHECK(kept >= 0 && kept <= kMostKept, kConvolution, ": ", kept,
                  " inputs to keep, expected 0 to ", kMostKept);
  Tensor after = new_tensor({x.size(0), x.size(1), kept}, x.scalar_type());
  Tensor out = convolved(x, weight, bias, state.has_value() ? &*state : nullptr, lengths, kept,
                         silu, level, &after);
  return {out, after};
}

Tensor causal_conv1d_in_place(Tensor x, Tensor weight, MaybeTensor bias, Tensor state,
                              MaybeTensor lengths, bool silu, int64_t level) {
  STD_TORCH_CHECK(state.dim() == 3, kConvolution, ": state has ", state.dim(), " dims, expected 3");
  return convolved(x, weight, bias, &state, lengths, state.size(2), silu, level, &state);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headwise, m) {
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? lengths, int "
      "kept, bool silu, int level) -> (Tensor, Tensor)");
  m.def(
      "causal_conv1d_(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, Tensor? lengths, "
      "bool silu, int level) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(headwise, CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d));
  m.impl("causal_conv1d_", TORCH_BOX(&causal_conv1d_in_place));
}

}  // namespace headwise
