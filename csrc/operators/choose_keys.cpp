// headwise::choose_keys: the keys that weigh most for each query, by a sketch of them.

#include "choose_keys.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "threads.h"

namespace headwise {
namespace {

constexpr const char* kChoose = "headwise::choose_keys";
// Weights that exist at once.
constexpr int64_t kMostWeights = int64_t(1) << 23;
// How often a thread takes work, and queries that one rotates alone.
constexpr int64_t kTurns = 2;
constexpr int64_t kFewRows = 64;

}  // namespace

void read_sketch(const Tensor& keys, const Tensor& scales, const MaybeTensor& table,
                 const char* operation, SketchArgs* args) {
  check_contiguous_rows(keys, operation, "the sketch", 4);
  check_contiguous_rows(scales, operation, "its scales", 4);
  const bool paged = table.has_value();
  const int64_t rows = keys.size(2);
  STD_TORCH_CHECK(
      args->dtype != kFloat64 && args->dim >= 2 && args->dim % 2 == 0 && args->dim <= kMostDim,
      operation, ": a sketch of rows of ", args->dim,
      " elements, expected an even "
      "number up to ",
      kMostDim, ", not of float64");
  STD_TORCH_CHECK(
      keys.scalar_type() == ScalarType::Byte && scales.scalar_type() == ScalarType::Float &&
          keys.size(1) == args->kv_heads && keys.size(3) * 2 == args->dim &&
          scales.size(0) == keys.size(0) && scales.size(1) == keys.size(1) &&
          scales.size(2) == rows && scales.size(3) == args->groups() &&
          (paged || (keys.size(0) == args->batch && rows >= args->context)),
      operation,
      ": a sketch is not uint8 [B, K, L, D/2] with float32 scales [B, K, L, ceil(D/32)]");
  STD_TORCH_CHECK(args->context >= 0 && args->context < int64_t(1) << 31, operation, ": ",
                  args->context, " keys");
  args->keys = static_cast<const unsigned char*>(keys.const_data_ptr());
  take_strides(keys, &args->key_batch, &args->key_head, &args->key_row);
  args->scales.data = static_cast<const float*>(scales.const_data_ptr());
  take_strides(scales, &args->scales.batch, &args->scales.head, &args->scales.row);
  if (!paged) return;
  STD_TORCH_CHECK(rows >= 1 && (rows & (rows - 1)) == 0, operation, ": pages of ", rows, " rows");
  while ((int64_t(1) << args->page_shift) < rows) ++args->page_shift;
  STD_TORCH_CHECK(table->is_cpu() && table->scalar_type() == ScalarType::Int && table->dim() == 2 &&
                      contiguous_rows(*table) && table->size(0) == args->batch &&
                      table->size(1) * rows >= args->context,
                  operation, ": page_table is not int32 [B, pages of ", args->context, " keys]");
  args->table = static_cast<const int32_t*>(table->const_data_ptr());
  args->table_row = table->stride(0);
  for (int64_t b = 0; b < args->batch; ++b) {
    const int64_t used = (args->held(b) + rows - 1) / rows;
    for (int64_t i = 0; i < used; ++i) {
      const int32_t page = args->table[b * args->table_row + i];
      STD_TORCH_CHECK(page >= 0 && page < keys.size(0), operation, ": page ", page, " of sequence ",
                      b, " does not exist, there are ", keys.size(0));
    }
  }
}

void check_budget(const Budget& budget, const char* operation) {
  STD_TORCH_CHECK(budget.first >= 0 && budget.recent >= 0 && budget.least >= 0 &&
                      budget.most >= 1 && budget.least <= budget.most &&
                      budget.first <= budget.most && budget.recent <= budget.most - budget.first &&
                      budget.mass <= 1.0,
                  operation, ": first ", budget.first, ", recent ", budget.recent, ", least ",
                  budget.least, ", most ", budget.most, ", mass ", budget.mass);
}

void choose(const SketchArgs& args, const Budget& budget, const Kernels& kernels, int32_t* chosen,
            float* rest) {
  // as many sequences at once as fit, or as many queries of one
  const int64_t per_query = args.heads * args.pitch();
  int64_t fit = per_query > 0 ? kMostWeights / per_query : args.queries;
  if (fit < 1) fit = 1;
  const int64_t queries = fit < args.queries ? fit : args.queries;
  int64_t sequences = fit / queries;
  if (sequences > args.batch) sequences = args.batch;
  const int64_t group = args.group(), ranges = args.ranges(), threads = most_threads();
  const int64_t rows = sequences * args.heads * queries;
  const int64_t weight_bytes = aligned(4 * rows * args.pitch());
  const int64_t range_bytes = aligned(4 * rows * ranges);
  const int64_t head_bytes = aligned(taken_bytes(args, queries));
  const int64_t query_bytes = sequences * args.kv_heads * head_bytes;
  int64_t bytes = scratch_bytes(args);
  // of a choice: the sums, factors and masses of its weights, and what selects among them
  const int64_t sum_bytes = aligned(4 * args.pitch());
  const int64_t factor_bytes = aligned(4 * group * ranges), mass_bytes = aligned(4 * group);
  const int64_t own_bytes = sum_bytes + factor_bytes + mass_bytes;
  if (bytes < own_bytes + select_bytes(args.context))
    bytes = own_bytes + select_bytes(args.context);
  bytes = aligned(bytes);
  char* memory = keep(weight_bytes + 2 * range_bytes + query_bytes + threads * bytes);
  float* weights = reinterpret_cast<float*>(memory);
  float* maxima = reinterpret_cast<float*>(memory + weight_bytes);
  float* sums = reinterpret_cast<float*>(memory + weight_bytes + range_bytes);
  char* taken = memory + weight_bytes + 2 * range_bytes;
  char* scratch = taken + query_bytes;
  for (int64_t b = 0; b < args.batch; b += sequences) {
    const int64_t of = args.batch - b < sequences ? args.batch - b : sequences;
    for (int64_t s = 0; s < args.queries; s += queries) {
      const int64_t own = args.queries - s < queries ? args.queries - s : queries;
      // the rows of `count` queries of a kv head, from query `from` of this part on
      const auto part = [&](int64_t which, int64_t from, int64_t count) {
        const int64_t row = (which * queries + from) * group;
        return SketchPart{b + which / args.kv_heads,
                          which % args.kv_heads,
                          s + from,
                          count,
                          taken + which * head_bytes,
                          weights + row * args.pitch(),
                          maxima + row * ranges,
                          sums + row * ranges};
      };
      const int64_t heads = of * args.kv_heads, tasks = heads * ranges;
      // a few rows are not worth waking a thread
      const int64_t rows_in_all = heads * own * group;
      share(heads, 1, rows_in_all > kFewRows && heads > 1 ? threads : 1, scratch, bytes,
            [&](int64_t head, char* space) {
              kernels.sketch_queries(args, part(head, 0, own), space);
            });
      // a thread reads on where it was
      const int64_t run = tasks / (threads * kTurns) > 1 ? tasks / (threads * kTurns) : 1;
      share(tasks, run, tasks < threads ? tasks : threads, scratch, bytes,
            [&](int64_t task, char* space) {
              const SketchPart rows_of_head = part(task / ranges, 0, own);
              const int64_t begin = task % ranges * kSketchRange;
              int64_t end = args.held(rows_of_head.batch);
              if (end > begin + kSketchRange) end = begin + kSketchRange;
              if (begin < end) {
                kernels.sketch_scores(args, rows_of_head, begin, end, space);
                return;
              }
              for (int64_t r = 0; r < own * group; ++r) {  // behind what the sequence holds
                rows_of_head.maxima[r * ranges + task % ranges] = -__builtin_inff();
                rows_of_head.sums[r * ranges + task % ranges] = 0.0f;
              }
            });
      const int64_t choices = heads * own;
      share(choices, 1, choices < threads ? choices : threads, scratch, bytes,
            [&](int64_t task, char* space) {
              const SketchPart one = part(task / own, task % own, 1);
              const int64_t stop = args.stop(one.batch, one.query);
              const ScoreStrides& at = args.mask.strides;
              const Seen seen = {args.mask.data == nullptr
                                     ? nullptr
                                     : args.mask.data + at.offset(one.batch, 0, one.query, 0),
                                 at.key};
              const SketchWeights found = {
                  reinterpret_cast<float*>(space), reinterpret_cast<float*>(space + sum_bytes),
                  reinterpret_cast<float*>(space + sum_bytes + factor_bytes)};
              kernels.sketch_weights(args, one, stop, found);
              int32_t* to =
                  chosen +
                  ((one.batch * args.kv_heads + one.head) * args.queries + one.query) * budget.most;
              select_budget(kernels, found.sum, stop, seen, budget, to, space + own_bytes);
              for (int64_t g = 0; g < group; ++g) {
                const float* weight = one.weights + g * args.pitch();
                const float* factor = found.factor + g * ranges;
                float taken = 0.0f;
                for (int64_t i = 0; i < budget.most && to[i] >= 0; ++i) {
                  const float own = weight[to[i]] * factor[to[i] / kSketchRange];
                  taken += own == own ? own : 0.0f;
                }
                const float left = found.mass[g] - taken;
                rest[(one.batch * args.heads + one.head * group + g) * args.queries + one.query] =
                    left > 0.0f ? left : 0.0f;
              }
            });
    }
  }
}

namespace {

// query [B,H,S,D]; keys uint8 [B,K,L,D/2] and scales [B,K,L,groups], or pages of them with their
// table [B,n] and `context`; lengths int64 [B]; mask [B|1,1,S|1,L|1]; sinks float32 [H]:
// int32 [B,K,S,most], ascending, then -1; and float32 [B,H,S], the part of a head's softmax that
// its keys have which were not chosen. mass below 0: the `most` keys that weigh most.
std::tuple<Tensor, Tensor> choose_keys(Tensor query, Tensor keys, Tensor scales, MaybeTensor table,
                                       int64_t context, MaybeTensor lengths, MaybeTensor mask,
                                       MaybeTensor sinks, bool causal, double scale, double softcap,
                                       int64_t first, int64_t recent, int64_t least, int64_t most,
                                       double mass, int64_t level) {
  const Kernels& kernels = kernels_of(level, kChoose);
  const Budget budget = {first, recent, least, most, mass};
  check_budget(budget, kChoose);
  check_contiguous_rows(query, kChoose, "query", 4);
  SketchArgs args = {};
  args.query = query.const_data_ptr();
  args.dtype = dtype_of(query, kChoose, "query");
  args.batch = query.size(0);
  args.heads = query.size(1);
  args.queries = query.size(2);
  args.dim = query.size(3);
  take_strides(query, &args.query_batch, &args.query_head, &args.query_row);
  STD_TORCH_CHECK(keys.dim() == 4 && keys.size(1) >= 1 && args.heads % keys.size(1) == 0, kChoose,
                  ": query has ", args.heads, " heads, which those of the keys do not divide");
  args.kv_heads = keys.size(1);
  args.context = table.has_value() ? context : keys.size(2);
  args.scale = float(scale);
  args.softcap = float(softcap);
  args.causal = causal;
  if (lengths.has_value()) {
    STD_TORCH_CHECK(lengths->is_cpu() && lengths->scalar_type() == ScalarType::Long &&
                        lengths->dim() == 1 && lengths->size(0) == args.batch &&
                        contiguous_rows(*lengths),
                    kChoose, ": lengths is not int64 [B]");
    args.lengths = static_cast<const int64_t*>(lengths->const_data_ptr());
    for (int64_t b = 0; b < args.batch; ++b)
      STD_TORCH_CHECK(args.lengths[b] >= 0 && args.lengths[b] <= args.context, kChoose, ": length ",
                      args.lengths[b], " of ", args.context, " keys");
  }
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->is_cpu() && mask->dim() == 4 && mask->scalar_type() == ScalarType::Bool,
                    kChoose, ": mask is not a boolean CPU tensor of 4 dims");
    const int64_t full[4] = {args.batch, 1, args.queries, args.context};
    int64_t strides[4];
    for (int64_t i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(mask->size(i) == full[i] || mask->size(i) == 1, kChoose, ": dim ", i,
                      " of mask has size ", mask->size(i), ", expected 1 or ", full[i]);
      strides[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
    }
    args.mask = {static_cast<const unsigned char*>(mask->const_data_ptr()),
                 {strides[0], 0, strides[2], strides[3]}};
  }
  if (sinks.has_value()) {
    STD_TORCH_CHECK(sinks->is_cpu() && sinks->scalar_type() == ScalarType::Float &&
                        sinks->dim() == 1 && sinks->size(0) == args.heads &&
                        contiguous_rows(*sinks),
                    kChoose, ": sinks is not a float32 vector of ", args.heads);
    args.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }
  read_sketch(keys, scales, table, kChoose, &args);
  Tensor out = new_tensor({args.batch, args.kv_heads, args.queries, most}, ScalarType::Int);
  Tensor rest = new_tensor({args.batch, args.heads, args.queries}, ScalarType::Float);
  if (out.numel() > 0)
    choose(args, budget, kernels, static_cast<int32_t*>(out.mutable_data_ptr()),
           static_cast<float*>(rest.mutable_data_ptr()));
  return {out, rest};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headwise, m) {
  m.def(
      "choose_keys(Tensor query, Tensor keys, Tensor scales, Tensor? page_table, int context, "
      "Tensor? lengths, Tensor? mask, Tensor? sinks, bool causal, float scale, float softcap, int "
      "first, int recent, int least, int most, float mass, int level) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(headwise, CPU, m) { m.impl("choose_keys", TORCH_BOX(&choose_keys)); }

}  // namespace headwise
