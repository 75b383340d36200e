// From running sums to results: one row at a time, and the merge of the parts of a context.
#pragma once

#include "extras.h"

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
  float scale = 1.0f;
  if (args.sinks != nullptr) {
    const float sink = args.sinks[head];
    if (sink != -kInfinity) {
      const float now = sink > top ? sink : top;
      scale = top == -kInfinity ? 0.0f : __builtin_expf(top - now);
      total = total * scale + __builtin_expf(sink - now);
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

// Blocks whose sums are added up apart, before they join the sums of all: a running sum of floats
// rounds more the longer it is.
constexpr int kSumBlocks = 8;

// The outer of two levels of sums of a task: what earlier runs of blocks gave.
struct Outer {
  float *top, *total, *sum;
  int64_t rows, width;
  int held = 0;       // blocks in the inner sums
  bool used = false;  // whether anything is here

  HEADWISE_INLINE Outer(int64_t rows, int64_t width, Scratch* scratch) : rows(rows), width(width) {
    top = scratch->take<float>(rows);
    total = scratch->take<float>(rows);
    sum = scratch->take<float>(rows * width);
  }

  // Takes the inner sums over, which are zero then: sums of `rows` rows over `inner_total`,
  // shifted by `inner_top`. columns(sum, row, v) says where 16 of a row lie, from the v-th on.
  template <class Columns>
  void take(const float* inner_top, float* inner_total, float* inner, const Columns& columns) {
    for (int64_t row = 0; row < rows; ++row) {
      float factor = 0.0f;
      if (used) factor = top[row] == inner_top[row] ? 1.0f : __builtin_expf(top[row] - inner_top[row]);
      total[row] = inner_total[row] + (used ? total[row] * factor : 0.0f);
      top[row] = inner_top[row];
      inner_total[row] = 0.0f;
      for (int64_t v = 0; v < width; v += 16) {
        float *to = columns(sum, row, v), *from = columns(inner, row, v);
        for (int i = 0; i < 16; i += W) {
          const vf fresh = load(from + i);
          store(to + i, used ? load(to + i) * factor + fresh : fresh);
          store(from + i, vf{});
        }
      }
    }
    used = true;
    held = 0;
  }
};

// Merges the parts of a tile of rows, in their order, and writes the result.
inline void merge(const Extras& at, const Plan& plan, const float* first, float* values) {
  const AttendArgs& args = *at.args;
  const int64_t width = padded(args.value_dim), slot = slot_floats(args, plan);
  for (int64_t row = 0; row < at.rows; ++row) {
    float top = -kInfinity, total = 0.0f;
    for (int64_t part = 0; part < at.sequence->parts; ++part) {
      const float other = first[part * slot + 2 * row];
      top = other > top ? other : top;
    }
    for (int64_t v = 0; v < width; ++v) values[v] = 0.0f;
    for (int64_t part = 0; part < at.sequence->parts; ++part) {
      const float* from = first + part * slot;
      // a part that shows nothing to the row; not one whose scores are NaN, which are no maximum
      if (from[2 * row + 1] == 0.0f) continue;
      const float factor = from[2 * row] == top ? 1.0f : __builtin_expf(from[2 * row] - top);
      total += factor * from[2 * row + 1];
      const float* given = from + 2 * plan.tile_rows + row * width;
      for (int64_t v = 0; v < width; v += W)
        store(values + v, load(values + v) + factor * load(given + v));
    }
    finish_row(args, at.batch, at.head(row), at.query(row), values, top, total);
  }
}

// Ends a task: `sums(row, to)` copies the V sums of a row. The last part to end merges them all.
template <class Sums>
HEADWISE_INLINE void finish(const Extras& at, const Plan& plan, int64_t tile, int64_t part,
                            const float* top, const float* total, const Sums& sums,
                            float* row_sum) {
  const AttendArgs& args = *at.args;
  const SequencePlan& sequence = *at.sequence;
  if (sequence.parts == 1) {
    for (int64_t row = 0; row < at.rows; ++row) {
      sums(row, row_sum);
      finish_row(args, at.batch, at.head(row), at.query(row), row_sum, top[row], total[row]);
    }
    return;
  }
  const int64_t width = padded(args.value_dim), slot = slot_floats(args, plan);
  const int64_t own = at.kv_head * plan.tiles + tile;
  float* first = plan.partial + (sequence.first_slot + own * sequence.parts) * slot;
  float* to = first + part * slot;
  for (int64_t row = 0; row < at.rows; ++row) {
    to[2 * row] = top[row];
    to[2 * row + 1] = total[row];
    sums(row, to + 2 * plan.tile_rows + row * width);
  }
  int32_t* left = plan.left + at.batch * args.kv_heads * plan.tiles + own;
  if (__atomic_sub_fetch(left, 1, __ATOMIC_ACQ_REL) == 0) merge(at, plan, first, row_sum);
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
