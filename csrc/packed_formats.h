// The block formats of GGUF files in which weights are multiplied as they are, and how the rows of
// a matrix lie in memory: 16 of them side by side.
//
// A block holds some columns of a row: units of four bytes, and of two for its scales in float16.
// Of each group of 16 rows (the last one may be smaller) and each block the first unit of all rows
// comes first, then the second of all: a vector of the processor holds the same columns of many
// rows, and a group is read from its beginning to its end. No byte is added or changed.
#pragma once

#include <stdint.h>

namespace headwise {

enum Format { kPlain, kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ4_K, kQ5_K, kQ6_K };

struct FormatSizes {
  Format format;
  int64_t columns, bytes;  // of a block
  // bytes of it that are float16, at its beginning or (Q6_K) its end
  int64_t first_halves, last_halves;
};
constexpr FormatSizes kFormats[] = {
    {kQ4_0, 32, 18, 2, 0},   {kQ4_1, 32, 20, 4, 0},   {kQ5_0, 32, 22, 2, 0},
    {kQ5_1, 32, 24, 4, 0},   {kQ8_0, 32, 34, 2, 0},   {kQ4_K, 256, 144, 4, 0},
    {kQ5_K, 256, 176, 4, 0}, {kQ6_K, 256, 210, 0, 2},
};
constexpr int64_t kMostBlockBytes = 210;

// The format whose blocks have so many bytes, which tell them apart; null: none has.
inline const FormatSizes* format_of_bytes(int64_t bytes) {
  for (const FormatSizes& sizes : kFormats)
    if (sizes.bytes == bytes) return &sizes;
  return nullptr;
}
inline const FormatSizes& sizes_of_format(Format format) { return kFormats[format - 1]; }

// Rows that lie side by side.
constexpr int64_t kGroup = 16;

// A matrix [rows,blocks,bytes of a block] in such groups.
struct PackedMatrix {
  const unsigned char* data;
  FormatSizes sizes;
  int64_t rows, blocks;

  // The group of a row: where it begins, and how many rows it has.
  const unsigned char* group(int64_t row) const {
    return data + row / kGroup * kGroup * blocks * sizes.bytes;
  }
  int64_t group_rows(int64_t row) const {
    const int64_t left = rows - row / kGroup * kGroup;
    return left < kGroup ? left : kGroup;
  }
};

// Calls what(offset, bytes) for each unit of a block.
template <class What>
inline void for_units(const FormatSizes& sizes, const What& what) {
  int64_t at = 0;
  for (; at < sizes.first_halves; at += 2) what(at, int64_t(2));
  for (; at < sizes.bytes - sizes.last_halves; at += 4) what(at, int64_t(4));
  for (; at < sizes.bytes; at += 2) what(at, int64_t(2));
}

}  // namespace headwise
