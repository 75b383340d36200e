// Rows of a packed matrix as numbers, to the bit those of the gguf package.
#pragma once

#include "packed.h"

namespace headwise {
namespace HEADWISE_ISA {

// `count` integers times a scale, plus `low` where it is asked for: each rounded on its own.
template <bool LOW>
HEADWISE_INLINE void scaled_integers(const int8_t* integers, int count, float scale, float low,
                                     float* to) {
  for (int i = 0; i < count; i += W) {
    vb bytes;
    __builtin_memcpy(&bytes, integers + i, sizeof bytes);
    const vi whole = __builtin_convertvector(bytes, vi);
    const vf x = rounded(__builtin_convertvector(whole, vf) * scale);
    store(to + i, LOW ? x + low : x);
  }
}

HEADWISE_INLINE float half_at(const unsigned char* from) {
  f16 half;
  __builtin_memcpy(&half, from, sizeof half);
  return to_float(half);
}

// Calls what(column, count, scale, low) for each run of columns that share them, and writes the
// integers of a block as the file has it.
template <class What>
HEADWISE_INLINE void read_block(Format format, const unsigned char* __restrict block,
                                int8_t* __restrict integers, const What& what) {
  switch (format) {
    case kQ4_0:
    case kQ4_1:
    case kQ5_0:
    case kQ5_1: {
      const bool low = format == kQ4_1 || format == kQ5_1, five = format >= kQ5_0;
      const unsigned char* at = block + (low ? 4 : 2);
      uint32_t fifth = 0;
      if (five) {
        __builtin_memcpy(&fifth, at, sizeof fifth);
        at += 4;
      }
      const int offset = low ? 0 : five ? 16 : 8;
      for (int i = 0; i < 16; ++i) {
        integers[i] = int8_t((at[i] & 15) + int((fifth >> i & 1) << 4) - offset);
        integers[16 + i] = int8_t((at[i] >> 4) + int((fifth >> (16 + i) & 1) << 4) - offset);
      }
      what(0, 32, half_at(block), low ? half_at(block + 2) : 0.0f);
      return;
    }
    case kQ8_0:
      __builtin_memcpy(integers, block + 2, 32);
      what(0, 32, half_at(block), 0.0f);
      return;
    case kQ4_K:
    case kQ5_K: {
      const float scale = half_at(block), low = half_at(block + 2);
      const unsigned char *s = block + 4, *fifth = block + 16;
      const unsigned char* at = block + (format == kQ5_K ? 48 : 16);
      for (int part = 0; part < 8; part += 2) {
        const unsigned char* both = at + 16 * part;
        int8_t* to = integers + 32 * part;
        for (int i = 0; i < 32; ++i) {
          to[i] = int8_t(both[i] & 15);
          to[32 + i] = int8_t(both[i] >> 4);
        }
        if (format == kQ5_K)
          for (int i = 0; i < 32; ++i) {
            to[i] = int8_t(to[i] | ((fifth[i] >> part & 1) << 4));
            to[32 + i] = int8_t(to[32 + i] | ((fifth[i] >> part & 2) << 3));
          }
      }
      for (int part = 0; part < 8; ++part) {
        const int j = part & 3;
        const int of_scale = part < 4 ? s[j] & 63 : (s[8 + j] & 15) | (s[j] >> 6) << 4;
        const int of_low = part < 4 ? s[4 + j] & 63 : (s[8 + j] >> 4) | (s[4 + j] >> 6) << 4;
        what(32 * part, 32, scale * float(of_scale), -(low * float(of_low)));
      }
      return;
    }
    default: {
      const float scale = half_at(block + 208);
      for (int part = 0; part < 8; ++part) {
        const unsigned char* low = block + 64 * (part / 4) + 32 * (part & 1);
        const unsigned char* high = block + 128 + 32 * (part / 4);
        const int of_low = part & 2 ? 4 : 0, of_high = 2 * (part & 3);
        int8_t* to = integers + 32 * part;
        for (int i = 0; i < 32; ++i)
          to[i] = int8_t(((low[i] >> of_low & 15) | (high[i] >> of_high & 3) << 4) - 32);
        for (int half = 0; half < 2; ++half)
          what(32 * part + 16 * half, 16, scale * float(int8_t(block[192 + 2 * part + half])),
               0.0f);
      }
    }
  }
}

// One row of a matrix, as T holds it.
template <class T>
void unpack_row(const PackedMatrix& matrix, int64_t row, T* to) {
  const FormatSizes& sizes = matrix.sizes;
  const unsigned char* group = matrix.group(row);
  const int64_t rows = matrix.group_rows(row), lane = row % kGroup;
  const bool has_low = sizes.first_halves == 4;
  alignas(64) unsigned char block[kMostBlockBytes];
  alignas(64) int8_t integers[256];
  alignas(64) float numbers[256];
  for (int64_t index = 0; index < matrix.blocks; ++index, group += sizes.bytes * rows) {
    for_units(sizes, [&](int64_t offset, int64_t bytes) HEADWISE_LAMBDA {
      __builtin_memcpy(block + offset, group + offset * rows + bytes * lane, size_t(bytes));
    });
    // the integers are whole by the time that what stands for them is asked
    read_block(sizes.format, block, integers,
               [&](int column, int count, float scale, float low) HEADWISE_LAMBDA {
                 if (has_low)
                   scaled_integers<true>(integers + column, count, scale, low, numbers + column);
                 else
                   scaled_integers<false>(integers + column, count, scale, low, numbers + column);
               });
    for (int64_t i = 0; i < sizes.columns; i += W) store_as(to + i, load(numbers + i));
    to += sizes.columns;
  }
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
