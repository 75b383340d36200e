// The kernels, compiled once for each instruction set: HEADWISE_ISA is its namespace.

#ifndef HEADWISE_ISA
#error "define HEADWISE_ISA as the name of the instruction set"
#endif

#include "project.h"
#include "quantize.h"
#include "rowwise.h"
#include "tiles.h"

namespace headwise {
namespace HEADWISE_ISA {

namespace {

// What one task is given beside the arguments.
struct Task {
  const AttendArgs& args;
  const Extras& at;
  const Plan& plan;
  int64_t tile;
  char* scratch;

  template <class Rows>
  HEADWISE_INLINE void run(const Rows& keys, const Rows& tails, const Rows& values) const {
    if (!plan.tiled) {
      attend_rowwise(at, plan, keys, values, scratch);
      return;
    }
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    if constexpr (Same<typename Rows::Element, bf16>::value) {
      attend_tiles<PairEngine>(at, plan, keys, tails, values, tile, scratch);
      return;
    }
#endif
    attend_tiles<FloatEngine>(at, plan, keys, tails, values, tile, scratch);
  }
};

template <class T>
void strided_task(const Task& task) {
  const AttendArgs& args = task.args;
  const int64_t batch = task.at.batch, head = task.at.kv_head;
  const int32_t* table = args.table == nullptr ? nullptr : args.table + batch * args.table_row;
  const auto rows = [&](const void* base, int64_t each, int64_t per_head, int64_t row) {
    const int64_t first = (table == nullptr ? batch * each : 0) + head * per_head;
    return StridedRows<T>{static_cast<const T*>(base) + first, row, table, each, args.page_shift};
  };
  task.run(rows(args.key, args.key_batch, args.key_head, args.key_row),
           rows(args.key_tail, args.key_tail_batch, args.key_tail_head, args.key_tail_row),
           rows(args.value, args.value_batch, args.value_head, args.value_row));
}

template <int BITS, int GROUP>
void quantized_task(const Task& task) {
  const AttendArgs& args = task.args;
  const int64_t batch = task.at.batch, head = task.at.kv_head;
  const auto rows = [&](const void* base, int64_t each, int64_t per_head, int64_t row,
                        const Scales& scales) {
    return QuantizedRows<BITS, GROUP>{
        static_cast<const unsigned char*>(base) + batch * each + head * per_head, row,
        scales.at + batch * scales.batch + head * scales.head, scales.row};
  };
  task.run(rows(args.key, args.key_batch, args.key_head, args.key_row, args.key_scales),
           rows(args.key_tail, args.key_tail_batch, args.key_tail_head, args.key_tail_row,
                args.key_tail_scales),
           rows(args.value, args.value_batch, args.value_head, args.value_row, args.value_scales));
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
  const int64_t own = index - sequence.first_task, piece = own % sequence.pieces();
  const int64_t tiled = own / sequence.pieces();
  // the last tile first: it sees most keys, and the threads end together
  const int64_t tile = plan.tiles - 1 - tiled % plan.tiles, first = tile * plan.tile_rows;
  const int64_t left = rows_of(args) - first;
  const Extras at = {&args,
                     &sequence,
                     low,
                     tiled / plan.tiles,
                     first,
                     left < plan.tile_rows ? left : plan.tile_rows,
                     group_of(args),
                     piece / sequence.segments,
                     piece % sequence.segments,
                     piece + 1 < sequence.pieces() && (index + 1) % plan.run != 0};
  const Task task = {args, at, plan, tile, scratch};
  if (args.bits == 8) {
    quantized_task<8, 0>(task);
  } else if (args.bits == 4) {
    quantized_task<4, kInt4Group>(task);
  } else if (args.dtype == kBfloat16) {
    strided_task<bf16>(task);
  } else if (args.dtype == kFloat16) {
    strided_task<f16>(task);
  } else {
    strided_task<float>(task);
  }
}

void quantize_task(const QuantizeArgs& args, int64_t first, int64_t count, char* scratch) {
  quantize_rows(args, first, count, scratch);
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
