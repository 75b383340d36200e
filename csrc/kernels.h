// What the kernels of one instruction set compute: an operator's arguments as plain pointers, and
// its function. No torch.
#pragma once

#include "attend_args.h"
#include "packed_formats.h"

namespace headwise {

// Products of x with one matrix per head: x W where `up`, else x W^T.
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

// A matrix that is multiplied with rows x: out = x W^T + bias.
struct LinearWeight {
  const void* data;  // W [rows,width]
  const void* bias;  // [rows], contiguous; null: none
  void* out;         // [rows of x,rows], contiguous
  int64_t rows;
  bool transposed;      // W's columns are contiguous, not its rows
  int64_t stride;       // from row to row, or from column to column
  bool wide;            // out is float32, whatever the dtype
  PackedMatrix packed;  // W instead of `data`, where it has data of its own
  int64_t begin;        // the first of W's rows there

  bool is_packed() const { return packed.data != nullptr; }
};

// Weights that are multiplied with the same rows.
struct LinearArgs {
  const void* x;  // [rows,width]
  Dtype dtype;    // of all
  int64_t rows, width, x_row;
  bool packed;  // the weights are: the products read x rounded to integers
};

// Bytes from row to row of x rounded to integers: these, and for each 32 columns two floats and two
// integers of 32 bits.
inline int64_t packed_pitch(int64_t width) { return (width + width / 2 + 63) / 64 * 64; }
// Bytes of x as the products read it.
inline int64_t taken_bytes(const LinearArgs& args) {
  return args.rows * (args.packed ? packed_pitch(args.width) : 4 * padded(args.width));
}
// Rows of x from which on a group of a packed matrix is first read into scratch, as bytes with
// their scales: 640 for each 32 columns.
constexpr int64_t kManyRows = 8;
// Bytes of a thread's scratch while it reads x.
inline int64_t take_bytes(const LinearArgs& args) { return 4 * padded(args.width) + 64; }
// Rows of x in bf16 from which on tile registers multiply, where there are any.
constexpr int64_t kTileRows = 5;
// Bytes of a thread's scratch for up to `outputs` at once.
inline int64_t scratch_bytes(const LinearArgs& args, int64_t outputs) {
  if (args.packed)
    return 4 * args.rows * kBlock + (args.rows < kManyRows ? 0 : 20 * args.width) + 128;
  const bool tiles = args.dtype == kBfloat16 && args.rows >= kTileRows;
  const int64_t of_tiles = tiles ? 32 * padded(args.width) + 8 * 16 * (kBlock + 16) + 192 : 0;
  return 4 * args.rows * (padded(outputs) + 2 * kBlock) + 64 * 8 + of_tiles;
}

// How a row is normalised: by its root mean square, times the weight or 1 + the weight; or to mean
// 0 and variance 1, times the weight, plus the bias. The first rounds before it multiplies; the
// last is the first without that.
enum NormKind { kNoNorm, kRmsNorm, kRmsNormPlusOne, kLayerNorm, kRmsNormWide };
struct Norm {
  NormKind kind;
  const void *weight, *bias;  // null: none
  float eps;
};

enum Activation { kSilu, kGelu, kGeluTanh, kRelu, kReluSquared };

// Rows of a residual stream: sum = x + scale * norm(added), and what the next products read of it.
struct JoinArgs {
  Dtype dtype;
  int64_t rows, width;
  const void* x;       // [rows,width]
  const float* wide;   // the same in floats, padded; null: x
  const float* added;  // [rows,width] in floats; null: none
  Norm added_norm;
  float scale;
  float* sum;  // [rows,width] in floats, padded
  void* out;   // [rows,width], of the sum; null: not asked for
  Norm next;
  bool next_of_x;  // the next norm is of x, not of the sum
  void* taken;     // the normalised rows as the products read them; null: not asked for
  bool packed;     // the weights of those are
  void* normed;    // the same as they are, [rows,width]; null: not asked for
};

// Which dims are rotated together: the halves, or neighbours; and how a row of angles has one for
// each pair: those of the pairs once, twice in turn, or each twice side by side.
enum Rotation { kHalves, kNeighbours, kNeighboursTwice, kHalvesOnce };

// The queries, keys and values of a layer: products, their norms, and rotary position embedding.
struct HeadsArgs {
  LinearArgs x;
  int64_t length, heads, kv_heads, dim;  // of each of B sequences; heads of queries, and of keys
  Norm query_norm, key_norm;             // over the dims of a head, or of all heads
  bool whole;                            // the latter
  const void *cos, *sin;                 // [B or 1,S,rope_row]; null: no rotation
  Dtype rope_dtype;
  int64_t rope_dim;              // dims that are rotated
  int64_t rope_row, rope_batch;  // elements from position to position, and sequence to sequence
  Rotation rotation;
  void* query;        // [B,H,S,dim], contiguous
  void *key, *value;  // [B,K,S,dim]
  int64_t key_batch, key_head, key_row, value_batch, value_head, value_row;
};

// act(x G^T) * (x U^T), or act(x U^T) without a gate.
struct GatedArgs {
  LinearArgs x;
  const LinearWeight *gate, *up;  // gate null: none
  Activation activation;
  LinearArgs middle;  // what the next products are given
  void* taken;        // the same as they read it
};

// Rows of a packed matrix to become numbers.
struct UnpackArgs {
  PackedMatrix matrix;
  const int64_t* rows;  // null: all
  Dtype dtype;
  void* out;  // [rows,width], contiguous
};

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

// Scores of an indexer, whose heads share the keys.
struct IndexArgs {
  const void *query, *key;  // [B,S,I,E] and [B,L,E], the last dim of each contiguous
  const float* weight;      // [B,S,I], the last dim contiguous
  Dtype dtype;              // of queries and keys
  int64_t batch, queries, context, heads, dim;
  int64_t query_batch, query_row, query_head, key_batch, key_row, weight_batch, weight_row;
};

// Bytes of a thread's scratch.
inline int64_t scratch_bytes(const IndexArgs& args) {
  const int64_t rows = (args.heads + 15) / 16 * 16, dim = padded(args.dim);
  return 4 * (rows * (1 + dim + kBlock) + kBlock * dim) + 64 * 4;
}

// Some rows of a kv head, and the list of each: the keys above its threshold. Row g * S + s is
// query s of the g-th head.
struct TopPart {
  int64_t batch, head, row, rows;  // rows from `row` on
  int64_t room;                    // of a list
  float* scores;                   // [rows][room]
  int32_t* places;
  int32_t* counts;    // [rows]
  float* thresholds;  // [rows], filled up to a whole vector
};
// The keys with the largest scores q . k, for each row of a kv head.
struct TopArgs {
  const void *query, *key;  // [B,H,S,D] and [B,K,L,D], the last dim of each contiguous
  Dtype dtype;              // of both
  int64_t batch, heads, kv_heads, queries, context, dim;
  int64_t query_batch, query_head, query_row, key_batch, key_head, key_row;
  Mask mask;  // [B,L]: the same for all heads and queries

  int64_t rows() const { return heads / kv_heads * queries; }
  int64_t keys_of(const TopPart& part) const {
    return part.batch * key_batch + part.head * key_head;
  }
  int64_t query_of(const TopPart& part, int64_t row) const {
    const int64_t own = part.row + row, head = part.head * (heads / kv_heads) + own / queries;
    return part.batch * query_batch + head * query_head + own % queries * query_row;
  }
  bool seen(const TopPart& part, int64_t key) const {
    return mask.data == nullptr || mask.data[mask.strides.offset(part.batch, 0, 0, key)] != 0;
  }
};
// Rows of a part at most.
constexpr int64_t kTopRows = 128;
// Bytes of a thread's scratch for so many rows.
inline int64_t scratch_bytes(const TopArgs& args, int64_t rows) {
  const int64_t all = (rows + 15) / 16 * 16, dim = padded(args.dim);
  return 4 * (all * (dim + kBlock) + kBlock * dim) + 64 * 4;
}

// Keys that a query finds by a sketch of them: in 4 bits, as rounded rows are.
constexpr int64_t kSketchRange = 1024;  // keys that a task scores
struct SketchArgs {
  const void* query;  // [B,H,S,D], the last dim contiguous
  Dtype dtype;
  int64_t batch, heads, kv_heads, queries, context, dim;
  int64_t query_batch, query_head, query_row;
  const unsigned char* keys;  // [B,K,L,D/2], or in pages, as in AttendArgs; strides in bytes
  int64_t key_batch, key_head, key_row;
  Scales scales;
  const int32_t* table;  // null: no pages
  int64_t table_row;
  int page_shift;
  float scale, softcap;    // softcap of 0: none
  const float* sinks;      // [H]; null: none
  Mask mask;               // the same for all heads
  const int64_t* lengths;  // [B]; null: all keys
  bool causal;

  int64_t group() const { return heads / kv_heads; }
  int64_t words() const { return (dim + 7) / 8; }
  int64_t groups() const { return (dim + kInt4Group - 1) / kInt4Group; }
  int64_t ranges() const { return (context + kSketchRange - 1) / kSketchRange; }
  int64_t pitch() const { return (context + 15) / 16 * 16; }
  // The keys of a sequence.
  int64_t held(int64_t b) const { return lengths == nullptr ? context : lengths[b]; }
  // Where the keys end that a query may see.
  int64_t stop(int64_t b, int64_t query) const {
    const int64_t length = held(b);
    const int64_t stop = causal ? length - queries + query + 1 : length;
    return stop > 0 ? stop : 0;
  }
};
// Some queries of a kv head. A row is a query of a head of its group: row = query * G + head.
struct SketchPart {
  int64_t batch, head, query, queries;  // queries from `query` on
  char* taken;                          // of taken_bytes: the queries as the products read them
  float* weights;                       // [rows][pitch]
  float *maxima, *sums;                 // [rows][ranges]

  int64_t rows(const SketchArgs& args) const { return queries * args.group(); }
};
// The softmax weights of a query of a kv head.
struct SketchWeights {
  float* sum;     // [pitch]: of all heads of the group
  float* factor;  // [G][ranges]: by which a part's weights are a head's
  float* mass;    // [G]: what all keys weigh; the rest is that of a learned sink
};
// Bytes of so many queries of a kv head as the products read them.
inline int64_t taken_bytes(const SketchArgs& args, int64_t queries) {
  return 4 * queries * args.group() * (2 * args.words() + args.groups() + 1);
}
// Bytes of a thread's scratch.
inline int64_t scratch_bytes(const SketchArgs& args) {
  return 4 * 16 * (args.words() + args.groups() + 32) + 64 * 4;
}

// The rest of attention to chosen keys: rest.h.
struct RestArgs {
  void* out;           // [B,H,S,D], contiguous
  const float* rest;   // [B,H,S]: the part of the softmax that was not chosen
  const float* sums;   // [B,K,D]: of the values of the first `summed` tokens
  const void* values;  // [B,K,L,D], or in pages as in AttendArgs
  Dtype dtype;         // of out and values
  int64_t batch, heads, kv_heads, queries, context, dim, summed;
  int64_t value_batch, value_head, value_row;
  const int32_t* table;
  int64_t table_row;
  int page_shift;
};
inline int64_t scratch_bytes(const RestArgs& args) { return 4 * args.dim + 64; }

// Linear attention, token by token: S = exp(decay) S + k u^T, out = scale q S.
struct StateArgs {
  const void *query, *key, *value;  // [B,K,S,D] twice and [B,H,S,V], the last dims contiguous
  const float* decay;               // [B,H,S,D], logarithms; decay_dim of 0: one for all dims
  const float* beta;                // [B,H,S]; null: u is v
  const float* state;               // [B,H,D,V], contiguous; null: zeros
  float* after;                     // [B,H,D,V], contiguous; may be `state`
  void* out;                        // [B,S,H,V], contiguous
  const int64_t* lengths;           // [B]; null: all tokens
  Dtype dtype;
  float scale;
  float norm;       // 0 or more: queries and keys are divided by their lengths, this added inside
  bool transposed;  // the states are [B,H,V,D]
  int64_t batch, heads, kv_heads, tokens, dim, value_dim;
  int64_t query_batch, query_head, query_row, key_batch, key_head, key_row;
  int64_t value_batch, value_head, value_row;
  int64_t decay_batch, decay_head, decay_row, decay_dim, beta_batch, beta_head, beta_row;

  // Whether a task is a head, whose state goes through once; else it is columns of one.
  bool streamed() const { return tokens == 1 && state != nullptr && lengths == nullptr; }
  // Parts of kColumns columns.
  int64_t blocks() const;
};
// Columns of a state that a task takes.
constexpr int64_t kColumns = 32;
inline int64_t StateArgs::blocks() const { return (value_dim + kColumns - 1) / kColumns; }
inline int64_t tasks_of(const StateArgs& args) {
  return args.batch * args.heads * (args.streamed() ? 1 : args.blocks());
}
// Bytes of a thread's scratch.
inline int64_t scratch_bytes(const StateArgs& args) {
  const int64_t floats = args.streamed() ? 4 * args.dim : args.dim * (kColumns + 8);
  return 4 * floats + 64 * 9;
}

// A causal convolution of each channel by itself.
struct ConvolutionArgs {
  const void *x, *weight, *bias;  // [B,C,S], [C,width] contiguous, and [C] or null
  const void* state;              // [B,C,kept], the inputs before; null: zeros
  void* after;                    // [B,C,kept]; may be `state`; null: not wanted
  void* out;                      // [B,S,C] where the channels of x lie side by side, else [B,C,S]
  const int64_t* lengths;         // [B]; null: all tokens
  Dtype dtype;
  bool silu;
  int64_t batch, channels, tokens, width, kept;  // kept: width - 1 or more, or 0
  int64_t x_batch, x_channel, x_token;

  bool channels_last() const { return x_channel == 1; }
  // Parts of kChannels channels, each a task.
  int64_t blocks() const;
};
// Channels that a task takes, tokens at once of one of them, and the widest convolution.
constexpr int64_t kChannels = 128, kRun = 512, kMostWidth = 64;
inline int64_t ConvolutionArgs::blocks() const { return (channels + kChannels - 1) / kChannels; }
inline int64_t scratch_bytes(const ConvolutionArgs& args) {
  const int64_t floats =
      args.channels_last() ? (2 * args.width + 2) * kChannels : args.width + 2 * kRun + 16;
  return 4 * floats + 64 * 4;
}

enum Level { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// One task of attention. `scratch` is aligned to 64 bytes in each of these.
typedef void (*AttendFunction)(const AttendArgs&, const Plan&, int64_t task, char* scratch);
// The products of one head.
typedef void (*ProjectFunction)(const ProjectArgs&, int64_t head, char* scratch);
// `count` of the rows of x from `first` on as the products read them.
typedef void (*TakeFunction)(const LinearArgs&, int64_t first, int64_t count, void* taken,
                             char* scratch);
// `count` of the outputs of one weight, for all rows of x.
typedef void (*LinearFunction)(const LinearArgs&, const LinearWeight&, int64_t first, int64_t count,
                               const void* taken, char* scratch);
// Rows joined to the residual stream, and taken for the next products.
typedef void (*JoinFunction)(const JoinArgs&, char* scratch);
// `count` heads from `first` on of one weight, whose first head is `base` among all heads of
// queries, keys and values.
typedef void (*HeadsFunction)(const HeadsArgs&, const LinearWeight&, int64_t base, int64_t first,
                              int64_t count, const void* taken, char* scratch);
// The same from the products [rows,weight.rows] in floats, of all heads of a weight.
typedef void (*PlaceFunction)(const HeadsArgs&, const LinearWeight&, int64_t base, float* products);
// `count` of the outputs of a gated product.
typedef void (*GatedFunction)(const GatedArgs&, int64_t first, int64_t count, const void* taken,
                              char* scratch);
// `count` of the rows that are asked for.
typedef void (*UnpackFunction)(const UnpackArgs&, int64_t first, int64_t count);
// `count` of the rows of all sequences and heads.
typedef void (*QuantizeFunction)(const QuantizeArgs&, int64_t first, int64_t count, char* scratch);

// The scores of one query and the keys first..stop: out[j] is that of key j.
typedef void (*IndexFunction)(const IndexArgs&, int64_t batch, int64_t query, int64_t first,
                              int64_t stop, float* out, char* scratch);

// Adds the keys first..stop to the lists of a part, and returns where a list had no room for more.
typedef int64_t (*TopFunction)(const TopArgs&, const TopPart&, int64_t first, int64_t stop,
                               char* scratch);

// The queries of a part, rotated and rounded.
typedef void (*SketchQueriesFunction)(const SketchArgs&, const SketchPart&, char* scratch);
// What the keys first..stop weigh for each row of a part, in one range; and the weights of a part's
// only query, of the keys before `stop`.
typedef void (*SketchScoresFunction)(const SketchArgs&, const SketchPart&, int64_t first,
                                     int64_t stop, char* scratch);
typedef void (*SketchWeightsFunction)(const SketchArgs&, const SketchPart&, int64_t stop,
                                      const SketchWeights& to);
// The rest of a kv head of a sequence.
typedef void (*RestFunction)(const RestArgs&, int64_t batch, int64_t head, char* scratch);

// Numbers in the order of the floats; -0 is 0, and NaN the largest.
inline uint32_t ordered(float score) {
  uint32_t bits;
  score += 0.0f;
  __builtin_memcpy(&bits, &score, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return ~uint32_t(0);
  return bits >> 31 ? ~bits : bits | 0x80000000;
}

// Where a selection ends: the smallest number that is taken, and how many of those equal to it.
struct End {
  uint32_t least;
  int64_t equal;
};

// The end of the largest of some scores (largest.h); the largest of groups of scores, and the
// places of scores that are not below a threshold: both return how many they wrote.
typedef End (*EndOfLargestFunction)(const float* scores, const int32_t* places, int64_t count,
                                    int64_t top, uint32_t* numbers);
typedef int64_t (*GroupMaximaFunction)(const float* scores, int64_t stop, int64_t group, float* to);
typedef int64_t (*AtLeastFunction)(const float* scores, int64_t stop, float threshold, int32_t* to);

// One task of linear attention.
typedef void (*StateFunction)(const StateArgs&, int64_t task, char* scratch);
typedef void (*ConvolutionFunction)(const ConvolutionArgs&, int64_t task, char* scratch);

// What kernels_isa.cpp defines once for each level.
struct Kernels {
  AttendFunction attend;
  ProjectFunction project;
  TakeFunction take;
  LinearFunction linear;
  JoinFunction join;
  HeadsFunction heads;
  PlaceFunction place;
  GatedFunction gated;
  QuantizeFunction quantize;
  UnpackFunction unpack;
  IndexFunction index;
  TopFunction top;
  SketchQueriesFunction sketch_queries;
  SketchScoresFunction sketch_scores;
  SketchWeightsFunction sketch_weights;
  RestFunction rest;
  EndOfLargestFunction end_of_largest;
  GroupMaximaFunction group_maxima;
  AtLeastFunction at_least;
  StateFunction state;
  ConvolutionFunction convolution;
  bool pairs;  // bf16 is multiplied as it is, in pairs
};

// The highest level that this machine and this build have.
int best_level();
// The kernels of `level`, null where the machine or the build lacks it.
const Kernels* kernels(int level);

}  // namespace headwise
