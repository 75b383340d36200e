// headwise::attend: attention to keys and values that lie in tensors, in pages, or as integers.

#include "attend.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>

#include "option_arguments.h"
#include "tensors.h"
#include "threads.h"

namespace headwise {

void run_attend(const AttendArgs& args, const Kernels& kernels) {
  Plan plan = {};
  plan_rows(args, kernels.pairs, &plan);
  const int64_t sequences = sequences_of(args);
  const int64_t sequence_bytes = aligned(int64_t(sizeof(SequencePlan)) * sequences);
  const int64_t left_bytes =
      int64_t(sizeof(int32_t)) * sequences * heads_of_sequence(args) * plan.tiles;
  const Memory table = allocate(sequence_bytes + left_bytes);
  plan.sequences = static_cast<SequencePlan*>(table.get());
  plan.left = reinterpret_cast<int32_t*>(static_cast<char*>(table.get()) + sequence_bytes);
  plan_tasks(args, most_threads(), &plan);
  const int64_t partial_bytes =
      aligned(int64_t(sizeof(float)) * plan.slots * slot_floats(args, plan));
  char* memory = keep(partial_bytes + plan.threads * plan.scratch_bytes);
  plan.partial = reinterpret_cast<float*>(memory);
  share(plan.tasks, plan.run, plan.threads, memory + partial_bytes, plan.scratch_bytes,
        [&](int64_t task, char* scratch) { kernels.attend(args, plan, task, scratch); });
}

namespace {

// The operator's arguments before its options. Keys and values are [B,K,L,D or V], unless there is
// - page_table: they are [pages,K,page size,D or V], and every sequence has `context` keys, or its
//   length of kv_lengths; without one, context is 0;
// - key_scales: they are integers, int8 of 8 bits, or uint8 with two of 4 bits in each byte; scales
//   lie as their rows do, in pages where those are in pages.
constexpr const char* kArguments =
    "Tensor query, Tensor key, Tensor value, Tensor? query_tail, Tensor? key_tail, "
    "Tensor? page_table, int context, "
    "Tensor? key_scales, Tensor? value_scales, Tensor? key_tail_scales, "
    "Tensor? kv_lengths, float scale, bool return_lse, int level";

// What a call gives. The fields are taken off the stack in the order of their declaration.
struct Call {
  StableIValue* stack;
  Tensor query = take<Tensor>(stack);
  Tensor key = take<Tensor>(stack);
  Tensor value = take<Tensor>(stack);
  MaybeTensor query_tail = take<MaybeTensor>(stack);
  MaybeTensor key_tail = take<MaybeTensor>(stack);
  MaybeTensor page_table = take<MaybeTensor>(stack);
  int64_t context = take<int64_t>(stack);
  MaybeTensor key_scales = take<MaybeTensor>(stack);
  MaybeTensor value_scales = take<MaybeTensor>(stack);
  MaybeTensor key_tail_scales = take<MaybeTensor>(stack);
  MaybeTensor kv_lengths = take<MaybeTensor>(stack);
  double scale = take<double>(stack);
  bool return_lse = take<bool>(stack);
  int64_t level = take<int64_t>(stack);
  Options options = {};
  OptionTensors option_tensors = take_options(stack, &options);
};

// Rows of at most kMostDim elements that lie side by side.
void check_rows(const Tensor& tensor, const char* name) {
  check_tensor(tensor, name);
  const int64_t dim = tensor.size(3);
  STD_TORCH_CHECK(dim >= 1 && dim <= kMostDim, kAttend, ": ", name, " has a last dim of ", dim,
                  ", expected 1 to ", kMostDim);
  STD_TORCH_CHECK(contiguous_rows(tensor), kAttend, ": the last dim of ", name,
                  " is not contiguous");
}

void read_query(const Call& call, AttendArgs* args) {
  const Tensor& query = call.query;
  check_rows(query, "query");
  args->dtype = dtype_of(query, kAttend, "query");
  STD_TORCH_CHECK(args->dtype != kFloat64, kAttend, ": float64 is not served");
  args->batch = query.size(0);
  args->heads = query.size(1);
  args->queries = query.size(2);
  args->dim = query.size(3);
  args->query = query.const_data_ptr();
  take_strides(query, &args->query_batch, &args->query_head, &args->query_row);
  if (!call.query_tail.has_value()) return;
  // a second part of query and key: [B,H,S,P] and [B,K,L,P]
  const Tensor& tail = *call.query_tail;
  check_rows(tail, "query_tail");
  STD_TORCH_CHECK(tail.scalar_type() == query.scalar_type(), kAttend,
                  ": query and the tails differ in dtype");
  STD_TORCH_CHECK(
      tail.size(0) == args->batch && tail.size(1) == args->heads && tail.size(2) == args->queries,
      kAttend, ": query_tail is not [B, H, S, P] with the query's B, H and S");
  args->tail_dim = tail.size(3);
  args->query_tail = tail.const_data_ptr();
  take_strides(tail, &args->query_tail_batch, &args->query_tail_head, &args->query_tail_row);
}

// key, value and key_tail as [first, K, length, dim]: `first` is B, or pages.
void read_keys(const Call& call, int64_t first, AttendArgs* args) {
  const Tensor &key = call.key, &value = call.value;
  check_rows(key, "key");
  check_rows(value, "value");
  args->kv_heads = key.size(1);
  STD_TORCH_CHECK(key.size(0) == first, kAttend, ": key has batch ", key.size(0), ", expected ",
                  first);
  STD_TORCH_CHECK(
      value.size(0) == first && value.size(1) == args->kv_heads && value.size(2) == key.size(2),
      kAttend, ": value is not [B, K, L, V] with the key's B, K and L");
  STD_TORCH_CHECK(args->kv_heads >= 1 && args->heads % args->kv_heads == 0, kAttend, ": ",
                  args->heads, " query heads are not a multiple of ", args->kv_heads, " kv heads");
  STD_TORCH_CHECK(value.scalar_type() == key.scalar_type(), kAttend,
                  ": key and value differ in dtype");
  args->key = key.const_data_ptr();
  args->value = value.const_data_ptr();
  take_strides(key, &args->key_batch, &args->key_head, &args->key_row);
  take_strides(value, &args->value_batch, &args->value_head, &args->value_row);
  STD_TORCH_CHECK(call.key_tail.has_value() == call.query_tail.has_value(), kAttend,
                  ": query_tail and key_tail come together, one of them is missing");
  if (!call.key_tail.has_value()) return;
  const Tensor& tail = *call.key_tail;
  check_rows(tail, "key_tail");
  STD_TORCH_CHECK(tail.scalar_type() == key.scalar_type(), kAttend,
                  ": key and the tails differ in dtype");
  STD_TORCH_CHECK(
      tail.size(0) == first && tail.size(1) == args->kv_heads && tail.size(2) == key.size(2),
      kAttend, ": key_tail is not [B, K, L, P] with the key's B, K and L");
  args->key_tail = tail.const_data_ptr();
  take_strides(tail, &args->key_tail_batch, &args->key_tail_head, &args->key_tail_row);
}

// The dtype and the dims of keys that are not quantised.
void check_dims(const Call& call, AttendArgs* args) {
  STD_TORCH_CHECK(call.key.scalar_type() == call.query.scalar_type(), kAttend,
                  ": query and key differ in dtype");
  STD_TORCH_CHECK(call.key.size(3) == args->dim, kAttend, ": key has a last dim of ",
                  call.key.size(3), ", query ", args->dim);
  STD_TORCH_CHECK(!call.key_tail.has_value() || call.key_tail->size(3) == args->tail_dim, kAttend,
                  ": key_tail is not [B, K, L, P] with the query's P");
  args->value_dim = call.value.size(3);
}

// The scales [B, K, L, groups] of quantised rows [B, K, L, bytes], or of such pages, and the dim of
// a row.
int64_t read_scales(const Tensor& rows, const MaybeTensor& given, const char* name, int64_t bits,
                    Scales* to) {
  const int64_t dim = rows.size(3) * 8 / bits, groups = scale_groups(bits, dim);
  STD_TORCH_CHECK(given.has_value(), kAttend, ": the scales of ", name, " are missing");
  STD_TORCH_CHECK(dim <= kMostDim, kAttend, ": ", name, " has a dim of ", dim, ", expected 1 to ",
                  kMostDim);
  const Tensor& scales = *given;
  STD_TORCH_CHECK(scales.is_cpu() && scales.scalar_type() == ScalarType::Float &&
                      scales.dim() == 4 && scales.size(0) == rows.size(0) &&
                      scales.size(1) == rows.size(1) && scales.size(2) == rows.size(2) &&
                      scales.size(3) == groups && contiguous_rows(scales),
                  kAttend, ": the scales of ", name, " are not float32 [B, K, L, ", groups, "]");
  to->data = static_cast<const float*>(scales.const_data_ptr());
  take_strides(scales, &to->batch, &to->head, &to->row);
  return dim;
}

// The bits, the dims and the scales of keys that are quantised.
void read_integers(const Call& call, AttendArgs* args) {
  const ScalarType dtype = call.key.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Char || dtype == ScalarType::Byte, kAttend,
                  ": key has scales and is neither int8 nor uint8");
  args->bits = dtype == ScalarType::Char ? 8 : 4;
  const int64_t dim = read_scales(call.key, call.key_scales, "key", args->bits, &args->key_scales);
  STD_TORCH_CHECK(dim == args->dim, kAttend, ": query and key differ in their last dim");
  args->value_dim =
      read_scales(call.value, call.value_scales, "value", args->bits, &args->value_scales);
  if (!call.key_tail.has_value()) return;
  const int64_t tail_dim = read_scales(*call.key_tail, call.key_tail_scales, "key_tail", args->bits,
                                       &args->key_tail_scales);
  STD_TORCH_CHECK(tail_dim == args->tail_dim, kAttend, ": the tails differ in their last dim");
}

void read_lengths(const Tensor& lengths, AttendArgs* args) {
  const bool wide = lengths.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || lengths.scalar_type() == ScalarType::Int, kAttend,
                  ": kv_lengths is neither int32 nor int64");
  STD_TORCH_CHECK(lengths.is_cpu() && lengths.dim() == 1 && lengths.size(0) == args->batch &&
                      contiguous_rows(lengths),
                  kAttend, ": kv_lengths is not a contiguous vector of ", args->batch);
  if (wide) {
    args->lengths64 = static_cast<const int64_t*>(lengths.const_data_ptr());
  } else {
    args->lengths32 = static_cast<const int32_t*>(lengths.const_data_ptr());
  }
  for (int64_t b = 0; b < args->batch; ++b) {
    const int64_t length = length_of(*args, b);
    STD_TORCH_CHECK(length >= 0 && length <= args->context, kAttend, ": kv_lengths[", b, "] is ",
                    length, ", expected 0 to ", args->context);
  }
}

// What the dispatcher calls: it takes the arguments off the stack, and puts out and lse in their
// place. lse is empty where it was not asked for.
void attend(StableIValue* stack, uint64_t, uint64_t) {
  const Call call = {stack};
  AttendArgs args = {};
  read_query(call, &args);
  const bool paged = call.page_table.has_value(), quantised = call.key_scales.has_value();
  STD_TORCH_CHECK(paged || call.context == 0, kAttend, ": context is ", call.context,
                  ", expected 0 without a page_table");
  check_tensor(call.key, "key");
  read_keys(call, paged ? call.key.size(0) : args.batch, &args);
  if (quantised) {
    read_integers(call, &args);
  } else {
    check_dims(call, &args);
  }
  args.context = paged ? call.context : call.key.size(2);
  if (call.kv_lengths.has_value()) read_lengths(*call.kv_lengths, &args);
  if (paged) read_pages(*call.page_table, call.key.size(0), call.key.size(2), &args);
  STD_TORCH_CHECK(args.context < int64_t(1) << 31, kAttend, ": ", args.context,
                  " keys, expected fewer than 2^31");
  args.scale = float(call.scale);
  args.options = call.options;
  args.options.each(CheckOptions{args, call.option_tensors.data()});
  args.options.check(args.context + args.queries,
                     [](const auto&... words) { STD_TORCH_CHECK(false, kAttend, ": ", words...); });
  const Kernels& kernels = kernels_of(call.level, kAttend);

  const ScalarType dtype = call.query.scalar_type();
  Tensor out = new_tensor({args.batch, args.heads, args.queries, args.value_dim}, dtype);
  Tensor lse = call.return_lse
                   ? new_tensor({args.batch, args.heads, args.queries}, ScalarType::Float)
                   : new_tensor({0}, ScalarType::Float);
  if (out.numel() > 0) {
    args.out = out.mutable_data_ptr();
    args.lse = call.return_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;
    args.options.chosen() == nullptr ? run_attend(args, kernels) : attend_chosen(args, kernels);
  }
  stack[0] = torch::stable::detail::from(out);
  stack[1] = torch::stable::detail::from(lse);
}

std::string schema() {
  DescribeOptions options;
  Options{}.each(options);
  return std::string("attend(") + kArguments + options.schema + ") -> (Tensor, Tensor)";
}

}  // namespace

void read_pages(const Tensor& table, int64_t pages, int64_t page_size, AttendArgs* args) {
  STD_TORCH_CHECK(page_size >= 1 && (page_size & (page_size - 1)) == 0, kAttend, ": pages of ",
                  page_size, " tokens, expected a power of two");
  STD_TORCH_CHECK(table.is_cpu() && table.scalar_type() == ScalarType::Int && table.dim() == 2 &&
                      table.size(0) == args->batch,
                  kAttend, ": page_table is not int32 [B, pages] with B of ", args->batch);
  STD_TORCH_CHECK(contiguous_rows(table), kAttend, ": the rows of page_table are not contiguous");
  STD_TORCH_CHECK(args->context >= 0 && args->context <= table.size(1) * page_size, kAttend,
                  ": a context of ", args->context, " in ", table.size(1), " pages of ", page_size);
  while (int64_t(1) << args->page_shift < page_size) ++args->page_shift;
  args->table = static_cast<const int32_t*>(table.const_data_ptr());
  args->table_row = table.stride(0);
  for (int64_t b = 0; b < args->batch; ++b) {
    const int32_t* row = args->table + b * args->table_row;
    const int64_t used = (length_of(*args, b) + page_size - 1) / page_size;
    int32_t low = 0, high = 0;
    for (int64_t i = 0; i < used; ++i) {
      low = row[i] < low ? row[i] : low;
      high = row[i] > high ? row[i] : high;
    }
    STD_TORCH_CHECK(low >= 0 && (used == 0 || high < pages), kAttend, ": page_table[", b,
                    "] names page ", low < 0 ? low : high, ", the pool has pages 0 to ", pages - 1);
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(headwise, m) { m.def(schema().c_str()); }

STABLE_TORCH_LIBRARY_IMPL(headwise, CPU, m) { m.impl("attend", attend); }

}  // namespace headwise
