// Random products with packed matrices through plain pointers, for a build with sanitizers: every
// buffer has its exact size. Results are compared with a few lines of double.

#include <stdio.h>
#include <stdlib.h>

#include "random_rows.h"

namespace {

int failures = 0;

// x as it is rounded before packed weights.
double as_rounded(const float* block, int i) {
  float top = 0;
  for (int k = 0; k < 32; ++k) top = std::max(top, fabsf(block[k]));
  if (!(top > 1e-30f)) return 0;
  const float scaled = block[i] * (127.0f / top);
  return double(nearbyintf(scaled)) * double(top / 127.0f);
}

void one(int level) {
  const FormatSizes& sizes = kFormats[rng() % 8];
  LinearArgs a = {};
  a.dtype = Dtype(rng() % 3);
  a.rows = pick({1, 1, 2, 3, 4, 5, 7, 8, 9, 17, 33});
  const int64_t blocks = pick({1, 1, 2, 3});
  a.width = blocks * sizes.columns;
  a.x_row = a.width + pick({0, 3});
  a.packed = true;
  Numbers x((a.rows - 1) * a.x_row + a.width, a.dtype);
  a.x = x.data();
  const int64_t all = pick({1, 3, 15, 16, 17, 48, 70}), begin = some(3) ? rng() % all : 0;
  std::vector<unsigned char> bytes(all * blocks * sizes.bytes);
  const bool damaged = some(2);
  for (unsigned char& byte : bytes) byte = (unsigned char)(rng());
  // small scales that are numbers: the float16 of a group lie side by side
  for (int64_t row = 0; row < all && !damaged; ++row) {
    const PackedMatrix whole = {bytes.data(), sizes, all, blocks};
    const int64_t count = whole.group_rows(row), lane = row % kGroup;
    auto* group = const_cast<unsigned char*>(whole.group(row));
    for (int64_t b = 0; b < blocks; ++b)
      for_units(sizes, [&](int64_t offset, int64_t unit) {
        if (unit == 2) group[(b * sizes.bytes + offset) * count + 2 * lane + 1] &= 0xa7;
      });
  }
  LinearWeight w = {};
  w.packed = {bytes.data(), sizes, all, blocks};
  w.begin = begin;
  w.rows = all - begin;
  Numbers bias(w.rows, a.dtype);
  w.bias = some(5) ? bias.data() : nullptr;
  w.wide = true;
  std::vector<float> out(a.rows * w.rows);
  w.out = out.data();
  const auto memory = [](int64_t bytes) {
    return static_cast<char*>(aligned_alloc(64, (bytes + 63) / 64 * 64));
  };
  const int64_t part = some(5) ? w.rows : (w.rows + 1) / 2;
  char *taken = memory(taken_bytes(a)), *scratch = memory(scratch_bytes(a, part));
  char* of_take = memory(take_bytes(a));
  kernels(level)->take(a, 0, a.rows, taken, of_take);
  for (int64_t first = 0; first < w.rows; first += part)
    kernels(level)->linear(a, w, first, std::min(part, w.rows - first), taken, scratch);
  std::vector<float> numbers(w.rows * a.width);
  std::vector<int64_t> indices(w.rows);
  for (int64_t i = 0; i < w.rows; ++i) indices[i] = begin + i;
  const UnpackArgs unpack = {w.packed, indices.data(), kFloat32, numbers.data()};
  kernels(level)->unpack(unpack, 0, w.rows);
  free(taken);
  free(scratch);
  free(of_take);
  if (damaged) return;
  const double eps = a.dtype == kFloat32 ? 1e-6 : a.dtype == kBfloat16 ? 8e-3 : 1e-3;
  std::vector<float> row(a.width);
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t d = 0; d < a.width; ++d) row[d] = float(x.at(r * a.x_row + d));
    for (int64_t o = 0; o < w.rows; ++o) {
      double sum = w.bias ? bias.at(o) : 0, size = fabs(sum);
      for (int64_t d = 0; d < a.width; ++d) {
        const double term = as_rounded(&row[d / 32 * 32], int(d % 32)) * numbers[o * a.width + d];
        sum += term;
        size += fabs(term);
      }
      if (!(fabs(out[r * w.rows + o] - sum) <= eps * fabs(sum) + 1e-5 * size + 3e-8) &&
          ++failures < 5)
        printf("level %d format %d dtype %d rows %ld blocks %ld F %ld from %ld: [%ld,%ld] %g %g\n",
               level, int(sizes.format), int(a.dtype), long(a.rows), long(blocks), long(all),
               long(begin), long(r), long(o), out[r * w.rows + o], sum);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_calls(argc, argv, failures, [](int level, int) { one(level); });
}
