// Rows as integers with scales, for a quantised cache. `quantize` in src/headwise/ops/_quantize.py
// says the same in PyTorch.
#pragma once

#include "kernels.h"
#include "rotation.h"
#include "rows.h"

namespace headwise {
namespace HEADWISE_ISA {

// To the nearest integer, ties to even, of what is well below 2^22.
HEADWISE_INLINE float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

// The integers -8 to 7 of a group, and its scale: of some that make the largest element one of the
// outermost integers, or a little less, the one with the smallest error.
inline float quantize_group(const float* x, int count, float* levels) {
  float low = 0.0f, high = 0.0f, odd = 0.0f;
  for (int i = 0; i < count; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    odd += x[i] * 0.0f;
  }
  const float top = -low > high ? -low : high;
  // what is no number stays none; scales of next to nothing would underflow
  if (odd != odd || top < 1e-30f) {
    for (int i = 0; i < count; ++i) levels[i] = 0.0f;
    return odd != odd ? odd : 0.0f;
  }
  // the sign that makes the largest element -8
  const float outermost = (-low > high ? 1.0f : -1.0f) * top / 8.0f;
  float best = top / 7.0f, least = kInfinity;
  for (int candidate = 0; candidate < 6; ++candidate) {
    const float base = candidate % 2 == 0 ? top / 7.0f : outermost;
    const float scale = base * (1.0f - 0.1f * float(candidate / 2));
    float error = 0.0f;
    for (int i = 0; i < count; ++i) {
      const float wanted = x[i] / scale;
      float level = nearest(wanted);
      level = level < -8.0f ? -8.0f : level > 7.0f ? 7.0f : level;
      error += (level - wanted) * (level - wanted);
    }
    error *= (scale / top) * (scale / top);
    if (error < least) {
      least = error;
      best = scale;
    }
  }
  for (int i = 0; i < count; ++i) {
    const float level = nearest(x[i] / best);
    levels[i] = level < -8.0f ? -8.0f : level > 7.0f ? 7.0f : level;
  }
  return best;
}

// The rows first..first + count of all.
inline void quantize_rows(const QuantizeArgs& args, int64_t first, int64_t count, char* scratch) {
  const int64_t dim = args.dim, bytes = dim * args.bits / 8;
  float* row = reinterpret_cast<float*>(scratch);
  float* levels = row + padded(dim);
  const int64_t groups = args.bits == 8 ? 1 : (dim + kInt4Group - 1) / kInt4Group;
  for (int64_t index = first; index < first + count; ++index) {
    const int64_t at = index / (args.heads * args.length) * args.row_batch +
                       index / args.length % args.heads * args.row_head +
                       index % args.length * args.row_row;
    with_dtype(args.dtype, args.rows, [&](const auto* base) HEADWISE_LAMBDA {
      for (int64_t d = 0; d < dim; ++d) row[d] = to_float(base[at + d]);
    });
    unsigned char* to = args.integers + index * bytes;
    if (args.bits == 8) {
      float top = 0.0f;
      for (int64_t d = 0; d < dim; ++d) {
        const float size = row[d] < 0.0f ? -row[d] : row[d];
        top = size > top || size != size ? size : top;
      }
      const float scale = top / 127.0f;
      args.scales[index] = scale;
      const float divisor = scale > 0.0f ? scale : 1.0f;
      for (int64_t d = 0; d < dim; ++d) {
        const float level = nearest(row[d] / divisor);
        to[d] =
            (unsigned char)(int8_t(int32_t(level >= -127.0f && level <= 127.0f ? level : 0.0f)));
      }
      continue;
    }
    rotate_row(row, dim);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t from = g * kInt4Group;
      const int own = int(dim - from < kInt4Group ? dim - from : kInt4Group);
      args.scales[index * groups + g] = quantize_group(row + from, own, levels + from);
    }
    for (int64_t d = 0; d < dim; d += 2) {
      const int32_t low = int32_t(levels[d]), high = int32_t(levels[d + 1]);
      to[d / 2] = (unsigned char)((low & 15) | (high & 15) << 4);
    }
  }
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
