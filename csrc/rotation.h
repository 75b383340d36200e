// The rotation of rows of 4 bits, which spreads a large element over all of its block.
#pragma once

#include <stdint.h>

namespace headwise {
namespace HEADWISE_ISA {

// The row times an orthogonal and symmetric matrix, in place: a Hadamard matrix for each block of
// the largest power of two that divides the dim. Rows of 4 bits are rotated, and so are queries and
// results then.
inline void rotate_row(float* row, int64_t dim) {
  const int64_t block = dim & -dim;
  const float factor = 1.0f / __builtin_sqrtf(float(block));
  for (int64_t first = 0; first < dim; first += block) {
    float* x = row + first;
    for (int64_t half = 1; half < block; half *= 2)
      for (int64_t from = 0; from < block; from += 2 * half)
        for (int64_t i = from; i < from + half; ++i) {
          const float a = x[i], b = x[i + half];
          x[i] = a + b;
          x[i + half] = a - b;
        }
    for (int64_t i = 0; i < block; ++i) x[i] *= factor;
  }
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
