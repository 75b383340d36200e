// Products of few rows with int8 keys and values by pairs of 16-bit integers, which a processor
// with AVX2 multiplies and adds twice as fast as floats.
//
// Queries and weights are rounded to 16 bits with one scale per row and block of keys: an error of
// 2^-16 of the largest, where the keys and values themselves were rounded to 2^-8.
#pragma once

#include "rows.h"

namespace headwise {
namespace HEADWISE_ISA {

// What weights of a block are to be known by: what an integer stands for, and their sum.
struct Whole {
  float unit;
  int32_t sum;
};

#if defined(__AVX2__)
constexpr bool kHasIntegers = true;

// Adds to a running sum where it is: GCC moves sums from register to register in loops with more
// than one way out, which takes a third longer.
HEADWISE_INLINE void add_to(__m256i& total, __m256i x) {
  asm("vpaddd %1, %0, %0" : "+x"(total) : "x"(x));
}

// Rounds `count` floats, a multiple of 16, to integers up to `most`; returns what an integer stands
// for, and adds the integers up. Where a float is no number, an integer stands for none.
HEADWISE_INLINE float to_integers(const float* from, int64_t count, float most, int16_t* to,
                                  int32_t* sum) {
  __m256 high = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
  const __m256 sign = _mm256_set1_ps(-0.0f);
  for (int64_t at = 0; at < count; at += 8) {
    const __m256 x = _mm256_loadu_ps(from + at);
    high = _mm256_max_ps(high, _mm256_andnot_ps(sign, x));
    odd = _mm256_or_ps(odd, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  }
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(high), _mm256_extractf128_ps(high, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  const float top = _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  if (_mm256_movemask_ps(odd) != 0 || top > 3e38f) {
    __builtin_memset(to, 0, sizeof(int16_t) * count);
    *sum = 0;
    return __builtin_nanf("");
  }
  // what is below can be nothing beside any other number
  const __m256 factor = _mm256_set1_ps(top > 1e-30f ? most / top : 0.0f);
  __m256i total = _mm256_setzero_si256();
  for (int64_t at = 0; at < count; at += 16) {
    const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + at), factor));
    const __m256i next = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + at + 8), factor));
    total = _mm256_add_epi32(total, _mm256_add_epi32(low, next));
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, next), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + at), both);
  }
  __m128i part = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  part = _mm_add_epi32(part, _mm_shuffle_epi32(part, 0x4e));
  *sum = _mm_cvtsi128_si32(_mm_add_epi32(part, _mm_shuffle_epi32(part, 0xb1)));
  return top / most;
}

// The sums of all lanes of two vectors, as floats.
HEADWISE_INLINE void store_sums(__m256i a, __m256i b, float* to) {
  const __m256i both = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_castps_si128(_mm_cvtepi32_ps(x)));
}

// The largest integer of a query: 32 bits are to hold the sum of its products with -128 to 127.
HEADWISE_INLINE float most_of_query(int64_t dim) { return dim > 512 ? 16383.0f : 32767.0f; }
constexpr float kMostOfWeight = 32767.0f;

// The scores of R rows and 4 keys, without any scale.
// query: R rows `query_stride` apart, zero-padded.
template <int R>
HEADWISE_INLINE void score_integers(const int16_t* query, int64_t query_stride,
                                    const unsigned char* const* keys, int64_t dim, float* score,
                                    Ahead& ahead) {
  constexpr int N = R > 1 ? 2 : 4;  // sums are to stay in registers
#pragma GCC unroll 2
  for (int first = 0; first < 4; first += N) {
    __m256i total[R][N];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) total[r][k] = _mm256_setzero_si256();
    const auto add = [&](int64_t at, const __m256i* key) HEADWISE_LAMBDA {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m256i row =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(query + r * query_stride + at));
#pragma GCC unroll 4
        for (int k = 0; k < N; ++k) add_to(total[r][k], _mm256_madd_epi16(row, key[k]));
      }
    };
    int64_t at = 0;
    for (; at + 16 <= dim; at += 16) {
      if (N == 4 || at % 32 == 0) ahead.tick();
      __m256i key[N];
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k)
        key[k] = _mm256_cvtepi8_epi16(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(keys[first + k] + at)));
      add(at, key);
    }
    if (at < dim) {
      __m256i key[N];
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) {
        alignas(16) unsigned char some[16] = {};
        __builtin_memcpy(some, keys[first + k] + at, dim - at);
        key[k] = _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(some)));
      }
      add(at, key);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int k = 0; k < N; k += 2)
        store_sums(total[r][k], total[r][k + 1], score + r * kBlock + first + k);
  }
}

// sum[r] = sum[r] * decay[r] + weights[r] times the values, in 32 columns from `column` on, or in
// half of them: 0 to 7 and 16 to 23 of them for FIRST of 0, the others for 1. `count` is even.
// PART: only `part` columns exist.
template <int R, int FIRST, int HALVES, bool PART>
HEADWISE_INLINE void weigh_integers_tile(const int16_t* weights, const Whole* whole,
                                         const unsigned char* const* values, int count,
                                         int64_t column, int64_t part, const float* decay,
                                         float* sum, int64_t sum_stride, Ahead& ahead) {
  __m256i total[R][2 * HALVES];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 2 * HALVES; ++c) total[r][c] = _mm256_setzero_si256();
  const __m256i flip = _mm256_set1_epi8(char(0x80)), zero = _mm256_setzero_si256();
  for (int j = 0; j < count; j += 2) {
    if (HALVES == 2 || j % 4 == 0) ahead.tick();
    __m256i even, odd;
    if constexpr (PART) {
      alignas(32) unsigned char some[64] = {};
      __builtin_memcpy(some, values[j] + column, part);
      __builtin_memcpy(some + 32, values[j + 1] + column, part);
      even = _mm256_load_si256(reinterpret_cast<const __m256i*>(some));
      odd = _mm256_load_si256(reinterpret_cast<const __m256i*>(some + 32));
    } else {
      even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values[j] + column));
      odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values[j + 1] + column));
    }
    __m256i pair[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      int32_t both;
      __builtin_memcpy(&both, weights + r * kBlock + j, sizeof both);
      pair[r] = _mm256_set1_epi32(both);
    }
#pragma GCC unroll 2
    for (int h = 0; h < HALVES; ++h) {
      // a column of both rows side by side, with 128 added, which makes them positive
      const __m256i mixed =
          FIRST + h == 0 ? _mm256_unpacklo_epi8(even, odd) : _mm256_unpackhi_epi8(even, odd);
      const __m256i bytes = _mm256_xor_si256(mixed, flip);
      const __m256i low = _mm256_unpacklo_epi8(bytes, zero);
      const __m256i high = _mm256_unpackhi_epi8(bytes, zero);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        add_to(total[r][2 * h], _mm256_madd_epi16(pair[r], low));
        add_to(total[r][2 * h + 1], _mm256_madd_epi16(pair[r], high));
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const __m256i added = _mm256_set1_epi32(128 * whole[r].sum);
    const __m256 unit = _mm256_set1_ps(whole[r].unit), factor = _mm256_set1_ps(decay[r]);
#pragma GCC unroll 2
    for (int h = 0; h < HALVES; ++h) {
      const __m256i a = total[r][2 * h], b = total[r][2 * h + 1];
      float* at = sum + r * sum_stride + column + 8 * (FIRST + h);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half, at += 16) {
        const __m256i own = half == 0 ? _mm256_permute2x128_si256(a, b, 0x20)
                                      : _mm256_permute2x128_si256(a, b, 0x31);
        const __m256 fresh = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(own, added)), unit);
        _mm256_storeu_ps(at, _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(at), factor), fresh));
      }
    }
  }
}

template <int R>
HEADWISE_INLINE void weigh_integers(const int16_t* weights, const Whole* whole,
                                    const unsigned char* const* values, int count, int64_t dim,
                                    const float* decay, float* sum, int64_t sum_stride,
                                    Ahead& ahead) {
  const auto tile = [&](auto part, int64_t at) HEADWISE_LAMBDA {
    constexpr bool kPart = part.value == 1;
    if constexpr (R <= 2) {
      weigh_integers_tile<R, 0, 2, kPart>(weights, whole, values, count, at, dim - at, decay, sum,
                                          sum_stride, ahead);
    } else {  // sums are to stay in registers
      weigh_integers_tile<R, 0, 1, kPart>(weights, whole, values, count, at, dim - at, decay, sum,
                                          sum_stride, ahead);
      weigh_integers_tile<R, 1, 1, kPart>(weights, whole, values, count, at, dim - at, decay, sum,
                                          sum_stride, ahead);
    }
  };
  int64_t at = 0;
  for (; at + 32 <= dim; at += 32) tile(Number<0>{}, at);
  if (at < dim) tile(Number<1>{}, at);
}
#else
constexpr bool kHasIntegers = false;
#endif

}  // namespace HEADWISE_ISA
}  // namespace headwise
