// Products with weights in a GGUF file's own blocks.
//
// The rows of x are rounded to integers of 8 bits with a scale for each 32 columns; products of
// integers are exact and meet the scales of a block in floats. A lane is a row of the weight, so
// nothing is ever summed across lanes.
#pragma once

#include "kernels.h"
#include "rowwise_float.h"

namespace headwise {
namespace HEADWISE_ISA {

// Columns of x that share a scale.
constexpr int64_t kTakenColumns = 32;

// A row of x as integers: what an integer stands for in each 32 columns, that times their sum, and
// the sums of each 16.
struct TakenRow {
  int8_t* integers;
  float *unit, *unit_sum;
  int32_t* sums;
};

HEADWISE_INLINE TakenRow taken_row(const LinearArgs& args, int64_t row, const void* taken) {
  const int64_t width = args.width, blocks = width / kTakenColumns;
  char* at = const_cast<char*>(static_cast<const char*>(taken)) + row * packed_pitch(width);
  float* unit = reinterpret_cast<float*>(at + width);
  return {reinterpret_cast<int8_t*>(at), unit, unit + blocks,
          reinterpret_cast<int32_t*>(unit + 2 * blocks)};
}

// `count` columns of a row, a multiple of 32, from column `first` on.
HEADWISE_INLINE void take_packed(const TakenRow& row, int64_t first, const float* from,
                                 int64_t count) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  for (int64_t at = 0; at < count; at += kTakenColumns) {
    const int64_t block = (first + at) / kTakenColumns;
    vf high = vf{}, odd = vf{};
    for (int i = 0; i < kTakenColumns; i += W) {
      const vf x = load(from + at + i);
      high = larger(select((vi)(x < 0.0f), -x, x), high);
      odd += x - x;  // 0, or NaN where x is no number or infinite
    }
    const float top = largest(high);
    const bool whole = sum(odd) == 0.0f;
    // what is below can be nothing beside any other number
    const float factor = whole && top > 1e-30f ? 127.0f / top : 0.0f;
    int8_t* to = row.integers + block * kTakenColumns;
    for (int half = 0; half < 2; ++half) {
      vi total = vi{};
      for (int i = 16 * half; i < 16 * half + 16; i += W) {
        // a product on its own, not drawn together with the sum
        const vf scaled = whole ? rounded(load(from + at + i) * factor) : vf{};
        const vi integers = bits_of<vi>(scaled + magic) - bits_of<vi>(magic);
        total += integers;
        const vb bytes = __builtin_convertvector(integers, vb);
        __builtin_memcpy(to + i, &bytes, sizeof bytes);
      }
      int32_t all = 0;
      for (int k = 0; k < W; ++k) all += total[k];
      row.sums[2 * block + half] = all;
    }
    const float unit = whole ? (factor > 0.0f ? top / 127.0f : 0.0f) : __builtin_nanf("");
    row.unit[block] = unit;
    row.unit_sum[block] = unit * float(row.sums[2 * block] + row.sums[2 * block + 1]);
  }
}

// Four columns of each of W rows, a byte each.
typedef vu Units;

HEADWISE_INLINE Units load_units(const unsigned char* from) {
  Units units;
  __builtin_memcpy(&units, from, sizeof units);
  return units;
}
HEADWISE_INLINE vf load_halves(const unsigned char* from) {
  return load(reinterpret_cast<const f16*>(from));
}
HEADWISE_INLINE vf as_floats(vu integers) {
  return __builtin_convertvector(bits_of<vi>(integers), vf);
}

#if defined(__AVX512VNNI__)
// What is added to bytes with a sign so that they have none.
constexpr int kSignOffset = 128;
#else
constexpr int kSignOffset = 0;
#endif

#if defined(__AVX512BW__)
typedef __m512i Bytes;
HEADWISE_INLINE Bytes all_equal(int32_t x) { return _mm512_set1_epi32(x); }
HEADWISE_INLINE vf floats_of(Bytes x) { return (vf)_mm512_cvtepi32_ps(x); }
#elif defined(__AVX2__)
typedef __m256i Bytes;
HEADWISE_INLINE Bytes all_equal(int32_t x) { return _mm256_set1_epi32(x); }
HEADWISE_INLINE vf floats_of(Bytes x) { return (vf)_mm256_cvtepi32_ps(x); }
#endif

#if defined(__AVX512VNNI__)
// Sums of 32 bits, plus the products of N units.
template <int BITS, int N>
HEADWISE_INLINE Bytes add_products(Bytes total, const Units* weights, const int32_t* x) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    Bytes weight = (Bytes)weights[i];
    if constexpr (BITS == 8) weight = _mm512_xor_si512(weight, _mm512_set1_epi8(-kSignOffset));
    total = _mm512_dpbusd_epi32(total, weight, all_equal(x[i]));
  }
  return total;
}
#elif defined(__AVX2__)
// Sums of two products each, of 16 bits.
template <bool SIGNED>
HEADWISE_INLINE Bytes pairs(Bytes weight, Bytes x) {
#if defined(__AVX512BW__)
  if constexpr (SIGNED) {
    x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(weight), _mm512_setzero_si512(), x);
    weight = _mm512_abs_epi8(weight);
  }
  return _mm512_maddubs_epi16(weight, x);
#else
  if constexpr (SIGNED) {
    x = _mm256_sign_epi8(x, weight);
    weight = _mm256_abs_epi8(weight);
  }
  return _mm256_maddubs_epi16(weight, x);
#endif
}
HEADWISE_INLINE Bytes add_pairs(Bytes a, Bytes b) {
#if defined(__AVX512BW__)
  return _mm512_add_epi16(a, b);
#else
  return _mm256_add_epi16(a, b);
#endif
}
// Sums of 32 bits, plus both halves of each.
HEADWISE_INLINE Bytes add_halves(Bytes total, Bytes pairs) {
#if defined(__AVX512BW__)
  return _mm512_add_epi32(total, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#else
  return _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}
template <int BITS, int N>
HEADWISE_INLINE Bytes add_products(Bytes total, const Units* weights, const int32_t* x) {
  // so many sums of two products fit in 16 bits
  constexpr int kFit = BITS <= 4 ? 8 : BITS == 5 ? 4 : BITS == 6 ? 2 : 1;
  constexpr int kRun = kFit < N ? kFit : N;
  for (int i = 0; i < N; i += kRun) {
    Bytes sum = pairs<BITS == 8>((Bytes)weights[i], all_equal(x[i]));
    for (int j = i + 1; j < i + kRun; ++j)
      sum = add_pairs(sum, pairs<BITS == 8>((Bytes)weights[j], all_equal(x[j])));
    total = add_halves(total, sum);
  }
  return total;
}
#endif

// The products of N units of weights with 4 N integers of x, for each row, plus `start`. A weight
// has BITS bits and no sign; with 8 bits it has one.
template <int BITS, int N>
HEADWISE_INLINE vf dots(const Units* weights, const int8_t* x, int32_t start) {
#if defined(__AVX2__)
  int32_t fours[N];
  __builtin_memcpy(fours, x, sizeof fours);
  return floats_of(add_products<BITS, N>(all_equal(start), weights, fours));
#else
  // all are integers below 2^24, which floats hold
  vf total = splat(float(start));
#pragma GCC unroll 1
  for (int i = 0; i < N; ++i)
    for (int k = 0; k < 4; ++k) {
      const vi weight = BITS == 8 ? bits_of<vi>(weights[i] << (24 - 8 * k)) >> 24
                                  : bits_of<vi>(weights[i] >> (8 * k) & 255u);
      total += __builtin_convertvector(weight, vf) * float(x[4 * i + k]);
    }
  return total;
#endif
}

// The low or the high half of each byte.
template <int HIGH>
HEADWISE_INLINE Units half_bytes(Units units) {
  return units >> (4 * HIGH) & 0x0f0f0f0fu;
}

// The lowest four bits of each lane as the fifth bit of a byte each.
HEADWISE_INLINE Units fifth_bits(vu bits) {
#if defined(__AVX512F__)
  const __m512i spread =
      _mm512_set_epi32(0x10101010, 0x10101000, 0x10100010, 0x10100000, 0x10001010, 0x10001000,
                       0x10000010, 0x10000000, 0x00101010, 0x00101000, 0x00100010, 0x00100000,
                       0x00001010, 0x00001000, 0x00000010, 0x00000000);
  return (vu)_mm512_permutexvar_epi32((__m512i)bits, spread);
#else
  return ((bits & 15u) * 0x00204081u & 0x01010101u) << 4;
#endif
}

// W rows of a group's block, from row `first` on, by the offsets that a row's own block has.
struct Lanes {
  const unsigned char* block;
  int64_t first;

  HEADWISE_INLINE Units units(int64_t offset) const {
    return load_units(block + offset * kGroup + 4 * first);
  }
  HEADWISE_INLINE vf halves(int64_t offset) const {
    return load_halves(block + offset * kGroup + 2 * first);
  }
};

// The formats. `read` reads what a block has once, `integers` those of 32 columns, the even or the
// odd ones of a pair of such parts. kOffset is taken off an integer, `scale` multiplies it, and
// `low` is added where there is one.

// 4 or 5 bits in blocks of 32: float16 scales, the fifth bits where there are some, the low bits.
template <int BITS, bool LOW>
struct Simple {
  static constexpr int kBits = BITS, kOffset = LOW ? 0 : 1 << (BITS - 1), kColumns = 32;
  static constexpr bool kLow = LOW, kTwoScales = false;
  vf scale, low;

  HEADWISE_INLINE void read(const Lanes& at) {
    scale = at.halves(0);
    if (LOW) low = at.halves(2);
  }
  template <int ODD>
  HEADWISE_INLINE void integers(const Lanes& at, int, Units* to) {
    constexpr int64_t kStart = LOW ? 4 : 2;
    const vu fifth = BITS == 5 ? at.units(kStart) : vu{};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Units both = at.units(kStart + (BITS == 5 ? 4 : 0) + 4 * i);
      to[i] = half_bytes<0>(both);
      to[4 + i] = half_bytes<1>(both);
      if (BITS == 5) {
        to[i] |= fifth_bits(fifth >> (4 * i));
        to[4 + i] |= fifth_bits(fifth >> (16 + 4 * i));
      }
    }
  }
};

struct Eight {
  static constexpr int kBits = 8, kOffset = kSignOffset, kColumns = 32;
  static constexpr bool kLow = false, kTwoScales = false;
  vf scale, low;

  HEADWISE_INLINE void read(const Lanes& at) { scale = at.halves(0); }
  template <int ODD>
  HEADWISE_INLINE void integers(const Lanes& at, int, Units* to) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) to[i] = at.units(2 + 4 * i);
  }
};

// 4 or 5 bits in blocks of 256: two float16 that integers of 6 bits for each 32 columns multiply.
template <int BITS>
struct Super {
  static constexpr int kBits = BITS, kOffset = 0, kColumns = 256;
  static constexpr bool kLow = true, kTwoScales = false;
  vf scale, low;
  vf all_scale, all_low;
  vu first, second, third;  // the 12 bytes of scales

  HEADWISE_INLINE void read(const Lanes& at) {
    all_scale = at.halves(0);
    all_low = -at.halves(2);
    first = at.units(4);
    second = at.units(8);
    third = at.units(12);
  }
  template <int ODD>
  HEADWISE_INLINE void integers(const Lanes& at, int pair, Units* to) {
    const int part = 2 * pair + ODD, turn = 8 * (part & 3);
    if (pair < 2) {
      scale = as_floats(first >> turn & 63u);
      low = as_floats(second >> turn & 63u);
    } else {
      scale = as_floats((third >> turn & 15u) | (first >> (turn + 6) & 3u) << 4);
      low = as_floats((third >> (turn + 4) & 15u) | (second >> (turn + 6) & 3u) << 4);
    }
    scale *= all_scale;
    low *= all_low;
    constexpr int64_t kStart = BITS == 5 ? 48 : 16;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      to[i] = half_bytes<ODD>(at.units(kStart + 32 * pair + 4 * i));
      if (BITS == 5) to[i] |= (at.units(16 + 4 * i) >> part & 0x01010101u) << 4;
    }
  }
};

// 6 bits in blocks of 256: a float16 that an integer of 8 bits for each 16 columns multiplies.
struct Six {
  static constexpr int kBits = 6, kOffset = 32, kColumns = 256;
  static constexpr bool kLow = false, kTwoScales = true;
  vf scale, low;  // `low`: the scale of the second 16 columns
  vf all_scale;

  HEADWISE_INLINE void read(const Lanes& at) { all_scale = at.halves(208); }
  template <int ODD>
  HEADWISE_INLINE void integers(const Lanes& at, int pair, Units* to) {
    const vu scales = at.units(192 + 4 * pair);
    const auto signed_byte = [&](int byte) HEADWISE_LAMBDA {
      const vi integer = bits_of<vi>(scales << (24 - 8 * byte)) >> 24;
      return __builtin_convertvector(integer, vf) * all_scale;
    };
    scale = signed_byte(2 * ODD);
    low = signed_byte(2 * ODD + 1);
    const int half = pair / 2, turn = 4 * (pair & 1);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const Units high = at.units(128 + 32 * half + 4 * i) >> (turn + 2 * ODD) & 0x03030303u;
      const Units four = at.units(64 * half + 32 * ODD + 4 * i) >> turn & 0x0f0f0f0fu;
      to[i] = four | high << 4;
    }
  }
};

// Vectors that hold a group's rows.
constexpr int kVectors = int(kGroup) / W;
// How far ahead of their use weights are asked for.
constexpr int64_t kPackedAhead = 4096;

// A block of a group of fewer than 16 rows as that of one of 16.
HEADWISE_INLINE void widen_block(const FormatSizes& sizes, const unsigned char* from, int64_t rows,
                                 unsigned char* to) {
  for_units(sizes, [&](int64_t offset, int64_t bytes) HEADWISE_LAMBDA {
    __builtin_memcpy(to + offset * kGroup, from + offset * rows, size_t(bytes * rows));
    __builtin_memset(to + offset * kGroup + bytes * rows, 0, size_t(bytes * (kGroup - rows)));
  });
}

// 32 columns of W rows of a block, and what their integers stand for.
struct Part {
  Units weights[8];
  vf scale, low;
};

template <int ODD, class F>
HEADWISE_INLINE void read_part(F format, const Lanes& lanes, int pair, Part* to) {
  format.template integers<ODD>(lanes, pair, to->weights);
  to->scale = format.scale;
  if (F::kLow || F::kTwoScales) to->low = format.low;
}

// Adds the products of R rows of x with a part, which is their columns 32 `taken`...
template <class F, int R>
HEADWISE_INLINE void add_part(const Part& part, int64_t taken, const TakenRow* x, vf* total) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const int8_t* integers = x[r].integers + taken * kTakenColumns;
    const int32_t* sums = x[r].sums + 2 * taken;
    if constexpr (F::kTwoScales) {
      const vf one = dots<F::kBits, 4>(part.weights, integers, -F::kOffset * sums[0]);
      const vf two = dots<F::kBits, 4>(part.weights + 4, integers + 16, -F::kOffset * sums[1]);
      total[r] += (one * part.scale + two * part.low) * x[r].unit[taken];
    } else {
      const int32_t start = F::kOffset == 0 ? 0 : -F::kOffset * (sums[0] + sums[1]);
      const vf product = dots<F::kBits, 8>(part.weights, integers, start);
      total[r] += product * (part.scale * x[r].unit[taken]);
      if constexpr (F::kLow) total[r] += part.low * x[r].unit_sum[taken];
    }
  }
}

// Calls what(v, index, part) for every 32 columns of a group, and each vector of its rows.
template <class F, class What>
HEADWISE_INLINE void over_group(const PackedMatrix& matrix, int64_t row, const What& what) {
  alignas(64) unsigned char whole[kMostBlockBytes * kGroup];
  const int64_t group_rows = matrix.group_rows(row), bytes = matrix.sizes.bytes * group_rows;
  const unsigned char* at = matrix.group(row);
  for (int64_t block = 0; block < matrix.blocks; ++block, at += bytes) {
    for (int64_t line = 0; line < bytes; line += 64) prefetch(at + kPackedAhead + line);
    const unsigned char* read = at;
    if (group_rows < kGroup) {
      widen_block(matrix.sizes, at, group_rows, whole);
      read = whole;
    }
    for (int v = 0; v < kVectors; ++v) {
      const Lanes lanes = {read, v * W};
      F format;
      format.read(lanes);
      Part part;
      if constexpr (F::kColumns == 32) {
        read_part<0>(format, lanes, 0, &part);
        what(v, block, part);
      } else {
        for (int pair = 0; pair < 4; ++pair) {
          read_part<0>(format, lanes, pair, &part);
          what(v, 8 * block + 2 * pair, part);
          read_part<1>(format, lanes, pair, &part);
          what(v, 8 * block + 2 * pair + 1, part);
        }
      }
    }
  }
}

// The products of R rows of x with a group's rows, `pitch` apart. Not inlined: a function of its
// own for each format and R is enough.
template <class F, int R>
__attribute__((noinline)) void multiply_group(const PackedMatrix& matrix, int64_t row,
                                              const TakenRow* x, float* to, int64_t pitch) {
  vf total[kVectors][R] = {};
  over_group<F>(matrix, row, [&](int v, int64_t index, const Part& part) HEADWISE_LAMBDA {
    add_part<F, R>(part, index, x, total[v]);
  });
  for (int v = 0; v < kVectors; ++v)
    for (int r = 0; r < R; ++r) store(to + r * pitch + v * W, total[v][r]);
}

// The same for a group that was read into `parts`.
template <class F, int R>
__attribute__((noinline)) void multiply_parts(const Part* parts, int64_t count, const TakenRow* x,
                                              float* to, int64_t pitch) {
  for (int v = 0; v < kVectors; ++v) {
    vf total[R] = {};
    for (int64_t index = 0; index < count; ++index)
      add_part<F, R>(parts[index * kVectors + v], index, x, total);
    for (int r = 0; r < R; ++r) store(to + r * pitch + v * W, total[r]);
  }
}

// The products of all rows of x with `groups` groups from that of `row` on, kBlock apart. Of many
// rows of x a group is read once into `parts`.
template <class F>
__attribute__((noinline)) void multiply_groups(const LinearArgs& args, const PackedMatrix& matrix,
                                               const void* taken, int64_t row, int64_t groups,
                                               Part* parts, float* to) {
  constexpr int kMost = kRegisters >= 32 ? 8 : 4;
  const int64_t count = matrix.blocks * (F::kColumns / kTakenColumns);
  TakenRow x[kMost];
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = row + group * kGroup;
    float* out = to + group * kGroup;
    if (args.rows < kManyRows) {
      by_rows(args.rows, [&](auto R, int64_t of_x) HEADWISE_LAMBDA {
        for (int r = 0; r < R.value; ++r) x[r] = taken_row(args, of_x + r, taken);
        multiply_group<F, R.value>(matrix, first, x, out + of_x * kBlock, kBlock);
      });
      continue;
    }
    over_group<F>(matrix, first, [&](int v, int64_t index, const Part& part) HEADWISE_LAMBDA {
      parts[index * kVectors + v] = part;
    });
    for (int64_t of_x = 0; of_x < args.rows; of_x += kMost) {
      const int64_t left = args.rows - of_x;
      for (int r = 0; r < kMost; ++r) x[r] = taken_row(args, of_x + (r < left ? r : 0), taken);
      // past the last row the first of these stands in
      alignas(64) float some[kMost * kGroup];
      float* place = left < kMost ? some : out + of_x * kBlock;
      multiply_parts<F, kMost>(parts, count, x, place, left < kMost ? kGroup : kBlock);
      for (int64_t r = 0; left < kMost && r < left; ++r)
        __builtin_memcpy(out + (of_x + r) * kBlock, some + r * kGroup, sizeof(float) * kGroup);
    }
  }
}

typedef void (*MultiplyFunction)(const LinearArgs&, const PackedMatrix&, const void*, int64_t,
                                 int64_t, Part*, float*);

inline MultiplyFunction multiply_function(Format format) {
  static constexpr MultiplyFunction kFunctions[] = {
      multiply_groups<Simple<4, false>>,
      multiply_groups<Simple<4, true>>,
      multiply_groups<Simple<5, false>>,
      multiply_groups<Simple<5, true>>,
      multiply_groups<Eight>,
      multiply_groups<Super<4>>,
      multiply_groups<Super<5>>,
      multiply_groups<Six>,
  };
  return kFunctions[format - 1];
}

// The products of all rows of x with the rows first..first + count of a matrix, which are counted
// from its row `begin`. Calls emit(row, at, n, products) with those of one row of x and the n rows
// from `at` on.
template <class Emit>
HEADWISE_INLINE void linear_packed(const LinearArgs& args, const PackedMatrix& matrix,
                                   const void* taken, int64_t begin, int64_t first, int64_t count,
                                   Scratch scratch, const Emit& emit) {
  const MultiplyFunction multiply = multiply_function(matrix.sizes.format);
  float* products = scratch.take<float>(args.rows * kBlock);
  Part* parts =
      args.rows < kManyRows ? nullptr : scratch.take<Part>(args.width / kTakenColumns * kVectors);
  const int64_t start = begin + first, end = start + count;
  for (int64_t row = start / kGroup * kGroup; row < end; row += kBlock) {
    const int64_t from = row < start ? start : row, to = row + kBlock < end ? row + kBlock : end;
    multiply(args, matrix, taken, row, (to - row + kGroup - 1) / kGroup, parts, products);
    for (int64_t x = 0; x < args.rows; ++x)
      emit(x, from - begin, int(to - from), products + x * kBlock + (from - row));
  }
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
