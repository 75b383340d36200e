// One call as plain pointers, and its division into tasks. No torch, no templates.
//
// Letters as in docs/design.md: B batch, H query heads, K kv heads, S queries, L keys, D head dim,
// V value dim, G = H/K. A kv head has S * G rows: row = s * G + g is query s of its g-th head.
#pragma once

#include "options.h"

namespace headwise {

// Where the scales of quantised rows lie, those of a row side by side; in pages, `batch` is from
// page to page.
struct Scales {
  const float* data;
  int64_t batch, head, row;
};

// The keys that each query attends to, by their positions: lists of a part of the queries, of every
// sequence and every head that has one. To a plan each list is a sequence of one query.
struct Lists {
  const int32_t* keys;    // [B][queries][heads][most], ascending; null: no lists
  const int32_t* counts;  // [B][queries][heads], the keys of a list
  int64_t first_query, queries, heads, most;  // heads: 1, or K
};

struct AttendArgs {
  const void *query, *key, *value;
  // a second part of query and key, in tensors of its own (absorbed MLA: the rope key); null: none
  const void *query_tail, *key_tail;
  void* out;   // [B,H,S,V], contiguous, of `dtype`
  float* lse;  // [B,H,S], contiguous; null: not asked for
  Dtype dtype;
  int64_t batch, heads, kv_heads, queries, context, dim, tail_dim, value_dim;
  // strides in elements; the last dim of each is contiguous
  int64_t query_batch, query_head, query_row;
  int64_t key_batch, key_head, key_row;
  int64_t value_batch, value_head, value_row;
  int64_t query_tail_batch, query_tail_head, query_tail_row;
  int64_t key_tail_batch, key_tail_head, key_tail_row;
  // keys in pages of 1 << page_shift rows: row j of sequence b is in the page
  // table[b * table_row + (j >> page_shift)], and *_batch, of keys and scales, is from page to page
  const int32_t* table;  // null: every sequence has its own rows, one after the other
  int64_t table_row;
  int page_shift;
  // bits of a key's integers, 8 or 4 (two per byte, the low half first), whose strides above are
  // in bytes; 0: keys are of `dtype`
  int bits;
  Scales key_scales, value_scales, key_tail_scales;
  float scale;  // of scores, before every option
  Options options;
  const int64_t* lengths64;  // [B]; at most one of the two
  const int32_t* lengths32;
  Lists lists;  // then no option hides a key
};

// The keys that sequence b has, or list b.
inline int64_t length_of(const AttendArgs& args, int64_t b) {
  if (args.lists.keys != nullptr) return args.lists.counts[b];
  if (args.lengths64 != nullptr) return args.lengths64[b];
  return args.lengths32 != nullptr ? int64_t(args.lengths32[b]) : args.context;
}

// Query heads of a kv head, and rows.
inline int64_t group_of(const AttendArgs& args) { return args.heads / args.kv_heads; }
inline int64_t rows_of(const AttendArgs& args) {
  return group_of(args) * (args.lists.keys != nullptr ? 1 : args.queries);
}

// What a plan counts as sequences, and the kv heads of each.
inline int64_t sequences_of(const AttendArgs& args) {
  const Lists& lists = args.lists;
  return lists.keys != nullptr ? args.batch * lists.queries * lists.heads : args.batch;
}
inline int64_t heads_of_sequence(const AttendArgs& args) {
  return args.lists.keys != nullptr && args.lists.heads > 1 ? 1 : args.kv_heads;
}

// The keys start..stop that some query of a sequence may see, cut into parts of `chunk` keys, and
// those into segments of `segment`. A task takes a part, or a segment where parts are too few for
// the threads; sums are the same then, since those of segments are added up to a part's, and those
// of parts to all, in their order.
struct SequencePlan {
  int64_t length, start, stop, chunk, parts, segment;
  int64_t segments;    // of a part that are tasks of their own; 1: the part is one
  int64_t first_task;  // tasks run through kv heads, tiles of rows, parts, segments
  int64_t first_slot;  // where the partial results lie; -1 where there is one task only

  int64_t pieces() const { return parts * segments; }
};

struct Plan {
  bool tiled;                // by tiles.h, else by rowwise.h
  int64_t tile_rows, tiles;  // rows of a task, and such tiles in a kv head's rows
  int64_t tasks, slots, threads;
  int64_t run;              // tasks that a thread takes at once, one after the other
  SequencePlan* sequences;  // [sequences_of]
  int32_t* left;            // [sequences_of][heads_of_sequence][tiles]: tasks not finished yet
  float* partial;           // [slots][tile_rows]: max, sum, then the V sums of each row
  int64_t scratch_bytes;    // for each thread

  // Where a sequence begins in `left`.
  int64_t first_left(const AttendArgs& args, const SequencePlan& sequence) const {
    return (&sequence - sequences) * heads_of_sequence(args) * tiles;
  }
};

// Floats of one slot of partial results.
inline int64_t slot_floats(const AttendArgs& args, const Plan& plan) {
  return plan.tile_rows * (padded(args.value_dim) + 2);
}

// Fills what does not depend on the lengths: how rows become tasks. pairs: as in `Kernels`.
void plan_rows(const AttendArgs& args, bool pairs, Plan* plan);
// Fills the sequences of `plan` (which has room for them) for `threads` threads.
void plan_tasks(const AttendArgs& args, int64_t threads, Plan* plan);

}  // namespace headwise
