// Products of few rows with a matrix of each head, which is read once: the folding of absorbed MLA.
//
// A task takes all rows of one head. Up: out = x W, a sum of W's rows weighted by x, as of values
// by weights. Down: out = x W^T, a product of x with each row of W, as of queries with keys.
#pragma once

#include "kernels.h"
#include "rowwise_float.h"

namespace headwise {
namespace HEADWISE_ISA {

template <class T>
void project(const ProjectArgs& args, int64_t head, char* memory) {
  const int64_t rows = args.batch * args.length;
  const StridedRows<T> weight = {static_cast<const T*>(args.weight) + head * args.weight_head,
                                 args.weight_row};
  const int64_t inner = args.up ? args.rows : args.width;  // of x
  const int64_t outer = args.up ? args.width : args.rows;  // of out
  const int64_t pitch = padded(inner), out_pitch = padded(outer);
  Scratch scratch = {memory};
  float* x = scratch.take<float>(rows * pitch);
  float* sum = scratch.take<float>(rows * out_pitch);
  float* block = scratch.take<float>(rows * kBlock);
  float* one = scratch.take<float>(rows);
  __builtin_memset(sum, 0, sizeof(float) * rows * out_pitch);
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = static_cast<const T*>(args.x) + row / args.length * args.x_batch +
                    head * args.x_head + row % args.length * args.x_row;
    one[row] = 1.0f;
    for (int64_t d = 0; d < pitch; ++d) x[row * pitch + d] = d < inner ? to_float(from[d]) : 0.0f;
  }

  for (int64_t first = 0; first < args.rows; first += kBlock) {
    const int count = int(args.rows - first < kBlock ? args.rows - first : kBlock);
    const int64_t next = first + kBlock;
    Ahead ahead;
    ahead.add(weight, next, args.rows - next < kBlock ? args.rows - next : kBlock, args.width);
    const T* line[kBlock];
    for (int j = 0; j < kBlock; ++j) line[j] = weight.row(first + (j < count ? j : count - 1));
    if (args.up) {
      for (int64_t row = 0; row < rows; ++row)
        for (int j = 0; j < count; ++j) block[row * kBlock + j] = x[row * pitch + first + j];
      by_rows(rows, [&](auto R, int64_t row) HEADWISE_LAMBDA {
        weigh<R.value, StridedRows<T>>(block + row * kBlock, line, count, args.width, one + row,
                                       sum + row * out_pitch, out_pitch, ahead);
      });
    } else {
      for (int j = 0; j < count; j += 4)
        by_rows(rows, [&](auto R, int64_t row) HEADWISE_LAMBDA {
          score_tile<R.value, StridedRows<T>>(x + row * pitch, pitch, line + j, args.width,
                                              block + row * kBlock + j, ahead);
        });
      for (int64_t row = 0; row < rows; ++row)
        for (int j = 0; j < count; ++j) sum[row * out_pitch + first + j] = block[row * kBlock + j];
    }
  }

  for (int64_t row = 0; row < rows; ++row) {
    T* out = static_cast<T*>(args.out) + row / args.length * args.out_batch + head * args.out_head +
             row % args.length * args.out_row;
    for (int64_t d = 0; d < outer; ++d) from_float(sum[row * out_pitch + d], out + d);
  }
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
