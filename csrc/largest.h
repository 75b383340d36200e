// What of many scores is, or may be, among the largest: the selection itself is in select.cpp.
#pragma once

#include "simd.h"

namespace headwise {
namespace HEADWISE_ISA {

// The largest of each of some groups of `group` scores, NaN aside; returns how many groups. A group
// has a score in every W-th place; what is left over at the end is in none.
inline int64_t group_maxima(const float* scores, int64_t stop, int64_t group, float* to) {
  int64_t groups = 0;
  for (int64_t first = 0; first + group * W <= stop; first += group * W, groups += W) {
    vf top = splat(-kInfinity);
    for (int64_t i = 0; i < group; ++i) top = larger(load(scores + first + i * W), top);
    store(to + groups, top);
  }
  return groups;
}

// The places of what is not smaller than `threshold`, ascending; returns how many.
inline int64_t at_least(const float* scores, int64_t stop, float threshold, int32_t* to) {
  int64_t count = 0, i = 0;
#if defined(__AVX512F__)
  __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + 16 <= stop; i += 16) {
    const __mmask16 taken =
        _mm512_cmp_ps_mask(_mm512_loadu_ps(scores + i), _mm512_set1_ps(threshold), _CMP_NLT_UQ);
    _mm512_storeu_si512(to + count, _mm512_maskz_compress_epi32(taken, place));
    count += __builtin_popcount(taken);
    place = _mm512_add_epi32(place, _mm512_set1_epi32(16));
  }
#endif
  for (; i < stop; ++i) {
    to[count] = int32_t(i);
    count += !(scores[i] < threshold);
  }
  return count;
}

// The end of the `top` largest of the scores at some places (null: of all), 1 to `count`, by one
// bit of it after another. `numbers` has room for `count` and a vector.
inline End end_of_largest(const float* scores, const int32_t* places, int64_t count, int64_t top,
                          uint32_t* numbers) {
  for (int64_t i = 0; i < count; ++i)
    numbers[i] = ordered(scores[places == nullptr ? i : places[i]]);
  for (int64_t i = count; i % W != 0; ++i) numbers[i] = 0;
  const auto reach = [&](uint32_t least) HEADWISE_LAMBDA {
    vu found = vu{};
    for (int64_t i = 0; i < count; i += W) {
      vu some;
      __builtin_memcpy(&some, numbers + i, sizeof some);
      found -= (vu)(some >= least);
    }
    int64_t all = 0;
    for (int lane = 0; lane < W; ++lane) all += found[lane];
    return all;
  };
  uint32_t least = 0;
  for (uint32_t bit = uint32_t(1) << 31; bit != 0; bit >>= 1) {
    const int64_t reached = reach(least | bit);
    if (reached >= top) least |= bit;
    if (reached == top) break;
  }
  return {least, least == ~uint32_t(0) ? top : top - reach(least + 1)};
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
