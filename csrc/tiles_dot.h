// The tile kernel's products of pairs of bf16 by AVX-512 BF16.
#pragma once

#include "tiles_pairs.h"

namespace headwise {
namespace HEADWISE_ISA {

// Weights: [row tile][kBlock/2][16][2]. O: [row][V].
struct PairEngine : PairLayout {
  static HEADWISE_INLINE float* columns(float* sum, int64_t width, int64_t row, int64_t column) {
    return sum + row * width + column;
  }

  // The weights of one row tile for 16 pairs of keys, from pair `at` on.
  static HEADWISE_INLINE void keep(const __m512i* pair, int at, bf16* weights) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(weights + (at + i) * 32, pair[i]);
  }

  template <int V, int N>
  static HEADWISE_INLINE void score(const bf16* query, int64_t tile, Block<bf16> keys, int64_t dim,
                                    bool first, float* score, Ahead& ahead) {
    __m512 total[N][V];
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        total[k][v] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(score + v * kBlock * W + k * W);
    for (int64_t d = 0; d < dim; d += 2) {
      if (d % 8 == 0) ahead.tick();
      __m512i row[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) row[v] = _mm512_loadu_si512(query + v * tile + d * 16);
#pragma GCC unroll 8
      for (int k = 0; k < N; ++k) {
        int32_t pair;
        __builtin_memcpy(&pair, keys.rows + k * keys.stride + d, sizeof pair);
        const __m512i one = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
          total[k][v] = _mm512_dpbf16_ps(total[k][v], (__m512bh)row[v], (__m512bh)one);
      }
    }
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) _mm512_storeu_ps(score + v * kBlock * W + k * W, total[k][v]);
  }

  static void scores(const bf16* query, int64_t tile, int64_t tiles, Block<bf16> keys, int64_t dim,
                     bool first, float* to, Ahead& ahead) {
    for (int k = 0; k < kBlock; k += 16) {
      int64_t t = 0;
      for (; t + 4 <= tiles; t += 4)
        for (int n = k; n < k + 16; n += 4) {
          const Block<bf16> some = {keys.rows + n * keys.stride, keys.stride};
          float* at = to + t * kBlock * W + n * W;
          score<4, 4>(query + t * tile, tile, some, dim, first, at, ahead);
        }
      for (; t < tiles; ++t)
        for (int n = k; n < k + 16; n += 8) {
          const Block<bf16> some = {keys.rows + n * keys.stride, keys.stride};
          float* at = to + t * kBlock * W + n * W;
          score<1, 8>(query + t * tile, tile, some, dim, first, at, ahead);
        }
    }
  }

  template <int R, int C>
  static HEADWISE_INLINE void weigh_tile(const bf16* weight, const bf16* value, int pairs,
                                         float* sum, int64_t width, Ahead& ahead) {
    __m512 total[R][C];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) total[r][c] = _mm512_setzero_ps();
    for (int j = 0; j < pairs; ++j) {
      ahead.tick();
      __m512i column[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) column[c] = _mm512_load_si512(value + c * kValueTile + j * 32);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        __builtin_memcpy(&pair, weight + j * 32 + r * 2, sizeof pair);
        const __m512i one = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c)
          total[r][c] = _mm512_dpbf16_ps(total[r][c], (__m512bh)one, (__m512bh)column[c]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        float* at = sum + r * width + c * 16;
        _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), total[r][c]));
      }
  }

  // The columns of O, from `sum` on, that `pack_values` has packed the values of.
  static void weigh(const bf16* weights, int64_t tiles, const bf16* values, int count, int columns,
                    int64_t width, float* sum, Ahead& ahead) {
    const int pairs = (count + 1) / 2;
    for (int64_t row = 0; row < tiles * 16; row += 4) {
      const bf16* from = weights + row / 16 * kBlock * 16 + row % 16 * 2;
      if (columns > 32)
        weigh_tile<4, 4>(from, values, pairs, sum + row * width, width, ahead);
      else
        weigh_tile<4, 2>(from, values, pairs, sum + row * width, width, ahead);
    }
  }
};

}  // namespace HEADWISE_ISA
}  // namespace headwise
