// How a call is cut into tasks: (sequence, kv head, tile of rows, part of the context).

#include "attend_args.h"

namespace headwise {

namespace {

// Keys whose sums are added up apart, since a running sum of floats rounds more the longer it is:
// as few as serve many threads, or more where there are many tiles to share among them.
constexpr int64_t kSegment = 16 * kBlock, kLongSegment = 64 * kBlock;
constexpr int64_t kManyTiles = 32;
// Parts of a call, and keys that a part has at least: writing and merging what it gives takes time.
// How sums are cut depends on neither the number of threads nor on who takes which task, so that a
// result does not either.
constexpr int64_t kParts = 64;
constexpr int64_t kLeastKeys = 64 * kBlock;
// Floats that the results of segments may take; else a task is a part.
constexpr int64_t kMostPartial = int64_t(1) << 23;
// Tasks that a thread gets at least, if a context is long enough, so that the threads end together.
constexpr int64_t kTasksPerThread = 4;
// Products of pairs of numbers for which waking one more thread pays, about 10 microseconds.
constexpr int64_t kLeastWork = int64_t(1) << 19;
// Rows from which products of tiles are faster than one row after the other; where tiles need the
// keys and values widened beforehand, and where not.
constexpr int64_t kManyRows = 16, kManyRowsInPlace = 8;
// Rows of a tile at most: what its queries, scores and sums need fits the second-level cache.
constexpr int64_t kTileRows = 128;

int64_t up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// Bytes of a thread's scratch, an upper bound for every level.
int64_t scratch_bytes(const AttendArgs& args, const Plan& plan) {
  const int64_t rows = up(plan.tile_rows, 16);
  const int64_t dim = padded(args.dim) + padded(args.tail_dim), width = padded(args.value_dim);
  const int64_t of_rows = rows * (dim + 2 * width + 2 * kBlock + 24);
  const int64_t of_keys = kBlock * (dim + width + 8);
  return up(4 * (of_rows + of_keys + 2 * width), 64) + 64 * 16;
}

}  // namespace

void plan_rows(const AttendArgs& args, bool pairs, Plan* plan) {
  const int64_t rows = rows_of(args);
  const bool in_place =
      args.bits == 0 && (args.dtype == kFloat32 || (args.dtype == kBfloat16 && pairs));
  plan->tiled = args.tail_dim > 0 || rows >= (in_place ? kManyRowsInPlace : kManyRows);
  if (plan->tiled) {
    plan->tiles = (rows + kTileRows - 1) / kTileRows;
    plan->tile_rows = up((rows + plan->tiles - 1) / plan->tiles, 16);
    if (plan->tile_rows > rows) plan->tile_rows = rows;
    plan->tiles = (rows + plan->tile_rows - 1) / plan->tile_rows;
  } else {
    plan->tiles = 1;
    plan->tile_rows = rows;
  }
  plan->scratch_bytes = scratch_bytes(args, *plan);
}

void plan_tasks(const AttendArgs& args, int64_t threads, Plan* plan) {
  int64_t total = 0;
  const int64_t count = sequences_of(args), heads = heads_of_sequence(args) * plan->tiles;
  for (int64_t b = 0; b < count; ++b) {
    SequencePlan& sequence = plan->sequences[b];
    sequence.length = length_of(args, b);
    sequence.stop = sequence.length;
    sequence.start = 0;
    const Options& options = args.options;
    if (options.causal && options.window > 0) {
      // the first query sits at length - S and sees the window that ends there
      const int64_t first = sequence.length - args.queries;
      if (options.window <= first) sequence.start = first - options.window + 1;
    }
    total += heads * (sequence.stop - sequence.start);
  }
  const int64_t share = (total + kParts - 1) / kParts;
  const int64_t chunk = share > kLeastKeys ? share : kLeastKeys;
  const int64_t segment = count * heads >= kManyTiles ? kLongSegment : kSegment;
  int64_t parts = 0, segments = 0;
  for (int64_t b = 0; b < count; ++b) {
    SequencePlan& sequence = plan->sequences[b];
    const int64_t keys = sequence.stop - sequence.start;
    // a little more than a chunk is not worth another part
    int64_t own = (keys + chunk / 4) / chunk;
    if (own < 1) own = 1;
    sequence.chunk = up((keys + own - 1) / own, kBlock);
    if (sequence.chunk == 0) sequence.chunk = kBlock;
    sequence.parts = (keys + sequence.chunk - 1) / sequence.chunk;
    if (sequence.parts < 1) sequence.parts = 1;
    sequence.segment = segment;
    parts += heads * sequence.parts;
    segments += heads * sequence.parts * ((sequence.chunk + segment - 1) / segment);
  }

  // reading a key costs about as much as two rows of products
  const int64_t work = total * (args.dim + args.tail_dim + args.value_dim) * (plan->tile_rows + 2);
  if (threads > 1 + work / kLeastWork) threads = 1 + work / kLeastWork;
  const bool split = threads > 1 && parts < kTasksPerThread * threads && parts % threads != 0 &&
                     segments * slot_floats(args, *plan) <= kMostPartial;
  int64_t most = 1;
  plan->tasks = 0;
  plan->slots = 0;
  for (int64_t b = 0; b < count; ++b) {
    SequencePlan& sequence = plan->sequences[b];
    sequence.segments = split ? (sequence.chunk + segment - 1) / segment : 1;
    const int64_t pieces = sequence.pieces();
    if (pieces > most) most = pieces;
    sequence.first_task = plan->tasks;
    sequence.first_slot = pieces > 1 ? plan->slots : -1;
    plan->tasks += heads * pieces;
    if (pieces > 1) plan->slots += heads * pieces;
    for (int64_t i = 0; i < heads; ++i) plan->left[b * heads + i] = int32_t(pieces);
  }
  // neighbouring keys one after the other, which are asked for ahead; tiles are not alike
  plan->run = plan->tasks / (threads * kTasksPerThread);
  if (plan->run > most) plan->run = most;
  if (plan->run < 1) plan->run = 1;
  const int64_t runs = (plan->tasks + plan->run - 1) / plan->run;
  plan->threads = threads < runs ? threads : runs;
}

}  // namespace headwise
