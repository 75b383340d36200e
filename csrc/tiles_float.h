// The tile kernel's products by multiply-add of floats; other dtypes are widened block by block.
#pragma once

#include "rotation.h"
#include "rows.h"

namespace headwise {
namespace HEADWISE_ISA {

// Copies `count` rows from `first` on, widened to floats, and zeros up to kBlock rows.
template <class Rows>
void widen_rows(const Rows& rows, int64_t first, int count, int64_t dim, float* to, int64_t pitch) {
  for (int j = 0; j < kBlock; ++j, to += pitch) {
    int64_t at = 0;
    if (j < count) {
      const typename Rows::Row row = rows.row(first + j);
      const float scale = rows.scale(first + j);
      for (; at + W <= dim; at += W) store(to + at, Rows::load(row, at) * scale);
      if (at < dim) {
        store(to + at, Rows::load_part(row, at, int(dim - at)) * scale);
        at += W;
      }
    }
    for (; at < pitch; at += W) store(to + at, vf{});
  }
}

struct FloatEngine {
  typedef float Element;
  typedef float Weight;
  static constexpr bool kPairs = false;
  static constexpr int kAlign = 1;  // keys of any width are read in place

  // Values are read in place in whole vectors only.
  struct Values {
    typedef float Element;
    static constexpr bool kPairs = false;
    static constexpr int kAlign = W;
    static HEADWISE_INLINE int64_t pitch(int64_t dim) { return (dim + W - 1) / W * W; }
  };

  // The width of a query, and of the rows of a copied block.
  static HEADWISE_INLINE int64_t key_width(int64_t dim) { return dim; }
  static HEADWISE_INLINE int64_t pitch(int64_t dim) { return (dim + W - 1) / W * W; }
  static HEADWISE_INLINE int64_t value_elements(int64_t dim) { return kBlock * padded(dim); }

  // Queries of up to W rows, which begin at the elements `rows` of `base`: [D][W].
  static void pack_queries(const AttendArgs& args, const void* base, const int64_t* rows, int count,
                           int64_t dim, float* to) {
    if (count < W) __builtin_memset(to, 0, sizeof(float) * dim * W);
    with_dtype(args.dtype, base, [&](const auto* from) HEADWISE_LAMBDA {
      float line[kMostDim];
      for (int row = 0; row < count; ++row) {
        for (int64_t d = 0; d < dim; ++d) line[d] = to_float(from[rows[row] + d]);
        if (args.bits == 4) rotate_row(line, dim);
        for (int64_t d = 0; d < dim; ++d) to[d * W + row] = line[d];
      }
    });
  }

  // V vectors of rows, N keys; adds to `score` unless `first`. Sums of about sqrt(D) products
  // are added up: one sum over all of them would round more than PyTorch's.
  template <int V, int N>
  static HEADWISE_INLINE void score(const float* query, int64_t tile, Block<float> keys,
                                    int64_t dim, bool first, float* score, Ahead& ahead) {
    const int64_t run = dim > 256 ? 32 : 24;
    for (int64_t from = 0; from < dim; from += run) {
      vf total[N][V];
#pragma GCC unroll 16
      for (int k = 0; k < N; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) total[k][v] = vf{};
      const int64_t to = dim - from < run ? dim : from + run;
      for (int64_t d = from; d < to; ++d) {
        if (d % 4 == 0) ahead.tick();
        vf row[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) row[v] = load(query + v * tile + d * W);
#pragma GCC unroll 16
        for (int k = 0; k < N; ++k) {
          const vf one = splat(keys.rows[k * keys.stride + d]);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) total[k][v] += row[v] * one;
        }
      }
      const bool fresh = first && from == 0;
#pragma GCC unroll 16
      for (int k = 0; k < N; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          float* at = score + v * kBlock * W + k * W;
          store(at, fresh ? total[k][v] : total[k][v] + load(at));
        }
    }
  }

  // query: from the first row tile on, `tile` floats per row tile.
  static void scores(const float* query, int64_t tile, int64_t tiles, Block<float> keys,
                     int64_t dim, bool first, float* score_at, Ahead& ahead) {
    constexpr int V = W >= 16 ? 4 : 2;
    for (int k = 0; k < kBlock; k += 16) {
      int64_t t = 0;
      for (; t + V <= tiles; t += V)
        for (int n = k; n < k + 16; n += 4)
          score<V, 4>(query + t * tile, tile, {keys.rows + n * keys.stride, keys.stride}, dim,
                      first, score_at + t * kBlock * W + n * W, ahead);
      for (; t < tiles; ++t)
        for (int n = k; n < k + 16; n += 8)
          score<1, 8>(query + t * tile, tile, {keys.rows + n * keys.stride, keys.stride}, dim,
                      first, score_at + t * kBlock * W + n * W, ahead);
    }
  }

  // O lies as [row][V]: the 16 columns from `column` on of a row.
  static HEADWISE_INLINE float* columns(float* sum, int64_t width, int64_t row, int64_t column) {
    return sum + row * width + column;
  }

  template <int R, int C>
  static HEADWISE_INLINE void weigh_tile(const float* weight, const float* value, int64_t stride,
                                         int count, float* sum, int64_t width, Ahead& ahead) {
    vf total[R][C];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) total[r][c] = vf{};
    for (int j = 0; j < count; ++j) {
      ahead.tick();
      vf column[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) column[c] = load(value + j * stride + c * W);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const vf one = splat(weight[j * W + r]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) total[r][c] += one * column[c];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        float* at = sum + r * width + c * W;
        store(at, load(at) + total[r][c]);
      }
  }

  static void weigh(const float* weight, int64_t tiles, Block<float> values, int count, int64_t dim,
                    int64_t width, float* sum, Ahead& ahead) {
    constexpr int C = W >= 16 ? 4 : 2;
    const int64_t used = (dim + W - 1) / W * W;
    int64_t column = 0;
    const auto all_rows = [&](auto c, int64_t at) HEADWISE_LAMBDA {
      for (int64_t row = 0; row < tiles * W; row += 4) {
        const float* from = weight + row / W * kBlock * W + row % W;
        float* to = sum + row * width + at;
        weigh_tile<4, c.value>(from, values.rows + at, values.stride, count, to, width, ahead);
      }
    };
    for (; column + C * W <= used; column += C * W) all_rows(Number<C>{}, column);
    for (; column < used; column += W) all_rows(Number<1>{}, column);
  }
};

}  // namespace HEADWISE_ISA
}  // namespace headwise
