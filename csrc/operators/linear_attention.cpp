// headwise::linear_attention: a few tokens, one after the other.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "tensors.h"
#include "threads.h"

namespace headwise {
namespace {

constexpr const char* kLinear = "headwise::linear_attention";
constexpr int64_t kMostStateDim = 4096;
// Elements of a state that are worth another thread.
constexpr int64_t kLeastElements = int64_t(1) << 14;

// A float32 tensor of `dims` dims, of these sizes or of 1 where that may be.
const float* check_floats(const Tensor& tensor, const char* name, const int64_t* sizes,
                          int64_t dims) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float && tensor.dim() == dims, kLinear,
      ": ", name, " is not a float32 CPU tensor of ", dims, " dims");
  for (int64_t i = 0; i < dims; ++i)
    STD_TORCH_CHECK(tensor.size(i) == sizes[i], kLinear, ": dim ", i, " of ", name, " is ",
                    tensor.size(i), ", expected ", sizes[i]);
  return static_cast<const float*>(tensor.const_data_ptr());
}

// query, key [B,K,S,D], value [B,H,S,V], decay [B,H,S,D or 1] and beta [B,H,S] in float32, state
// [B,H,D,V] in float32, lengths [B] in int64: out [B,H,S,V] and the state after the last token.
std::tuple<Tensor, Tensor> linear_attention(Tensor query, Tensor key, Tensor value,
                                            std::optional<Tensor> decay, std::optional<Tensor> beta,
                                            double scale, std::optional<Tensor> state,
                                            std::optional<Tensor> lengths, int64_t level) {
  const Kernels& kernels = kernels_of(level, kLinear);
  check_contiguous_rows(query, kLinear, "query", 4);
  check_contiguous_rows(key, kLinear, "key", 4);
  check_contiguous_rows(value, kLinear, "value", 4);
  StateArgs args = {};
  args.dtype = dtype_of(query, kLinear, "query");
  args.batch = query.size(0);
  args.kv_heads = query.size(1);
  args.tokens = query.size(2);
  args.dim = query.size(3);
  args.heads = value.size(1);
  args.value_dim = value.size(3);
  args.scale = float(scale);
  STD_TORCH_CHECK(args.dtype != kFloat64 && key.scalar_type() == query.scalar_type() &&
                      value.scalar_type() == query.scalar_type(),
                  kLinear, ": query, key and value differ in dtype, or are float64");
  for (int64_t i = 0; i < 4; ++i)
    STD_TORCH_CHECK(key.size(i) == query.size(i), kLinear, ": key is not of the query's sizes");
  STD_TORCH_CHECK(value.size(0) == args.batch && value.size(2) == args.tokens, kLinear,
                  ": value is not [B, H, S, V] with the query's B and S");
  STD_TORCH_CHECK(args.kv_heads >= 1 && args.heads % args.kv_heads == 0, kLinear, ": ", args.heads,
                  " heads of values are not a multiple of ", args.kv_heads);
  STD_TORCH_CHECK(args.dim >= 1 && args.dim <= kMostStateDim && args.value_dim >= 1, kLinear,
                  ": D is ", args.dim, " and V ", args.value_dim, ", expected 1 to ", kMostStateDim,
                  " and 1 or more");
  const int64_t full[4] = {args.batch, args.heads, args.tokens, args.dim};
  if (decay.has_value()) {
    const bool one = decay->dim() == 4 && decay->size(3) == 1;
    const int64_t sizes[4] = {full[0], full[1], full[2], one ? 1 : args.dim};
    args.decay = check_floats(*decay, "decay", sizes, 4);
    take_strides(*decay, &args.decay_batch, &args.decay_head, &args.decay_row);
    args.decay_dim = one ? 0 : decay->stride(3);
  }
  if (beta.has_value()) {
    args.beta = check_floats(*beta, "beta", full, 3);
    take_strides(*beta, &args.beta_batch, &args.beta_head, &args.beta_row);
  }
  const int64_t of_state[4] = {args.batch, args.heads, args.dim, args.value_dim};
  if (state.has_value()) {
    args.state = check_floats(*state, "state", of_state, 4);
    STD_TORCH_CHECK(state->is_contiguous(), kLinear, ": state is not contiguous");
  }
  if (lengths.has_value()) {
    STD_TORCH_CHECK(lengths->is_cpu() && lengths->scalar_type() == ScalarType::Long &&
                        lengths->dim() == 1 && lengths->size(0) == args.batch &&
                        contiguous_rows(*lengths),
                    kLinear, ": lengths is not a contiguous int64 vector of ", args.batch);
    args.lengths = static_cast<const int64_t*>(lengths->const_data_ptr());
  }
  Tensor out =
      new_tensor({args.batch, args.heads, args.tokens, args.value_dim}, query.scalar_type());
  Tensor after = new_tensor(of_state, 4, ScalarType::Float);
  if (after.numel() == 0) return {out, after};
  args.query = query.const_data_ptr();
  args.key = key.const_data_ptr();
  args.value = value.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.after = static_cast<float*>(after.mutable_data_ptr());
  take_strides(query, &args.query_batch, &args.query_head, &args.query_row);
  take_strides(key, &args.key_batch, &args.key_head, &args.key_row);
  take_strides(value, &args.value_batch, &args.value_head, &args.value_row);
  const int64_t tasks = tasks_of(args), bytes = aligned(scratch_bytes(args));
  const int64_t wanted = 1 + after.numel() * (1 + args.tokens) / kLeastElements;
  int64_t threads = most_threads() < tasks ? most_threads() : tasks;
  if (wanted < threads) threads = wanted;
  // the columns of a head lie side by side
  const int64_t blocks = (args.value_dim + kColumns - 1) / kColumns;
  share(tasks, blocks, threads, keep(threads * bytes), bytes,
        [&](int64_t task, char* scratch) { kernels.state(args, task, scratch); });
  return {out, after};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headwise, m) {
  m.def(
      "linear_attention(Tensor query, Tensor key, Tensor value, Tensor? decay, Tensor? beta, float "
      "scale, Tensor? state, Tensor? lengths, int level) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(headwise, CPU, m) {
  m.impl("linear_attention", TORCH_BOX(&linear_attention));
}

}  // namespace headwise
