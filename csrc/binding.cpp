// The kernels as PyTorch operators, by the LibTorch stable ABI: one library for every Python and for
// every PyTorch from 2.10 on. Everything is checked here, before memory is touched.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>

#include "attend_args.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostDim = 576;
constexpr int64_t kMostProjected = 64;

headwise::Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return headwise::kFloat32;
    case ScalarType::BFloat16:
      return headwise::kBfloat16;
    case ScalarType::Half:
      return headwise::kFloat16;
    case ScalarType::Double:
      return headwise::kFloat64;
    default:
      STD_TORCH_CHECK(false, "headwise: ", name, " has no floating dtype that is served");
  }
}

// [B, heads, length, dim] with the last dim contiguous.
void check_rows(const Tensor& tensor, const char* name, int64_t batch) {
  STD_TORCH_CHECK(tensor.is_cpu(), "headwise::attend: ", name, " is not on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 4, "headwise::attend: ", name, " has ", tensor.dim(),
                  " dims, expected 4");
  STD_TORCH_CHECK(tensor.size(0) == batch, "headwise::attend: ", name, " has batch ",
                  tensor.size(0), ", query has ", batch);
  const int64_t dim = tensor.size(3);
  STD_TORCH_CHECK(dim >= 1 && dim <= kMostDim, "headwise::attend: ", name, " has a last dim of ",
                  dim, ", expected 1 to ", kMostDim);
  STD_TORCH_CHECK(dim == 1 || tensor.stride(3) == 1 || tensor.numel() == 0,
                  "headwise::attend: the last dim of ", name, " is not contiguous");
}

void take_strides(const Tensor& tensor, int64_t* batch, int64_t* head, int64_t* row) {
  *batch = tensor.stride(0);
  *head = tensor.stride(1);
  *row = tensor.stride(2);
}

// Strides of a tensor that broadcasts to [B,H,S,L]: 0 where it has one element.
void broadcast(const Tensor& tensor, const char* name, const int64_t (&full)[4],
               int64_t* const (&strides)[4]) {
  STD_TORCH_CHECK(tensor.is_cpu(), "headwise::attend: ", name, " is not on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 4, "headwise::attend: ", name, " has ", tensor.dim(),
                  " dims, expected 4");
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t size = tensor.size(i);
    STD_TORCH_CHECK(size == full[i] || size == 1, "headwise::attend: dim ", i, " of ", name,
                    " has size ", size, ", expected 1 or ", full[i]);
    *strides[i] = size == 1 ? 0 : tensor.stride(i);
  }
}

const float* per_head(const std::optional<Tensor>& tensor, const char* name, int64_t heads) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->is_cpu() && tensor->scalar_type() == ScalarType::Float &&
                      tensor->dim() == 1 && tensor->size(0) == heads &&
                      (heads <= 1 || tensor->stride(0) == 1),
                  "headwise::attend: ", name, " is not a contiguous float32 vector of ", heads);
  return static_cast<const float*>(tensor->const_data_ptr());
}

void check_lengths(const std::optional<Tensor>& lengths, headwise::AttendArgs* args) {
  if (!lengths.has_value()) return;
  const bool wide = lengths->scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || lengths->scalar_type() == ScalarType::Int,
                  "headwise::attend: kv_lengths is neither int32 nor int64");
  STD_TORCH_CHECK(lengths->is_cpu() && lengths->dim() == 1 && lengths->size(0) == args->batch &&
                      (args->batch <= 1 || lengths->stride(0) == 1),
                  "headwise::attend: kv_lengths is not a contiguous vector of ", args->batch);
  if (wide) {
    args->lengths64 = static_cast<const int64_t*>(lengths->const_data_ptr());
  } else {
    args->lengths32 = static_cast<const int32_t*>(lengths->const_data_ptr());
  }
  for (int64_t b = 0; b < args->batch; ++b) {
    const int64_t length = wide ? args->lengths64[b] : int64_t(args->lengths32[b]);
    STD_TORCH_CHECK(length >= 0 && length <= args->context, "headwise::attend: kv_lengths[", b,
                    "] is ", length, ", expected 0 to ", args->context);
  }
}

// The part of query and key that is held apart: [B,H,S,P] and [B,K,L,P].
void check_tails(const std::optional<Tensor>& query, const std::optional<Tensor>& key,
                 headwise::AttendArgs* args) {
  STD_TORCH_CHECK(query.has_value() == key.has_value(),
                  "headwise::attend: query_tail and key_tail come together or not at all");
  if (!query.has_value()) return;
  check_rows(*query, "query_tail", args->batch);
  check_rows(*key, "key_tail", args->batch);
  STD_TORCH_CHECK(dtype_of(*query, "query_tail") == args->dtype &&
                      dtype_of(*key, "key_tail") == args->dtype,
                  "headwise::attend: query and the tails differ in dtype");
  STD_TORCH_CHECK(query->size(1) == args->heads && query->size(2) == args->queries,
                  "headwise::attend: query_tail is not [B, H, S, P] with the query's H and S");
  STD_TORCH_CHECK(key->size(1) == args->kv_heads && key->size(2) == args->context &&
                      key->size(3) == query->size(3),
                  "headwise::attend: key_tail is not [B, K, L, P] with the key's K and L");
  args->tail_dim = query->size(3);
  args->query_tail = query->const_data_ptr();
  args->key_tail = key->const_data_ptr();
  take_strides(*query, &args->query_tail_batch, &args->query_tail_head, &args->query_tail_row);
  take_strides(*key, &args->key_tail_batch, &args->key_tail_head, &args->key_tail_row);
}

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory that a thread keeps from call to call: fresh memory costs a page fault each 4 KiB.
char* keep(int64_t bytes) {
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset();
    size = 0;
    memory.reset(std::aligned_alloc(64, aligned(bytes)));
    STD_TORCH_CHECK(memory != nullptr, "headwise: out of memory for ", bytes, " bytes");
    size = bytes;
  }
  return static_cast<char*>(memory.get());
}

int64_t most_threads() {
  const int64_t most = torch::stable::get_num_threads();
  return most < 1 ? 1 : most;
}

// Runs what(task, scratch) for every task, with `bytes` of scratch for each thread.
template <class What>
void share(int64_t tasks, int64_t threads, char* scratch, int64_t bytes, const What& what) {
  std::atomic<int64_t> next{0};
  // parallel_for divides evenly beforehand: the counter lets a thread that is ahead take more
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    for (int64_t at = next.fetch_add(1); at < tasks; at = next.fetch_add(1))
      what(at, scratch + thread * bytes);
  });
}

void run(const headwise::AttendArgs& args, const headwise::Kernels& kernels) {
  headwise::Plan plan = {};
  headwise::plan_rows(args, kernels.pairs, &plan);
  const int64_t heads_bytes = aligned(int64_t(sizeof(headwise::SequencePlan)) * args.batch);
  const int64_t left_bytes =
      aligned(int64_t(sizeof(int32_t)) * args.batch * args.kv_heads * plan.tiles);
  std::unique_ptr<void, Free> table(std::aligned_alloc(64, heads_bytes + left_bytes));
  STD_TORCH_CHECK(table != nullptr, "headwise::attend: out of memory");
  plan.sequences = static_cast<headwise::SequencePlan*>(table.get());
  plan.left = reinterpret_cast<int32_t*>(static_cast<char*>(table.get()) + heads_bytes);
  headwise::plan_tasks(args, most_threads(), &plan);
  const int64_t partial_bytes =
      aligned(int64_t(sizeof(float)) * plan.slots * headwise::slot_floats(args, plan));
  char* memory = keep(partial_bytes + plan.threads * plan.scratch_bytes);
  plan.partial = reinterpret_cast<float*>(memory);
  share(plan.tasks, plan.threads, memory + partial_bytes, plan.scratch_bytes,
        [&](int64_t at, char* scratch) { kernels.attend(args, plan, at, scratch); });
}

std::tuple<Tensor, Tensor> attend(Tensor query, Tensor key, Tensor value,
                                  std::optional<Tensor> query_tail, std::optional<Tensor> key_tail,
                                  double scale, bool causal, int64_t window, double softcap,
                                  std::optional<Tensor> sinks, std::optional<Tensor> alibi_slopes,
                                  std::optional<Tensor> bias, std::optional<Tensor> mask,
                                  std::optional<Tensor> kv_lengths, bool return_lse,
                                  int64_t level) {
  headwise::AttendArgs args = {};
  STD_TORCH_CHECK(query.dim() == 4, "headwise::attend: query has ", query.dim(),
                  " dims, expected 4");
  args.batch = query.size(0);
  check_rows(query, "query", args.batch);
  check_rows(key, "key", args.batch);
  check_rows(value, "value", args.batch);
  args.heads = query.size(1);
  args.queries = query.size(2);
  args.dim = query.size(3);
  args.kv_heads = key.size(1);
  args.context = key.size(2);
  args.value_dim = value.size(3);
  STD_TORCH_CHECK(key.size(3) == args.dim, "headwise::attend: key has a last dim of ", key.size(3),
                  ", query ", args.dim);
  STD_TORCH_CHECK(value.size(1) == args.kv_heads && value.size(2) == args.context,
                  "headwise::attend: value is not [B, K, L, V] with the key's K and L");
  STD_TORCH_CHECK(args.kv_heads >= 1 && args.heads % args.kv_heads == 0,
                  "headwise::attend: ", args.heads, " query heads are no multiple of ",
                  args.kv_heads, " kv heads");
  args.dtype = dtype_of(query, "query");
  STD_TORCH_CHECK(args.dtype != headwise::kFloat64, "headwise::attend: float64 is not served");
  STD_TORCH_CHECK(key.scalar_type() == query.scalar_type() &&
                      value.scalar_type() == query.scalar_type(),
                  "headwise::attend: query, key and value differ in dtype");
  STD_TORCH_CHECK(window >= 0 && (window == 0 || causal),
                  "headwise::attend: window is ", window, ", expected 0 or, with causal, more");
  const headwise::Kernels kernels = headwise::kernels(int(level));
  STD_TORCH_CHECK(kernels.attend != nullptr, "headwise::attend: level ", level,
                  " does not run on this machine");
  STD_TORCH_CHECK(args.context < int64_t(1) << 31, "headwise::attend: ", args.context,
                  " keys, expected fewer than 2^31");

  args.query = query.const_data_ptr();
  args.key = key.const_data_ptr();
  args.value = value.const_data_ptr();
  take_strides(query, &args.query_batch, &args.query_head, &args.query_row);
  take_strides(key, &args.key_batch, &args.key_head, &args.key_row);
  take_strides(value, &args.value_batch, &args.value_head, &args.value_row);
  check_tails(query_tail, key_tail, &args);
  args.scale = float(scale);
  // far above and below what a score can be, and safe in float32
  const double capped = softcap < 1e-30 ? 1e-30 : softcap > 1e30 ? 1e30 : softcap;
  args.softcap = softcap <= 0 ? 0.0f : float(capped);
  args.causal = causal;
  const int64_t all = args.context + args.queries;
  args.window = window > all ? all : window;
  args.sinks = per_head(sinks, "sinks", args.heads);
  args.slopes = per_head(alibi_slopes, "alibi_slopes", args.heads);
  const int64_t full[4] = {args.batch, args.heads, args.queries, args.context};
  if (bias.has_value()) {
    int64_t* const strides[4] = {&args.bias_batch, &args.bias_head, &args.bias_row,
                                 &args.bias_key};
    broadcast(*bias, "bias", full, strides);
    args.bias_dtype = dtype_of(*bias, "bias");
    args.bias = bias->const_data_ptr();
  }
  if (mask.has_value()) {
    int64_t* const strides[4] = {&args.mask_batch, &args.mask_head, &args.mask_row,
                                 &args.mask_key};
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "headwise::attend: mask is not bool");
    broadcast(*mask, "mask", full, strides);
    args.mask = static_cast<const unsigned char*>(mask->const_data_ptr());
  }
  check_lengths(kv_lengths, &args);

  const int64_t shape[4] = {args.batch, args.heads, args.queries, args.value_dim};
  const int64_t none[1] = {0};
  Tensor out = torch::stable::new_empty(query, {shape, 4});
  Tensor lse = return_lse ? torch::stable::new_empty(query, {shape, 3}, ScalarType::Float)
                          : torch::stable::new_empty(query, {none, 1}, ScalarType::Float);
  if (out.numel() == 0) return {out, lse};
  args.out = out.mutable_data_ptr();
  args.lse = return_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;
  run(args, kernels);
  return {out, lse};
}

// x [B,H,S,N] by weight [H,N,R] where `up`; x [B,H,S,R] by the transpose of weight [H,V,R] else.
Tensor project(Tensor x, Tensor weight, bool up, int64_t level) {
  const headwise::ProjectFunction function = headwise::kernels(int(level)).project;
  STD_TORCH_CHECK(function != nullptr, "headwise::project: level ", level,
                  " does not run on this machine");
  STD_TORCH_CHECK(x.is_cpu() && weight.is_cpu(), "headwise::project: not on the CPU");
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 3, "headwise::project: x has ", x.dim(),
                  " dims and weight ", weight.dim(), ", expected 4 and 3");
  headwise::ProjectArgs args = {};
  args.up = up;
  args.batch = x.size(0);
  args.heads = x.size(1);
  args.length = x.size(2);
  args.rows = weight.size(1);
  args.width = weight.size(2);
  args.dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(args.dtype != headwise::kFloat64 && x.scalar_type() == weight.scalar_type(),
                  "headwise::project: x and weight differ in dtype, or are float64");
  STD_TORCH_CHECK(weight.size(0) == args.heads && x.size(3) == (up ? args.rows : args.width),
                  "headwise::project: weight does not fit x");
  STD_TORCH_CHECK(args.batch * args.length <= kMostProjected, "headwise::project: ",
                  args.batch * args.length, " rows a head, expected at most ", kMostProjected);
  STD_TORCH_CHECK(x.numel() == 0 || weight.numel() == 0 ||
                      ((x.stride(3) == 1 || x.size(3) == 1) &&
                       (weight.stride(2) == 1 || args.width == 1)),
                  "headwise::project: a last dim is not contiguous");
  const int64_t shape[4] = {args.batch, args.heads, args.length, up ? args.width : args.rows};
  Tensor out = torch::stable::new_empty(x, {shape, 4});
  if (out.numel() == 0) return out;
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.out = out.mutable_data_ptr();
  take_strides(x, &args.x_batch, &args.x_head, &args.x_row);
  args.weight_head = weight.stride(0);
  args.weight_row = weight.stride(1);
  take_strides(out, &args.out_batch, &args.out_head, &args.out_row);
  const int64_t threads = most_threads() < args.heads ? most_threads() : args.heads;
  const int64_t bytes = aligned(headwise::scratch_bytes(args));
  share(args.heads, threads, keep(threads * bytes), bytes,
        [&](int64_t head, char* scratch) { function(args, head, scratch); });
  return out;
}

int64_t best_level() { return headwise::best_level(); }

}  // namespace

STABLE_TORCH_LIBRARY(headwise, m) {
  m.def(
      "attend(Tensor query, Tensor key, Tensor value, Tensor? query_tail, Tensor? key_tail, "
      "float scale, bool causal, int window, "
      "float softcap, Tensor? sinks, Tensor? alibi_slopes, Tensor? bias, Tensor? mask, "
      "Tensor? kv_lengths, bool return_lse, int level) -> (Tensor, Tensor)");
  m.def("project(Tensor x, Tensor weight, bool up, int level) -> Tensor");
  m.def("best_level() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(headwise, CPU, m) {
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("project", TORCH_BOX(&project));
}

STABLE_TORCH_LIBRARY_IMPL(headwise, CompositeExplicitAutograd, m) {
  m.impl("best_level", TORCH_BOX(&best_level));
}
