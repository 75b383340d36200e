// Products of few rows with keys and values, by floats: each is widened once for up to 4 rows.
#pragma once

#include "rows.h"

namespace headwise {
namespace HEADWISE_ISA {

// Calls what(Number<R>, row) for the rows in groups of 4, then the rest of 1 to 3.
template <class What>
HEADWISE_INLINE void by_rows(int64_t rows, const What& what) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) what(Number<4>{}, row);
  if (rows - row == 3) what(Number<3>{}, row);
  if (rows - row == 2) what(Number<2>{}, row);
  if (rows - row == 1) what(Number<1>{}, row);
}

// How many reads of `bytes` make a cache line.
constexpr int line_part(int bytes) { return bytes < 64 ? 64 / bytes : 1; }

// The scores of R rows and 4 keys, by floats. query: R rows `query_stride` apart, zero-padded.
template <int R, class Rows>
HEADWISE_INLINE void score_tile(const float* query, int64_t query_stride,
                                const typename Rows::Row* keys, int64_t dim, float* score,
                                Ahead& ahead) {
  // keys at once: sums, a vector of each row and one of a key are to stay in registers
  constexpr int N = R * 5 + 1 <= kRegisters ? 4 : 2;
  vf sum[R][4];
#pragma GCC unroll 2
  for (int first = 0; first < 4; first += N) {
    vf total[R][N];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) total[r][k] = vf{};
    int64_t at = 0;
    for (; at + W <= dim; at += W) {
      if (at % (W * line_part(N * Rows::kBytes)) == 0) ahead.tick();
      vf row[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) row[r] = load(query + r * query_stride + at);
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) {
        if (k > 0 && k * Rows::kBytes % 64 == 0) ahead.tick();
        const vf key = Rows::load(keys[first + k], at);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) total[r][k] += row[r] * key;
      }
    }
    if (at < dim) {
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) {
        const vf key = Rows::load_part(keys[first + k], at, int(dim - at));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) total[r][k] += load(query + r * query_stride + at) * key;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) sum[r][first + k] = total[r][k];
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    store(score + r * kBlock, sums(sum[r][0], sum[r][1], sum[r][2], sum[r][3]));
}

// Keys whose weighted values are summed apart before they join the sum of all. Where a product is
// rounded on its own (no fused multiply-add) fewer, which makes up for it.
#if defined(__FMA__) || defined(__aarch64__)
constexpr int kSumRun = kBlock;
#else
constexpr int kSumRun = 16;
#endif

// sum[r] = sum[r] * decay[r] + weights[r] times the values, in C vectors of columns from `column`.
// PART: only `part` columns of a single vector exist.
template <int R, int C, bool PART, class Rows>
HEADWISE_INLINE void weigh_tile(const float* weights, const typename Rows::Row* values, int count,
                                int64_t column, int part, const float* decay, float* sum,
                                int64_t sum_stride, Ahead& ahead) {
  for (int from = 0; from < count; from += kSumRun) {
    vf total[R][C];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) total[r][c] = vf{};
    const int to = count - from < kSumRun ? count : from + kSumRun;
    for (int j = from; j < to; ++j) {
      if (j % line_part(C * Rows::kBytes) == 0) ahead.tick();
      vf weight[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) weight[r] = splat(weights[r * kBlock + j]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        if (c > 0 && c * Rows::kBytes % 64 == 0) ahead.tick();
        const vf value =
            PART ? Rows::load_part(values[j], column, part) : Rows::load(values[j], column + c * W);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) total[r][c] += weight[r] * value;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        float* at = sum + r * sum_stride + column + c * W;
        store(at, load(at) * (from == 0 ? decay[r] : 1.0f) + total[r][c]);
      }
  }
}

template <int R, class Rows>
HEADWISE_INLINE void weigh(const float* weights, const typename Rows::Row* values, int count,
                           int64_t dim, const float* decay, float* sum, int64_t sum_stride,
                           Ahead& ahead) {
  // sums, a weight of each row and a vector of values are to stay in registers
  constexpr int C = R * 9 + 1 <= kRegisters ? 8 : R * 5 + 1 <= kRegisters ? 4 : 2;
  int64_t at = 0;
  for (; at + C * W <= dim; at += C * W)
    weigh_tile<R, C, false, Rows>(weights, values, count, at, 0, decay, sum, sum_stride, ahead);
  for (; at + 2 * W <= dim; at += 2 * W)
    weigh_tile<R, 2, false, Rows>(weights, values, count, at, 0, decay, sum, sum_stride, ahead);
  for (; at + W <= dim; at += W)
    weigh_tile<R, 1, false, Rows>(weights, values, count, at, 0, decay, sum, sum_stride, ahead);
  if (at < dim)
    weigh_tile<R, 1, true, Rows>(weights, values, count, at, int(dim - at), decay, sum, sum_stride,
                                 ahead);
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
