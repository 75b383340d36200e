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
  char* of_take = memory(take_bytes(a));
  kernels(level)->take(a, 0, a.rows, taken, of_take);
  free(of_take);
  for (int64_t first = 0; first < w.rows; first += part)
    kernels(level)->linear(a, w, first, std::min(part, w.rows - first), taken, scratch);
  free(taken);
  free(scratch);
  const double least = a.dtype == kFloat16 ? 3e-8 : 0;  // half a subnormal number
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
      if (!(fabs(out.at(row * w.rows + o) - sum) <= eps * fabs(sum) + 1e-5 * size + least) &&
          ++failures < 5)
        printf("level %d dtype %d rows %ld width %ld F %ld transposed %d: [%ld,%ld] differs\n",
               level, int(a.dtype), long(a.rows), long(a.width), long(w.rows), w.transposed,
               long(row), long(o));
    }
}

// A decoder layer's kernels: nothing is read or written out of bounds, and all that is asked for is
// written. What they compute is compared with float64 in the tests of the operators.
void one_layer(int level) {
  const Kernels& k = *kernels(level);
  HeadsArgs a = {};
  a.x.dtype = Dtype(rng() % 3);
  const int64_t batch = pick({1, 2}), width = pick({1, 7, 33, 64});
  a.length = pick({1, 3});
  a.x.rows = batch * a.length, a.x.width = a.x.x_row = width;
  a.heads = pick({1, 3}), a.kv_heads = 1, a.dim = pick({2, 6, 17, 64});
  Numbers x(a.x.rows * width, a.x.dtype), norm(width, a.x.dtype), head(a.dim, a.x.dtype);
  a.x.x = x.data();
  const auto memory = [](int64_t bytes) {
    return static_cast<char*>(aligned_alloc(64, (bytes + 63) / 64 * 64));
  };
  char* taken = memory(taken_bytes(a.x));
  std::vector<float> sum(a.x.rows * padded(width)), added(a.x.rows * width, 1.0f);
  Numbers out(a.x.rows * width, a.x.dtype);
  for (int64_t i = 0; i < a.x.rows * width; ++i) out.set(i, NAN);
  JoinArgs join = {};
  join.dtype = a.x.dtype, join.rows = a.x.rows, join.width = width, join.x = a.x.x;
  join.added = added.data(), join.sum = sum.data(), join.scale = 0.5f, join.taken = taken;
  join.added_norm = {NormKind(rng() % 5), norm.data(), norm.data(), 1e-5f};
  join.next = {NormKind(rng() % 5), norm.data(), nullptr, 1e-5f};
  join.out = out.data();
  Numbers normed(a.x.rows * width, a.x.dtype);
  for (int64_t i = 0; i < normed.size(); ++i) normed.set(i, NAN);
  join.normed = normed.data();
  char* of_join = memory(8 * padded(width) + 128);
  k.join(join, of_join);
  free(of_join);

  a.rope_dtype = some(5) ? kFloat32 : a.x.dtype;
  a.rotation = Rotation(rng() % 4);
  a.rope_dim = a.dim / 2 * 2, a.rope_row = a.rope_dim / (a.rotation == kHalvesOnce ? 2 : 1);
  a.rope_batch = batch == 1 || some(5) ? 0 : a.length * a.rope_row;
  Numbers cos((a.rope_batch ? batch : 1) * a.length * a.rope_row, a.rope_dtype);
  a.cos = some(8) ? cos.data() : nullptr, a.sin = a.cos;
  a.whole = some(3);
  Numbers heads(a.heads * a.dim, a.x.dtype);
  a.query_norm = {NormKind(rng() % 5), a.whole ? heads.data() : head.data(), nullptr, 1e-5f};
  a.key_norm = {a.query_norm.kind, head.data(), nullptr, 1e-5f};
  const int64_t all = a.heads + 2;
  LinearWeight w = {};
  w.rows = all * a.dim, w.transposed = some(3), w.stride = w.transposed ? w.rows : width;
  Numbers weight(w.rows * width, a.x.dtype), bias(w.rows, a.x.dtype);
  w.data = weight.data(), w.bias = some(5) ? bias.data() : nullptr;
  Numbers query(a.x.rows * a.heads * a.dim, a.x.dtype), key(a.x.rows * a.dim, a.x.dtype),
      value(a.x.rows * a.dim, a.x.dtype);
  for (Numbers* part : {&query, &key, &value})
    for (int64_t i = 0; i < part->size(); ++i) part->set(i, NAN);
  a.query = query.data(), a.key = key.data(), a.value = value.data();
  a.key_row = a.value_row = a.dim;
  a.key_head = a.value_head = a.key_batch = a.value_batch = a.length * a.dim;
  const int64_t each = pick({1, all});
  char* of_heads =
      memory(scratch_bytes(a.x, each * a.dim) + 4 * a.x.rows * padded(each * a.dim) + 64);
  std::vector<float> products(a.x.rows * w.rows);
  w.out = products.data(), w.wide = true;
  for (int64_t first = 0; first < all; first += each) {
    if (a.whole)
      k.linear(a.x, w, first * a.dim, each * a.dim, taken, of_heads);
    else
      k.heads(a, w, 0, first, each, taken, of_heads);
  }
  if (a.whole) k.place(a, w, 0, products.data());
  free(of_heads);

  LinearWeight gate = {}, up = {};
  up.rows = gate.rows = pick({1, 5, 33, 64});
  up.stride = gate.stride = width;
  Numbers gates(up.rows * width, a.x.dtype), ups(up.rows * width, a.x.dtype);
  gate.data = gates.data(), up.data = ups.data();
  const LinearArgs next = {nullptr, a.x.dtype, a.x.rows, up.rows, up.rows, false};
  GatedArgs g = {a.x, some(7) ? &gate : nullptr, &up, Activation(rng() % 5), next, nullptr};
  char* middle = memory(4 * a.x.rows * padded(up.rows));
  g.taken = middle;
  const int64_t part = some(5) ? up.rows : (up.rows + 1) / 2;
  char* of_gated = memory(scratch_bytes(a.x, part) + 8 * a.x.rows * padded(part) + 128);
  for (int64_t first = 0; first < up.rows; first += part)
    k.gated(g, first, std::min(part, up.rows - first), taken, of_gated);
  free(of_gated);
  free(middle);
  free(taken);
  bool good = true;
  for (const Numbers* numbers : {&query, &key, &value, &out, &normed})
    for (int64_t i = 0; i < numbers->size(); ++i) good = good && numbers->at(i) == numbers->at(i);
  if (!good && ++failures < 5)
    printf("level %d dtype %d rows %ld width %ld: a part of a layer is not written\n", level,
           int(a.x.dtype), long(a.x.rows), long(width));
}

}  // namespace

int main(int argc, char** argv) {
  return run_calls(argc, argv, failures,
                   [](int level, int i) { i % 3 ? one(level) : one_layer(level); });
}
