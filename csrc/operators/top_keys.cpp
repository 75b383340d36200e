// headwise::top_keys: the keys with the largest scores q . k, for each query and head.

#include <torch/csrc/stable/library.h>

#include "../select.h"
#include "tensors.h"
#include "threads.h"

namespace headwise {
namespace {

constexpr const char* kTop = "headwise::top_keys";
// Keys that a task reads at least, and tasks that a thread gets where there are enough of those.
constexpr int64_t kLeastKeys = 4096, kTasksPerThread = 2;
// Keys that a list has room for beside twice the largest, and bytes of the lists of a task.
constexpr int64_t kRoom = 2 * kBlock, kMostBytes = int64_t(1) << 24;
// Products of pairs of numbers for which waking one more thread pays.
constexpr int64_t kLeastWork = int64_t(1) << 19;

// Cuts the list of a row to its `top` largest, ascending by place.
void cut(const Kernels& kernels, const TopPart& part, int64_t row, int64_t top, int32_t* kept,
         char* scratch) {
  int32_t& count = part.counts[row];
  if (count <= top) return;
  float* scores = part.scores + row * part.room;
  int32_t* places = part.places + row * part.room;
  select_largest(kernels, scores, count, {nullptr, 1}, top, kept, scratch);
  float least = __builtin_inff();
  for (int64_t i = 0; i < top; ++i) {
    scores[i] = scores[kept[i]], places[i] = places[kept[i]];
    if (scores[i] < least) least = scores[i];
  }
  count = int32_t(top);
  part.thresholds[row] = least;  // an equal score that comes later is not larger
}

// query [B,H,S,D], key [B,K,L,D] and mask [B|1,L]: int32 [B,H,S,top], ascending, then -1.
Tensor top_keys(Tensor query, Tensor key, MaybeTensor mask, int64_t top, int64_t level) {
  const Kernels& kernels = kernels_of(level, kTop);
  check_contiguous_rows(query, kTop, "query", 4);
  check_contiguous_rows(key, kTop, "key", 4);
  TopArgs args = {};
  args.dtype = dtype_of(query, kTop, "query");
  args.batch = query.size(0);
  args.heads = query.size(1);
  args.queries = query.size(2);
  args.dim = query.size(3);
  args.kv_heads = key.size(1);
  args.context = key.size(2);
  STD_TORCH_CHECK(args.dtype != kFloat64 && key.scalar_type() == query.scalar_type(), kTop,
                  ": query and key differ in dtype, or are float64");
  STD_TORCH_CHECK(key.size(0) == args.batch && key.size(3) == args.dim && args.dim >= 1 &&
                      args.dim <= kMostDim && args.kv_heads >= 1 && args.heads % args.kv_heads == 0,
                  kTop,
                  ": key is not [B, K, L, D] with the query's B, K that divides H, and D of 1 "
                  "to ",
                  kMostDim);
  STD_TORCH_CHECK(args.context < int64_t(1) << 31 && top >= 0 && top <= args.context, kTop,
                  ": top is ", top, ", expected 0 to ", args.context, ", the keys");
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->is_cpu() && mask->dim() == 2 && mask->scalar_type() == ScalarType::Bool &&
                        (mask->size(0) == args.batch || mask->size(0) == 1) &&
                        mask->size(1) == args.context,
                    kTop, ": mask is not a boolean CPU tensor [B or 1, L]");
    args.mask = {static_cast<const unsigned char*>(mask->const_data_ptr()),
                 {mask->size(0) == 1 ? 0 : mask->stride(0), 0, 0, mask->stride(1)}};
  }
  Tensor out = new_tensor({args.batch, args.heads, args.queries, top}, ScalarType::Int);
  if (out.numel() == 0) return out;
  args.query = query.const_data_ptr();
  args.key = key.const_data_ptr();
  take_strides(query, &args.query_batch, &args.query_head, &args.query_row);
  take_strides(key, &args.key_batch, &args.key_head, &args.key_row);
  int32_t* chosen = static_cast<int32_t*>(out.mutable_data_ptr());

  const int64_t room = 2 * top + kRoom, rows = args.rows(), heads = args.batch * args.kv_heads;
  int64_t tile = kMostBytes / (8 * room);
  if (tile > kTopRows) tile = kTopRows;
  if (tile > rows) tile = rows;
  if (tile < 1) tile = 1;
  const int64_t tiles = (rows + tile - 1) / tile, units = heads * tiles;
  const int64_t work = heads * args.context * args.dim * (rows + 2 * tiles);
  int64_t threads = most_threads();
  if (threads > 1 + work / kLeastWork) threads = 1 + work / kLeastWork;
  // the lists of parts of the keys are joined to those of all: what is chosen is the same
  int64_t ranges = threads > 1 ? (kTasksPerThread * threads + units - 1) / units : 1;
  if (ranges > args.context / kLeastKeys) ranges = args.context / kLeastKeys;
  if (ranges < 1) ranges = 1;
  const int64_t keys = (args.context + ranges * kBlock - 1) / (ranges * kBlock) * kBlock;

  const int64_t product_bytes = aligned(scratch_bytes(args, tile));
  const int64_t list_bytes = aligned(4 * tile * room);
  const int64_t of_rows = aligned(4 * (tile + 16)), kept_bytes = aligned(4 * top);
  const int64_t joined = ranges * top, joined_bytes = aligned(4 * joined);
  int64_t select = select_bytes(room > joined ? room : joined);
  int64_t bytes = product_bytes + 2 * list_bytes + 2 * of_rows + kept_bytes + aligned(select);
  if (bytes < joined_bytes + kept_bytes + aligned(select))
    bytes = joined_bytes + kept_bytes + aligned(select);
  // with one range a list is the result
  const int64_t lists = ranges > 1 ? units * tile * ranges : 0;
  const int64_t found_bytes = aligned(4 * lists * top);
  char* memory = keep(2 * found_bytes + aligned(4 * lists) + threads * bytes);
  float* found = reinterpret_cast<float*>(memory);
  int32_t* places = reinterpret_cast<int32_t*>(memory + found_bytes);
  int32_t* counts = reinterpret_cast<int32_t*>(memory + 2 * found_bytes);
  char* scratch = memory + 2 * found_bytes + aligned(4 * lists);
  const auto result = [&](int64_t unit, int64_t row) {
    return chosen + (unit / tiles * rows + unit % tiles * tile + row) * top;
  };
  const auto rows_of = [&](int64_t unit) {
    const int64_t first = unit % tiles * tile;
    return rows - first < tile ? rows - first : tile;
  };

  const int64_t tasks = units * ranges;
  share(tasks, 1, tasks < threads ? tasks : threads, scratch, bytes, [&](int64_t task, char* own) {
    const int64_t unit = task / ranges, range = task % ranges, head = unit / tiles;
    TopPart part = {};
    part.batch = head / args.kv_heads, part.head = head % args.kv_heads;
    part.row = unit % tiles * tile, part.rows = rows_of(unit), part.room = room;
    char* at = own + product_bytes;
    part.scores = reinterpret_cast<float*>(at);
    part.places = reinterpret_cast<int32_t*>(at += list_bytes);
    part.counts = reinterpret_cast<int32_t*>(at += list_bytes);
    part.thresholds = reinterpret_cast<float*>(at += of_rows);
    int32_t* kept = reinterpret_cast<int32_t*>(at += of_rows);
    char* space = at + kept_bytes;
    for (int64_t row = 0; row < tile + 16; ++row) {
      part.counts[row] = 0;
      // what fills up a vector has no list
      part.thresholds[row] = row < part.rows ? -__builtin_inff() : __builtin_inff();
    }
    const int64_t stop = (range + 1) * keys < args.context ? (range + 1) * keys : args.context;
    for (int64_t first = range * keys; first < stop;) {
      first = kernels.top(args, part, first, stop, own);
      if (first < stop)
        for (int64_t row = 0; row < part.rows; ++row) cut(kernels, part, row, top, kept, space);
    }
    for (int64_t row = 0; row < part.rows; ++row) {
      cut(kernels, part, row, top, kept, space);
      const int32_t count = part.counts[row];
      const float* scores = part.scores + row * room;
      const int32_t* list = part.places + row * room;
      if (ranges == 1) {
        int32_t* to = result(unit, row);
        for (int64_t i = 0; i < top; ++i) to[i] = i < count ? list[i] : -1;
        continue;
      }
      const int64_t to = (unit * tile + row) * ranges + range;
      counts[to] = count;
      for (int32_t i = 0; i < count; ++i)
        found[to * top + i] = scores[i], places[to * top + i] = list[i];
    }
  });
  if (ranges == 1) return out;
  const int64_t all = units * tile;
  share(all, 1, all < threads ? all : threads, scratch, bytes, [&](int64_t task, char* own) {
    const int64_t unit = task / tile, row = task % tile;
    if (row >= rows_of(unit)) return;
    float* scores = reinterpret_cast<float*>(own);
    int32_t* list = places + task * joined;
    int64_t count = 0;
    for (int64_t range = 0; range < ranges; ++range)
      for (int64_t i = 0; i < counts[task * ranges + range]; ++i, ++count) {
        scores[count] = found[(task * ranges + range) * top + i];
        list[count] = list[range * top + i];
      }
    int32_t* to = result(unit, row);
    select_largest(kernels, scores, count, {nullptr, 1}, top, to, own + joined_bytes);
    for (int64_t i = 0; i < top && to[i] >= 0; ++i) to[i] = list[to[i]];
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headwise, m) {
  m.def("top_keys(Tensor query, Tensor key, Tensor? mask, int top, int level) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(headwise, CPU, m) { m.impl("top_keys", TORCH_BOX(&top_keys)); }

}  // namespace headwise
