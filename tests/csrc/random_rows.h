// Random rows of every kind that the kernels read, each in a buffer of its exact size, and what the
// rounding of quantised rows may cost.
#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <random>
#include <vector>

#include "kernels.h"

using namespace headwise;

inline std::mt19937 rng;

inline int64_t pick(std::initializer_list<int64_t> from) {
  return from.begin()[rng() % from.size()];
}
inline bool some(int tenths) { return int(rng() % 10) < tenths; }
inline float normal() { return std::normal_distribution<float>()(rng); }

inline uint16_t narrow(float x, Dtype dtype) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  if (dtype == kBfloat16) return uint16_t(u >> 16);
  if (x != x) return 0x7e00;
  // truncation of a normal number, 0 below
  const int32_t exponent = int32_t(u >> 23 & 255) - 112;
  const uint32_t sign = u >> 16 & 0x8000;
  return uint16_t(exponent <= 0 ? sign : sign | uint32_t(exponent) << 10 | (u >> 13 & 0x3ff));
}
inline double widen(uint16_t h, Dtype dtype) {
  if (dtype == kBfloat16) {
    uint32_t u = uint32_t(h) << 16;
    float x;
    __builtin_memcpy(&x, &u, 4);
    return x;
  }
  const double sign = h & 0x8000 ? -1 : 1;
  const int exponent = h >> 10 & 31, mantissa = h & 0x3ff;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24));
}

// A program of random calls: each(level, i), some tens at every level, which counts failures.
template <class Each>
int run_calls(int argc, char** argv, const int& failures, const Each& each) {
  const int calls = 10 * (argc > 1 ? atoi(argv[1]) : 10);
  rng.seed(argc > 2 ? atoi(argv[2]) : 1);
  int done = 0;
  for (int level = 0; kernels(level) != nullptr; ++level)
    for (int i = 0; i < calls; ++i, ++done) each(level, i);
  printf("%d calls, %d failures\n", done, failures);
  return failures != 0;
}

// A buffer of numbers in some dtype, exactly as large as asked.
struct Numbers {
  std::vector<float> wide;
  std::vector<uint16_t> half;
  Dtype dtype;
  Numbers(int64_t count, Dtype dtype) : dtype(dtype) {
    if (dtype == kFloat32)
      wide.resize(count);
    else
      half.resize(count);
    for (int64_t i = 0; i < count; ++i) set(i, normal());
  }
  void set(int64_t i, float x) {
    if (dtype == kFloat32)
      wide[i] = x;
    else
      half[i] = narrow(x, dtype);
  }
  int64_t size() const { return int64_t(wide.size() + half.size()); }
  double at(int64_t i) const { return dtype == kFloat32 ? wide[i] : widen(half[i], dtype); }
  void* data() { return dtype == kFloat32 ? (void*)wide.data() : (void*)half.data(); }
};

// What the rounding of queries and weights to 16 bits, beside int8 keys and values, may do to a
// row: each is off by half of what an integer stands for, the largest over `kMost` or so.
struct Rounding {
  static constexpr double kMost = 32767;
  double query_most;
  bool there;
  int64_t start, block = -1;
  double largest = 0, score = 0, scale;  // of the query; what a score may be off by
  double top = 0, integers = 0, weights = 0, size = 0;
  Rounding(const AttendArgs& a, int64_t start)
      : query_most(a.dim > 512 ? 16383 : kMost), there(a.bits == 8), start(start), scale(a.scale) {}
  void query(double x) { largest = std::max(largest, fabs(x)); }
  // A key that the row sees: the sum of its magnitudes, its weight, its value's largest magnitude
  // and scale.
  void key(int64_t index, double key_size, double weight, double value_size, double value_scale) {
    if (!there) return;
    score = std::max(score, 0.5 * largest / query_most * scale * key_size);
    size = std::max(size, value_size);
    // the weights of a block of keys, by their values' scales, share what an integer stands for
    if ((index - start) / kBlock != block) end_block();
    block = (index - start) / kBlock;
    top = std::max(top, weight * fabs(value_scale));
    integers += value_scale != 0 ? value_size / fabs(value_scale) : 0;
  }
  void end_block() {
    weights += 0.5 * top / kMost * integers;
    top = integers = 0;
  }
  // What each element of the result may be off by.
  double of_result(double total) {
    end_block();
    return there ? weights / total + expm1(2 * score) * size : 0;
  }
};

// Rows of integers with scales, exactly as large as asked.
struct Integers {
  int bits = 8;
  std::vector<unsigned char> bytes;
  std::vector<float> scales;
  int64_t groups = 1;
  void fill(int64_t rows, int64_t dim) {
    groups = bits == 8 ? 1 : (dim + kInt4Group - 1) / kInt4Group;
    bytes.resize(rows * (dim * bits / 8));
    scales.resize(rows * groups);
    for (auto& x : bytes) x = (unsigned char)(rng());
    for (auto& x : scales) x = fabsf(normal()) / (bits == 8 ? 64 : 4);
  }
  // What they stand for; of 4 bits times a Hadamard matrix, whose signs count common bits.
  std::vector<double> wide;
  void widen(int64_t rows, int64_t dim) {
    const int64_t block = bits == 8 ? 1 : dim & -dim;
    wide.assign(rows * dim, 0.0);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t d = 0; d < dim; ++d)
        for (int64_t i = 0; i < block; ++i)
          wide[row * dim + d] += stored(row, d / block * block + i, dim) *
                                 (__builtin_popcountll(i & d % block) % 2 ? -1 : 1) /
                                 sqrt(double(block));
  }
  double at(int64_t row, int64_t d, int64_t dim) const { return wide[row * dim + d]; }
  double stored(int64_t row, int64_t d, int64_t dim) const {
    const unsigned char byte = bytes[row * (dim * bits / 8) + d * bits / 8];
    const int x = bits == 8 ? int8_t(byte) : int8_t(byte << (d % 2 ? 0 : 4)) >> 4;
    return x * double(scales[row * groups + (bits == 8 ? 0 : d / kInt4Group)]);
  }
};
