// Products of few rows with a matrix of each head: the folding of absorbed MLA.
//
// A task takes all rows of one head. Up: out = x W; down: out = x W^T.
#pragma once

#include "linear.h"

namespace headwise {
namespace HEADWISE_ISA {

template <class T>
void project(const ProjectArgs& args, int64_t head, char* memory) {
  const int64_t rows = args.batch * args.length;
  const StridedRows<T> weight = {static_cast<const T*>(args.weight) + head * args.weight_head,
                                 args.weight_row};
  const int64_t inner = args.up ? args.rows : args.width;  // of x
  Scratch scratch = {memory};
  auto* x = scratch.take<typename Taken<T>::Type>(rows * padded(inner));
  for (int64_t row = 0; row < rows; ++row) {
    take_plain<T>(static_cast<const T*>(args.x) + row / args.length * args.x_batch +
                      head * args.x_head + row % args.length * args.x_row,
                  inner, x + row * padded(inner));
    pad_row(x + row * padded(inner), inner);
  }
  const auto emit = [&](int64_t row, int64_t at, int n, const float* product) HEADWISE_LAMBDA {
    T* out = static_cast<T*>(args.out) + row / args.length * args.out_batch + head * args.out_head +
             row % args.length * args.out_row + at;
    for (int j = 0; j < n; ++j) from_float(product[j], out + j);
  };
  if (args.up)
    linear_by_columns<T>(x, rows, inner, weight, 0, args.width, scratch, emit);
  else
    linear_by_rows<T>(x, rows, inner, weight, 0, args.rows, scratch, emit);
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
