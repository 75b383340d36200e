// One call as plain pointers, and its division into tasks. No torch, no templates.
//
// Letters as in docs/design.md: B batch, H query heads, K kv heads, S queries, L keys, D head dim,
// V value dim, G = H/K. A kv head has S * G rows: row = s * G + g is query s of its g-th head.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace headwise {

enum Dtype { kFloat32, kBfloat16, kFloat16, kFloat64 };

// Of query, key and value rows.
constexpr int64_t kMostDim = 576;
// Keys that are scored at once; a block is the unit of masking and skipping.
constexpr int kBlock = 64;

// Elements of a row of 4 bits that share a scale; in 8 bits a row has one.
constexpr int kInt4Group = 32;

// Where the scales of quantised rows lie, those of a row side by side.
struct Scales {
  const float* at;
  int64_t batch, head, row;
};

struct AttendArgs {
  const void *query, *key, *value;
  // a part of query and key that is held apart (absorbed MLA: the rope key); null: none
  const void *query_tail, *key_tail;
  void* out;   // [B,H,S,V], contiguous, of `dtype`
  float* lse;  // [B,H,S], contiguous; null where nobody asked
  Dtype dtype;
  int64_t batch, heads, kv_heads, queries, context, dim, tail_dim, value_dim;
  // strides in elements; the last dim of each is contiguous
  int64_t query_batch, query_head, query_row;
  int64_t key_batch, key_head, key_row;
  int64_t value_batch, value_head, value_row;
  int64_t query_tail_batch, query_tail_head, query_tail_row;
  int64_t key_tail_batch, key_tail_head, key_tail_row;
  // keys in pages of 1 << page_shift rows: row j of sequence b is in the page
  // table[b * table_row + (j >> page_shift)], and the *_batch above are from page to page
  const int32_t* table;  // null: every sequence has its own rows, one after the other
  int64_t table_row;
  int page_shift;
  // keys as integers of so many bits, 8 or 4 (two a byte, the low half first); 0: of `dtype`.
  // Their strides above are in bytes.
  int bits;
  Scales key_scales, value_scales, key_tail_scales;
  float scale;
  float softcap;  // 0: none
  bool causal;
  int64_t window;       // 0: none
  const float* sinks;   // [H] or null
  const float* slopes;  // [H] or null
  const void* bias;     // null: none; strides of 0 where it broadcasts
  Dtype bias_dtype;
  int64_t bias_batch, bias_head, bias_row, bias_key;
  const unsigned char* mask;  // null: none; 0 hides
  int64_t mask_batch, mask_head, mask_row, mask_key;
  const int64_t* lengths64;  // [B]; at most one of the two
  const int32_t* lengths32;
};

inline int64_t group_of(const AttendArgs& args) { return args.heads / args.kv_heads; }
inline int64_t rows_of(const AttendArgs& args) { return group_of(args) * args.queries; }
inline int64_t padded(int64_t dim) { return (dim + 31) / 32 * 32; }

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
  SequencePlan* sequences;  // [B]
  int32_t* left;            // [B][K][tiles]: tasks not finished yet
  float* partial;           // [slots][tile_rows]: max, sum, then the V sums of each row
  int64_t scratch_bytes;    // for each thread
};

// Floats of one slot of partial results.
inline int64_t slot_floats(const AttendArgs& args, const Plan& plan) {
  return plan.tile_rows * (padded(args.value_dim) + 2);
}

// Products of x with one matrix a head: x W where `up`, else x W^T.
struct ProjectArgs {
  const void *x, *weight;  // [B,H,S,rows or width] and [H,rows,width]
  void* out;               // [B,H,S,width or rows]
  Dtype dtype;
  bool up;
  int64_t batch, heads, length, rows, width;
  int64_t x_batch, x_head, x_row, weight_head, weight_row, out_batch, out_head, out_row;
};

// Bytes of a thread's scratch.
inline int64_t scratch_bytes(const ProjectArgs& args) {
  const int64_t rows = args.batch * args.length;
  return 4 * rows * (padded(args.rows) + padded(args.width) + kBlock + 16) + 64 * 8;
}

// Rows to become integers with scales.
struct QuantizeArgs {
  const void* rows;  // [B,heads,S,D]
  Dtype dtype;
  int bits;
  int64_t heads, length, dim;
  int64_t row_batch, row_head, row_row;
  unsigned char* integers;  // [B,heads,S,bytes], contiguous
  float* scales;            // [B,heads,S,groups], contiguous
};

// Bytes of a thread's scratch.
inline int64_t scratch_bytes(const QuantizeArgs& args) { return 8 * padded(args.dim); }

enum Level { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// Says how rows become tasks: all of `plan` but what depends on the lengths. pairs: as in
// `Kernels`.
void plan_rows(const AttendArgs& args, bool pairs, Plan* plan);
// Fills the sequences of `plan` (which has room for B) for `threads` threads.
void plan_tasks(const AttendArgs& args, int64_t threads, Plan* plan);

// One task by the kernels of one instruction set. `scratch` is aligned to 64 bytes.
typedef void (*TaskFunction)(const AttendArgs&, const Plan&, int64_t task, char* scratch);
// The rows of one head.
typedef void (*ProjectFunction)(const ProjectArgs&, int64_t head, char* scratch);
// Some rows, of those of all sequences and heads.
typedef void (*QuantizeFunction)(const QuantizeArgs&, int64_t first, int64_t count, char* scratch);

struct Kernels {
  TaskFunction attend;
  ProjectFunction project;
  QuantizeFunction quantize;
  bool pairs;  // bf16 is multiplied as it is, in pairs
};

// The highest level that this machine and this build have.
int best_level();
// The kernels of `level`, null where the machine or the build lacks it.
Kernels kernels(int level);

}  // namespace headwise
