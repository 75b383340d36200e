// headwise::attention_inputs and headwise::layer_outputs: what a decoder layer computes before its
// attention and after it, for few rows. The cache stands between them; where it is a contiguous
// buffer, headwise::layer_attention is the first of them, the cache and attention in one.

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "attend.h"
#include "choose_keys.h"
#include "layer_parts.h"

namespace headwise {
namespace {

constexpr const char* kInputs = "headwise::attention_inputs";
constexpr const char* kOutputs = "headwise::layer_outputs";

// x is [B,S,E].
void check_dims(const Tensor& x, const char* operation) {
  STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous(), operation,
                  ": x is not a contiguous tensor of three dims");
}

// What comes before attention: the norm of x [B,S,E], the products with weights that together have
// (H + 2 K) D rows, norms of each head of queries and keys, and the rotation of their first dims by
// cos and sin [B or 1,S,P].
struct Inputs {
  HeadsArgs args = {};
  JoinArgs first = {};
  std::vector<LinearWeight> weights;
  std::vector<int64_t> base;
  int64_t bytes = 0;

  void read_rows(const Tensor& x, int64_t norm, const MaybeTensor& weight, const MaybeTensor& bias,
                 double eps) {
    check_dims(x, kInputs);
    args.x = check_rows(x, kInputs);
    args.length = x.size(1);
    first.dtype = args.x.dtype;
    first.rows = args.x.rows;
    first.width = args.x.width;
    first.x = args.x.x;
    first.next = check_norm(norm, weight, bias, eps, x, args.x.width, kInputs);
  }

  void read_heads(const Tensor& x, int64_t heads, int64_t kv_heads, int64_t dim, int64_t norm,
                  const MaybeTensor& query_norm, const MaybeTensor& key_norm, double eps) {
    STD_TORCH_CHECK(
        heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && dim > 0 && dim <= kMostDim, kInputs,
        ": ", heads, " and ", kv_heads, " heads of ", dim);
    args.heads = heads;
    args.kv_heads = kv_heads;
    args.dim = dim;
    // norms of all heads at once are as long as these
    args.whole = heads > 1 && query_norm.has_value() && query_norm->numel() == heads * dim;
    const int64_t of_query = args.whole ? heads * dim : dim;
    const int64_t of_key = args.whole ? kv_heads * dim : dim;
    args.query_norm = check_norm(norm, query_norm, std::nullopt, eps, x, of_query, kInputs);
    args.key_norm = check_norm(norm, key_norm, std::nullopt, eps, x, of_key, kInputs);
  }

  void read_rotation(const Tensor& x, const MaybeTensor& cos, const MaybeTensor& sin,
                     int64_t rotation) {
    STD_TORCH_CHECK(cos.has_value() == sin.has_value(), kInputs, ": cos without sin");
    if (!cos.has_value()) return;
    STD_TORCH_CHECK(cos->is_cpu() && cos->dim() == 3 && cos->is_contiguous() && sin->is_cpu() &&
                        sin->dim() == 3 && sin->is_contiguous() &&
                        cos->scalar_type() == sin->scalar_type() && cos->size(0) == sin->size(0) &&
                        cos->size(1) == sin->size(1) && cos->size(2) == sin->size(2),
                    kInputs, ": cos and sin are not contiguous, alike and of three dims");
    STD_TORCH_CHECK(rotation >= kHalves && rotation <= kHalvesOnce, kInputs, ": no rotation is ",
                    rotation);
    args.rotation = Rotation(rotation);
    args.rope_row = cos->size(2);
    args.rope_dim = args.rope_row * (args.rotation == kHalvesOnce ? 2 : 1);
    STD_TORCH_CHECK((cos->size(0) == 1 || cos->size(0) == x.size(0)) &&
                        cos->size(1) == args.length && args.rope_dim % 2 == 0 &&
                        args.rope_dim <= args.dim,
                    kInputs, ": cos does not fit x: expected 1 or ", x.size(0), " sequences of ",
                    args.length, " and an even number of dims, at most ", args.dim);
    args.rope_dtype = dtype_of(*cos, kInputs, "cos");
    STD_TORCH_CHECK(args.rope_dtype != kFloat64, kInputs, ": cos is float64");
    args.rope_batch = cos->size(0) == 1 ? 0 : args.length * args.rope_row;
    args.cos = cos->const_data_ptr();
    args.sin = sin->const_data_ptr();
  }

  void read_weights(const Tensor& x, const std::vector<Tensor>& given, const MaybeTensors& biases) {
    STD_TORCH_CHECK(given.size() == biases.size(), kInputs, ": ", given.size(), " weights and ",
                    biases.size(), " biases");
    int64_t rows = 0;
    for (size_t i = 0; i < given.size(); ++i) {
      weights.push_back(check_weight(given[i], biases[i], x, args.x.width, kInputs));
      STD_TORCH_CHECK(weights[i].rows % args.dim == 0, kInputs, ": ", weights[i].rows,
                      " outputs of a weight are no multiple of ", args.dim);
      base.push_back(rows / args.dim);
      rows += weights[i].rows;
      bytes += bytes_of(weights[i], args.x);
    }
    args.x.packed = first.packed = all_packed(weights.data(), weights.size(), kInputs);
    const int64_t expected = (args.heads + 2 * args.kv_heads) * args.dim;
    STD_TORCH_CHECK(rows == expected, kInputs, ": the weights have ", rows, " outputs, expected ",
                    expected);
  }

  // key and value [B,K,S,D], as they lie in memory.
  void write_to(Tensor* query, const Tensor& key, const Tensor& value) {
    args.query = query->mutable_data_ptr();
    args.key = key.mutable_data_ptr();
    args.value = value.mutable_data_ptr();
    take_strides(key, &args.key_batch, &args.key_head, &args.key_row);
    take_strides(value, &args.value_batch, &args.value_head, &args.value_row);
  }

  void run(const Kernels& kernels) {
    const Division division(weights.data(), weights.size(), bytes, args.whole ? 0 : args.dim);
    const int64_t taken = aligned(taken_bytes(args.x)), rows = args.x.rows;
    int64_t scratch = aligned(join_bytes(first));
    const int64_t of_task =
        aligned(scratch_bytes(args.x, division.largest) + 4 * rows * padded(division.largest) + 64);
    if (of_task > scratch) scratch = of_task;
    int64_t products = 0;
    for (const LinearWeight& weight : weights) products += args.whole ? rows * weight.rows : 0;
    char* memory = keep(taken + aligned(4 * products) + division.threads * scratch);
    char* own = memory + taken + aligned(4 * products);
    first.taken = memory;
    kernels.join(first, own);
    float* next = reinterpret_cast<float*>(memory + taken);
    for (LinearWeight& weight : weights) {
      weight.out = next;
      weight.wide = true;
      next += args.whole ? rows * weight.rows : 0;
    }
    division.share(own, scratch, [&](const Division::Task& task, char* each) {
      const LinearWeight& weight = weights[task.weight];
      if (args.whole)
        kernels.linear(args.x, weight, task.first, task.count, memory, each);
      else
        kernels.heads(args, weight, base[task.weight], task.first / args.dim, task.count / args.dim,
                      memory, each);
    });
    if (!args.whole) return;
    for (size_t i = 0; i < weights.size(); ++i)
      kernels.place(args, weights[i], base[i], static_cast<float*>(weights[i].out));
  }
};

// query [B,H,S,D], key and value [B,K,S,D] of x [B,S,E].
std::tuple<Tensor, Tensor, Tensor> attention_inputs(
    Tensor x, int64_t norm, MaybeTensor norm_weight, MaybeTensor norm_bias, double eps,
    std::vector<Tensor> weights, MaybeTensors biases, int64_t heads, int64_t kv_heads, int64_t dim,
    int64_t head_norm, MaybeTensor query_norm, MaybeTensor key_norm, double head_eps,
    MaybeTensor cos, MaybeTensor sin, int64_t rotation, int64_t level) {
  const Kernels& kernels = kernels_of(level, kInputs);
  Inputs inputs;
  inputs.read_rows(x, norm, norm_weight, norm_bias, eps);
  inputs.read_heads(x, heads, kv_heads, dim, head_norm, query_norm, key_norm, head_eps);
  inputs.read_rotation(x, cos, sin, rotation);
  inputs.read_weights(x, weights, biases);
  const int64_t batch = x.size(0), length = x.size(1);
  Tensor query = new_tensor({batch, heads, length, dim}, x.scalar_type());
  Tensor key = new_tensor({batch, kv_heads, length, dim}, x.scalar_type());
  Tensor value = new_tensor({batch, kv_heads, length, dim}, x.scalar_type());
  inputs.write_to(&query, key, value);
  inputs.run(kernels);
  return {query, key, value};
}

// A sketch [B,K,capacity,D/2] of a layer's keys, or pages of the only sequence, and the choice by
// it.
struct LayerSketch {
  SketchArgs args = {};
  Budget budget;
  unsigned char* keys;  // where the new ones go, of the first sequence and head
  float* scales;
  RestArgs rest = {};

  // The new keys are the last of the context of `attend`.
  LayerSketch(const AttendArgs& attend, const Tensor& sketch, const Tensor& of, Dtype dtype,
              int64_t dim, const MaybeTensor& table, const Budget& budget)
      : budget(budget) {
    check_budget(budget, kInputs);
    args.dtype = dtype;
    args.batch = attend.batch, args.heads = attend.heads, args.kv_heads = attend.kv_heads;
    args.queries = attend.queries, args.context = attend.context, args.dim = dim;
    args.softcap = float(attend.options.softcap);
    args.sinks = attend.options.sinks.data;
    args.causal = true;
    read_sketch(sketch, of, table, kInputs, &args);
    const int64_t before = attend.context - attend.queries, rows = sketch.size(2);
    const int64_t first = args.table == nullptr ? before : before % rows;
    STD_TORCH_CHECK(args.key_row == dim / 2 && args.scales.row == args.groups() &&
                        attend.options.window == 0 && first <= rows - attend.queries &&
                        (args.table == nullptr || args.batch == 1),
                    kInputs, ": a sketch does not fit: expected room for ", attend.queries,
                    " rows side by side behind ", first, ", and no window");
    const int64_t page = args.table == nullptr ? 0 : args.table[before / rows];
    keys = static_cast<unsigned char*>(sketch.mutable_data_ptr()) + page * args.key_batch +
           first * args.key_row;
    scales = static_cast<float*>(of.mutable_data_ptr()) + page * args.scales.batch +
             first * args.scales.row;
  }

  // The sums [B,K,D] of the values of so many tokens, of those before the new ones.
  void read_sums(const MaybeTensor& sums, int64_t summed) {
    STD_TORCH_CHECK(sums.has_value() && sums->is_cpu() &&
                        sums->scalar_type() == ScalarType::Float && sums->dim() == 3 &&
                        sums->is_contiguous() && sums->size(0) == args.batch &&
                        sums->size(1) == args.kv_heads && sums->size(2) == args.dim &&
                        summed >= 0 && summed <= args.context - args.queries,
                    kInputs, ": sums of the values of ", summed, " tokens are not float32 [",
                    args.batch, ", ", args.kv_heads, ", ", args.dim, "], or of too many");
    rest.sums = static_cast<const float*>(sums->const_data_ptr());
    rest.summed = summed;
  }

  // Rounds the new keys of a layer, which lie where its products have put them.
  void round(const HeadsArgs& heads, const Kernels& kernels) const {
    QuantizeArgs rows = {};
    rows.dtype = args.dtype;
    rows.bits = 4;
    rows.heads = 1;
    rows.length = args.queries;
    rows.dim = args.dim;
    rows.row_row = heads.key_row;
    char* scratch = keep(aligned(scratch_bytes(rows)));
    for (int64_t b = 0; b < args.batch; ++b)
      for (int64_t k = 0; k < args.kv_heads; ++k) {
        rows.rows = static_cast<const char*>(heads.key) +
                    (b * heads.key_batch + k * heads.key_head) * element_bytes(args.dtype);
        rows.integers = keys + b * args.key_batch + k * args.key_head;
        rows.scales = scales + b * args.scales.batch + k * args.scales.head;
        kernels.quantize(rows, 0, args.queries, scratch);
      }
  }

  // Attends to what each query chooses.
  void attend(AttendArgs* attend, const Kernels& kernels) {
    args.query = attend->query;
    args.query_batch = attend->query_batch;
    args.query_head = attend->query_head;
    args.query_row = attend->query_row;
    args.scale = attend->scale;
    // a choice is a list already: ascending, each key once, none that is hidden
    const int64_t most = budget.most, lists = args.batch * args.kv_heads * args.queries;
    const int64_t of_rest = args.batch * args.heads * args.queries;
    const Memory memory = allocate(4 * (lists * (most + 1) + of_rest));
    int32_t* numbers = static_cast<int32_t*>(memory.get());
    int32_t* counts = numbers + lists * most;
    float* left = reinterpret_cast<float*>(counts + lists);
    choose(args, budget, kernels, numbers, left);
    // where some are for several queries, those of a query go together
    const bool turns = args.queries > 1 && args.kv_heads > 1;
    const Memory turned = allocate(turns ? 4 * lists * most : 64);
    const int32_t* keys = turns ? static_cast<int32_t*>(turned.get()) : numbers;
    for (int64_t i = 0; i < lists; ++i) {
      const int64_t k = i % args.kv_heads, s = i / args.kv_heads % args.queries;
      const int64_t b = i / args.kv_heads / args.queries;
      const int32_t* from = numbers + ((b * args.kv_heads + k) * args.queries + s) * most;
      if (turns)
        std::memcpy(static_cast<int32_t*>(turned.get()) + i * most, from, size_t(4 * most));
      int64_t count = most;
      while (count > 0 && from[count - 1] < 0) --count;
      counts[i] = int32_t(count);
    }
    attend->options.causal = false;
    attend->lists = {keys, counts, 0, args.queries, args.kv_heads, most};
    run_attend(*attend, kernels);
    rest.out = attend->out;
    rest.rest = left;
    rest.values = attend->value;
    rest.dtype = attend->dtype;
    rest.batch = args.batch, rest.heads = args.heads, rest.kv_heads = args.kv_heads;
    rest.queries = args.queries, rest.context = args.context, rest.dim = args.dim;
    rest.value_batch = attend->value_batch, rest.value_head = attend->value_head;
    rest.value_row = attend->value_row;
    rest.table = attend->table, rest.table_row = attend->table_row;
    rest.page_shift = attend->page_shift;
    char* scratch = keep(aligned(scratch_bytes(rest)));
    for (int64_t i = 0; i < args.batch * args.kv_heads; ++i)
      kernels.rest(rest, i / args.kv_heads, i % args.kv_heads, scratch);
  }
};

// What x [B,S,E] attends to, [B,S,H,D]: its keys and values become the tokens `before`.. of the
// buffers keys and values [B,K,capacity,D], and each query sees those up to its own. With a
// page_table [1,n] the buffers are pages [pages,K,page size,D] of one sequence, and its new tokens
// lie in one page, which it has. With a sketch [B,K,capacity,D/2] of the keys before, or pages of
// one, the new keys are put there too, and each query sees what it chooses by it (select.h); the
// rest counts by its mean, of which value_sums [B,K,D] has the sums of the first `summed` values.
Tensor layer_attention(Tensor x, int64_t norm, MaybeTensor norm_weight, MaybeTensor norm_bias,
                       double eps, std::vector<Tensor> weights, MaybeTensors biases, int64_t heads,
                       int64_t kv_heads, int64_t dim, int64_t head_norm, MaybeTensor query_norm,
                       MaybeTensor key_norm, double head_eps, MaybeTensor cos, MaybeTensor sin,
                       int64_t rotation, Tensor keys, Tensor values, MaybeTensor page_table,
                       int64_t before, double scale, int64_t window, double softcap,
                       MaybeTensor sinks, MaybeTensor sketch, MaybeTensor sketch_scales,
                       MaybeTensor sketch_table, int64_t first_keys, int64_t recent, int64_t least,
                       int64_t most, double mass, MaybeTensor value_sums, int64_t summed,
                       int64_t level) {
  const Kernels& kernels = kernels_of(level, kInputs);
  Inputs inputs;
  inputs.read_rows(x, norm, norm_weight, norm_bias, eps);
  inputs.read_heads(x, heads, kv_heads, dim, head_norm, query_norm, key_norm, head_eps);
  inputs.read_rotation(x, cos, sin, rotation);
  inputs.read_weights(x, weights, biases);
  const int64_t batch = x.size(0), length = x.size(1);
  const bool paged = page_table.has_value();
  STD_TORCH_CHECK(before >= 0 && before < (int64_t(1) << 31) - length && (!paged || batch == 1),
                  kInputs, ": a buffer does not fit: expected ", length, " tokens of ",
                  paged ? 1 : batch, " sequences behind ", before);
  // the token of the buffer, or of the page, that the new ones begin at
  const int64_t first =
      paged && keys.dim() == 4 && keys.size(2) > 0 ? before % keys.size(2) : before;
  for (const Tensor* buffer : {&keys, &values})
    STD_TORCH_CHECK(
        buffer->is_cpu() && buffer->dim() == 4 && buffer->scalar_type() == x.scalar_type() &&
            buffer->size(0) == (paged ? keys.size(0) : batch) && buffer->size(1) == kv_heads &&
            buffer->size(2) == keys.size(2) && first <= buffer->size(2) - length &&
            buffer->size(3) == dim && contiguous_rows(*buffer),
        kInputs, ": a buffer does not fit: expected [", batch, ", ", kv_heads, ", ", length,
        " tokens behind ", first, ", ", dim, "] of x's dtype on the CPU");
  Tensor query = new_tensor({batch, heads, length, dim}, x.scalar_type());
  AttendArgs attend = {};
  attend.options.causal = true;
  attend.options.window = window;
  attend.options.softcap = softcap;
  attend.options.check(before + 2 * length, [](const auto&... words) {
    STD_TORCH_CHECK(false, kInputs, ": ", words...);
  });
  if (sinks.has_value()) {
    STD_TORCH_CHECK(sinks->is_cpu() && sinks->scalar_type() == ScalarType::Float &&
                        sinks->dim() == 1 && sinks->size(0) == heads && contiguous_rows(*sinks),
                    kInputs, ": sinks is not a contiguous float32 vector of ", heads);
    attend.options.sinks.data = static_cast<const float*>(sinks->const_data_ptr());
  }
  attend.batch = batch, attend.heads = heads, attend.kv_heads = kv_heads;
  attend.queries = length, attend.context = before + length;
  inputs.write_to(&query, keys, values);
  HeadsArgs& to = inputs.args;
  int64_t key_at = first * to.key_row, value_at = first * to.value_row;
  if (paged) {
    read_pages(*page_table, keys.size(0), keys.size(2), &attend);
    const int64_t page = attend.table[before / keys.size(2)];
    key_at += page * keys.stride(0);
    value_at += page * values.stride(0);
  }
  std::optional<LayerSketch> own;
  if (sketch.has_value()) {
    STD_TORCH_CHECK(sketch_scales.has_value(), kInputs, ": a sketch without scales");
    own.emplace(attend, *sketch, *sketch_scales, to.x.dtype, dim, sketch_table,
                Budget{first_keys, recent, least, most, mass});
    own->read_sums(value_sums, summed);
  }
  const int64_t size = element_bytes(to.x.dtype);
  to.key = static_cast<char*>(to.key) + key_at * size;
  to.value = static_cast<char*>(to.value) + value_at * size;
  inputs.run(kernels);

  // of one query a sequence, [B,H,1,D] lies in memory as [B,1,H,D]
  Tensor out = length == 1 ? new_tensor({batch, length, heads, dim}, x.scalar_type())
                           : new_tensor({batch, heads, length, dim}, x.scalar_type());
  attend.query = query.const_data_ptr();
  attend.key = keys.const_data_ptr();
  attend.value = values.const_data_ptr();
  attend.out = out.mutable_data_ptr();
  attend.dtype = to.x.dtype;
  attend.dim = attend.value_dim = dim;
  attend.scale = float(scale);
  take_strides(query, &attend.query_batch, &attend.query_head, &attend.query_row);
  take_strides(keys, &attend.key_batch, &attend.key_head, &attend.key_row);
  take_strides(values, &attend.value_batch, &attend.value_head, &attend.value_row);
  if (own.has_value()) {
    own->round(to, kernels);
    own->attend(&attend, kernels);
  } else {
    run_attend(attend, kernels);
  }
  if (length == 1) return out;
  Tensor turned = new_tensor({batch, length, heads, dim}, x.scalar_type());
  const char* from = static_cast<const char*>(out.const_data_ptr());
  char* at = static_cast<char*>(turned.mutable_data_ptr());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t s = 0; s < length; ++s, from += dim * size)
        __builtin_memcpy(at + ((b * length + s) * heads + h) * dim * size, from,
                         size_t(dim * size));
  return turned;
}

// The product of what was attended to [B,S,H D], which joins x [B,S,E].
struct AttentionOutput {
  LinearArgs rows, inner;
  LinearWeight out;
  JoinArgs join = {};

  AttentionOutput(const Tensor& x, const Tensor& attended, const Tensor& weight,
                  const MaybeTensor& bias) {
    check_dims(x, kOutputs);
    rows = check_rows(x, kOutputs);
    inner = check_rows(attended, kOutputs);
    STD_TORCH_CHECK(inner.rows == rows.rows && inner.dtype == rows.dtype, kOutputs,
                    ": attended does not fit x");
    out = check_weight(weight, bias, x, inner.width, kOutputs);
    inner.packed = out.is_packed();
    STD_TORCH_CHECK(out.rows == rows.width, kOutputs, ": the weight has ", out.rows,
                    " outputs, expected ", rows.width);
    join.dtype = rows.dtype;
    join.rows = rows.rows;
    join.width = rows.width;
    join.x = rows.x;
  }

  Division division() const { return Division(&out, 1, bytes_of(out, inner)); }

  // Bytes of a thread.
  int64_t scratch(const Division& division) const {
    const int64_t of_join = aligned(join_bytes(join));
    const int64_t of_task = aligned(scratch_bytes(inner, division.largest)) + take_bytes(inner);
    return of_task > of_join ? of_task : of_join;
  }

  void run(const Kernels& kernels, const Division& division, char* taken, float* product, char* own,
           int64_t scratch) {
    kernels.take(inner, 0, inner.rows, taken, own);
    out.out = product;
    out.wide = true;
    division.share(own, scratch, [&](const Division::Task& task, char* each) {
      kernels.linear(inner, out, task.first, task.count, taken, each);
    });
    join.added = product;
    kernels.join(join, own);
  }
};

// x [B,S,E] plus the product of what was attended to [B,S,H D], and the norm of that sum: what an
// MLP that is a module of its own is given.
std::tuple<Tensor, Tensor> attention_outputs(Tensor x, Tensor attended, Tensor weight,
                                             MaybeTensor bias, int64_t after_attention,
                                             MaybeTensor after_weight, MaybeTensor after_bias,
                                             double after_eps, int64_t before_mlp,
                                             MaybeTensor before_weight, MaybeTensor before_bias,
                                             double before_eps, double scale, int64_t level) {
  const Kernels& kernels = kernels_of(level, kOutputs);
  AttentionOutput output(x, attended, weight, bias);
  const int64_t width = output.rows.width;
  Tensor sum = new_tensor({x.size(0), x.size(1), width}, x.scalar_type());
  Tensor normed = new_tensor({x.size(0), x.size(1), width}, x.scalar_type());
  JoinArgs& join = output.join;
  join.added_norm =
      check_norm(after_attention, after_weight, after_bias, after_eps, x, width, kOutputs);
  join.scale = float(scale);
  join.next = check_norm(before_mlp, before_weight, before_bias, before_eps, x, width, kOutputs);
  join.out = sum.mutable_data_ptr();
  join.normed = normed.mutable_data_ptr();
  const Division division = output.division();
  const int64_t scratch = output.scratch(division);
  const int64_t taken = aligned(taken_bytes(output.inner));
  const int64_t floats = aligned(4 * output.rows.rows * width);
  char* memory = keep(taken + floats + most_threads() * scratch);
  output.run(kernels, division, memory, reinterpret_cast<float*>(memory + taken),
             memory + taken + floats, scratch);
  return {sum, normed};
}

// What a layer returns for x [B,S,E] and attended [B,S,H D]: x, plus the product of what was
// attended to, plus the MLP of the norm of that sum (of x itself where `parallel`). weights: of the
// attention's output, of the gate where the MLP `gates` (first in one with up where there are
// three), up and down. norms: weight and bias of the norm of the attention's output, of the MLP's
// input and of its output.
Tensor layer_outputs(Tensor x, Tensor attended, std::vector<Tensor> weights, MaybeTensors biases,
                     bool gates, int64_t after_attention, int64_t before_mlp, int64_t after_mlp,
                     MaybeTensors norms, double attention_eps, double input_eps, double output_eps,
                     int64_t activation, bool parallel, double scale, int64_t level) {
  const Kernels& kernels = kernels_of(level, kOutputs);
  STD_TORCH_CHECK(!weights.empty() && biases.size() == weights.size() && norms.size() == 6,
                  kOutputs, ": ", weights.size(), " weights, ", biases.size(), " biases and ",
                  norms.size(), " parts of norms, expected 3 or 4, as many, and 6");
  AttentionOutput output(x, attended, weights[0], biases[0]);
  const LinearArgs& rows = output.rows;
  const int64_t width = rows.width;
  Mlp mlp(x, rows, weights, biases, 1, gates, activation, kOutputs);
  Tensor result = new_tensor({x.size(0), x.size(1), width}, x.scalar_type());

  JoinArgs& join = output.join;
  join.added_norm =
      check_norm(after_attention, norms[0], norms[1], attention_eps, x, width, kOutputs);
  join.scale = float(scale);
  join.next = check_norm(before_mlp, norms[2], norms[3], input_eps, x, width, kOutputs);
  join.next_of_x = parallel;
  join.packed = mlp.rows.packed;
  JoinArgs last = join;
  last.added_norm = check_norm(after_mlp, norms[4], norms[5], output_eps, x, width, kOutputs);
  last.out = result.mutable_data_ptr();

  // what is taken of the attention and of the MLP's input; its middle; products; the sum
  const Division first = output.division();
  const int64_t floats = aligned(4 * rows.rows * padded(width));
  const int64_t of_next = aligned(taken_bytes(mlp.rows));
  const int64_t of_attended = aligned(taken_bytes(output.inner));
  const int64_t before = output.scratch(first), inside = mlp.scratch();
  const int64_t scratch = before > inside ? before : inside;
  char* memory =
      keep(of_attended + mlp.of_middle + of_next + 2 * floats + most_threads() * scratch);
  char* taken = memory + of_attended + mlp.of_middle;
  float* product = reinterpret_cast<float*>(taken + of_next);
  join.sum = reinterpret_cast<float*>(taken + of_next + floats);
  join.taken = taken;
  char* own = taken + of_next + 2 * floats;

  output.run(kernels, first, memory, product, own, scratch);
  mlp.down.out = product;
  mlp.down.wide = true;
  mlp.run(kernels, taken, memory + of_attended, own, scratch);
  last.wide = join.sum;
  last.added = product;
  kernels.join(last, own);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headwise, m) {
  m.def(
      "attention_inputs(Tensor x, int norm, Tensor? norm_weight, Tensor? norm_bias, float eps, "
      "Tensor[] weights, Tensor?[] biases, int heads, int kv_heads, int dim, int head_norm, "
      "Tensor? query_norm, Tensor? key_norm, float head_eps, Tensor? cos, Tensor? sin, "
      "int rotation, int level) -> (Tensor, Tensor, Tensor)");
  m.def(
      "layer_attention(Tensor x, int norm, Tensor? norm_weight, Tensor? norm_bias, float eps, "
      "Tensor[] weights, Tensor?[] biases, int heads, int kv_heads, int dim, int head_norm, "
      "Tensor? query_norm, Tensor? key_norm, float head_eps, Tensor? cos, Tensor? sin, "
      "int rotation, Tensor(a!) keys, Tensor(b!) values, Tensor? page_table, int before, "
      "float scale, int window, "
      "float softcap, Tensor? sinks, Tensor(c!)? sketch, Tensor(d!)? sketch_scales, "
      "Tensor? sketch_table, int first, int recent, int least, int most, float mass, "
      "Tensor? value_sums, int summed, int level) -> Tensor");
  m.def(
      "attention_outputs(Tensor x, Tensor attended, Tensor weight, Tensor? bias, "
      "int after_attention, Tensor? after_weight, Tensor? after_bias, float after_eps, "
      "int before_mlp, Tensor? before_weight, Tensor? before_bias, float before_eps, float scale, "
      "int level) -> (Tensor, Tensor)");
  m.def(
      "layer_outputs(Tensor x, Tensor attended, Tensor[] weights, Tensor?[] biases, bool gates, "
      "int after_attention, int before_mlp, int after_mlp, Tensor?[] norms, float attention_eps, "
      "float input_eps, float output_eps, int activation, bool parallel, float scale, int level) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(headwise, CPU, m) {
  m.impl("attention_inputs", TORCH_BOX(&attention_inputs));
  m.impl("layer_attention", TORCH_BOX(&layer_attention));
  m.impl("attention_outputs", TORCH_BOX(&attention_outputs));
  m.impl("layer_outputs", TORCH_BOX(&layer_outputs));
}

}  // namespace headwise
