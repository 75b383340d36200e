// From running sums to results: one row at a time, and the merge of the pieces of a context.
#pragma once

#include "rotation.h"
#include "task.h"

namespace headwise {
namespace HEADWISE_ISA {

template <class T>
HEADWISE_INLINE void write_row(const float* values, float factor, int64_t count, T* to) {
  for (int64_t v = 0; v < count; ++v) from_float(values[v] * factor, to + v);
}

// Writes one row of the result: sums of V values over `total`, shifted by `top`; the sink joins.
// The sums may be rotated where they are.
HEADWISE_INLINE void finish_row(const AttendArgs& args, int64_t batch, int64_t head, int64_t query,
                                float* values, float top, float total) {
  // a row that has seen nothing is 0, whatever lies where it may not look
  if (total == 0.0f) __builtin_memset(values, 0, sizeof(float) * args.value_dim);
  float scale = 1.0f;
  if (args.options.sinks.data != nullptr) {
    const float sink = args.options.sinks.data[head];
    if (sink != -kInfinity) {
      const float now = sink > top ? sink : top;
      scale = top == -kInfinity ? 0.0f : __builtin_expf(top - now);
      total = rounded(total * scale) + __builtin_expf(sink - now);
      top = now;
    }
  }
  const int64_t index = (batch * args.heads + head) * args.queries + query;
  const int64_t first = index * args.value_dim;
  const float factor = total == 0.0f ? 0.0f : scale / total;
  if (args.bits == 4) rotate_row(values, args.value_dim);
  if (args.dtype == kFloat32)
    write_row(values, factor, args.value_dim, static_cast<float*>(args.out) + first);
  else if (args.dtype == kBfloat16)
    write_row(values, factor, args.value_dim, static_cast<bf16*>(args.out) + first);
  else
    write_row(values, factor, args.value_dim, static_cast<f16*>(args.out) + first);
  if (args.lse != nullptr)
    args.lse[index] = total == 0.0f ? -kInfinity : top + __builtin_logf(total);
}

// Sums of weights and of weighted values of one row, shifted by `top`. A total of 0: it has seen
// nothing (one of NaN has).
struct RowSums {
  float top, total;
};

// How one sum is added to another: by factors, or not at all, or in place of what is there.
struct Factors {
  enum { kBoth, kNothing, kCopy } how;
  float to, from;
};

// Adds `from` to `to`, of which the values' sums are to follow by `fold_values`. Every product is
// rounded on its own, so that a compiler makes the same of it in a task and in the merge.
HEADWISE_INLINE Factors fold(RowSums* to, RowSums from) {
  if (from.total == 0.0f) return {Factors::kNothing, 1.0f, 0.0f};
  if (to->total == 0.0f) {
    *to = from;
    return {Factors::kCopy, 0.0f, 1.0f};
  }
  const float now = from.top > to->top ? from.top : to->top;
  const Factors factors = {Factors::kBoth, to->top == now ? 1.0f : __builtin_expf(to->top - now),
                           from.top == now ? 1.0f : __builtin_expf(from.top - now)};
  to->total = rounded(to->total * factors.to) + rounded(from.total * factors.from);
  to->top = now;
  return factors;
}

// 16 of the values' sums.
HEADWISE_INLINE void fold_values(float* to, const float* from, Factors factors) {
  if (factors.how == Factors::kNothing) return;
  for (int i = 0; i < 16; i += W) {
    const vf fresh = load(from + i);
    store(to + i, factors.how == Factors::kCopy
                      ? fresh
                      : rounded(load(to + i) * factors.to) + rounded(fresh * factors.from));
  }
}

// The sums of the segments of a task that have ended.
struct Segments {
  float *top, *total, *sum;
  int64_t rows, width;
  bool used = false;  // whether anything is here

  HEADWISE_INLINE Segments(int64_t rows, int64_t width, Scratch* scratch)
      : rows(rows), width(width) {
    top = scratch->take<float>(rows);
    total = scratch->take<float>(rows);
    sum = scratch->take<float>(rows * width);
  }

  // Adds a segment's sums, and sets those to zero. columns(sum, row, v): where 16 of a row's lie,
  // from the v-th on.
  template <class Columns>
  void end_segment(float* own_top, float* own_total, float* own, const Columns& columns) {
    for (int64_t row = 0; row < rows; ++row) {
      RowSums all = {used ? top[row] : -kInfinity, used ? total[row] : 0.0f};
      Factors factors = fold(&all, {own_top[row], own_total[row]});
      if (!used) factors.how = Factors::kCopy;  // over memory that nothing was written to
      top[row] = all.top;
      total[row] = all.total;
      own_top[row] = -kInfinity;
      own_total[row] = 0.0f;
      for (int64_t v = 0; v < width; v += 16) {
        float* from = columns(own, row, v);
        fold_values(columns(sum, row, v), from, factors);
        for (int i = 0; i < 16; i += W) store(from + i, vf{});
      }
    }
    used = true;
  }
};

// Adds the sums of a row in the pieces first..last of a tile of rows up in `values`.
HEADWISE_INLINE RowSums fold_pieces(const float* pieces, int64_t slot, int64_t first, int64_t last,
                                    int64_t row, int64_t tile_rows, int64_t width, float* values) {
  RowSums all = {-kInfinity, 0.0f};
  for (int64_t piece = first; piece < last; ++piece) {
    const float* from = pieces + piece * slot;
    const Factors factors = fold(&all, {from[2 * row], from[2 * row + 1]});
    const float* sums = from + 2 * tile_rows + row * width;
    for (int64_t v = 0; v < width; v += 16) fold_values(values + v, sums + v, factors);
  }
  return all;
}

// Merges the pieces of a tile of rows, in their order, and writes the result. values: two rows.
inline void merge(const Task& task, const float* pieces, float* values) {
  const AttendArgs& args = *task.args;
  const Plan& plan = *task.plan;
  const SequencePlan& sequence = *task.sequence;
  const int64_t width = padded(args.value_dim), slot = slot_floats(args, plan);
  float* of_part = values + width;
  for (int64_t row = 0; row < task.rows; ++row) {
    __builtin_memset(values, 0, sizeof(float) * width);
    RowSums all = {-kInfinity, 0.0f};
    for (int64_t part = 0; part < sequence.parts; ++part) {
      const int64_t first = part * sequence.segments;
      const RowSums own = fold_pieces(pieces, slot, first, first + sequence.segments, row,
                                      plan.tile_rows, width, of_part);
      const Factors factors = fold(&all, own);
      for (int64_t v = 0; v < width; v += 16) fold_values(values + v, of_part + v, factors);
    }
    finish_row(args, task.batch, task.head(row), task.query(row), values, all.top, all.total);
  }
}

// Ends a task: `sums(row, to)` copies the V sums of a row. The last piece to end merges them all.
// row_sum: two rows.
template <class Sums>
HEADWISE_INLINE void finish(const Task& task, const float* top, const float* total,
                            const Sums& sums, float* row_sum) {
  const AttendArgs& args = *task.args;
  const Plan& plan = *task.plan;
  const SequencePlan& sequence = *task.sequence;
  const int64_t pieces = sequence.pieces();
  if (pieces == 1) {
    for (int64_t row = 0; row < task.rows; ++row) {
      sums(row, row_sum);
      finish_row(args, task.batch, task.head(row), task.query(row), row_sum, top[row], total[row]);
    }
    return;
  }
  const int64_t width = padded(args.value_dim), slot = slot_floats(args, plan);
  const int64_t own = task.left - plan.first_left(args, sequence);
  float* first = plan.partial + (sequence.first_slot + own * pieces) * slot;
  float* to = first + (task.part * sequence.segments + task.segment) * slot;
  for (int64_t row = 0; row < task.rows; ++row) {
    to[2 * row] = top[row];
    to[2 * row + 1] = total[row];
    sums(row, to + 2 * plan.tile_rows + row * width);
  }
  if (__atomic_sub_fetch(plan.left + task.left, 1, __ATOMIC_ACQ_REL) == 0)
    merge(task, first, row_sum);
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
