// What the kernels of one instruction set compute: an operator's arguments as plain pointers, and
// its function. No torch.
#pragma once

#include "attend_args.h"

namespace headwise {

// Products of x with one matrix per head: x W where `up`, else x W^T.
struct ProjectArgs {
  const void *x, *weight;  // [B,H,S,rows or width] and [H,rows,width]
  void* out;               // [B,H,S,width or rows]
  Dtype dtype;
  bool up;
  int64_t batch, heads, length, rows, width;
  int64_t x_batch, x_head, x_row, weight_head, weight_row, out_batch, out_head, out_row;
};

// Bytes of a thread's scratch.
inline int64_t scratch_bytes(const ProjectArgs& args) {
  const int64_t rows = args.batch * args.length;
  return 4 * rows * (padded(args.rows) + padded(args.width) + kBlock + 16) + 64 * 8;
}

// A matrix that is multiplied with rows x: out = x W^T + bias.
struct LinearWeight {
  const void* data;  // W [rows,width]
  const void* bias;  // [rows], contiguous; null: none
  void* out;         // [rows of x,rows], contiguous
  int64_t rows;
  bool transposed;  // W's columns are contiguous, not its rows
  int64_t stride;   // from row to row, or from column to column
};

// Weights that are multiplied with the same rows.
struct LinearArgs {
  const void* x;  // [rows,width]
  Dtype dtype;    // of all
  int64_t rows, width, x_row;
};

// Bytes of x as the products read it.
inline int64_t taken_bytes(const LinearArgs& args) { return 4 * args.rows * padded(args.width); }
// Bytes of a thread's scratch for up to `outputs` at once.
inline int64_t scratch_bytes(const LinearArgs& args, int64_t outputs) {
  return 4 * args.rows * (padded(outputs) + 2 * kBlock) + 64 * 8;
}

// Rows to become integers with scales.
struct QuantizeArgs {
  const void* rows;  // [B,heads,S,D]
  Dtype dtype;
  int bits;
  int64_t heads, length, dim;
  int64_t row_batch, row_head, row_row;
  unsigned char* integers;  // [B,heads,S,bytes], contiguous
  float* scales;            // [B,heads,S,groups], contiguous
};

// Bytes of a thread's scratch.
inline int64_t scratch_bytes(const QuantizeArgs& args) { return 8 * padded(args.dim); }

enum Level { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// One task of attention. `scratch` is aligned to 64 bytes in each of these.
typedef void (*AttendFunction)(const AttendArgs&, const Plan&, int64_t task, char* scratch);
// The products of one head.
typedef void (*ProjectFunction)(const ProjectArgs&, int64_t head, char* scratch);
// The rows of x as the products read them.
typedef void (*TakeFunction)(const LinearArgs&, void* taken);
// `count` of the outputs of one weight, for all rows of x.
typedef void (*LinearFunction)(const LinearArgs&, const LinearWeight&, int64_t first, int64_t count,
                               const void* taken, char* scratch);
// `count` of the rows of all sequences and heads.
typedef void (*QuantizeFunction)(const QuantizeArgs&, int64_t first, int64_t count, char* scratch);

// What kernels_isa.cpp defines once for each level.
struct Kernels {
  AttendFunction attend;
  ProjectFunction project;
  TakeFunction take;
  LinearFunction linear;
  QuantizeFunction quantize;
  bool pairs;  // bf16 is multiplied as it is, in pairs
};

// The highest level that this machine and this build have.
int best_level();
// The kernels of `level`, null where the machine or the build lacks it.
const Kernels* kernels(int level);

}  // namespace headwise
