// What a decoder layer does between its attention and its products: norms, rotary position
// embedding, gated activations and the residual stream, a few rows at a time and in floats. They
// are rounded to the dtype where Transformers' modules round, so that both say the same.
#pragma once

#include "activation.h"
#include "linear.h"

namespace headwise {
namespace HEADWISE_ISA {

// Calls vector(i) for W elements of a row at a time, then single(i) for each that is left.
template <class Vector, class Single>
HEADWISE_INLINE void along(int64_t width, const Vector& vector, const Single& single) {
  int64_t i = 0;
  for (; i + W <= width; i += W) vector(i);
  for (; i < width; ++i) single(i);
}

HEADWISE_INLINE float sum_of_squares(const float* x, int64_t width, float mean) {
  vf all = vf{};
  float rest = 0.0f;
  along(
      width,
      [&](int64_t i) HEADWISE_LAMBDA {
        const vf off = load(x + i) - mean;
        all += off * off;
      },
      [&](int64_t i) HEADWISE_LAMBDA { rest += (x[i] - mean) * (x[i] - mean); });
  return sum(all) + rest;
}

HEADWISE_INLINE float mean_of(const float* x, int64_t width) {
  vf all = vf{};
  float rest = 0.0f;
  along(
      width, [&](int64_t i) HEADWISE_LAMBDA { all += load(x + i); },
      [&](int64_t i) HEADWISE_LAMBDA { rest += x[i]; });
  return (sum(all) + rest) / float(width);
}

// A row normalised; `to` may be `x`.
template <class T>
HEADWISE_INLINE void normalize(const Norm& norm, const float* x, int64_t width, float* to) {
  if (norm.kind == kNoNorm) {
    if (to != x) __builtin_memcpy(to, x, sizeof(float) * width);
    return;
  }
  const float mean = norm.kind == kLayerNorm ? mean_of(x, width) : 0.0f;
  const float variance = sum_of_squares(x, width, mean) / float(width);
  const float factor = 1.0f / __builtin_sqrtf(variance + norm.eps);
  const float plus = norm.kind == kRmsNormPlusOne ? 1.0f : 0.0f;
  const T* weight = static_cast<const T*>(norm.weight);
  const T* bias = static_cast<const T*>(norm.bias);
  along(
      width,
      [&](int64_t i) HEADWISE_LAMBDA {
        vf y = (load(x + i) - mean) * factor;
        if (norm.kind == kRmsNorm) y = as_held<T>(y);
        if (weight != nullptr) y = y * (load(weight + i) + plus);
        if (bias != nullptr) y = y + load(bias + i);
        store(to + i, as_held<T>(y));
      },
      [&](int64_t i) HEADWISE_LAMBDA {
        float y = (x[i] - mean) * factor;
        if (norm.kind == kRmsNorm) y = as_held<T>(y);
        if (weight != nullptr) y = y * (to_float(weight[i]) + plus);
        if (bias != nullptr) y = y + to_float(bias[i]);
        to[i] = as_held<T>(y);
      });
}

template <class T>
void join_rows(const JoinArgs& args, char* memory) {
  const LinearArgs next = {nullptr, args.dtype, args.rows, args.width, 0, args.packed};
  const int64_t width = args.width, pitch = padded(width);
  Scratch scratch = {memory};
  float* own = scratch.take<float>(pitch);
  float* row_x = scratch.take<float>(pitch);
  for (int64_t row = 0; row < args.rows; ++row) {
    const float* x = args.wide == nullptr ? row_x : args.wide + row * pitch;
    if (args.wide == nullptr) widen_row(static_cast<const T*>(args.x) + row * width, width, row_x);
    const float* sum = x;
    if (args.added != nullptr) {
      normalize<T>(args.added_norm, args.added + row * width, width, own);
      float* to = args.sum == nullptr ? own : args.sum + row * pitch;
      for (int64_t i = 0; i < width; ++i) own[i] *= args.scale;
      hold<T>(own, width);
      for (int64_t i = 0; i < width; ++i) to[i] = x[i] + own[i];
      hold<T>(to, width);
      sum = to;
    }
    if (args.out != nullptr) {
      T* to = static_cast<T*>(args.out) + row * width;
      for (int64_t i = 0; i < width; ++i) from_float(sum[i], to + i);
    }
    if (args.taken == nullptr && args.normed == nullptr) continue;
    normalize<T>(args.next, args.next_of_x ? x : sum, width, own);
    if (args.normed != nullptr) {
      T* to = static_cast<T*>(args.normed) + row * width;
      for (int64_t i = 0; i < width; ++i) from_float(own[i], to + i);
    }
    if (args.taken != nullptr) take_row<T>(next, row, own, args.taken);
  }
}

// Rotary position embedding of one head's row, in place. Products with angles of R are rounded to
// it.
template <class R>
HEADWISE_INLINE void rotate_head(const R* cos, const R* sin, int64_t dim, Rotation rotation,
                                 float* x) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const bool neighbours = rotation == kNeighbours || rotation == kNeighboursTwice;
    float* first = x + (neighbours ? 2 * i : i);
    float* second = first + (neighbours ? 1 : half);
    const int64_t one = rotation == kNeighboursTwice ? 2 * i : i;
    const int64_t other = rotation == kNeighboursTwice ? one + 1
                          : rotation == kHalves        ? half + i
                                                       : i;
    const float a = *first, b = *second;
    *first = as_held<R>(a * to_float(cos[one])) - as_held<R>(b * to_float(sin[one]));
    *second = as_held<R>(b * to_float(cos[other])) + as_held<R>(a * to_float(sin[other]));
  }
}

// `count` heads from `head` on among all heads of queries, keys and values, whose products are the
// rows `all`: normalised, rotated, and put where they belong.
template <class T>
HEADWISE_INLINE void place_heads(const HeadsArgs& args, int64_t head, int64_t count, float* all,
                                 int64_t pitch) {
  const int64_t dim = args.dim, of_values = args.heads + args.kv_heads;
  for (int64_t i = 0; i < count; ++i, ++head) {
    const bool is_query = head < args.heads, is_value = head >= of_values;
    const Norm& norm = is_query ? args.query_norm : args.key_norm;
    const int64_t own = is_query ? head : head - (is_value ? of_values : args.heads);
    T* out = static_cast<T*>(is_query ? args.query : is_value ? args.value : args.key);
    int64_t of_row = dim, of_head = args.length * dim, of_batch = args.heads * of_head;
    if (is_value)
      of_row = args.value_row, of_head = args.value_head, of_batch = args.value_batch;
    else if (!is_query)
      of_row = args.key_row, of_head = args.key_head, of_batch = args.key_batch;
    for (int64_t row = 0; row < args.x.rows; ++row) {
      const int64_t batch = row / args.length, position = row % args.length;
      float* x = all + row * pitch + i * dim;
      if (!is_value && !args.whole) normalize<T>(norm, x, dim, x);
      if (!is_value && args.cos != nullptr) {
        const int64_t offset = batch * args.rope_batch + position * args.rope_row;
        with_dtype(args.rope_dtype, args.cos, [&](const auto* cos) HEADWISE_LAMBDA {
          const auto* sin = static_cast<decltype(cos)>(args.sin);
          rotate_head(cos + offset, sin + offset, args.rope_dim, args.rotation, x);
        });
      }
      T* to = out + batch * of_batch + own * of_head + position * of_row;
      for (int64_t d = 0; d < dim; ++d) from_float(x[d], to + d);
    }
  }
}

template <class T>
void heads(const HeadsArgs& args, const LinearWeight& weight, int64_t base, int64_t first,
           int64_t count, const void* taken, char* memory) {
  const int64_t outputs = count * args.dim, begin = first * args.dim;
  Scratch scratch = {memory};
  float* all = scratch.take<float>(args.x.rows * outputs);
  const T* bias = static_cast<const T*>(weight.bias);
  linear_as_stored<T>(taken, args.x, weight, begin, outputs, scratch,
                      [&](int64_t row, int64_t at, int n, const float* product) HEADWISE_LAMBDA {
                        add_bias_held(product, bias == nullptr ? bias : bias + at, n,
                                      all + row * outputs + at - begin);
                      });
  place_heads<T>(args, base + first, count, all, outputs);
}

// Norms over all heads at once need all of their products before.
template <class T>
void place(const HeadsArgs& args, const LinearWeight& weight, int64_t base, float* products) {
  const int64_t ends[] = {args.heads, args.heads + args.kv_heads, base + weight.rows / args.dim};
  const Norm* norms[] = {&args.query_norm, &args.key_norm};
  for (int64_t row = 0; row < args.x.rows; ++row) {
    float* x = products + row * weight.rows;
    for (int part = 0; part < 2; ++part) {
      // the heads of queries, then of keys, where this weight has them
      const int64_t begin = part == 0 ? 0 : ends[0], end = ends[part];
      if (begin < base || end > ends[2]) continue;
      float* first = x + (begin - base) * args.dim;
      normalize<T>(*norms[part], first, (end - begin) * args.dim, first);
    }
  }
  place_heads<T>(args, base, weight.rows / args.dim, products, weight.rows);
}

template <class T>
void gated(const GatedArgs& args, int64_t first, int64_t count, const void* taken, char* memory) {
  const int64_t rows = args.x.rows, line = padded(count);
  Scratch scratch = {memory};
  float* gate = scratch.take<float>(rows * line);
  float* up = scratch.take<float>(rows * line);
  const auto product = [&](const LinearWeight& weight, float* to) HEADWISE_LAMBDA {
    const T* bias = static_cast<const T*>(weight.bias);
    linear_as_stored<T>(taken, args.x, weight, first, count, scratch,
                        [&](int64_t row, int64_t at, int n, const float* part) HEADWISE_LAMBDA {
                          add_bias_held(part, bias == nullptr ? bias : bias + at, n,
                                        to + row * line + at - first);
                        });
  };
  product(*args.up, up);
  if (args.gate != nullptr) product(*args.gate, gate);
  for (int64_t row = 0; row < rows; ++row) {
    float* g = gate + row * line;
    float* u = up + row * line;
    // past `count` lies what an earlier task left, which is not written
    for (int64_t i = 0; i < count; i += W)
      store(u + i, args.gate == nullptr
                       ? activate(args.activation, load(u + i))
                       : as_held<T>(activate(args.activation, load(g + i))) * load(u + i));
    hold<T>(u, count);
    take_part<T>(args.middle, row, first, count, u, args.taken);
  }
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
