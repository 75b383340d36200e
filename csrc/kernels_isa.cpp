// The kernels, compiled once for each instruction set: HEADWISE_ISA is its namespace.

#ifndef HEADWISE_ISA
#error "define HEADWISE_ISA as the name of the instruction set"
#endif

#include "convolution.h"
#include "decoder_layer.h"
#include "index_scores.h"
#include "largest.h"
#include "linear_attention.h"
#include "packed_rows.h"
#include "project.h"
#include "quantize.h"
#include "rest.h"
#include "rowwise.h"
#include "sketch.h"
#include "tiles.h"
#include "top_keys.h"

namespace headwise {
namespace HEADWISE_ISA {

namespace {

// The kernel that takes a task, for the layout of its keys and values.
struct Body {
  const Task& task;
  char* scratch;

  template <class Rows>
  HEADWISE_INLINE void run(const Rows& keys, const Rows& tails, const Rows& values) const {
    if (!task.plan->tiled) {
      attend_rowwise(task, keys, values, scratch);
      return;
    }
#if defined(HEADWISE_PAIRS)
    if constexpr (Same<typename Rows::Element, bf16>::value) {
      attend_tiles<PairEngine>(task, keys, tails, values, scratch);
      return;
    }
#endif
    attend_tiles<FloatEngine>(task, keys, tails, values, scratch);
  }
};

// Where the rows of a task's kv head begin, `batch` apart from sequence to sequence where they are
// not in pages.
HEADWISE_INLINE int64_t first_of(const Task& task, int64_t batch, int64_t head) {
  return (task.args->table == nullptr ? task.batch * batch : 0) + task.kv_head * head;
}

template <class T>
void over_strided(const Body& body) {
  const AttendArgs& args = *body.task.args;
  const Places places = body.task.places();
  const auto rows = [&](const void* base, int64_t batch, int64_t head, int64_t row) {
    return StridedRows<T>{static_cast<const T*>(base) + first_of(body.task, batch, head), row,
                          batch, places};
  };
  body.run(rows(args.key, args.key_batch, args.key_head, args.key_row),
           rows(args.key_tail, args.key_tail_batch, args.key_tail_head, args.key_tail_row),
           rows(args.value, args.value_batch, args.value_head, args.value_row));
}

template <int BITS, int GROUP>
void over_quantized(const Body& body) {
  const AttendArgs& args = *body.task.args;
  const Places places = body.task.places();
  const auto rows = [&](const void* base, int64_t batch, int64_t head, int64_t row, Scales scales) {
    scales.data += first_of(body.task, scales.batch, scales.head);
    return QuantizedRows<BITS, GROUP>{
        static_cast<const unsigned char*>(base) + first_of(body.task, batch, head), row, batch,
        scales, places};
  };
  body.run(rows(args.key, args.key_batch, args.key_head, args.key_row, args.key_scales),
           rows(args.key_tail, args.key_tail_batch, args.key_tail_head, args.key_tail_row,
                args.key_tail_scales),
           rows(args.value, args.value_batch, args.value_head, args.value_row, args.value_scales));
}

void attend_task(const AttendArgs& args, const Plan& plan, int64_t index, char* scratch) {
  const Task task = task_of(args, plan, index);
  const Body body = {task, scratch};
  if (args.bits == 8) {
    over_quantized<8, 0>(body);
  } else if (args.bits == 4) {
    over_quantized<4, kInt4Group>(body);
  } else if (args.dtype == kBfloat16) {
    over_strided<bf16>(body);
  } else if (args.dtype == kFloat16) {
    over_strided<f16>(body);
  } else {
    over_strided<float>(body);
  }
}

// Calls what(T{}) with the type of a dtype.
template <class What>
void with_type(Dtype dtype, const What& what) {
  if (dtype == kBfloat16)
    what(bf16{});
  else if (dtype == kFloat16)
    what(f16{});
  else
    what(float{});
}

void project_head(const ProjectArgs& args, int64_t head, char* scratch) {
  with_type(args.dtype, [&](auto type) { project<decltype(type)>(args, head, scratch); });
}

void take(const LinearArgs& args, int64_t first, int64_t count, void* taken, char* scratch) {
  with_type(args.dtype,
            [&](auto type) { take_rows<decltype(type)>(args, first, count, taken, scratch); });
}

void linear_outputs(const LinearArgs& args, const LinearWeight& weight, int64_t first,
                    int64_t count, const void* taken, char* scratch) {
  with_type(args.dtype,
            [&](auto type) { linear<decltype(type)>(args, weight, first, count, taken, scratch); });
}

void join(const JoinArgs& args, char* scratch) {
  with_type(args.dtype, [&](auto type) { join_rows<decltype(type)>(args, scratch); });
}

void heads_of_layer(const HeadsArgs& args, const LinearWeight& weight, int64_t base, int64_t first,
                    int64_t count, const void* taken, char* scratch) {
  with_type(args.x.dtype, [&](auto type) {
    heads<decltype(type)>(args, weight, base, first, count, taken, scratch);
  });
}

void place_products(const HeadsArgs& args, const LinearWeight& weight, int64_t base,
                    float* products) {
  with_type(args.x.dtype, [&](auto type) { place<decltype(type)>(args, weight, base, products); });
}

void gated_outputs(const GatedArgs& args, int64_t first, int64_t count, const void* taken,
                   char* scratch) {
  with_type(args.x.dtype,
            [&](auto type) { gated<decltype(type)>(args, first, count, taken, scratch); });
}

void unpack_rows(const UnpackArgs& args, int64_t first, int64_t count) {
  const int64_t width = args.matrix.blocks * args.matrix.sizes.columns;
  with_type(args.dtype, [&](auto type) {
    auto* out = static_cast<decltype(type)*>(args.out);
    for (int64_t i = first; i < first + count; ++i)
      unpack_row(args.matrix, args.rows == nullptr ? i : args.rows[i], out + i * width);
  });
}

void index_query(const IndexArgs& args, int64_t batch, int64_t query, int64_t first, int64_t stop,
                 float* out, char* scratch) {
#if defined(HEADWISE_PAIRS)
  if (args.dtype == kBfloat16) {
    index_scores<PairEngine, bf16>(args, batch, query, first, stop, out, scratch);
    return;
  }
#endif
  with_type(args.dtype, [&](auto type) {
    index_scores<FloatEngine, decltype(type)>(args, batch, query, first, stop, out, scratch);
  });
}

// Rows from which tiles are faster: where they read the keys in place, and where not.
constexpr int64_t kTiledInPlace = 8, kTiled = 16;

int64_t top_keys(const TopArgs& args, const TopPart& part, int64_t first, int64_t stop,
                 char* scratch) {
#if defined(HEADWISE_PAIRS)
  if (args.dtype == kBfloat16 && part.rows >= kTiledInPlace)
    return top_by_tiles<PairEngine, bf16>(args, part, first, stop, scratch);
#endif
  int64_t at = first;
  with_type(args.dtype, [&](auto type) {
    typedef decltype(type) T;
    if (part.rows < (Same<T, float>::value ? kTiledInPlace : kTiled))
      at = top_by_rows<T>(args, part, first, stop, scratch);
    else
      at = top_by_tiles<FloatEngine, T>(args, part, first, stop, scratch);
  });
  return at;
}

void change_state(const StateArgs& args, int64_t task, char* scratch) {
  with_type(args.dtype, [&](auto type) { linear_attention<decltype(type)>(args, task, scratch); });
}

void convolve(const ConvolutionArgs& args, int64_t task, char* scratch) {
  with_type(args.dtype, [&](auto type) { convolution<decltype(type)>(args, task, scratch); });
}

void blend_rest(const RestArgs& args, int64_t batch, int64_t head, char* scratch) {
  with_type(args.dtype, [&](auto type) { add_rest<decltype(type)>(args, batch, head, scratch); });
}

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {attend_task,
                          project_head,
                          take,
                          linear_outputs,
                          join,
                          heads_of_layer,
                          place_products,
                          gated_outputs,
                          quantize_rows,
                          unpack_rows,
                          index_query,
                          top_keys,
                          take_sketch_queries,
                          sketch_scores,
                          sketch_weights,
                          blend_rest,
                          end_of_largest,
                          group_maxima,
                          at_least,
                          change_state,
                          convolve,
                          kHasPairs};

}  // namespace HEADWISE_ISA
}  // namespace headwise
