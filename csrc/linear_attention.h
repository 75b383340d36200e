// Linear attention, one token after the other: what a chunk of matrix products would multiply by a
// state is multiplied here while a part of the state lies in the first-level cache, in as many
// products and without a sum of decays.
#pragma once

#include "kernels.h"
#include "rows.h"

namespace headwise {
namespace HEADWISE_ISA {

// What a token does to a state of D rows, widened: rows are multiplied by `kept`, then get `key`
// times what is added; `query` asks.
struct StateToken {
  float *query, *key, *kept, *found;  // found: key times kept, by which a state is asked beforehand

  StateToken(Scratch* scratch, int64_t dim)
      : query(scratch->take<float>(dim)),
        key(scratch->take<float>(dim)),
        kept(scratch->take<float>(dim)),
        found(scratch->take<float>(dim)) {}
};

// A row of D numbers, widened; with a norm divided by its length.
template <class T>
HEADWISE_INLINE void widen(const T* row, int64_t dim, float norm, float* to) {
  int64_t d = 0;
  for (; d + W <= dim; d += W) store(to + d, load(row + d));
  for (; d < dim; ++d) to[d] = to_float(row[d]);
  if (norm < 0.0f) return;
  vf even = vf{}, odd = vf{};
  float squares = norm;
  for (d = 0; d + 2 * W <= dim; d += 2 * W) {
    const vf x = load(to + d), y = load(to + d + W);
    even += x * x;
    odd += y * y;
  }
  for (; d < dim; ++d) squares += to[d] * to[d];
  const float factor = 1.0f / __builtin_sqrtf(squares + sum(even + odd));
  for (d = 0; d < dim; ++d) to[d] *= factor;
}

// Tokens ahead of which rows are asked for.
constexpr int64_t kAhead = 4;

template <class T>
HEADWISE_INLINE void ask_for(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(T))) prefetch(row + d);
}

template <class T>
HEADWISE_INLINE void take_token(const StateArgs& args, int64_t b, int64_t h, int64_t t,
                                StateToken to) {
  const int64_t dim = args.dim, kv_head = h / (args.heads / args.kv_heads);
  const T* query = static_cast<const T*>(args.query) + b * args.query_batch +
                   kv_head * args.query_head + t * args.query_row;
  const T* key = static_cast<const T*>(args.key) + b * args.key_batch + kv_head * args.key_head +
                 t * args.key_row;
  if (t + kAhead < args.tokens) {
    ask_for(query + kAhead * args.query_row, dim);
    ask_for(key + kAhead * args.key_row, dim);
  }
  widen(query, dim, args.norm, to.query);
  widen(key, dim, args.norm, to.key);
  const float* decay = args.decay == nullptr ? nullptr
                                             : args.decay + b * args.decay_batch +
                                                   h * args.decay_head + t * args.decay_row;
  if (decay == nullptr || args.decay_dim == 0) {
    const vf all = decay == nullptr ? splat(1.0f) : exp(splat(decay[0]));
    int64_t d = 0;
    for (; d + W <= dim; d += W) store(to.kept + d, all);
    for (; d < dim; ++d) to.kept[d] = all[0];
  } else {
    if (t + kAhead < args.tokens) ask_for(decay + kAhead * args.decay_row, dim);
    int64_t d = 0;
    if (args.decay_dim == 1)
      for (; d + W <= dim; d += W) store(to.kept + d, exp(load(decay + d)));
    for (; d < dim; ++d) to.kept[d] = exp(splat(decay[d * args.decay_dim]))[0];
  }
  int64_t d = 0;
  for (; d + W <= dim; d += W) store(to.found + d, load(to.key + d) * load(to.kept + d));
  for (; d < dim; ++d) to.found[d] = to.key[d] * to.kept[d];
}

HEADWISE_INLINE float beta_of(const StateArgs& args, int64_t b, int64_t h, int64_t t) {
  return args.beta[b * args.beta_batch + h * args.beta_head + t * args.beta_row];
}

template <class T>
HEADWISE_INLINE const T* value_of(const StateArgs& args, int64_t b, int64_t h, int64_t t) {
  return static_cast<const T*>(args.value) + b * args.value_batch + h * args.value_head +
         t * args.value_row;
}

template <class T>
HEADWISE_INLINE T* out_of(const StateArgs& args, int64_t b, int64_t h, int64_t t) {
  return static_cast<T*>(args.out) + ((b * args.tokens + t) * args.heads + h) * args.value_dim;
}

// One pass over a part [D, kColumns] of a state: a token changes it and asks it, and what the next
// token's key will find there is summed up on the way (with kDelta).
template <bool kDelta>
HEADWISE_INLINE void pass(float* slab, int64_t dim, StateToken now, const float* added,
                          const float* ahead, float* asked, float* found) {
  constexpr int C = kColumns / W;
  vf sum[C], then[C];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) sum[c] = then[c] = vf{};
  for (int64_t d = 0; d < dim; ++d) {
    float* at = slab + d * kColumns;
    const vf kept = splat(now.kept[d]), key = splat(now.key[d]), query = splat(now.query[d]);
    const vf next = splat(ahead[d]);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const vf x = load(at + c * W) * kept + key * load(added + c * W);
      store(at + c * W, x);
      sum[c] += x * query;
      if (kDelta) then[c] += x * next;
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
    store(asked + c * W, sum[c]);
    if (kDelta) store(found + c * W, then[c]);
  }
}

// Some tokens, and kColumns columns of the state of one head.
template <class T, bool kDelta>
void many_tokens(const StateArgs& args, int64_t head_of_all, int64_t column, Scratch scratch) {
  const int64_t dim = args.dim, width = args.value_dim;
  const int64_t b = head_of_all / args.heads, h = head_of_all % args.heads;
  const int count = int(width - column < kColumns ? width - column : kColumns);
  float* slab = scratch.take<float>(dim * kColumns);
  StateToken both[2] = {{&scratch, dim}, {&scratch, dim}};
  alignas(64) float added[kColumns] = {}, asked[kColumns], found[kColumns] = {};

  // a state [D, V], or [V, D]
  const int64_t row = args.transposed ? 1 : width, step = args.transposed ? dim : 1;
  const int64_t first = head_of_all * dim * width + column * step;
  for (int64_t d = 0; d < dim; ++d) {
    float* to = slab + d * kColumns;
    for (int i = 0; i < kColumns; ++i)
      to[i] = args.state != nullptr && i < count ? args.state[first + d * row + i * step] : 0.0f;
  }
  const int64_t tokens = args.lengths != nullptr ? args.lengths[b] : args.tokens;
  if (tokens > 0) take_token<T>(args, b, h, 0, both[0]);
  if (kDelta && tokens > 0)
    for (int64_t d = 0; d < dim; ++d) {
      const vf by = splat(both[0].found[d]);
      for (int i = 0; i < kColumns; i += W)
        store(found + i, load(found + i) + load(slab + d * kColumns + i) * by);
    }
  for (int64_t t = 0; t < tokens; ++t) {
    const StateToken now = both[t % 2], next = both[1 - t % 2];
    const bool last = t + 1 == tokens;
    if (!last) take_token<T>(args, b, h, t + 1, next);
    const T* value = value_of<T>(args, b, h, t) + column;
    const float beta = kDelta ? beta_of(args, b, h, t) : 1.0f;
    for (int i = 0; i < count; ++i)
      added[i] = kDelta ? beta * (to_float(value[i]) - found[i]) : to_float(value[i]);
    pass<kDelta>(slab, dim, now, added, last ? now.found : next.found, asked, found);
    T* out = out_of<T>(args, b, h, t) + column;
    for (int i = 0; i < count; ++i) from_float(asked[i] * args.scale, out + i);
  }
  for (int64_t t = tokens; t < args.tokens; ++t)
    for (int i = 0; i < count; ++i) from_float(0.0f, out_of<T>(args, b, h, t) + column + i);
  for (int64_t d = 0; d < dim; ++d)
    for (int i = 0; i < count; ++i) args.after[first + d * row + i * step] = slab[d * kColumns + i];
}

// A part of a row that is a vector or less: what(x) for each of its vectors, and what it gives is
// stored there.
template <class What>
HEADWISE_INLINE void each_vector(const float* from, float* to, int64_t width, const What& what) {
  int64_t i = 0;
  for (; i + W <= width; i += W) store(to + i, what(load(from + i), i, W));
  if (i == width) return;
  const int count = int(width - i);
  const vf x = what(load_part(from + i, count), i, count);
  for (int lane = 0; lane < count; ++lane) to[i + lane] = x[lane];
}

HEADWISE_INLINE vf some(const float* from, int count) {
  return count == W ? load(from) : load_part(from, count);
}

// One token and C vectors of columns, or a part of one, of a whole state [D, V]: they come from
// memory once, and the second time from the first-level cache. Meanwhile `ahead`, two cache lines
// a row, is asked for.
template <int C>
HEADWISE_INLINE void columns(const float* state, float* after, int64_t dim, int64_t width,
                             int count, StateToken now, const float* beta, const float* value,
                             const float* ahead, float* asked) {
  vf added[C], sums[C];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
    added[c] = load(value + c * W);
    sums[c] = vf{};
  }
  if (beta != nullptr) {
    vf found[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) found[c] = vf{};
    for (int64_t d = 0; d < dim; ++d) {
      const vf by = splat(now.found[d]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c)
        found[c] += some(state + d * width + c * W, C > 1 ? W : count) * by;
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) added[c] = *beta * (added[c] - found[c]);
  }
  for (int64_t d = 0; d < dim; ++d) {
    const vf kept = splat(now.kept[d]), key = splat(now.key[d]), query = splat(now.query[d]);
    if (ahead != nullptr) {
      prefetch(ahead + d * kColumns);
      prefetch(ahead + d * kColumns + 16);
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const int64_t at = d * width + c * W;
      const vf x = some(state + at, C > 1 ? W : count) * kept + key * added[c];
      if (C > 1 || count == W)
        store(after + at, x);
      else
        for (int lane = 0; lane < count; ++lane) after[at + lane] = x[lane];
      sums[c] += x * query;
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) store(asked + c * W, sums[c]);
}

template <class T>
void one_token(const StateArgs& args, int64_t head_of_all, Scratch scratch) {
  const int64_t dim = args.dim, width = args.value_dim;
  const int64_t b = head_of_all / args.heads, h = head_of_all % args.heads;
  const StateToken now(&scratch, dim);
  alignas(64) float value[kColumns] = {}, asked[kColumns];
  take_token<T>(args, b, h, 0, now);
  const float* state = args.state + head_of_all * dim * width;
  float* after = args.after + head_of_all * dim * width;
  const float* next = head_of_all + 1 < args.batch * args.heads ? state + dim * width : nullptr;
  const float beta = args.beta != nullptr ? beta_of(args, b, h, 0) : 1.0f;
  const T* values = value_of<T>(args, b, h, 0);
  T* out = out_of<T>(args, b, h, 0);
  for (int64_t column = 0; column < width;) {
    const bool whole = column + kColumns <= width;
    const int64_t left = width - column;
    const int count = int(whole ? kColumns : left < W ? left : W);
    for (int i = 0; i < count; ++i) value[i] = to_float(values[column + i]);
    const float* of_beta = args.beta != nullptr ? &beta : nullptr;
    const float* ahead = whole && next != nullptr ? next + column * dim : nullptr;
    if (whole)
      columns<kColumns / W>(state + column, after + column, dim, width, W, now, of_beta, value,
                            ahead, asked);
    else
      columns<1>(state + column, after + column, dim, width, count, now, of_beta, value, ahead,
                 asked);
    for (int i = 0; i < count; ++i) from_float(asked[i] * args.scale, out + column + i);
    column += count;
  }
}

// The same of a state [V, D]: a row has all that its value needs.
template <class T>
void one_token_transposed(const StateArgs& args, int64_t head_of_all, Scratch scratch) {
  const int64_t dim = args.dim, width = args.value_dim;
  const int64_t b = head_of_all / args.heads, h = head_of_all % args.heads;
  const StateToken now(&scratch, dim);
  take_token<T>(args, b, h, 0, now);
  const T* value = value_of<T>(args, b, h, 0);
  T* out = out_of<T>(args, b, h, 0);
  for (int64_t v = 0; v < width; ++v) {
    const float* state = args.state + (head_of_all * width + v) * dim;
    float* after = args.after + (head_of_all * width + v) * dim;
    float adds = to_float(value[v]);
    if (args.beta != nullptr) {
      vf found = vf{};
      for (int64_t d = 0; d < dim; d += W) {
        const int count = int(dim - d < W ? dim - d : W);
        found += some(state + d, count) * some(now.found + d, count);
      }
      adds = beta_of(args, b, h, 0) * (adds - sum(found));
    }
    vf asked = vf{};
    each_vector(state, after, dim, [&](vf x, int64_t d, int count) HEADWISE_LAMBDA {
      x = x * some(now.kept + d, count) + some(now.key + d, count) * splat(adds);
      asked += x * some(now.query + d, count);
      return x;
    });
    from_float(sum(asked) * args.scale, out + v);
  }
}

template <class T>
void linear_attention(const StateArgs& args, int64_t task, char* memory) {
  if (args.streamed()) {
    if (args.transposed)
      one_token_transposed<T>(args, task, {memory});
    else
      one_token<T>(args, task, {memory});
    return;
  }
  const int64_t blocks = args.blocks();
  if (args.beta != nullptr)
    many_tokens<T, true>(args, task / blocks, task % blocks * kColumns, {memory});
  else
    many_tokens<T, false>(args, task / blocks, task % blocks * kColumns, {memory});
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
