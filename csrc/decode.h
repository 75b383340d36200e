// Attention of few queries to a long context, one task at a time, over plain pointers.
//
// A task takes all rows (the queries of all heads of a group) of one kv head over a part of the
// context, in blocks of 64 keys: scores, running softmax, weighted sum of the values. Each key and
// value is read from memory once. Partial results are merged by log-sum-exp in a fixed order by the
// task that finishes last. Online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867; split over
// the context: Flash-Decoding, 2023.
//
// How a row of K or V is found and widened to floats is a template parameter (`StridedRows`): pages
// and quantised rows need another such class, not another kernel.
#pragma once

#include "decode_args.h"
#include "simd.h"

namespace headwise {
namespace HEADWISE_ISA {

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
constexpr bool kHasDot = true;
#else
constexpr bool kHasDot = false;
#endif

constexpr float kInfinity = __builtin_inff();
// How far ahead of its use a row is asked for, in bytes.
constexpr int64_t kAhead = 8192;

// Rows of T at a fixed distance.
template <class T>
struct StridedRows {
  typedef T Element;
  typedef const T* Row;
  const T* base;
  int64_t stride;

  HEADWISE_INLINE Row row(int64_t index) const { return base + index * stride; }
  static HEADWISE_INLINE vf load(Row row, int64_t at) { return HEADWISE_ISA::load(row + at); }
  static HEADWISE_INLINE vf load_part(Row row, int64_t at, int count) {
    return HEADWISE_ISA::load_part(row + at, count);
  }
};

// Asks for whole rows ahead of their use, in the order of their addresses.
template <class Rows>
struct Ahead {
  const Rows* rows;
  int64_t next, last, bytes;

  HEADWISE_INLINE void one() {
    if (next > last) return;
    const char* from = reinterpret_cast<const char*>(rows->row(next));
    for (int64_t at = 0; at < bytes; at += 64) prefetch(from + at);
    ++next;
  }
};

struct NoAhead {
  HEADWISE_INLINE void one() {}
};

// The scores of R rows and 4 keys, by floats. query: R rows `query_stride` apart, zero-padded.
template <int R, class Rows>
HEADWISE_INLINE void score_tile(const float* query, int64_t query_stride,
                                const typename Rows::Row* keys, int64_t dim, float* score) {
  vf total[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) total[r][k] = vf{};
  int64_t at = 0;
  for (; at + W <= dim; at += W) {
    vf key[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) key[k] = Rows::load(keys[k], at);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vf row = load(query + r * query_stride + at);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) total[r][k] += row * key[k];
    }
  }
  if (at < dim) {
    vf key[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) key[k] = Rows::load_part(keys[k], at, int(dim - at));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vf row = load(query + r * query_stride + at);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) total[r][k] += row * key[k];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    store(score + r * kBlock, sums(total[r][0], total[r][1], total[r][2], total[r][3]));
}

// sum[r] = sum[r] * decay[r] + weights[r] times the values, in C vectors of columns from `column`.
// PART > 0: only that many columns of a single vector exist.
template <int R, int C, bool PART, class Rows, class Prefetch>
HEADWISE_INLINE void weigh_tile(const float* weights, const typename Rows::Row* values, int count,
                                int64_t column, int part, const float* decay, float* sum,
                                int64_t sum_stride, Prefetch& ahead) {
  vf total[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
      total[r][c] = load(sum + r * sum_stride + column + c * W) * decay[r];
  for (int j = 0; j < count; ++j) {
    ahead.one();
    vf value[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
      value[c] = PART ? Rows::load_part(values[j], column, part)
                      : Rows::load(values[j], column + c * W);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vf weight = splat(weights[r * kBlock + j]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) total[r][c] += weight * value[c];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(sum + r * sum_stride + column + c * W, total[r][c]);
}

template <int R, class Rows, class Prefetch>
HEADWISE_INLINE void weigh(const float* weights, const typename Rows::Row* values, int count,
                           int64_t dim, const float* decay, float* sum, int64_t sum_stride,
                           Prefetch& ahead) {
  constexpr int C = R <= 2 ? 8 : 4;
  NoAhead none;
  int64_t at = 0;
  if (C * W <= dim) {
    weigh_tile<R, C, false, Rows>(weights, values, count, 0, 0, decay, sum, sum_stride, ahead);
    for (at = C * W; at + C * W <= dim; at += C * W)
      weigh_tile<R, C, false, Rows>(weights, values, count, at, 0, decay, sum, sum_stride, none);
  } else {
    for (int j = 0; j < count; ++j) ahead.one();
  }
  for (; at + 2 * W <= dim; at += 2 * W)
    weigh_tile<R, 2, false, Rows>(weights, values, count, at, 0, decay, sum, sum_stride, none);
  for (; at + W <= dim; at += W)
    weigh_tile<R, 1, false, Rows>(weights, values, count, at, 0, decay, sum, sum_stride, none);
  if (at < dim)
    weigh_tile<R, 1, true, Rows>(weights, values, count, at, int(dim - at), decay, sum, sum_stride,
                                 none);
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// The same with the processor's products of pairs of bf16, exact but for the sums' rounding.

HEADWISE_INLINE __m512i load_pairs(const bf16* from, int64_t left) {
  if (left >= 32) return _mm512_loadu_si512(from);
  return _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << left) - 1), from);
}

template <int R>
HEADWISE_INLINE void score_tile_dot(const bf16* query, int64_t query_stride,
                                    const bf16* const* keys, int64_t dim, float* score) {
  __m512 total[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) total[r][k] = _mm512_setzero_ps();
  for (int64_t at = 0; at < dim; at += 32) {
    __m512i key[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) key[k] = load_pairs(keys[k] + at, dim - at);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512i row = _mm512_loadu_si512(query + r * query_stride + at);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k)
        total[r][k] = _mm512_dpbf16_ps(total[r][k], (__m512bh)row, (__m512bh)key[k]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    store(score + r * kBlock,
          sums((vf)total[r][0], (vf)total[r][1], (vf)total[r][2], (vf)total[r][3]));
}

// C pairs of vectors of columns; `count` is even, weights are pairs of bf16.
template <int R, int C, class Prefetch>
HEADWISE_INLINE void weigh_tile_dot(const bf16* weights, const bf16* const* values, int count,
                                    int64_t column, int64_t dim, const float* decay, float* sum,
                                    int64_t sum_stride, Prefetch& ahead) {
  // the elements of two rows in turn, in the order of the columns
  alignas(64) static const uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,
                                                37, 6, 38, 7, 39, 8,  40, 9,  41, 10, 42,
                                                11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  __m512 total[R][2 * C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < 2 * C; ++c)
      total[r][c] = _mm512_mul_ps(_mm512_loadu_ps(sum + r * sum_stride + column + 16 * c),
                                  _mm512_set1_ps(decay[r]));
  for (int j = 0; j < count; j += 2) {
    ahead.one();
    ahead.one();
    __m512i value[2 * C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const int64_t at = column + 32 * c;
      const __m512i even = load_pairs(values[j] + at, dim - at);
      const __m512i odd = load_pairs(values[j + 1] + at, dim - at);
      value[2 * c] = _mm512_permutex2var_epi16(even, low, odd);
      value[2 * c + 1] = _mm512_permutex2var_epi16(even, high, odd);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, weights + r * kBlock + j, sizeof pair);
      const __m512i weight = _mm512_set1_epi32(pair);
#pragma GCC unroll 8
      for (int c = 0; c < 2 * C; ++c)
        total[r][c] = _mm512_dpbf16_ps(total[r][c], (__m512bh)weight, (__m512bh)value[c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < 2 * C; ++c)
      _mm512_storeu_ps(sum + r * sum_stride + column + 16 * c, total[r][c]);
}

template <int R, class Prefetch>
HEADWISE_INLINE void weigh_dot(const bf16* weights, const bf16* const* values, int count,
                               int64_t dim, const float* decay, float* sum, int64_t sum_stride,
                               Prefetch& ahead) {
  constexpr int C = R <= 2 ? 4 : 2;
  NoAhead none;
  int64_t at = 0;
  if (dim >= 32 * C) {
    weigh_tile_dot<R, C>(weights, values, count, 0, dim, decay, sum, sum_stride, ahead);
    for (at = 32 * C; at + 32 * C <= dim; at += 32 * C)
      weigh_tile_dot<R, C>(weights, values, count, at, dim, decay, sum, sum_stride, none);
  } else {
    for (int j = 0; j < count; ++j) ahead.one();
  }
  for (; at < dim; at += 32)
    weigh_tile_dot<R, 1>(weights, values, count, at, dim, decay, sum, sum_stride, none);
}
#endif  // AVX-512 BF16

// Memory of one task, cut out of its thread's scratch.
struct Scratch {
  char* at;
  template <class T>
  HEADWISE_INLINE T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(at);
    at += (int64_t(sizeof(T)) * count + 63) / 64 * 64;
    return taken;
  }
};

// What a block of scores is combined with, for one kv head of one sequence.
struct Extras {
  const DecodeArgs* args;
  const SequencePlan* sequence;
  int64_t batch, kv_head;

  HEADWISE_INLINE int64_t head(int64_t row) const {
    return kv_head * (args->heads / args->kv_heads) + row / args->queries;
  }
  HEADWISE_INLINE int64_t query(int64_t row) const { return row % args->queries; }
  HEADWISE_INLINE int64_t position(int64_t row) const {
    return sequence->length - args->queries + query(row);
  }
  HEADWISE_INLINE const unsigned char* mask(int64_t row, int64_t key) const {
    return args->mask + batch * args->mask_batch + head(row) * args->mask_head +
           query(row) * args->mask_row + key * args->mask_key;
  }

  // Whether some row may see one of the keys; without a mask, always.
  bool visible(int64_t key, int count, int64_t rows) const {
    if (args->mask == nullptr) return true;
    // rows that share a row of the mask are looked at once
    const int64_t shared = args->mask_head == 0 ? args->queries : rows;
    const int64_t distinct = args->mask_head == 0 && args->mask_row == 0 ? 1 : shared;
    for (int64_t row = 0; row < distinct; ++row) {
      const unsigned char* bytes = mask(row, key);
      unsigned any = 0;
      if (args->mask_key == 1) {
        for (int j = 0; j < count; ++j) any |= bytes[j];
      } else {
        for (int j = 0; j < count; ++j) any |= bytes[j * args->mask_key];
      }
      if (any) return true;
    }
    return false;
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
      if (args->bias_dtype == kFloat32) {
        add_bias(static_cast<const float*>(args->bias) + at, count, score);
      } else if (args->bias_dtype == kBfloat16) {
        add_bias(static_cast<const bf16*>(args->bias) + at, count, score);
      } else if (args->bias_dtype == kFloat16) {
        add_bias(static_cast<const f16*>(args->bias) + at, count, score);
      } else {
        const double* bias = static_cast<const double*>(args->bias) + at;
        for (int j = 0; j < count; ++j) score[j] += float(bias[j * args->bias_key]);
      }
    }
    if (args->slopes != nullptr) {
      const vf slope = splat(args->slopes[head(row)]);
      const vf first = splat(float(key - position(row)));
      for (int j = 0; j < kBlock; j += W)
        store(score + j, load(score + j) + slope * (first + float(j) + iota()));
    }
    if (args->mask != nullptr) {
      const unsigned char* bytes = mask(row, key);
      for (int j = 0; j < count; ++j)
        score[j] = bytes[j * args->mask_key] ? score[j] : -kInfinity;
    }
    int64_t low = 0, high = count;
    if (args->causal) {
      const int64_t end = position(row) + 1 - key;
      if (end < high) high = end < 0 ? 0 : end;
      if (args->window > 0) {
        const int64_t begin = position(row) - key - (args->window - 1);
        if (begin > 0) low = begin < kBlock ? begin : kBlock;
      }
    }
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

// Running softmax of one row: the weights replace the scores; what is there must be multiplied by
// the returned decay. A row that has seen nothing keeps a maximum of -inf.
HEADWISE_INLINE float soften(float* score, float* top, float* total) {
  vf high = load(score);
#pragma GCC unroll 4
  for (int j = W; j < kBlock; j += W) high = larger(load(score + j), high);
  const float block = largest(high);
  const float now = block > *top ? block : *top;
  const float shift = now == -kInfinity ? 0.0f : now;
  vf added = vf{};
#pragma GCC unroll 4
  for (int j = 0; j < kBlock; j += W) {
    const vf weight = exp(load(score + j) - shift);
    store(score + j, weight);
    added += weight;
  }
  const float decay = now == *top ? 1.0f : exp(splat(*top - shift))[0];
  *total = *total * decay + sum(added);
  *top = now;
  return decay;
}

// Writes one row of the result: sums of V values over `total`, shifted by `top`; `sink` joins.
template <class T>
HEADWISE_INLINE void finish_row(const DecodeArgs& args, int64_t batch, int64_t head, int64_t query,
                                const float* values, float top, float total) {
  float scale = 1.0f;
  if (args.sinks != nullptr) {
    const float sink = args.sinks[head];
    const float now = sink > top ? sink : top;
    if (now != -kInfinity) {
      scale = top == -kInfinity ? 0.0f : __builtin_expf(top - now);
      total = total * scale + (sink == -kInfinity ? 0.0f : __builtin_expf(sink - now));
      top = now;
    }
  }
  const int64_t index = (batch * args.heads + head) * args.queries + query;
  T* out = static_cast<T*>(args.out) + index * args.value_dim;
  const float factor = total == 0.0f ? 0.0f : scale / total;
  for (int64_t v = 0; v < args.value_dim; ++v) from_float(values[v] * factor, out + v);
  if (args.lse != nullptr)
    args.lse[index] = total == 0.0f ? -kInfinity : top + __builtin_logf(total);
}

// Merges the parts of one kv head of one sequence, in their order, and writes the result.
template <class T>
void merge(const Extras& at, const Plan& plan, int64_t rows, float* values) {
  const DecodeArgs& args = *at.args;
  const int64_t width = padded(args.value_dim), slot = slot_floats(args);
  const float* first =
      plan.partial + (at.sequence->first_slot + at.kv_head * at.sequence->parts) * slot;
  for (int64_t row = 0; row < rows; ++row) {
    float top = -kInfinity, total = 0.0f;
    for (int64_t part = 0; part < at.sequence->parts; ++part) {
      const float other = first[part * slot + 2 * row];
      top = other > top ? other : top;
    }
    for (int64_t v = 0; v < width; ++v) values[v] = 0.0f;
    for (int64_t part = 0; part < at.sequence->parts && top != -kInfinity; ++part) {
      const float* from = first + part * slot;
      if (from[2 * row] == -kInfinity) continue;
      const float factor = __builtin_expf(from[2 * row] - top);
      total += factor * from[2 * row + 1];
      const float* given = from + 2 * rows + row * width;
      for (int64_t v = 0; v < width; v += W)
        store(values + v, load(values + v) + factor * load(given + v));
    }
    finish_row<T>(args, at.batch, at.head(row), at.query(row), values, top, total);
  }
}

// The body of a task. KeyRows and ValueRows say how rows are found and widened.
template <class T, class KeyRows, class ValueRows>
void attend(const Extras& at, const Plan& plan, const KeyRows& keys, const ValueRows& values,
            int64_t part, char* memory) {
  constexpr bool kDot = kHasDot && sizeof(typename KeyRows::Element) == 2 &&
                        __is_same(typename KeyRows::Element, bf16) &&
                        __is_same(typename ValueRows::Element, bf16) && __is_same(T, bf16);
  const DecodeArgs& args = *at.args;
  const SequencePlan& sequence = *at.sequence;
  const int64_t rows = rows_of(args), dim = args.dim, value_dim = args.value_dim;
  const int64_t query_width = padded(dim), width = padded(value_dim);
  Scratch scratch = {memory};
  float* top = scratch.take<float>(rows);
  float* total = scratch.take<float>(rows);
  float* decay = scratch.take<float>(rows);
  float* score = scratch.take<float>(rows * kBlock);
  bf16* weights = scratch.take<bf16>(rows * kBlock);
  float* sum = scratch.take<float>(rows * width);
  float* query = scratch.take<float>(rows * query_width);
  bf16* narrow = reinterpret_cast<bf16*>(query);

  for (int64_t row = 0; row < rows; ++row) {
    top[row] = -kInfinity;
    total[row] = 0.0f;
    const T* from = static_cast<const T*>(args.query) + at.batch * args.query_batch +
                    at.head(row) * args.query_head + at.query(row) * args.query_row;
    // unscaled, which is exact: the scale is applied to the scores
    if constexpr (kDot) {
      for (int64_t d = 0; d < query_width; ++d)
        narrow[row * query_width + d] = d < dim ? from[d] : bf16{0};
    } else {
      for (int64_t d = 0; d < query_width; ++d)
        query[row * query_width + d] = d < dim ? to_float(from[d]) : 0.0f;
    }
  }
  __builtin_memset(sum, 0, sizeof(float) * rows * width);

  const int64_t begin = sequence.start + part * sequence.chunk;
  const int64_t end =
      begin + sequence.chunk < sequence.stop ? begin + sequence.chunk : sequence.stop;
  const int64_t key_bytes = dim * int64_t(sizeof(typename KeyRows::Element));
  const int64_t value_bytes = value_dim * int64_t(sizeof(typename ValueRows::Element));
  Ahead<KeyRows> key_ahead = {&keys, 0, end - 1, key_bytes};
  Ahead<ValueRows> value_ahead = {&values, 0, end - 1, value_bytes};
  const int64_t key_lead = kAhead / key_bytes + 4, value_lead = kAhead / value_bytes + 4;
  const bool plain =
      args.softcap <= 0 && args.bias == nullptr && args.slopes == nullptr && args.mask == nullptr;
  const int64_t first_position = sequence.length - args.queries;
  NoAhead none;

  for (int64_t block = begin; block < end; block += kBlock) {
    const int count = int(end - block < kBlock ? end - block : kBlock);
    if (!at.visible(block, count, rows)) continue;
    if (key_ahead.next < block + key_lead) key_ahead.next = block + key_lead;
    if (value_ahead.next < block + value_lead) value_ahead.next = block + value_lead;

    // past the last key the last one stands in; what it gives is hidden
    typename KeyRows::Row key[kBlock];
    typename ValueRows::Row value[kBlock];
    for (int j = 0; j < kBlock; ++j) {
      const int64_t index = block + (j < count ? j : count - 1);
      key[j] = keys.row(index);
      value[j] = values.row(index);
    }
    for (int k = 0; k < count; k += 4) {
      for (int i = 0; i < 4; ++i) key_ahead.one();
      int64_t row = 0;
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
      if constexpr (kDot) {
        const int64_t pitch = query_width;
        for (; row + 4 <= rows; row += 4)
          score_tile_dot<4>(narrow + row * pitch, pitch, key + k, dim, score + row * kBlock + k);
        const bf16* rest = narrow + row * pitch;
        float* to = score + row * kBlock + k;
        if (rows - row == 3) score_tile_dot<3>(rest, pitch, key + k, dim, to);
        if (rows - row == 2) score_tile_dot<2>(rest, pitch, key + k, dim, to);
        if (rows - row == 1) score_tile_dot<1>(rest, pitch, key + k, dim, to);
        continue;
      }
#endif
      const int64_t pitch = query_width;
      for (; row + 4 <= rows; row += 4)
        score_tile<4, KeyRows>(query + row * pitch, pitch, key + k, dim, score + row * kBlock + k);
      const float* rest = query + row * pitch;
      float* to = score + row * kBlock + k;
      if (rows - row == 3) score_tile<3, KeyRows>(rest, pitch, key + k, dim, to);
      if (rows - row == 2) score_tile<2, KeyRows>(rest, pitch, key + k, dim, to);
      if (rows - row == 1) score_tile<1, KeyRows>(rest, pitch, key + k, dim, to);
    }

    const bool edge = count < kBlock || (args.causal && block + count - 1 > first_position) ||
                      (args.window > 0 &&
                       block <= sequence.length - 1 - args.window);
    for (int64_t row = 0; row < rows; ++row) {
      float* s = score + row * kBlock;
      for (int j = (count + 3) / 4 * 4; j < kBlock; ++j) s[j] = 0.0f;
      for (int j = 0; j < kBlock; j += W) store(s + j, load(s + j) * args.scale);
      if (!plain || edge) at.apply(row, block, count, s);
      decay[row] = soften(s, top + row, total + row);
      if constexpr (kDot) {
        for (int j = 0; j < kBlock; ++j) from_float(s[j], weights + row * kBlock + j);
      }
    }

    int64_t row = 0;
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    if constexpr (kDot) {
      const int even = (count + 1) / 2 * 2;
      for (; row + 4 <= rows; row += 4) {
        const bf16* w = weights + row * kBlock;
        if (row == 0)
          weigh_dot<4>(w, value, even, value_dim, decay, sum, width, value_ahead);
        else
          weigh_dot<4>(w, value, even, value_dim, decay + row, sum + row * width, width, none);
      }
      const bf16* w = weights + row * kBlock;
      float* to = sum + row * width;
      if (rows - row == 3)
        weigh_dot<3>(w, value, even, value_dim, decay + row, to, width, value_ahead);
      if (rows - row == 2)
        weigh_dot<2>(w, value, even, value_dim, decay + row, to, width, value_ahead);
      if (rows - row == 1)
        weigh_dot<1>(w, value, even, value_dim, decay + row, to, width, value_ahead);
      continue;
    }
#endif
    for (; row + 4 <= rows; row += 4) {
      const float* w = score + row * kBlock;
      if (row == 0)
        weigh<4, ValueRows>(w, value, count, value_dim, decay, sum, width, value_ahead);
      else
        weigh<4, ValueRows>(w, value, count, value_dim, decay + row, sum + row * width, width,
                            none);
    }
    const float* w = score + row * kBlock;
    float* to = sum + row * width;
    if (rows - row == 3)
      weigh<3, ValueRows>(w, value, count, value_dim, decay + row, to, width, value_ahead);
    if (rows - row == 2)
      weigh<2, ValueRows>(w, value, count, value_dim, decay + row, to, width, value_ahead);
    if (rows - row == 1)
      weigh<1, ValueRows>(w, value, count, value_dim, decay + row, to, width, value_ahead);
  }

  if (sequence.parts == 1) {
    for (int64_t row = 0; row < rows; ++row)
      finish_row<T>(args, at.batch, at.head(row), at.query(row), sum + row * width, top[row],
                    total[row]);
    return;
  }
  float* to = plan.partial + (sequence.first_slot + at.kv_head * sequence.parts + part) *
                                 slot_floats(args);
  for (int64_t row = 0; row < rows; ++row) {
    to[2 * row] = top[row];
    to[2 * row + 1] = total[row];
  }
  __builtin_memcpy(to + 2 * rows, sum, sizeof(float) * rows * width);
  int32_t* left = plan.left + at.batch * args.kv_heads + at.kv_head;
  if (__atomic_sub_fetch(left, 1, __ATOMIC_ACQ_REL) == 0) merge<T>(at, plan, rows, sum);
}

template <class T>
void strided_task(const DecodeArgs& args, const Extras& at, const Plan& plan, int64_t part,
                  char* scratch) {
  const StridedRows<T> keys = {static_cast<const T*>(args.key) + at.batch * args.key_batch +
                                   at.kv_head * args.key_head,
                               args.key_row};
  const StridedRows<T> values = {static_cast<const T*>(args.value) + at.batch * args.value_batch +
                                     at.kv_head * args.value_head,
                                 args.value_row};
  attend<T>(at, plan, keys, values, part, scratch);
}

// Runs one task of `plan`.
void decode_task(const DecodeArgs& args, const Plan& plan, int64_t task, char* scratch) {
  int64_t low = 0, high = args.batch - 1;
  while (low < high) {  // the last sequence whose first task is not above this one
    const int64_t middle = (low + high + 1) / 2;
    if (plan.sequences[middle].first_task <= task) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const SequencePlan& sequence = plan.sequences[low];
  const int64_t own = task - sequence.first_task;
  const Extras at = {&args, &sequence, low, own / sequence.parts};
  const int64_t part = own % sequence.parts;
  if (args.dtype == kBfloat16) {
    strided_task<bf16>(args, at, plan, part, scratch);
  } else if (args.dtype == kFloat16) {
    strided_task<f16>(args, at, plan, part, scratch);
  } else {
    strided_task<float>(args, at, plan, part, scratch);
  }
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
