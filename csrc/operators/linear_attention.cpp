// headwise::linear_attention: tokens, one after the other; and the same on a state in its place.

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

// What both operators check, and the result; `after` may be `state`.
Tensor changed(const Tensor& query, const Tensor& key, const Tensor& value,
               const MaybeTensor& decay, const MaybeTensor& beta, double scale,
               const MaybeTensor& state, const MaybeTensor& lengths, double norm, bool transposed,
               int64_t level, const Tensor* in_place, Tensor* after) {
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
  args.norm = float(norm);
  args.transposed = transposed;
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
    const int64_t dims = decay->dim() == 3 ? 3 : 4;
    args.decay = check_floats(*decay, "decay", full, dims);
    take_strides(*decay, &args.decay_batch, &args.decay_head, &args.decay_row);
    args.decay_dim = dims == 3 || args.dim == 1 ? 0 : decay->stride(3);
  }
  if (beta.has_value()) {
    args.beta = check_floats(*beta, "beta", full, 3);
    take_strides(*beta, &args.beta_batch, &args.beta_head, &args.beta_row);
  }
  const int64_t of_state[4] = {args.batch, args.heads, transposed ? args.value_dim : args.dim,
                               transposed ? args.dim : args.value_dim};
  const Tensor* given = in_place != nullptr ? in_place : state.has_value() ? &*state : nullptr;
  if (given != nullptr) {
    args.state = check_floats(*given, "state", of_state, 4);
    STD_TORCH_CHECK(given->is_contiguous(), kLinear, ": state is not contiguous");
  }
  if (lengths.has_value()) {
    STD_TORCH_CHECK(lengths->is_cpu() && lengths->scalar_type() == ScalarType::Long &&
                        lengths->dim() == 1 && lengths->size(0) == args.batch &&
                        contiguous_rows(*lengths),
                    kLinear, ": lengths is not a contiguous int64 vector of ", args.batch);
    args.lengths = static_cast<const int64_t*>(lengths->const_data_ptr());
    for (int64_t b = 0; b < args.batch; ++b)
      STD_TORCH_CHECK(args.lengths[b] >= 0 && args.lengths[b] <= args.tokens, kLinear,
                      ": a length is ", args.lengths[b], ", expected 0 to ", args.tokens);
  }
  if (in_place != nullptr)
    for (const Tensor* rows : {&query, &key, &value})
      STD_TORCH_CHECK(!may_overlap(*rows, *in_place), kLinear,
                      ": the state that is changed in its place shares memory with what is read");
  // [B,H,S,V] as a model goes on with it: the heads of a token side by side
  const int64_t row = args.heads * args.value_dim;
  const int64_t sizes[4] = {args.batch, args.heads, args.tokens, args.value_dim};
  const int64_t strides[4] = {args.tokens * row, args.value_dim, row, 1};
  Tensor out = new_strided_tensor(sizes, strides, 4, query.scalar_type());
  *after = in_place != nullptr ? *in_place : new_tensor(of_state, 4, ScalarType::Float);
  if (after->numel() == 0) return out;
  args.query = query.const_data_ptr();
  args.key = key.const_data_ptr();
  args.value = value.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.after = static_cast<float*>(after->mutable_data_ptr());
  take_strides(query, &args.query_batch, &args.query_head, &args.query_row);
  take_strides(key, &args.key_batch, &args.key_head, &args.key_row);
  take_strides(value, &args.value_batch, &args.value_head, &args.value_row);
  const int64_t tasks = tasks_of(args), bytes = aligned(scratch_bytes(args));
  const int64_t wanted = 1 + after->numel() * (1 + args.tokens) / kLeastElements;
  int64_t threads = most_threads() < tasks ? most_threads() : tasks;
  if (wanted < threads) threads = wanted;
  // what lies side by side goes to one thread: the columns of a head, some heads
  int64_t run = args.streamed() ? tasks / (4 * threads) : args.blocks();
  if (run < 1 || tasks / run < threads) run = 1;
  share(tasks, run, threads, keep(threads * bytes), bytes,
        [&](int64_t task, char* scratch) { kernels.state(args, task, scratch); });
  return out;
}

// query, key [B,K,S,D], value [B,H,S,V], decay [B,H,S] or [B,H,S,D] and beta [B,H,S] in float32,
// state [B,H,D,V] or, transposed, [B,H,V,D] in float32, lengths [B] in int64; norm below 0 is none:
// out [B,H,S,V] and the state after the last token.
std::tuple<Tensor, Tensor> linear_attention(Tensor query, Tensor key, Tensor value,
                                            MaybeTensor decay, MaybeTensor beta, double scale,
                                            MaybeTensor state, MaybeTensor lengths, double norm,
                                            bool transposed, int64_t level) {
  Tensor after;
  Tensor out = changed(query, key, value, decay, beta, scale, state, lengths, norm, transposed,
                       level, nullptr, &after);
  return {out, after};
}

Tensor linear_attention_in_place(Tensor query, Tensor key, Tensor value, MaybeTensor decay,
                                 MaybeTensor beta, double scale, Tensor state, MaybeTensor lengths,
                                 double norm, bool transposed, int64_t level) {
  Tensor after;
  return changed(query, key, value, decay, beta, scale, std::nullopt, lengths, norm, transposed,
                 level, &state, &after);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headwise, m) {
  m.def(
      "linear_attention(Tensor query, Tensor key, Tensor value, Tensor? decay, Tensor? beta, float "
      "scale, Tensor? state, Tensor? lengths, float norm, bool transposed, int level) -> (Tensor, "
      "Tensor)");
  m.def(
      "linear_attention_(Tensor query, Tensor key, Tensor value, Tensor? decay, Tensor? beta, "
      "float scale, Tensor(a!) state, Tensor? lengths, float norm, bool transposed, int level) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(headwise, CPU, m) {
  m.impl("linear_attention", TORCH_BOX(&linear_attention));
  m.impl("linear_attention_", TORCH_BOX(&linear_attention_in_place));
}

}  // namespace headwise
