// Linear attention, one token after the other: the state of a head is read once and written once.
//
// A task takes some columns of one head's state, which stay in the first-level cache: decay and
// what the key finds, then the change and what the query finds.
#pragma once

#include "rows.h"

namespace headwise {
namespace HEADWISE_ISA {

template <class T>
void linear_attention(const StateArgs& args, int64_t task, char* memory) {
  constexpr int C = kColumns / W;
  const int64_t blocks = (args.value_dim + kColumns - 1) / kColumns, dim = args.dim;
  const int64_t head_of_all = task / blocks, column = task % blocks * kColumns;
  const int64_t b = head_of_all / args.heads, h = head_of_all % args.heads;
  const int64_t kv_head = h / (args.heads / args.kv_heads);
  const int64_t left = args.value_dim - column;
  const int count = int(left < kColumns ? left : kColumns);
  Scratch scratch = {memory};
  float* slab = scratch.take<float>(dim * kColumns);
  float* query = scratch.take<float>(dim);
  float* key = scratch.take<float>(dim);
  float* kept = scratch.take<float>(dim);
  alignas(64) float line[kColumns] = {};

  const int64_t first = head_of_all * dim * args.value_dim + column;
  for (int64_t d = 0; d < dim; ++d) {
    float* to = slab + d * kColumns;
    if (args.state == nullptr || count < kColumns) __builtin_memset(to, 0, sizeof line);
    if (args.state != nullptr)
      __builtin_memcpy(to, args.state + first + d * args.value_dim, sizeof(float) * count);
  }
  const int64_t tokens = args.lengths != nullptr ? args.lengths[b] : args.tokens;
  T* out = static_cast<T*>(args.out) + head_of_all * args.tokens * args.value_dim + column;
  for (int64_t t = 0; t < args.tokens; ++t, out += args.value_dim) {
    if (t >= tokens) {
      for (int i = 0; i < count; ++i) from_float(0.0f, out + i);
      continue;
    }
    const T* q = static_cast<const T*>(args.query) + b * args.query_batch +
                 kv_head * args.query_head + t * args.query_row;
    const T* k = static_cast<const T*>(args.key) + b * args.key_batch + kv_head * args.key_head +
                 t * args.key_row;
    const T* v = static_cast<const T*>(args.value) + b * args.value_batch + h * args.value_head +
                 t * args.value_row + column;
    for (int64_t d = 0; d < dim; ++d) {
      query[d] = to_float(q[d]);
      key[d] = to_float(k[d]);
    }
    const float* decay = args.decay == nullptr ? nullptr
                                               : args.decay + b * args.decay_batch +
                                                     h * args.decay_head + t * args.decay_row;
    const bool each = decay != nullptr && args.decay_dim != 0;
    const float all = decay == nullptr ? 1.0f : exp(splat(decay[0]))[0];
    int64_t done = 0;
    if (each && args.decay_dim == 1)
      for (; done + W <= dim; done += W) store(kept + done, exp(load(decay + done)));
    for (; each && done < dim; ++done) kept[done] = exp(splat(decay[done * args.decay_dim]))[0];

    vf found[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) found[c] = vf{};
    for (int64_t d = 0; d < dim; ++d) {
      const vf factor = splat(each ? kept[d] : all), by = splat(key[d]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        float* at = slab + d * kColumns + c * W;
        const vf now = load(at) * factor;
        store(at, now);
        found[c] += now * by;
      }
    }
    for (int i = 0; i < count; ++i) line[i] = to_float(v[i]);
    vf added[C], sum[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      added[c] = load(line + c * W);
      sum[c] = vf{};
    }
    if (args.beta != nullptr) {
      const vf beta =
          splat(args.beta[b * args.beta_batch + h * args.beta_head + t * args.beta_row]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) added[c] = beta * (added[c] - found[c]);
    }
    for (int64_t d = 0; d < dim; ++d) {
      const vf by = splat(key[d]), asked = splat(query[d]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        float* at = slab + d * kColumns + c * W;
        const vf now = load(at) + by * added[c];
        store(at, now);
        sum[c] += now * asked;
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(line + c * W, sum[c] * args.scale);
    for (int i = 0; i < count; ++i) from_float(line[i], out + i);
  }
  for (int64_t d = 0; d < dim; ++d)
    __builtin_memcpy(args.after + first + d * args.value_dim, slab + d * kColumns,
                     sizeof(float) * count);
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
