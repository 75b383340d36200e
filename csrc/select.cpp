// Selection by a histogram of the leading bits of the scores, three times.

#include "select.h"

#include <string.h>

namespace headwise {

namespace {

// Numbers in the order of the floats; -0 is 0.
inline uint32_t ordered(float score) {
  uint32_t bits;
  score += 0.0f;
  memcpy(&bits, &score, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return ~uint32_t(0);
  return bits >> 31 ? ~bits : bits | 0x80000000;
}

}  // namespace

void select_largest(const float* scores, int64_t first, int64_t stop, const unsigned char* mask,
                    int64_t step, int64_t top, int32_t* to) {
  const auto seen = [&](int64_t i) { return mask == nullptr || mask[i * step] != 0; };
  int64_t visible = stop > first ? stop - first : 0;
  if (mask != nullptr) {
    visible = 0;
    for (int64_t i = first; i < stop; ++i) visible += mask[i * step] != 0;
  }
  // the smallest number that is taken, and how many of those equal to it are
  uint32_t least = 0;
  int64_t equal = visible;
  if (visible > top) {
    equal = top;
    uint32_t known = 0;  // the bits of `least` that are found
    for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
      const uint32_t digit = shift == 0 ? 1023 : 2047;
      int64_t count[2048] = {};
      for (int64_t i = first; i < stop; ++i) {
        const uint32_t number = ordered(scores[i]);
        if ((number & known) == (least & known) && seen(i)) ++count[number >> shift & digit];
      }
      uint32_t bin = digit;
      for (; equal > count[bin]; --bin) equal -= count[bin];
      least |= bin << shift;
      known |= digit << shift;
    }
  }
  int64_t taken = 0;
  for (int64_t i = first; i < stop && taken < top; ++i) {
    if (!seen(i)) continue;
    const uint32_t number = ordered(scores[i]);
    if (number < least || (number == least && equal-- <= 0)) continue;
    to[taken++] = int32_t(i);
  }
  for (; taken < top; ++taken) to[taken] = -1;
}

}  // namespace headwise
