// What scores are combined with: cap, bias, ALiBi, masks, causality and windows.
#pragma once

#include "rows.h"

namespace headwise {
namespace HEADWISE_ISA {

constexpr float kInfinity = __builtin_inff();

// Calls what(pointer) with the bias from its element `at` on, in its dtype.
template <class What>
HEADWISE_INLINE void with_bias(const AttendArgs& args, int64_t at, const What& what) {
  if (args.bias_dtype == kFloat32)
    what(static_cast<const float*>(args.bias) + at);
  else if (args.bias_dtype == kBfloat16)
    what(static_cast<const bf16*>(args.bias) + at);
  else if (args.bias_dtype == kFloat16)
    what(static_cast<const f16*>(args.bias) + at);
  else
    what(static_cast<const double*>(args.bias) + at);
}

// Calls what(pointer) with `base` in one of the three dtypes that are served.
template <class What>
HEADWISE_INLINE void with_dtype(Dtype dtype, const void* base, const What& what) {
  if (dtype == kFloat32)
    what(static_cast<const float*>(base));
  else if (dtype == kBfloat16)
    what(static_cast<const bf16*>(base));
  else
    what(static_cast<const f16*>(base));
}

// The row times an orthogonal and symmetric matrix, in place: a Hadamard matrix for each block of
// the largest power of two that divides the dim. Rows of 4 bits are rotated, and so are queries and
// results then.
inline void rotate_row(float* row, int64_t dim) {
  const int64_t block = dim & -dim;
  const float factor = 1.0f / __builtin_sqrtf(float(block));
  for (int64_t first = 0; first < dim; first += block) {
    float* x = row + first;
    for (int64_t half = 1; half < block; half *= 2)
      for (int64_t from = 0; from < block; from += 2 * half)
        for (int64_t i = from; i < from + half; ++i) {
          const float a = x[i], b = x[i + half];
          x[i] = a + b;
          x[i + half] = a - b;
        }
    for (int64_t i = 0; i < block; ++i) x[i] *= factor;
  }
}

// The keys begin..end of a task that some row may see, and those that causality, window and length
// hide from none, all_see_from..all_see_to.
struct Span {
  int64_t begin, end, all_see_from, all_see_to;
  int64_t ahead;  // where the keys end that the thread reads next: of its next task too

  // Keys of the block that starts at `block`; 0 or less behind the end.
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

// What scores are combined with, for the rows first_row.. of one kv head of one sequence.
struct Extras {
  const AttendArgs* args;
  const SequencePlan* sequence;
  int64_t batch, kv_head;
  int64_t first_row, rows, group;
  int64_t part, segment;  // of the part: one of its segments, or 0 for all of it
  bool on;                // the thread goes on with the keys behind

  HEADWISE_INLINE int64_t head(int64_t row) const {
    return kv_head * group + (first_row + row) % group;
  }
  HEADWISE_INLINE int64_t query(int64_t row) const { return (first_row + row) / group; }
  HEADWISE_INLINE int64_t position(int64_t row) const {
    return sequence->length - args->queries + query(row);
  }
  HEADWISE_INLINE const unsigned char* mask(int64_t row, int64_t key) const {
    return args->mask + batch * args->mask_batch + head(row) * args->mask_head +
           query(row) * args->mask_row + key * args->mask_key;
  }

  // The scores are used as they are, but for causality and windows.
  HEADWISE_INLINE bool plain() const {
    return args->softcap <= 0 && args->bias == nullptr && args->slopes == nullptr &&
           args->mask == nullptr;
  }

  // Whether a mask lets some row see one of the keys; without a mask, always.
  bool visible(int64_t key, int count) const {
    if (args->mask == nullptr) return true;
    if (args->mask_head == 0 && args->mask_row == 0) return any(mask(0, key), count);
    // heads that share a row of the mask are looked at once; a tile may begin within them
    const bool shared = args->mask_head == 0;
    for (int64_t row = 0; row < rows; row += shared ? group - (first_row + row) % group : 1)
      if (any(mask(row, key), count)) return true;
    return false;
  }

  HEADWISE_INLINE bool any(const unsigned char* bytes, int count) const {
    unsigned found = 0;
    if (args->mask_key == 1) {
      for (int j = 0; j < count; ++j) found |= bytes[j];
    } else {
      for (int j = 0; j < count; ++j) found |= bytes[j * args->mask_key];
    }
    return found != 0;
  }

  // The keys that a row may see lie between these two, masks aside.
  HEADWISE_INLINE int64_t first_key(int64_t row) const {
    if (!args->causal || args->window <= 0) return 0;
    const int64_t from = position(row) - args->window + 1;
    return from > 0 ? from : 0;
  }
  HEADWISE_INLINE int64_t stop_key(int64_t row) const {
    if (!args->causal) return sequence->length;
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
    span.ahead = on ? stop : span.end;
    const int64_t skipped = first_key(0) - span.begin;
    if (skipped > 0) span.begin += skipped / kBlock * kBlock;
    return span;
  }

  template <class T>
  HEADWISE_INLINE void add_bias(const T* bias, int count, float* score) const {
    if (args->bias_key == 1) {
      for (int j = 0; j < count; ++j) score[j] += to_float(bias[j]);
    } else {
      for (int j = 0; j < count; ++j) score[j] += to_float(bias[j * args->bias_key]);
    }
  }

  // Cap, bias, ALiBi and masks for the scores of one row and the keys key..key + count.
  void apply(int64_t row, int64_t key, int count, float* score) const {
    if (args->softcap > 0) {
      const float cap = args->softcap;
      for (int j = 0; j < kBlock; j += W) {
        const vf x = load(score + j);
        store(score + j, cap * tanh(x / cap));
      }
    }
    if (args->bias != nullptr) {
      const int64_t at = batch * args->bias_batch + head(row) * args->bias_head +
                         query(row) * args->bias_row + key * args->bias_key;
      with_bias(*args, at, [&](const auto* from) HEADWISE_LAMBDA { add_bias(from, count, score); });
    }
    if (args->slopes != nullptr) {
      const vf slope = splat(args->slopes[head(row)]);
      const vf first = splat(float(key - position(row)));
      for (int j = 0; j < kBlock; j += W)
        store(score + j, load(score + j) + slope * (first + float(j) + iota()));
    }
    if (args->mask != nullptr) {
      const unsigned char* bytes = mask(row, key);
      for (int j = 0; j < count; ++j) score[j] = bytes[j * args->mask_key] ? score[j] : -kInfinity;
    }
    const int64_t begin = first_key(row) - key, end = stop_key(row) - key;
    const int64_t low = begin < 0 ? 0 : begin < kBlock ? begin : kBlock;
    const int64_t high = end < 0 ? 0 : end < count ? end : count;
    if (low > 0 || high < kBlock) {
      const vf from = splat(float(low)), to = splat(float(high)), hidden = splat(-kInfinity);
      for (int j = 0; j < kBlock; j += W) {
        const vf index = float(j) + iota();
        const vi inside = (vi)(index >= from) & (vi)(index < to);
        store(score + j, select(inside, load(score + j), hidden));
      }
    }
  }
};

}  // namespace HEADWISE_ISA
}  // namespace headwise
