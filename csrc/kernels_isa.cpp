// The kernels, compiled once for each instruction set: HEADWISE_ISA is its namespace.

#ifndef HEADWISE_ISA
#error "define HEADWISE_ISA as the name of the instruction set"
#endif

#include "project.h"
#include "rowwise.h"
#include "tiles.h"

namespace headwise {
namespace HEADWISE_ISA {

namespace {

template <class T>
StridedRows<T> rows_at(const void* base, int64_t batch, int64_t batch_stride, int64_t head,
                       int64_t head_stride, int64_t row_stride) {
  return {static_cast<const T*>(base) + batch * batch_stride + head * head_stride, row_stride};
}

template <class T>
void strided_task(const AttendArgs& args, const Extras& at, const Plan& plan, int64_t tile,
                  int64_t part, char* scratch) {
  const StridedRows<T> keys = rows_at<T>(args.key, at.batch, args.key_batch, at.kv_head,
                                         args.key_head, args.key_row);
  const StridedRows<T> values = rows_at<T>(args.value, at.batch, args.value_batch, at.kv_head,
                                           args.value_head, args.value_row);
  if (!plan.tiled) {
    attend_rowwise<T>(at, plan, keys, values, part, scratch);
    return;
  }
  StridedRows<T> tails = keys;
  if (args.tail_dim > 0)
    tails = rows_at<T>(args.key_tail, at.batch, args.key_tail_batch, at.kv_head,
                       args.key_tail_head, args.key_tail_row);
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  if constexpr (Same<T, bf16>::value) {
    attend_tiles<PairEngine, T>(at, plan, keys, tails, values, tile, part, scratch);
    return;
  }
#endif
  attend_tiles<FloatEngine, T>(at, plan, keys, tails, values, tile, part, scratch);
}

}  // namespace

// Runs one task of `plan`.
void attend_task(const AttendArgs& args, const Plan& plan, int64_t index, char* scratch) {
  int64_t low = 0, high = args.batch - 1;
  while (low < high) {  // the last sequence whose first task is not above this one
    const int64_t middle = (low + high + 1) / 2;
    if (plan.sequences[middle].first_task <= index) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const SequencePlan& sequence = plan.sequences[low];
  const int64_t own = index - sequence.first_task, part = own % sequence.parts;
  const int64_t tiled = own / sequence.parts;
  // the last tile first: it sees most keys, and the threads end together
  const int64_t tile = plan.tiles - 1 - tiled % plan.tiles, first = tile * plan.tile_rows;
  const int64_t left = rows_of(args) - first;
  const Extras at = {&args, &sequence, low, tiled / plan.tiles, first,
                     left < plan.tile_rows ? left : plan.tile_rows, group_of(args)};
  if (args.dtype == kBfloat16) {
    strided_task<bf16>(args, at, plan, tile, part, scratch);
  } else if (args.dtype == kFloat16) {
    strided_task<f16>(args, at, plan, tile, part, scratch);
  } else {
    strided_task<float>(args, at, plan, tile, part, scratch);
  }
}

void project_task(const ProjectArgs& args, int64_t head, char* scratch) {
  if (args.dtype == kBfloat16) {
    project<bf16>(args, head, scratch);
  } else if (args.dtype == kFloat16) {
    project<f16>(args, head, scratch);
  } else {
    project<float>(args, head, scratch);
  }
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
