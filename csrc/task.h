// What one task computes: which rows, over which keys, and which of those each row may see.
#pragma once

#include "rows.h"

namespace headwise {
namespace HEADWISE_ISA {

// The keys begin..end of a task that some row may see, and those that causality, window and length
// hide from none, all_see_from..all_see_to.
struct Span {
  int64_t begin, end, all_see_from, all_see_to;
  int64_t ahead;  // where the keys end that the thread reads next: of its next task too

  // Keys of the block that starts at `block`; 0 or less after the end.
  HEADWISE_INLINE int count(int64_t block) const {
    return int(end - block < kBlock ? end - block : kBlock);
  }
  // Keys of the block that starts at `block` which will be read.
  HEADWISE_INLINE int64_t coming(int64_t block) const {
    return ahead - block < kBlock ? ahead - block : kBlock;
  }
  // Whether some key of the block is hidden from some row.
  HEADWISE_INLINE bool edge(int64_t block) const {
    return end - block < kBlock || block < all_see_from || block + kBlock > all_see_to;
  }
};

// The rows first_row.. of one kv head of one sequence, over a part of its context or a segment of
// one.
struct Task {
  const AttendArgs* args;
  const Plan* plan;
  const SequencePlan* sequence;
  int64_t batch, kv_head, tile;
  int64_t left;  // where the plan counts the pieces of this tile that are left
  int64_t first_row, first_query, rows, group;
  int64_t part, segment;  // of the part: one of its segments, or 0 for all of it
  bool continues;         // the thread takes the next keys afterwards

  HEADWISE_INLINE int64_t head(int64_t row) const {
    return kv_head * group + (first_row + row) % group;
  }
  HEADWISE_INLINE int64_t query(int64_t row) const {
    return first_query + (first_row + row) / group;
  }
  // The pages of the sequence, and the keys of a list, of which the task's are then numbers.
  Places places() const {
    const Lists& lists = args->lists;
    return {
        args->table == nullptr ? nullptr : args->table + batch * args->table_row, args->page_shift,
        lists.keys == nullptr ? nullptr : lists.keys + (sequence - plan->sequences) * lists.most};
  }
  HEADWISE_INLINE int64_t position(int64_t row) const {
    return sequence->length - args->queries + query(row);
  }
  HEADWISE_INLINE const unsigned char* mask(int64_t row, int64_t key) const {
    const Mask& mask = args->options.mask;
    return mask.data + mask.strides.offset(batch, head(row), query(row), key);
  }

  // Whether a mask lets some row see one of the keys; without a mask, always.
  bool visible(int64_t key, int count) const {
    const ScoreStrides& strides = args->options.mask.strides;
    if (args->options.mask.data == nullptr) return true;
    if (strides.head == 0 && strides.query == 0) return any(mask(0, key), count);
    // heads that share a row of the mask are looked at once; a tile may begin within them
    const bool shared = strides.head == 0;
    for (int64_t row = 0; row < rows; row += shared ? group - (first_row + row) % group : 1)
      if (any(mask(row, key), count)) return true;
    return false;
  }

  HEADWISE_INLINE bool any(const unsigned char* bytes, int count) const {
    const int64_t stride = args->options.mask.strides.key;
    unsigned some = 0;
    if (stride == 1) {
      for (int j = 0; j < count; ++j) some |= bytes[j];
    } else {
      for (int j = 0; j < count; ++j) some |= bytes[j * stride];
    }
    return some != 0;
  }

  // The keys that a row may see lie between these two, masks aside.
  HEADWISE_INLINE int64_t first_key(int64_t row) const {
    if (!args->options.causal || args->options.window <= 0) return 0;
    const int64_t from = position(row) - args->options.window + 1;
    return from > 0 ? from : 0;
  }
  HEADWISE_INLINE int64_t stop_key(int64_t row) const {
    if (!args->options.causal) return sequence->length;
    const int64_t stop = position(row) + 1;
    return stop < 0 ? 0 : stop;
  }

  // Where segments of the task's keys are counted from.
  HEADWISE_INLINE int64_t base() const {
    return sequence->start + part * sequence->chunk + segment * sequence->segment;
  }

  // Rows are in the order of their positions: the first sees least, the last most.
  HEADWISE_INLINE Span span() const {
    Span span = {base(), sequence->start + (part + 1) * sequence->chunk, first_key(rows - 1),
                 stop_key(0), 0};
    if (sequence->segments > 1 && span.end > span.begin + sequence->segment)
      span.end = span.begin + sequence->segment;
    const int64_t stop = stop_key(rows - 1) < sequence->stop ? stop_key(rows - 1) : sequence->stop;
    if (span.end > stop) span.end = stop;
    span.ahead = continues ? stop : span.end;
    const int64_t skipped = first_key(0) - span.begin;
    if (skipped > 0) span.begin += skipped / kBlock * kBlock;
    return span;
  }
};

// The task `index` of a plan.
inline Task task_of(const AttendArgs& args, const Plan& plan, int64_t index) {
  int64_t low = 0, high = sequences_of(args) - 1;
  while (low < high) {  // the last sequence whose first task is not above this one
    const int64_t middle = (low + high + 1) / 2;
    if (plan.sequences[middle].first_task <= index) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const SequencePlan& sequence = plan.sequences[low];
  const int64_t own = index - sequence.first_task, piece = own % sequence.pieces();
  const int64_t tiles = own / sequence.pieces();
  Task task;
  task.args = &args;
  task.plan = &plan;
  task.sequence = &sequence;
  task.batch = low;
  task.kv_head = tiles / plan.tiles;
  task.first_query = 0;
  task.left = low * heads_of_sequence(args) * plan.tiles + tiles;
  const Lists& lists = args.lists;
  if (lists.keys != nullptr) {
    task.batch = low / (lists.queries * lists.heads);
    task.first_query = lists.first_query + low / lists.heads % lists.queries;
    if (lists.heads > 1) task.kv_head = low % lists.heads;
  }
  // the last tile first: it sees most keys, and the threads end together
  task.tile = plan.tiles - 1 - tiles % plan.tiles;
  task.first_row = task.tile * plan.tile_rows;
  const int64_t left = rows_of(args) - task.first_row;
  task.rows = left < plan.tile_rows ? left : plan.tile_rows;
  task.group = group_of(args);
  task.part = piece / sequence.segments;
  task.segment = piece % sequence.segments;
  task.continues = piece + 1 < sequence.pieces() && (index + 1) % plan.run != 0;
  return task;
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
