// The tile kernel's products of pairs of bf16: by AVX-512 BF16, and by AMX where HEADWISE_AMX is
// defined. Queries lie as [row tile][D/2][16][2], values as [16 columns][kBlock/2][16][2].
#pragma once

#include "rows.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

namespace headwise {
namespace HEADWISE_ISA {

// Copies `count` rows from `first` on, and zeros up to kBlock rows.
template <class Rows>
void copy_rows(const Rows& rows, int64_t first, int count, int64_t dim, bf16* to, int64_t pitch) {
  __builtin_memset(to, 0, sizeof(bf16) * kBlock * pitch);
  for (int j = 0; j < count; ++j)
    __builtin_memcpy(to + j * pitch, rows.row(first + j), sizeof(bf16) * dim);
}

// 16 x 16 elements of 32 bits.
HEADWISE_INLINE void transpose(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

struct PairLayout {
  typedef bf16 Element;
  typedef bf16 Weight;
  static constexpr bool kPairs = true;
  static constexpr int kAlign = 32;  // the width of a key that is read in place is a multiple
  // A tile of values, with a line to spare so that tiles do not meet in the same cache sets.
  static constexpr int64_t kValueTile = kBlock * 16 + 32;

  static HEADWISE_INLINE int64_t key_width(int64_t dim) { return padded(dim); }
  static HEADWISE_INLINE int64_t pitch(int64_t dim) { return padded(dim); }
  static HEADWISE_INLINE int64_t value_elements(int64_t) { return 4 * kValueTile; }

  // Queries of up to 16 rows, which begin at the elements `rows` of `base`: [D/2][16][2].
  static void pack_queries(const AttendArgs&, const void* base, const int64_t* rows, int count,
                           int64_t dim, bf16* to) {
    const bf16* from = static_cast<const bf16*>(base);
    for (int64_t d = 0; d < dim; d += 32) {
      __m512i line[16];
#pragma GCC unroll 16
      for (int row = 0; row < 16; ++row)
        line[row] =
            row < count ? load_pairs(from + rows[row] + d, dim - d) : _mm512_setzero_si512();
      transpose(line);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(to + (d / 2 + i) * 32, line[i]);
    }
  }

  // Interleaves pairs of rows of values, 64 columns from `column` on; rows from `count` on are
  // zeros.
  template <class Rows>
  static HEADWISE_INLINE void pack_values(const Rows& rows, int64_t first, int count, int64_t dim,
                                          int64_t column, bf16* to, Ahead& ahead) {
    const int64_t end = dim - column < 64 ? dim - column : 64;
    for (int j = 0; j < kBlock; j += 2) {
      const bool both = j + 1 < count;
      const bf16* even_row = rows.row(first + (j < count ? j : 0)) + column;
      const bf16* odd_row = rows.row(first + (both ? j + 1 : 0)) + column;
      for (int64_t at = 0; at < end; at += 32) {
        const __m512i zero = _mm512_setzero_si512();
        const __m512i even = j < count ? load_pairs(even_row + at, end - at) : zero;
        ahead.tick();
        const __m512i odd = both ? load_pairs(odd_row + at, end - at) : zero;
        __m512i left, right;
        interleave(even, odd, &left, &right);
        bf16* tile = to + at / 16 * kValueTile + j * 16;
        _mm512_store_si512(tile, left);
        ahead.tick();
        _mm512_store_si512(tile + kValueTile, right);
      }
    }
  }

  // The weights of 16 rows for two keys as pairs of bf16, a pair a row.
  static HEADWISE_INLINE __m512i pairs(vf even, vf odd) {
    alignas(64) static const uint16_t kTurns[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                    21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                    11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    return _mm512_permutexvar_epi16(_mm512_load_si512(kTurns), (__m512i)both);
  }
};

#if !defined(HEADWISE_AMX)

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

#else  // HEADWISE_AMX

#define HEADWISE_TILE_ZERO(t) asm volatile("tilezero %%tmm" #t ::: "memory")
#define HEADWISE_TILE_LOAD(t, from, bytes) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(from), "r"(int64_t(bytes)) : "memory")
#define HEADWISE_TILE_STORE(t, to, bytes) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(to), "r"(int64_t(bytes)) : "memory")
// tmm c += tmm a (16 rows of 32) times tmm b (16 pairs of rows of 16)
#define HEADWISE_TILE_DOT(c, a, b) \
  asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory")

// Weights: [row tile][kBlock/32][16][32]. O: [row tile][16 columns][16][16].
struct PairEngine : PairLayout {
  PairEngine() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~PairEngine() { asm volatile("tilerelease" ::: "memory"); }

  static HEADWISE_INLINE float* columns(float* sum, int64_t width, int64_t row, int64_t column) {
    return sum + row / 16 * 16 * width + column / 16 * 256 + row % 16 * 16;
  }

  static HEADWISE_INLINE void keep(__m512i* pair, int at, bf16* weights) {
    transpose(pair);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(weights + at * 32 + i * 32, pair[i]);
  }

  static void scores(const bf16* query, int64_t tile, int64_t tiles, Block<bf16> keys, int64_t dim,
                     bool first, float* to, Ahead& ahead) {
    const int64_t pitch = keys.stride * 2, step = 16 * keys.stride;
    const int64_t next = kBlock * 16;  // floats from a row tile to the next
    int64_t t = 0;
    for (; t + 2 <= tiles; t += 2)
      for (int k = 0; k < kBlock; k += 32) {
        float* at = to + t * next + k * 16;
        const bf16* key = keys.rows + k * keys.stride;
        score_square(query + t * tile, tile, key, pitch, step, dim, first, at, at + next, ahead);
      }
    if (t < tiles)
      score_column(query + t * tile, keys.rows, pitch, step, dim, first, to + t * next, ahead);
  }

  // Two row tiles, 32 keys.
  static HEADWISE_INLINE void score_square(const bf16* row, int64_t tile, const bf16* key,
                                           int64_t pitch, int64_t step, int64_t dim, bool first,
                                           float* at, float* below, Ahead& ahead) {
    open(first, at, below, at + 256, below + 256);
    for (int64_t d = 0; d < dim; d += 32) {
      HEADWISE_TILE_LOAD(6, row + d * 16, 64);
      ahead.tick();
      HEADWISE_TILE_LOAD(4, key + d, pitch);
      ahead.tick();
      HEADWISE_TILE_DOT(0, 4, 6);
      HEADWISE_TILE_LOAD(7, row + tile + d * 16, 64);
      HEADWISE_TILE_DOT(1, 4, 7);
      ahead.tick();
      HEADWISE_TILE_LOAD(5, key + step + d, pitch);
      HEADWISE_TILE_DOT(2, 5, 6);
      ahead.tick();
      HEADWISE_TILE_DOT(3, 5, 7);
    }
    close(at, below, at + 256, below + 256);
  }

  // One row tile, 64 keys.
  static HEADWISE_INLINE void score_column(const bf16* row, const bf16* key, int64_t pitch,
                                           int64_t step, int64_t dim, bool first, float* at,
                                           Ahead& ahead) {
    open(first, at, at + 256, at + 512, at + 768);
    for (int64_t d = 0; d < dim; d += 32) {
      HEADWISE_TILE_LOAD(6, row + d * 16, 64);
      ahead.tick();
      HEADWISE_TILE_LOAD(4, key + d, pitch);
      ahead.tick();
      HEADWISE_TILE_DOT(0, 4, 6);
      ahead.tick();
      HEADWISE_TILE_LOAD(5, key + step + d, pitch);
      ahead.tick();
      HEADWISE_TILE_DOT(1, 5, 6);
      ahead.tick();
      HEADWISE_TILE_LOAD(4, key + 2 * step + d, pitch);
      ahead.tick();
      HEADWISE_TILE_DOT(2, 4, 6);
      ahead.tick();
      HEADWISE_TILE_LOAD(5, key + 3 * step + d, pitch);
      ahead.tick();
      HEADWISE_TILE_DOT(3, 5, 6);
      ahead.tick();
    }
    close(at, at + 256, at + 512, at + 768);
  }

  // Sums in the tiles 0 to 3: from zero, or from what is there; and back.
  static HEADWISE_INLINE void open(bool zero, const float* a, const float* b, const float* c,
                                   const float* d) {
    if (zero) {
      HEADWISE_TILE_ZERO(0);
      HEADWISE_TILE_ZERO(1);
      HEADWISE_TILE_ZERO(2);
      HEADWISE_TILE_ZERO(3);
    } else {
      HEADWISE_TILE_LOAD(0, a, 64);
      HEADWISE_TILE_LOAD(1, b, 64);
      HEADWISE_TILE_LOAD(2, c, 64);
      HEADWISE_TILE_LOAD(3, d, 64);
    }
  }
  static HEADWISE_INLINE void close(float* a, float* b, float* c, float* d) {
    HEADWISE_TILE_STORE(0, a, 64);
    HEADWISE_TILE_STORE(1, b, 64);
    HEADWISE_TILE_STORE(2, c, 64);
    HEADWISE_TILE_STORE(3, d, 64);
  }

  static void weigh(const bf16* weights, int64_t tiles, const bf16* values, int count, int columns,
                    int64_t width, float* sum, Ahead& ahead) {
    const int64_t next = kBlock * 16;  // weights from a row tile to the next
    int64_t t = 0;
    for (; t + 2 <= tiles; t += 2)
      for (int c = 0; c < columns; c += 32) {
        const bf16* value = values + c / 16 * kValueTile;
        float* at = sum + t * 16 * width + c * 16;
        float* below = at + 16 * width;
        open(false, at, at + 256, below, below + 256);
        for (int j = 0; j < count; j += 32) {
          HEADWISE_TILE_LOAD(6, value + j * 16, 64);
          HEADWISE_TILE_LOAD(4, weights + t * next + j * 16, 64);
          HEADWISE_TILE_DOT(0, 4, 6);
          ahead.tick();
          HEADWISE_TILE_LOAD(7, value + kValueTile + j * 16, 64);
          HEADWISE_TILE_DOT(1, 4, 7);
          ahead.tick();
          HEADWISE_TILE_LOAD(5, weights + (t + 1) * next + j * 16, 64);
          HEADWISE_TILE_DOT(2, 5, 6);
          ahead.tick();
          HEADWISE_TILE_DOT(3, 5, 7);
          ahead.tick();
        }
        close(at, at + 256, below, below + 256);
      }
    if (t == tiles) return;
    float* at = sum + t * 16 * width;
    HEADWISE_TILE_LOAD(0, at, 64);
    HEADWISE_TILE_LOAD(1, at + 256, 64);
    if (columns > 32) {
      HEADWISE_TILE_LOAD(2, at + 512, 64);
      HEADWISE_TILE_LOAD(3, at + 768, 64);
    }
    for (int j = 0; j < count; j += 32) {
      const bf16* value = values + j * 16;
      HEADWISE_TILE_LOAD(4, weights + t * next + j * 16, 64);
      HEADWISE_TILE_LOAD(6, value, 64);
      HEADWISE_TILE_DOT(0, 4, 6);
      ahead.tick();
      HEADWISE_TILE_LOAD(7, value + kValueTile, 64);
      HEADWISE_TILE_DOT(1, 4, 7);
      ahead.tick();
      if (columns > 32) {
        HEADWISE_TILE_LOAD(6, value + 2 * kValueTile, 64);
        HEADWISE_TILE_DOT(2, 4, 6);
        ahead.tick();
        HEADWISE_TILE_LOAD(7, value + 3 * kValueTile, 64);
        HEADWISE_TILE_DOT(3, 4, 7);
        ahead.tick();
      }
    }
    HEADWISE_TILE_STORE(0, at, 64);
    HEADWISE_TILE_STORE(1, at + 256, 64);
    if (columns > 32) {
      HEADWISE_TILE_STORE(2, at + 512, 64);
      HEADWISE_TILE_STORE(3, at + 768, 64);
    }
  }
};

#endif  // HEADWISE_AMX

}  // namespace HEADWISE_ISA
}  // namespace headwise

#endif  // AVX-512 BF16
