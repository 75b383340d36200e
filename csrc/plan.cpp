// How a call is cut into tasks: (sequence, kv head, part of the context).

#include "decode_args.h"

namespace headwise {

namespace {

// Tasks a thread gets, so that the threads end together, and keys that a part has at least.
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kLeastKeys = 256;

int64_t up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

}  // namespace

int64_t scratch_bytes(const DecodeArgs& args) {
  const int64_t rows = rows_of(args);
  const int64_t floats = rows * (padded(args.dim) + padded(args.value_dim) + 2 * kBlock + 4) +
                         kBlock * (padded(args.dim) + padded(args.value_dim) + 8);
  return up(4 * floats, 64) + 64 * 16;
}

void make_plan(const DecodeArgs& args, int64_t threads, Plan* plan) {
  int64_t total = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    SequencePlan& sequence = plan->sequences[b];
    sequence.length = args.lengths64   ? args.lengths64[b]
                      : args.lengths32 ? int64_t(args.lengths32[b])
                                       : args.context;
    sequence.stop = sequence.length;
    sequence.start = 0;
    if (args.causal && args.window > 0) {
      // the first query sits at length - S and sees the window that ends there
      const int64_t first = sequence.length - args.queries;
      if (args.window <= first) sequence.start = first - args.window + 1;
    }
    total += args.kv_heads * (sequence.stop - sequence.start);
  }
  const int64_t share = (total + threads * kTasksPerThread - 1) / (threads * kTasksPerThread);
  const int64_t chunk = share > kLeastKeys ? share : kLeastKeys;
  plan->tasks = 0;
  plan->slots = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    SequencePlan& sequence = plan->sequences[b];
    const int64_t keys = sequence.stop - sequence.start;
    // a little more than a chunk is not worth another part
    int64_t parts = (keys + chunk / 4) / chunk;
    if (parts < 1) parts = 1;
    sequence.chunk = up((keys + parts - 1) / parts, kBlock);
    if (sequence.chunk == 0) sequence.chunk = kBlock;
    sequence.parts = (keys + sequence.chunk - 1) / sequence.chunk;
    if (sequence.parts < 1) sequence.parts = 1;
    sequence.first_task = plan->tasks;
    sequence.first_slot = sequence.parts > 1 ? plan->slots : -1;
    plan->tasks += args.kv_heads * sequence.parts;
    if (sequence.parts > 1) plan->slots += args.kv_heads * sequence.parts;
    for (int64_t k = 0; k < args.kv_heads; ++k)
      plan->left[b * args.kv_heads + k] = int32_t(sequence.parts);
  }
  plan->threads = threads < plan->tasks ? threads : plan->tasks;
  plan->scratch_bytes = scratch_bytes(args);
}

}  // namespace headwise
