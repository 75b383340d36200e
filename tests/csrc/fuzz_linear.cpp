// Random products of few rows through plain pointers, for a build with sanitizers: every buffer has
// its exact size. Results are compared with a few lines of double.

#include <stdio.h>
#include <stdlib.h>

#include "random_rows.h"

namespace {

int failures = 0;

void one(int level) {
  LinearArgs a = {};
  a.dtype = Dtype(rng() % 3);
  a.rows = pick({1, 1, 2, 3, 4, 5, 16, 17});
  a.width = pick({1, 7, 16, 31, 33, 64, 129, 600});
  a.x_row = a.width + pick({0, 3});
  Numbers x((a.rows - 1) * a.x_row + a.width, a.dtype);
  a.x = x.data();
  LinearWeight w = {};
  w.rows = pick({1, 3, 4, 5, 63, 64, 65, 130});
  w.transposed = some(5);
  w.stride = (w.transposed ? w.rows : a.width) + pick({0, 3});
  const int64_t lines = w.transposed ? a.width : w.rows;
  Numbers weight((lines - 1) * w.stride + (w.transposed ? w.rows : a.width), a.dtype);
  Numbers bias(w.rows, a.dtype), out(a.rows * w.rows, a.dtype);
  w.data = weight.data();
  w.bias = some(5) ? bias.data() : nullptr;
  w.out = out.data();
  const auto memory = [](int64_t bytes) {
    return static_cast<char*>(aligned_alloc(64, (bytes + 63) / 64 * 64));
  };
  const int64_t part = some(5) ? w.rows : (w.rows + 1) / 2;
  char* taken = memory(taken_bytes(a));
  char* scratch = memory(scratch_bytes(a, part));
  kernels(level)->take(a, taken);
  for (int64_t first = 0; first < w.rows; first += part)
    kernels(level)->linear(a, w, first, std::min(part, w.rows - first), taken, scratch);
  free(taken);
  free(scratch);
  const double eps = a.dtype == kFloat32 ? 1e-6 : a.dtype == kBfloat16 ? 8e-3 : 1e-3;
  for (int64_t row = 0; row < a.rows; ++row)
    for (int64_t o = 0; o < w.rows; ++o) {
      double sum = w.bias ? bias.at(o) : 0, size = fabs(sum);
      for (int64_t d = 0; d < a.width; ++d) {
        const double term =
            x.at(row * a.x_row + d) * weight.at(w.transposed ? d * w.stride + o : o * w.stride + d);
        sum += term;
        size += fabs(term);
      }
      if (!(fabs(out.at(row * w.rows + o) - sum) <= eps * fabs(sum) + 1e-5 * size) &&
          ++failures < 5)
        printf("level %d dtype %d rows %ld width %ld F %ld transposed %d: [%ld,%ld] differs\n",
               level, int(a.dtype), long(a.rows), long(a.width), long(w.rows), w.transposed,
               long(row), long(o));
    }
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = 10 * (argc > 1 ? atoi(argv[1]) : 10);
  rng.seed(argc > 2 ? atoi(argv[2]) : 1);
  int done = 0;
  for (int level = 0; kernels(level) != nullptr; ++level)
    for (int i = 0; i < calls; ++i, ++done) one(level);
  printf("%d calls, %d failures\n", done, failures);
  return failures != 0;
}
