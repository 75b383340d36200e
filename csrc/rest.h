// What is not chosen counts by its mean: out becomes (1 - rest) out + rest mean(values), where rest
// is the part of the softmax that the keys which were not chosen have by the sketch. SparQ
// Attention, arXiv 2312.04985, section 3.
#pragma once

#include "rows.h"

namespace headwise {
namespace HEADWISE_ISA {

template <class T>
void add_rest(const RestArgs& args, int64_t b, int64_t k, char* memory) {
  float* sum = reinterpret_cast<float*>(memory);
  const float* sums = args.sums + (b * args.kv_heads + k) * args.dim;
  for (int64_t d = 0; d < args.dim; ++d) sum[d] = sums[d];
  const Places places = {args.table == nullptr ? nullptr : args.table + b * args.table_row,
                         args.page_shift, nullptr};
  const T* values = static_cast<const T*>(args.values) +
                    (args.table == nullptr ? b : 0) * args.value_batch + k * args.value_head;
  const int64_t whole = args.dim / W * W, group = args.heads / args.kv_heads;
  int64_t j = args.summed;
  for (int64_t s = 0; s < args.queries; ++s) {
    const int64_t stop = args.context - args.queries + s + 1;
    for (; j < stop; ++j) {
      const T* row = values + places.offset(j, args.value_row, args.value_batch);
      for (int64_t d = 0; d < whole; d += W) store(sum + d, load(sum + d) + load(row + d));
      for (int64_t d = whole; d < args.dim; ++d) sum[d] += to_float(row[d]);
    }
    for (int64_t g = 0; g < group; ++g) {
      const int64_t at = (b * args.heads + k * group + g) * args.queries + s;
      const float rest = args.rest[at], each = rest / float(stop), kept = 1.0f - rest;
      T* out = static_cast<T*>(args.out) + at * args.dim;
      for (int64_t d = 0; d < args.dim; ++d)
        from_float(kept * to_float(out[d]) + each * sum[d], out + d);
    }
  }
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
