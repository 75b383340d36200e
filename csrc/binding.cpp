// The kernels as PyTorch operators, by the LibTorch stable ABI: one library for every Python and
// for every PyTorch from 2.10 on. Everything is checked here, before memory is touched.

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

using headwise::kMostDim;
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

// Four dims, of which the last is contiguous and holds what is served.
void check_rows(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), "headwise::attend: ", name, " is not on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 4, "headwise::attend: ", name, " has ", tensor.dim(),
                  " dims, expected 4");
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

void check_query(const Tensor& query, const std::optional<Tensor>& tail,
                 headwise::AttendArgs* args) {
  check_rows(query, "query");
  args->dtype = dtype_of(query, "query");
  STD_TORCH_CHECK(args->dtype != headwise::kFloat64, "headwise::attend: float64 is not served");
  args->batch = query.size(0);
  args->heads = query.size(1);
  args->queries = query.size(2);
  args->dim = query.size(3);
  args->query = query.const_data_ptr();
  take_strides(query, &args->query_batch, &args->query_head, &args->query_row);
  if (!tail.has_value()) return;
  // a part of query and key that is held apart: [B,H,S,P] and [B,K,L,P]
  check_rows(*tail, "query_tail");
  STD_TORCH_CHECK(dtype_of(*tail, "query_tail") == args->dtype,
                  "headwise::attend: query and the tails differ in dtype");
  STD_TORCH_CHECK(tail->size(0) == args->batch && tail->size(1) == args->heads &&
                      tail->size(2) == args->queries,
                  "headwise::attend: query_tail is not [B, H, S, P] with the query's B, H and S");
  args->tail_dim = tail->size(3);
  args->query_tail = tail->const_data_ptr();
  take_strides(*tail, &args->query_tail_batch, &args->query_tail_head, &args->query_tail_row);
}

// key, value and key_tail as [first, K, length, dim]: `first` is B, or pages. The dtype and the
// dims are for the caller to check.
void check_kv(const Tensor& key, const Tensor& value, const std::optional<Tensor>& tail,
              int64_t first, headwise::AttendArgs* args) {
  check_rows(key, "key");
  check_rows(value, "value");
  args->kv_heads = key.size(1);
  STD_TORCH_CHECK(key.size(0) == first, "headwise::attend: key has batch ", key.size(0),
                  ", expected ", first);
  STD_TORCH_CHECK(
      value.size(0) == first && value.size(1) == args->kv_heads && value.size(2) == key.size(2),
      "headwise::attend: value is not [B, K, L, V] with the key's B, K and L");
  STD_TORCH_CHECK(args->kv_heads >= 1 && args->heads % args->kv_heads == 0,
                  "headwise::attend: ", args->heads, " query heads are no multiple of ",
                  args->kv_heads, " kv heads");
  STD_TORCH_CHECK(value.scalar_type() == key.scalar_type(),
                  "headwise::attend: key and value differ in dtype");
  args->key = key.const_data_ptr();
  args->value = value.const_data_ptr();
  take_strides(key, &args->key_batch, &args->key_head, &args->key_row);
  take_strides(value, &args->value_batch, &args->value_head, &args->value_row);
  STD_TORCH_CHECK(tail.has_value() == (args->tail_dim > 0),
                  "headwise::attend: query_tail and key_tail come together or not at all");
  if (!tail.has_value()) return;
  check_rows(*tail, "key_tail");
  STD_TORCH_CHECK(tail->scalar_type() == key.scalar_type(),
                  "headwise::attend: key and the tails differ in dtype");
  STD_TORCH_CHECK(
      tail->size(0) == first && tail->size(1) == args->kv_heads && tail->size(2) == key.size(2),
      "headwise::attend: key_tail is not [B, K, L, P] with the key's B, K and L");
  args->key_tail = tail->const_data_ptr();
  take_strides(*tail, &args->key_tail_batch, &args->key_tail_head, &args->key_tail_row);
}

// The dims and the dtype of keys that are not quantised.
void check_dims(const Tensor& query, const Tensor& key, const Tensor& value,
                const std::optional<Tensor>& tail, headwise::AttendArgs* args) {
  STD_TORCH_CHECK(key.scalar_type() == query.scalar_type(),
                  "headwise::attend: query and key differ in dtype");
  STD_TORCH_CHECK(key.size(3) == args->dim, "headwise::attend: key has a last dim of ", key.size(3),
                  ", query ", args->dim);
  STD_TORCH_CHECK(!tail.has_value() || tail->size(3) == args->tail_dim,
                  "headwise::attend: key_tail is not [B, K, L, P] with the query's P");
  args->value_dim = value.size(3);
}

// page_table [B, pages of a sequence]: entries in use name pages of the pool.
void check_pages(const Tensor& table, int64_t pages, int64_t page_size,
                 headwise::AttendArgs* args) {
  STD_TORCH_CHECK(page_size >= 1 && (page_size & (page_size - 1)) == 0,
                  "headwise::attend: pages of ", page_size, " tokens, expected a power of two");
  STD_TORCH_CHECK(table.is_cpu() && table.scalar_type() == ScalarType::Int && table.dim() == 2 &&
                      table.size(0) == args->batch,
                  "headwise::attend: page_table is not int32 [B, pages] with B of ", args->batch);
  STD_TORCH_CHECK(table.size(1) <= 1 || table.stride(1) == 1 || table.numel() == 0,
                  "headwise::attend: the rows of page_table are not contiguous");
  STD_TORCH_CHECK(args->context >= 0 && args->context <= table.size(1) * page_size,
                  "headwise::attend: a context of ", args->context, " in ", table.size(1),
                  " pages of ", page_size);
  while (int64_t(1) << args->page_shift < page_size) ++args->page_shift;
  args->table = static_cast<const int32_t*>(table.const_data_ptr());
  args->table_row = table.stride(0);
  for (int64_t b = 0; b < args->batch; ++b) {
    const int64_t length = args->lengths64   ? args->lengths64[b]
                           : args->lengths32 ? int64_t(args->lengths32[b])
                                             : args->context;
    const int32_t* row = args->table + b * args->table_row;
    const int64_t used = (length + page_size - 1) / page_size;
    int32_t low = 0, high = 0;
    for (int64_t i = 0; i < used; ++i) {
      low = row[i] < low ? row[i] : low;
      high = row[i] > high ? row[i] : high;
    }
    STD_TORCH_CHECK(low >= 0 && (used == 0 || high < pages), "headwise::attend: page_table[", b,
                    "] names a page that the pool has not, of ", pages);
  }
}

// The scales [B, K, L, groups] of quantised rows [B, K, L, bytes], and the dim of such a row.
int64_t check_scales(const Tensor& rows, const Tensor& scales, const char* name, int64_t bits,
                     headwise::Scales* to) {
  const int64_t dim = rows.size(3) * 8 / bits;
  const int64_t groups = bits == 8 ? 1 : (dim + headwise::kInt4Group - 1) / headwise::kInt4Group;
  STD_TORCH_CHECK(rows.scalar_type() == (bits == 8 ? ScalarType::Char : ScalarType::Byte),
                  "headwise::attend: ", name, " of ", bits, " bits is not ",
                  bits == 8 ? "int8" : "uint8");
  STD_TORCH_CHECK(dim <= kMostDim, "headwise::attend: ", name, " has a dim of ", dim,
                  ", expected 1 to ", kMostDim);
  STD_TORCH_CHECK(
      scales.is_cpu() && scales.scalar_type() == ScalarType::Float && scales.dim() == 4 &&
          scales.size(0) == rows.size(0) && scales.size(1) == rows.size(1) &&
          scales.size(2) == rows.size(2) && scales.size(3) == groups &&
          (groups <= 1 || scales.stride(3) == 1 || scales.numel() == 0),
      "headwise::attend: the scales of ", name, " are not float32 [B, K, L, ", groups, "]");
  to->at = static_cast<const float*>(scales.const_data_ptr());
  take_strides(scales, &to->batch, &to->head, &to->row);
  return dim;
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

// Runs what(task, scratch) for every task, with `bytes` of scratch for each thread, which takes
// `run` tasks at once.
template <class What>
void share(int64_t tasks, int64_t run, int64_t threads, char* scratch, int64_t bytes,
           const What& what) {
  std::atomic<int64_t> next{0};
  // parallel_for divides evenly beforehand: the counter lets a thread that is ahead take more
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    for (int64_t first = next.fetch_add(run); first < tasks; first = next.fetch_add(run))
      for (int64_t at = first; at < first + run && at < tasks; ++at)
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
  share(plan.tasks, plan.run, plan.threads, memory + partial_bytes, plan.scratch_bytes,
        [&](int64_t at, char* scratch) { kernels.attend(args, plan, at, scratch); });
}

// What every operator takes beside its keys and values.
struct Options {
  double scale;
  bool causal;
  int64_t window;
  double softcap;
  const std::optional<Tensor>&sinks, &alibi_slopes, &bias, &mask;
  bool return_lse;
  int64_t level;
};

std::tuple<Tensor, Tensor> serve(const Tensor& query, headwise::AttendArgs& args,
                                 const Options& options) {
  STD_TORCH_CHECK(options.window >= 0 && (options.window == 0 || options.causal),
                  "headwise::attend: window is ", options.window,
                  ", expected 0 or, with causal, more");
  const headwise::Kernels kernels = headwise::kernels(int(options.level));
  STD_TORCH_CHECK(kernels.attend != nullptr, "headwise::attend: level ", options.level,
                  " does not run on this machine");
  STD_TORCH_CHECK(args.context < int64_t(1) << 31, "headwise::attend: ", args.context,
                  " keys, expected fewer than 2^31");
  args.scale = float(options.scale);
  // far above and below what a score can be, and safe in float32
  const double softcap = options.softcap;
  const double capped = softcap < 1e-30 ? 1e-30 : softcap > 1e30 ? 1e30 : softcap;
  args.softcap = softcap <= 0 ? 0.0f : float(capped);
  args.causal = options.causal;
  const int64_t all = args.context + args.queries;
  args.window = options.window > all ? all : options.window;
  args.sinks = per_head(options.sinks, "sinks", args.heads);
  args.slopes = per_head(options.alibi_slopes, "alibi_slopes", args.heads);
  const int64_t full[4] = {args.batch, args.heads, args.queries, args.context};
  if (options.bias.has_value()) {
    const Tensor& bias = *options.bias;
    int64_t* const strides[4] = {&args.bias_batch, &args.bias_head, &args.bias_row, &args.bias_key};
    broadcast(bias, "bias", full, strides);
    args.bias_dtype = dtype_of(bias, "bias");
    args.bias = bias.const_data_ptr();
  }
  if (options.mask.has_value()) {
    const Tensor& mask = *options.mask;
    int64_t* const strides[4] = {&args.mask_batch, &args.mask_head, &args.mask_row, &args.mask_key};
    STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "headwise::attend: mask is not bool");
    broadcast(mask, "mask", full, strides);
    args.mask = static_cast<const unsigned char*>(mask.const_data_ptr());
  }

  const int64_t shape[4] = {args.batch, args.heads, args.queries, args.value_dim};
  const int64_t none[1] = {0};
  Tensor out = torch::stable::new_empty(query, {shape, 4});
  Tensor lse = options.return_lse ? torch::stable::new_empty(query, {shape, 3}, ScalarType::Float)
                                  : torch::stable::new_empty(query, {none, 1}, ScalarType::Float);
  if (out.numel() == 0) return {out, lse};
  args.out = out.mutable_data_ptr();
  args.lse = options.return_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;
  run(args, kernels);
  return {out, lse};
}

std::tuple<Tensor, Tensor> attend(Tensor query, Tensor key, Tensor value,
                                  std::optional<Tensor> query_tail, std::optional<Tensor> key_tail,
                                  double scale, bool causal, int64_t window, double softcap,
                                  std::optional<Tensor> sinks, std::optional<Tensor> alibi_slopes,
                                  std::optional<Tensor> bias, std::optional<Tensor> mask,
                                  std::optional<Tensor> kv_lengths, bool return_lse,
                                  int64_t level) {
  headwise::AttendArgs args = {};
  check_query(query, query_tail, &args);
  check_kv(key, value, key_tail, args.batch, &args);
  check_dims(query, key, value, key_tail, &args);
  args.context = key.size(2);
  check_lengths(kv_lengths, &args);
  return serve(
      query, args,
      {scale, causal, window, softcap, sinks, alibi_slopes, bias, mask, return_lse, level});
}

// key [pages,K,page size,D], value [pages,K,page size,V]; every sequence has `context` keys, or its
// length of `kv_lengths`.
std::tuple<Tensor, Tensor> attend_paged(Tensor query, Tensor key, Tensor value, Tensor page_table,
                                        int64_t context, std::optional<Tensor> query_tail,
                                        std::optional<Tensor> key_tail, double scale, bool causal,
                                        int64_t window, double softcap, std::optional<Tensor> sinks,
                                        std::optional<Tensor> alibi_slopes,
                                        std::optional<Tensor> bias, std::optional<Tensor> mask,
                                        std::optional<Tensor> kv_lengths, bool return_lse,
                                        int64_t level) {
  headwise::AttendArgs args = {};
  check_query(query, query_tail, &args);
  STD_TORCH_CHECK(key.dim() == 4, "headwise::attend: key has ", key.dim(), " dims, expected 4");
  check_kv(key, value, key_tail, key.size(0), &args);
  check_dims(query, key, value, key_tail, &args);
  args.context = context;
  check_lengths(kv_lengths, &args);
  check_pages(page_table, key.size(0), key.size(2), &args);
  return serve(
      query, args,
      {scale, causal, window, softcap, sinks, alibi_slopes, bias, mask, return_lse, level});
}

// key and value as integers of `bits` bits, [B,K,L,bytes], with their scales.
std::tuple<Tensor, Tensor> attend_quantized(
    Tensor query, Tensor key, Tensor key_scales, Tensor value, Tensor value_scales, int64_t bits,
    std::optional<Tensor> query_tail, std::optional<Tensor> key_tail,
    std::optional<Tensor> key_tail_scales, double scale, bool causal, int64_t window,
    double softcap, std::optional<Tensor> sinks, std::optional<Tensor> alibi_slopes,
    std::optional<Tensor> bias, std::optional<Tensor> mask, std::optional<Tensor> kv_lengths,
    bool return_lse, int64_t level) {
  STD_TORCH_CHECK(bits == 8 || bits == 4, "headwise::attend: ", bits, " bits, expected 8 or 4");
  headwise::AttendArgs args = {};
  check_query(query, query_tail, &args);
  check_kv(key, value, key_tail, args.batch, &args);
  args.bits = int(bits);
  STD_TORCH_CHECK(check_scales(key, key_scales, "key", bits, &args.key_scales) == args.dim,
                  "headwise::attend: query and key differ in their last dim");
  args.value_dim = check_scales(value, value_scales, "value", bits, &args.value_scales);
  STD_TORCH_CHECK(key_tail.has_value() == key_tail_scales.has_value(),
                  "headwise::attend: key_tail comes with its scales");
  if (key_tail.has_value())
    STD_TORCH_CHECK(check_scales(*key_tail, *key_tail_scales, "key_tail", bits,
                                 &args.key_tail_scales) == args.tail_dim,
                    "headwise::attend: the tails differ in their last dim");
  args.context = key.size(2);
  check_lengths(kv_lengths, &args);
  return serve(
      query, args,
      {scale, causal, window, softcap, sinks, alibi_slopes, bias, mask, return_lse, level});
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
  STD_TORCH_CHECK(args.batch * args.length <= kMostProjected,
                  "headwise::project: ", args.batch * args.length,
                  " rows a head, expected at most ", kMostProjected);
  STD_TORCH_CHECK(
      x.numel() == 0 || weight.numel() == 0 ||
          ((x.stride(3) == 1 || x.size(3) == 1) && (weight.stride(2) == 1 || args.width == 1)),
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
  share(args.heads, 1, threads, keep(threads * bytes), bytes,
        [&](int64_t head, char* scratch) { function(args, head, scratch); });
  return out;
}

// Integers and scales of rows [B,heads,S,D].
std::tuple<Tensor, Tensor> quantize(Tensor rows, int64_t bits, int64_t level) {
  const headwise::QuantizeFunction function = headwise::kernels(int(level)).quantize;
  STD_TORCH_CHECK(function != nullptr, "headwise::quantize: level ", level,
                  " does not run on this machine");
  STD_TORCH_CHECK(bits == 8 || bits == 4, "headwise::quantize: ", bits, " bits, expected 8 or 4");
  STD_TORCH_CHECK(rows.is_cpu() && rows.dim() == 4, "headwise::quantize: rows have ", rows.dim(),
                  " dims, expected 4, on the CPU");
  headwise::QuantizeArgs args = {};
  args.dtype = dtype_of(rows, "rows");
  args.bits = int(bits);
  args.heads = rows.size(1);
  args.length = rows.size(2);
  args.dim = rows.size(3);
  STD_TORCH_CHECK(args.dtype != headwise::kFloat64 && args.dim >= 1 && args.dim <= kMostDim &&
                      args.dim % (8 / bits) == 0,
                  "headwise::quantize: rows of ", args.dim, " elements, or of float64");
  STD_TORCH_CHECK(args.dim == 1 || rows.stride(3) == 1 || rows.numel() == 0,
                  "headwise::quantize: the last dim of rows is not contiguous");
  const int64_t groups =
      bits == 8 ? 1 : (args.dim + headwise::kInt4Group - 1) / headwise::kInt4Group;
  const int64_t of_integers[4] = {rows.size(0), args.heads, args.length, args.dim * bits / 8};
  const int64_t of_scales[4] = {rows.size(0), args.heads, args.length, groups};
  Tensor integers = torch::stable::new_empty(rows, {of_integers, 4},
                                             bits == 8 ? ScalarType::Char : ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(rows, {of_scales, 4}, ScalarType::Float);
  const int64_t all = rows.size(0) * args.heads * args.length;
  if (all == 0) return {integers, scales};
  args.rows = rows.const_data_ptr();
  take_strides(rows, &args.row_batch, &args.row_head, &args.row_row);
  args.integers = static_cast<unsigned char*>(integers.mutable_data_ptr());
  args.scales = static_cast<float*>(scales.mutable_data_ptr());
  constexpr int64_t kRows = 256;  // of a task
  const int64_t tasks = (all + kRows - 1) / kRows;
  const int64_t threads = most_threads() < tasks ? most_threads() : tasks;
  const int64_t bytes = aligned(headwise::scratch_bytes(args));
  share(tasks, 1, threads, keep(threads * bytes), bytes, [&](int64_t task, char* scratch) {
    const int64_t first = task * kRows;
    function(args, first, all - first < kRows ? all - first : kRows, scratch);
  });
  return {integers, scales};
}

int64_t best_level() { return headwise::best_level(); }

}  // namespace

STABLE_TORCH_LIBRARY(headwise, m) {
  m.def(
      "attend(Tensor query, Tensor key, Tensor value, Tensor? query_tail, Tensor? key_tail, "
      "float scale, bool causal, int window, "
      "float softcap, Tensor? sinks, Tensor? alibi_slopes, Tensor? bias, Tensor? mask, "
      "Tensor? kv_lengths, bool return_lse, int level) -> (Tensor, Tensor)");
  m.def(
      "attend_paged(Tensor query, Tensor key, Tensor value, Tensor page_table, int context, "
      "Tensor? query_tail, Tensor? key_tail, float scale, bool causal, int window, "
      "float softcap, Tensor? sinks, Tensor? alibi_slopes, Tensor? bias, Tensor? mask, "
      "Tensor? kv_lengths, bool return_lse, int level) -> (Tensor, Tensor)");
  m.def(
      "attend_quantized(Tensor query, Tensor key, Tensor key_scales, Tensor value, "
      "Tensor value_scales, int bits, Tensor? query_tail, Tensor? key_tail, "
      "Tensor? key_tail_scales, float scale, bool causal, int window, "
      "float softcap, Tensor? sinks, Tensor? alibi_slopes, Tensor? bias, Tensor? mask, "
      "Tensor? kv_lengths, bool return_lse, int level) -> (Tensor, Tensor)");
  m.def("project(Tensor x, Tensor weight, bool up, int level) -> Tensor");
  m.def("quantize(Tensor rows, int bits, int level) -> (Tensor, Tensor)");
  m.def("best_level() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(headwise, CPU, m) {
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("attend_paged", TORCH_BOX(&attend_paged));
  m.impl("attend_quantized", TORCH_BOX(&attend_quantized));
  m.impl("project", TORCH_BOX(&project));
  m.impl("quantize", TORCH_BOX(&quantize));
}

STABLE_TORCH_LIBRARY_IMPL(headwise, CompositeExplicitAutograd, m) {
  m.impl("best_level", TORCH_BOX(&best_level));
}
