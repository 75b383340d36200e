// Attention of few rows to a context: every key and value is widened once and used for all rows.
//
// A task takes all rows (the queries of all heads of a group) of one kv head over a part of the
// context, in blocks of kBlock keys: scores, running softmax, weighted sum of the values. Online
// softmax: Milakov and Gimelshein 2018, arXiv 1805.02867.
#pragma once

#include "finish.h"
#include "integers.h"

namespace headwise {
namespace HEADWISE_ISA {

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
constexpr bool kHasDot = true;
#else
constexpr bool kHasDot = false;
#endif

// How many reads of `bytes` make a cache line.
constexpr int line_part(int bytes) { return bytes < 64 ? 64 / bytes : 1; }

// The scores of R rows and 4 keys, by floats. query: R rows `query_stride` apart, zero-padded.
template <int R, class Rows>
HEADWISE_INLINE void score_tile(const float* query, int64_t query_stride,
                                const typename Rows::Row* keys, int64_t dim, float* score,
                                Ahead& ahead) {
  // keys at once: sums, a vector of each row and one of a key are to stay in registers
  constexpr int N = R * 5 + 1 <= kRegisters ? 4 : 2;
  vf sum[R][4];
#pragma GCC unroll 2
  for (int first = 0; first < 4; first += N) {
    vf total[R][N];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) total[r][k] = vf{};
    int64_t at = 0;
    for (; at + W <= dim; at += W) {
      if (at % (W * line_part(N * Rows::kBytes)) == 0) ahead.tick();
      vf row[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) row[r] = load(query + r * query_stride + at);
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) {
        if (k > 0 && k * Rows::kBytes % 64 == 0) ahead.tick();
        const vf key = Rows::load(keys[first + k], at);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) total[r][k] += row[r] * key;
      }
    }
    if (at < dim) {
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) {
        const vf key = Rows::load_part(keys[first + k], at, int(dim - at));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) total[r][k] += load(query + r * query_stride + at) * key;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) sum[r][first + k] = total[r][k];
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    store(score + r * kBlock, sums(sum[r][0], sum[r][1], sum[r][2], sum[r][3]));
}

// Keys whose weighted values are summed apart before they join the sum of all. Where a product is
// rounded on its own (no fused multiply-add) fewer, which makes up for it.
#if defined(__FMA__) || defined(__aarch64__)
constexpr int kSumRun = kBlock;
#else
constexpr int kSumRun = 16;
#endif

// sum[r] = sum[r] * decay[r] + weights[r] times the values, in C vectors of columns from `column`.
// PART: only `part` columns of a single vector exist.
template <int R, int C, bool PART, class Rows>
HEADWISE_INLINE void weigh_tile(const float* weights, const typename Rows::Row* values, int count,
                                int64_t column, int part, const float* decay, float* sum,
                                int64_t sum_stride, Ahead& ahead) {
  for (int from = 0; from < count; from += kSumRun) {
    vf total[R][C];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) total[r][c] = vf{};
    const int to = count - from < kSumRun ? count : from + kSumRun;
    for (int j = from; j < to; ++j) {
      if (j % line_part(C * Rows::kBytes) == 0) ahead.tick();
      vf weight[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) weight[r] = splat(weights[r * kBlock + j]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        if (c > 0 && c * Rows::kBytes % 64 == 0) ahead.tick();
        const vf value =
            PART ? Rows::load_part(values[j], column, part) : Rows::load(values[j], column + c * W);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) total[r][c] += weight[r] * value;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        float* at = sum + r * sum_stride + column + c * W;
        store(at, load(at) * (from == 0 ? decay[r] : 1.0f) + total[r][c]);
      }
  }
}

template <int R, class Rows>
HEADWISE_INLINE void weigh(const float* weights, const typename Rows::Row* values, int count,
                           int64_t dim, const float* decay, float* sum, int64_t sum_stride,
                           Ahead& ahead) {
  // sums, a weight of each row and a vector of values are to stay in registers
  constexpr int C = R * 9 + 1 <= kRegisters ? 8 : R * 5 + 1 <= kRegisters ? 4 : 2;
  int64_t at = 0;
  for (; at + C * W <= dim; at += C * W)
    weigh_tile<R, C, false, Rows>(weights, values, count, at, 0, decay, sum, sum_stride, ahead);
  for (; at + 2 * W <= dim; at += 2 * W)
    weigh_tile<R, 2, false, Rows>(weights, values, count, at, 0, decay, sum, sum_stride, ahead);
  for (; at + W <= dim; at += W)
    weigh_tile<R, 1, false, Rows>(weights, values, count, at, 0, decay, sum, sum_stride, ahead);
  if (at < dim)
    weigh_tile<R, 1, true, Rows>(weights, values, count, at, int(dim - at), decay, sum, sum_stride,
                                 ahead);
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// The same with the processor's products of pairs of bf16, exact but for the sums' rounding.

template <int R>
HEADWISE_INLINE void score_tile_dot(const bf16* query, int64_t query_stride,
                                    const bf16* const* keys, int64_t dim, float* score,
                                    Ahead& ahead) {
  __m512 total[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) total[r][k] = _mm512_setzero_ps();
  for (int64_t at = 0; at < dim; at += 32) {
    __m512i row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) row[r] = _mm512_loadu_si512(query + r * query_stride + at);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      ahead.tick();
      const __m512i key = load_pairs(keys[k] + at, dim - at);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        total[r][k] = _mm512_dpbf16_ps(total[r][k], (__m512bh)row[r], (__m512bh)key);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    store(score + r * kBlock,
          sums((vf)total[r][0], (vf)total[r][1], (vf)total[r][2], (vf)total[r][3]));
}

// C pairs of vectors of columns; `count` is even, weights are pairs of bf16.
template <int R, int C>
HEADWISE_INLINE void weigh_tile_dot(const bf16* weights, const bf16* const* values, int count,
                                    int64_t column, int64_t dim, const float* decay, float* sum,
                                    int64_t sum_stride, Ahead& ahead) {
  __m512 total[R][2 * C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < 2 * C; ++c) total[r][c] = _mm512_setzero_ps();
  for (int j = 0; j < count; j += 2) {
    __m512i value[2 * C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const int64_t at = column + 32 * c;
      const __m512i even = load_pairs(values[j] + at, dim - at);
      ahead.tick();
      const __m512i odd = load_pairs(values[j + 1] + at, dim - at);
      interleave(even, odd, value + 2 * c, value + 2 * c + 1);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, weights + r * kBlock + j, sizeof pair);
      const __m512i weight = _mm512_set1_epi32(pair);
      if (r % 2 == 0) ahead.tick();
#pragma GCC unroll 8
      for (int c = 0; c < 2 * C; ++c)
        total[r][c] = _mm512_dpbf16_ps(total[r][c], (__m512bh)weight, (__m512bh)value[c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < 2 * C; ++c) {
      float* at = sum + r * sum_stride + column + 16 * c;
      _mm512_storeu_ps(at,
                       _mm512_fmadd_ps(_mm512_loadu_ps(at), _mm512_set1_ps(decay[r]), total[r][c]));
    }
}

template <int R>
HEADWISE_INLINE void weigh_dot(const bf16* weights, const bf16* const* values, int count,
                               int64_t dim, const float* decay, float* sum, int64_t sum_stride,
                               Ahead& ahead) {
  constexpr int C = R <= 2 ? 4 : 2;
  int64_t at = 0;
  for (; at + 32 * C <= dim; at += 32 * C)
    weigh_tile_dot<R, C>(weights, values, count, at, dim, decay, sum, sum_stride, ahead);
  for (; at < dim; at += 32)
    weigh_tile_dot<R, 1>(weights, values, count, at, dim, decay, sum, sum_stride, ahead);
}
#endif  // AVX-512 BF16

// Calls what(Number<R>, row) for the rows in groups of 4, then the rest of 1 to 3.
template <class What>
HEADWISE_INLINE void by_rows(int64_t rows, const What& what) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) what(Number<4>{}, row);
  if (rows - row == 3) what(Number<3>{}, row);
  if (rows - row == 2) what(Number<2>{}, row);
  if (rows - row == 1) what(Number<1>{}, row);
}

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

// The body of a task. KeyRows and ValueRows say how rows are found and widened.
template <class KeyRows, class ValueRows>
void attend_rowwise(const Extras& at, const Plan& plan, const KeyRows& keys,
                    const ValueRows& values, char* memory) {
  constexpr bool kDot = kHasDot && Same<typename KeyRows::Element, bf16>::value &&
                        Same<typename ValueRows::Element, bf16>::value;
  constexpr bool kIntegers = kHasIntegers && KeyRows::kBits == 8 && ValueRows::kBits == 8;
  const AttendArgs& args = *at.args;
  const int64_t rows = at.rows, dim = args.dim, value_dim = args.value_dim;
  const int64_t query_width = padded(dim), width = padded(value_dim);
  Scratch scratch = {memory};
  float* top = scratch.take<float>(rows);
  float* total = scratch.take<float>(rows);
  float* decay = scratch.take<float>(rows);
  float* score = scratch.take<float>(rows * kBlock);
  [[maybe_unused]] bf16* weights = scratch.take<bf16>(rows * kBlock);
  [[maybe_unused]] int16_t* whole = reinterpret_cast<int16_t*>(weights);
  float* sum = scratch.take<float>(rows * width);
  Segments ended(rows, width, &scratch);
  const auto columns = [&](float* of, int64_t row, int64_t v) HEADWISE_LAMBDA {
    return of + row * width + v;
  };
  float* row_sum = scratch.take<float>(2 * width);
  float* query = scratch.take<float>(rows * query_width);
  bf16* narrow = reinterpret_cast<bf16*>(query);
  // a row's integers lie at the beginning of its floats
  [[maybe_unused]] const int16_t* query_whole = reinterpret_cast<const int16_t*>(query);
  [[maybe_unused]] float* query_unit = scratch.take<float>(rows);
  [[maybe_unused]] Whole* weights_whole = scratch.take<Whole>(rows);

  for (int64_t row = 0; row < rows; ++row) {
    top[row] = -kInfinity;
    total[row] = 0.0f;
    const int64_t offset = at.batch * args.query_batch + at.head(row) * args.query_head +
                           at.query(row) * args.query_row;
    // unscaled, which is exact: the scale is applied to the scores
    if constexpr (kDot) {
      const bf16* from = static_cast<const bf16*>(args.query) + offset;
      for (int64_t d = 0; d < query_width; ++d)
        narrow[row * query_width + d] = d < dim ? from[d] : bf16{0};
    } else {
      with_dtype(args.dtype, args.query, [&](const auto* base) HEADWISE_LAMBDA {
        for (int64_t d = 0; d < query_width; ++d)
          query[row * query_width + d] = d < dim ? to_float(base[offset + d]) : 0.0f;
      });
      if constexpr (KeyRows::kBits == 4) rotate_row(query + row * query_width, dim);
#if defined(__AVX2__)
      if constexpr (kIntegers) {
        float* own = query + row * query_width;
        int32_t unused;
        query_unit[row] = to_integers(own, query_width, most_of_query(dim),
                                      reinterpret_cast<int16_t*>(own), &unused);
      }
#endif
    }
  }
  __builtin_memset(sum, 0, sizeof(float) * rows * width);

  const Span span = at.span();
  const int64_t base = at.base();
  const bool plain = at.plain();
  for (int64_t block = span.begin; block < span.end; block += kBlock) {
    const int count = span.count(block);
    if (block > span.begin && (block - base) % at.sequence->segment == 0)
      ended.end_segment(top, total, sum, columns);
    if (!at.visible(block, count)) continue;
    const int64_t next = block + kBlock;
    Ahead ahead;
    ahead.add(keys, next, span.coming(next), dim);
    ahead.add(values, next, span.coming(next), value_dim);

    // past the last key the last one stands in; what it gives is hidden
    typename KeyRows::Row key[kBlock];
    typename ValueRows::Row value[kBlock];
    alignas(64) float key_scale[kBlock], value_scale[kBlock];
    for (int j = 0; j < kBlock; ++j) {
      const int64_t index = block + (j < count ? j : count - 1);
      key[j] = keys.row(index);
      value[j] = values.row(index);
      if constexpr (KeyRows::kScaled) key_scale[j] = args.scale * keys.scale(index);
      if constexpr (ValueRows::kScaled) value_scale[j] = values.scale(index);
    }
    for (int k = 0; k < count; k += 4)
      by_rows(rows, [&](auto R, int64_t row) HEADWISE_LAMBDA {
        float* to = score + row * kBlock + k;
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
        if constexpr (kDot) {
          score_tile_dot<R.value>(narrow + row * query_width, query_width, key + k, dim, to, ahead);
          return;
        }
#endif
#if defined(__AVX2__)
        if constexpr (kIntegers) {
          score_integers<R.value>(query_whole + row * 2 * query_width, 2 * query_width, key + k,
                                  dim, to, ahead);
          return;
        }
#endif
        score_tile<R.value, KeyRows>(query + row * query_width, query_width, key + k, dim, to,
                                     ahead);
      });

    const bool edge = span.edge(block);
    for (int64_t row = 0; row < rows; ++row) {
      float* s = score + row * kBlock;
      for (int j = (count + 3) / 4 * 4; j < kBlock; ++j) s[j] = 0.0f;
      const float factor = kIntegers ? query_unit[row] : 1.0f;
      for (int j = 0; j < kBlock; j += W) {
        const vf scale = KeyRows::kScaled ? load(key_scale + j) * factor : splat(args.scale);
        store(s + j, rounded(load(s + j) * scale));
      }
      if (!plain || edge) at.apply(row, block, count, s);
      decay[row] = soften(s, top + row, total + row);
      if constexpr (ValueRows::kScaled)
        for (int j = 0; j < kBlock; j += W) store(s + j, load(s + j) * load(value_scale + j));
#if defined(__AVX2__)
      if constexpr (kIntegers) {
        Whole& known = weights_whole[row];
        known.unit = to_integers(s, kBlock, kMostOfWeight, whole + row * kBlock, &known.sum);
      }
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
      if constexpr (kDot) {
        for (int j = 0; j < kBlock; j += 32)
          _mm512_storeu_si512(
              weights + row * kBlock + j,
              (__m512i)_mm512_cvtne2ps_pbh((__m512)load(s + j + 16), (__m512)load(s + j)));
      }
#endif
    }

    by_rows(rows, [&](auto R, int64_t row) HEADWISE_LAMBDA {
      float* to = sum + row * width;
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
      if constexpr (kDot) {
        weigh_dot<R.value>(weights + row * kBlock, value, (count + 1) / 2 * 2, value_dim,
                           decay + row, to, width, ahead);
        return;
      }
#endif
#if defined(__AVX2__)
      if constexpr (kIntegers) {
        weigh_integers<R.value>(whole + row * kBlock, weights_whole + row, value,
                                (count + 1) / 2 * 2, value_dim, decay + row, to, width, ahead);
        return;
      }
#endif
      weigh<R.value, ValueRows>(score + row * kBlock, value, count, value_dim, decay + row, to,
                                width, ahead);
    });
  }

  if (ended.used) ended.end_segment(top, total, sum, columns);
  const float* all = ended.used ? ended.sum : sum;
  finish(
      at, plan, 0, ended.used ? ended.top : top, ended.used ? ended.total : total,
      [&](int64_t row, float* to) HEADWISE_LAMBDA {
        __builtin_memcpy(to, all + row * width, sizeof(float) * width);
      },
      row_sum);
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
