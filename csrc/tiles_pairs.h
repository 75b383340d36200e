// What the tile kernel's two engines for bf16 share: queries as pairs, [row tile][D/2][16][2], and
// values as pairs, [16 columns][kBlock/2][16][2].
#pragma once

#include "rows.h"

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

  // The weights of 16 rows for two keys as pairs of bf16, one per row.
  static HEADWISE_INLINE __m512i pairs(vf even, vf odd) {
    alignas(64) static const uint16_t kTurns[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                    21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                    11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    return _mm512_permutexvar_epi16(_mm512_load_si512(kTurns), (__m512i)both);
  }
};

}  // namespace HEADWISE_ISA
}  // namespace headwise
