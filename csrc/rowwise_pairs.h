// Products of few rows with bf16 keys and values by the processor's products of pairs of bf16,
// exact but for the rounding of the sums.
#pragma once

#include "rows.h"

namespace headwise {
namespace HEADWISE_ISA {

#if defined(HEADWISE_PAIRS)
constexpr bool kHasPairs = true;

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
#else
constexpr bool kHasPairs = false;
#endif

}  // namespace HEADWISE_ISA
}  // namespace headwise
