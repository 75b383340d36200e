// Dtypes and sizes that every operator shares.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace headwise {

enum Dtype { kFloat32, kBfloat16, kFloat16, kFloat64 };

// Elements of a row of query, key or value at most.
constexpr int64_t kMostDim = 576;
// Keys that are scored at once; a block is the unit of masking and skipping.
constexpr int kBlock = 64;

// Elements of a row of 4 bits that share a scale; a row of 8 bits has one scale.
constexpr int kInt4Group = 32;

// The scales of a quantised row of `dim` elements.
inline int64_t scale_groups(int64_t bits, int64_t dim) {
  return bits == 8 ? 1 : (dim + kInt4Group - 1) / kInt4Group;
}

// The elements that a row takes in scratch memory.
inline int64_t padded(int64_t dim) { return (dim + 31) / 32 * 32; }

}  // namespace headwise
