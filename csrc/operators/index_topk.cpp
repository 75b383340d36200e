// headwise::index_topk: the keys with the largest scores of an indexer, for each query.

#include <torch/csrc/stable/library.h>

#include "../select.h"
#include "tensors.h"
#include "threads.h"

namespace headwise {
namespace {

constexpr const char* kIndex = "headwise::index_topk";
// Scores that exist at once, and keys of one query that a task scores.
constexpr int64_t kMostScores = int64_t(1) << 22, kKeys = 1024;

// query [B,S,I,E], key [B,L,E], weight [B,S,I] in float32 and mask [B,S,L]: int32 [B,S,top], filled
// up with -1. causal: the last query sits on the last key, and none looks ahead.
Tensor index_topk(Tensor query, Tensor key, Tensor weight, std::optional<Tensor> mask, bool causal,
                  int64_t top, int64_t level) {
  const Kernels& kernels = kernels_of(level, kIndex);
  check_contiguous_rows(query, kIndex, "query", 4);
  check_contiguous_rows(key, kIndex, "key", 3);
  check_contiguous_rows(weight, kIndex, "weight", 3);
  IndexArgs args = {};
  args.dtype = dtype_of(query, kIndex, "query");
  args.batch = query.size(0);
  args.queries = query.size(1);
  args.heads = query.size(2);
  args.dim = query.size(3);
  args.context = key.size(1);
  STD_TORCH_CHECK(args.dtype != kFloat64 && key.scalar_type() == query.scalar_type(), kIndex,
                  ": query and key differ in dtype, or are float64");
  STD_TORCH_CHECK(
      key.size(0) == args.batch && key.size(2) == args.dim && args.dim >= 1 && args.dim <= kMostDim,
      kIndex, ": key is not [B, L, E] with the query's B and E, and E of 1 to ", kMostDim);
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.size(0) == args.batch &&
                      weight.size(1) == args.queries && weight.size(2) == args.heads,
                  kIndex, ": weight is not float32 [B, S, I] with the query's B, S and I");
  STD_TORCH_CHECK(args.context < int64_t(1) << 31 && top >= 0 && top <= args.context, kIndex,
                  ": top is ", top, ", expected 0 to ", args.context, ", the keys");
  Mask hidden = {};
  if (mask.has_value()) {
    const Tensor& given = *mask;
    STD_TORCH_CHECK(given.is_cpu() && given.dim() == 3 && given.scalar_type() == ScalarType::Bool,
                    kIndex, ": mask is not a boolean CPU tensor of 3 dims");
    const int64_t full[3] = {args.batch, args.queries, args.context};
    int64_t strides[3];
    for (int64_t i = 0; i < 3; ++i) {
      STD_TORCH_CHECK(given.size(i) == full[i] || given.size(i) == 1, kIndex, ": dim ", i,
                      " of mask has size ", given.size(i), ", expected 1 or ", full[i]);
      strides[i] = given.size(i) == 1 ? 0 : given.stride(i);
    }
    hidden = {static_cast<const unsigned char*>(given.const_data_ptr()),
              {strides[0], 0, strides[1], strides[2]}};
  }
  Tensor out = new_tensor({args.batch, args.queries, top}, ScalarType::Int);
  if (out.numel() == 0) return out;
  args.query = query.const_data_ptr();
  args.key = key.const_data_ptr();
  args.weight = static_cast<const float*>(weight.const_data_ptr());
  take_strides(query, &args.query_batch, &args.query_row, &args.query_head);
  args.key_batch = key.stride(0), args.key_row = key.stride(1);
  args.weight_batch = weight.stride(0), args.weight_row = weight.stride(1);
  int32_t* chosen = static_cast<int32_t*>(out.mutable_data_ptr());

  const int64_t queries = args.batch * args.queries, context = args.context;
  int64_t each = kMostScores / context;
  each = each < 1 ? 1 : each > queries ? queries : each;
  int64_t bytes = scratch_bytes(args);
  if (bytes < select_bytes(context)) bytes = select_bytes(context);
  bytes = aligned(bytes);
  const int64_t most = most_threads();
  const int64_t score_bytes = aligned(int64_t(sizeof(float)) * each * context);
  char* memory = keep(score_bytes + most * bytes + aligned(8 * each));
  float* scores = reinterpret_cast<float*>(memory);
  char* scratch = memory + score_bytes;
  int64_t* stops = reinterpret_cast<int64_t*>(scratch + most * bytes);
  const auto bytes_of = [&](int64_t q) {
    const ScoreStrides& at = hidden.strides;
    return hidden.data == nullptr
               ? nullptr
               : hidden.data + at.offset(q / args.queries, 0, q % args.queries, 0);
  };
  const int64_t ranges = (context + kKeys - 1) / kKeys;
  for (int64_t first = 0; first < queries; first += each) {
    const int64_t count = queries - first < each ? queries - first : each;
    for (int64_t i = 0; i < count; ++i) {
      // the keys behind the last that a query may see are not scored
      int64_t stop = context - (causal ? args.queries - 1 - (first + i) % args.queries : 0);
      const unsigned char* own = bytes_of(first + i);
      if (own != nullptr)
        while (stop > 0 && !own[(stop - 1) * hidden.strides.key]) --stop;
      stops[i] = stop > 0 ? stop : 0;
    }
    const int64_t tasks = ranges * count;
    share(tasks, 1, tasks < most ? tasks : most, scratch, bytes, [&](int64_t task, char* own) {
      const int64_t i = task % count, from = task / count * kKeys, q = first + i;
      const int64_t to = from + kKeys < stops[i] ? from + kKeys : stops[i];
      if (from < to)
        kernels.index(args, q / args.queries, q % args.queries, from, to, scores + i * context,
                      own);
    });
    share(count, 1, count < most ? count : most, scratch, bytes, [&](int64_t i, char* own) {
      select_largest(kernels, scores + i * context, stops[i],
                     {bytes_of(first + i), hidden.strides.key}, top, chosen + (first + i) * top,
                     own);
    });
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headwise, m) {
  m.def(
      "index_topk(Tensor query, Tensor key, Tensor weight, Tensor? mask, bool causal, int top, int "
      "level) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(headwise, CPU, m) { m.impl("index_topk", TORCH_BOX(&index_topk)); }

}  // namespace headwise
