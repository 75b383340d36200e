// What options do to scores before the softmax. Scores come in two forms: those of one row, and
// transposed those of W rows, a vector for each key. Every option is here in both of them.
#pragma once

#include "task.h"

namespace headwise {
namespace HEADWISE_ISA {

// Whether scores are used as they are, but for causality and windows.
HEADWISE_INLINE bool plain(const Options& options) {
  return options.softcap <= 0 && options.bias.data == nullptr &&
         options.alibi_slopes.data == nullptr && options.mask.data == nullptr;
}

// Calls what(pointer) with the bias from its element `offset` on, in its dtype.
template <class What>
HEADWISE_INLINE void with_bias(const Bias& bias, int64_t offset, const What& what) {
  if (bias.dtype == kFloat32)
    what(static_cast<const float*>(bias.data) + offset);
  else if (bias.dtype == kBfloat16)
    what(static_cast<const bf16*>(bias.data) + offset);
  else if (bias.dtype == kFloat16)
    what(static_cast<const f16*>(bias.data) + offset);
  else
    what(static_cast<const double*>(bias.data) + offset);
}

template <class T>
HEADWISE_INLINE void add_bias(const T* bias, int64_t stride, int count, float* score) {
  if (stride == 1) {
    for (int j = 0; j < count; ++j) score[j] += to_float(bias[j]);
  } else {
    for (int j = 0; j < count; ++j) score[j] += to_float(bias[j * stride]);
  }
}

// Options for the scores of one row and the keys key..key + count, which are scaled. The scores of
// the block after those are hidden.
inline void apply_options(const Task& task, int64_t row, int64_t key, int count, float* score) {
  const Options& options = task.args->options;
  if (options.softcap > 0) {
    const float cap = float(options.softcap);
    for (int j = 0; j < kBlock; j += W) {
      const vf x = load(score + j);
      store(score + j, cap * tanh(x / cap));
    }
  }
  if (options.bias.data != nullptr) {
    const ScoreStrides& strides = options.bias.strides;
    const int64_t offset = strides.offset(task.batch, task.head(row), task.query(row), key);
    with_bias(options.bias, offset,
              [&](const auto* bias) HEADWISE_LAMBDA { add_bias(bias, strides.key, count, score); });
  }
  if (options.alibi_slopes.data != nullptr) {
    const vf slope = splat(options.alibi_slopes.data[task.head(row)]);
    const vf first = splat(float(key - task.position(row)));
    for (int j = 0; j < kBlock; j += W)
      store(score + j, load(score + j) + slope * (first + float(j) + iota()));
  }
  if (options.mask.data != nullptr) {
    const unsigned char* bytes = task.mask(row, key);
    const int64_t stride = options.mask.strides.key;
    for (int j = 0; j < count; ++j) score[j] = bytes[j * stride] ? score[j] : -kInfinity;
  }
  const int64_t begin = task.first_key(row) - key, end = task.stop_key(row) - key;
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

// Options for transposed scores: what they depend on for each row of a tile, looked up once.
struct TileOptions {
  const Task* task;
  int32_t *first, *stop;  // [rows]: the keys that causality and window leave
  int32_t* position;
  float* slope;
  int64_t *mask, *bias;  // offsets of each row's first element

  HEADWISE_INLINE TileOptions(const Task& task, int64_t padded_rows, Scratch* scratch)
      : task(&task) {
    first = scratch->take<int32_t>(padded_rows);
    stop = scratch->take<int32_t>(padded_rows);
    slope = scratch->take<float>(padded_rows);
    position = scratch->take<int32_t>(padded_rows);
    mask = scratch->take<int64_t>(padded_rows);
    bias = scratch->take<int64_t>(padded_rows);
    const Options& options = task.args->options;
    const float* slopes = options.alibi_slopes.data;
    for (int64_t row = 0; row < padded_rows; ++row) {
      const int64_t real = row < task.rows ? row : task.rows - 1;
      const int64_t head = task.head(real), query = task.query(real);
      first[row] = int32_t(task.first_key(real));
      stop[row] = int32_t(task.stop_key(real));
      position[row] = int32_t(task.position(real));
      slope[row] = slopes == nullptr ? 0.0f : slopes[head];
      mask[row] = options.mask.strides.offset(task.batch, head, query, 0);
      bias[row] = options.bias.strides.offset(task.batch, head, query, 0);
    }
  }

  template <class B>
  HEADWISE_INLINE void add_bias(const B* from, int64_t row, int count, float* score) const {
    const int64_t stride = task->args->options.bias.strides.key;
    for (int lane = 0; lane < W; ++lane) {
      const B* line = from + bias[row + lane];
      for (int j = 0; j < count; ++j) score[j * W + lane] += to_float(line[j * stride]);
    }
  }

  // Scales the scores of W rows for the keys key..key + count, and applies options to them.
  void apply(int64_t row, int64_t key, int count, float* score) const {
    const Options& options = task->args->options;
    const float scale = task->args->scale, cap = float(options.softcap);
    for (int j = 0; j < count; ++j) {
      vf x = load(score + j * W) * scale;
      if (cap > 0) x = cap * tanh(x / cap);
      store(score + j * W, x);
    }
    if (options.bias.data != nullptr)
      with_bias(options.bias, key * options.bias.strides.key,
                [&](const auto* from) HEADWISE_LAMBDA { add_bias(from, row, count, score); });
    if (options.alibi_slopes.data != nullptr) {
      const vf per_key = load(slope + row);
      vi here;
      __builtin_memcpy(&here, position + row, sizeof here);
      for (int j = 0; j < count; ++j) {
        // as integers: floats hold no position above 2^24
        const vf distance = __builtin_convertvector(splat_int(int32_t(key + j)) - here, vf);
        store(score + j * W, load(score + j * W) + per_key * distance);
      }
    }
    if (options.mask.data != nullptr) {
      const int64_t stride = options.mask.strides.key;
      for (int lane = 0; lane < W; ++lane) {
        const unsigned char* line = options.mask.data + mask[row + lane] + key * stride;
        for (int j = 0; j < count; ++j)
          if (!line[j * stride]) score[j * W + lane] = -kInfinity;
      }
    }
  }

  // Hides what causality, window and the end of the context hide.
  HEADWISE_INLINE void hide(int64_t row, int64_t key, int count, float* score) const {
    vi from, to;
    __builtin_memcpy(&from, first + row, sizeof from);
    __builtin_memcpy(&to, stop + row, sizeof to);
    const vf hidden = splat(-kInfinity);
    for (int j = 0; j < count; ++j) {
      const vi here = splat_int(int32_t(key + j));
      const vi seen = (vi)(here >= from) & (vi)(here < to);
      store(score + j * W, select(seen, load(score + j * W), hidden));
    }
    for (int j = count; j < kBlock; ++j) store(score + j * W, hidden);
  }
};

}  // namespace HEADWISE_ISA
}  // namespace headwise
