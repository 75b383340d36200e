// Products of few rows with a matrix, which is read once: x W^T with W as it is stored, by rows, or
// transposed, by columns.
//
// By rows each output is a product of x with a row of W, as of queries with keys; by columns the
// outputs are a sum of W's lines weighted by x, as of values by weights.
#pragma once

#include "packed.h"
#include "rowwise_float.h"
#include "rowwise_pairs.h"
#if defined(HEADWISE_AMX)
#include "tiles_amx.h"
#endif

namespace headwise {
namespace HEADWISE_ISA {

// What x is taken as for weights of T: bf16 where pairs are multiplied as they are, else floats.
template <class T>
struct Taken {
  typedef typename Either<kHasPairs && Same<T, bf16>::value, bf16, float>::Type Type;
};

// `count` elements of a row as the products read those that are no integers.
template <class T, class From>
HEADWISE_INLINE void take_plain(const From* from, int64_t count, typename Taken<T>::Type* to) {
  for (int64_t d = 0; d < count; ++d) {
    if constexpr (Same<typename Taken<T>::Type, From>::value)
      to[d] = from[d];
    else
      from_float(to_float(from[d]), to + d);
  }
}

// What lies past a row's width is read as zeros.
template <class Element>
HEADWISE_INLINE void pad_row(Element* row, int64_t width) {
  for (int64_t d = width; d < padded(width); ++d) row[d] = {};
}

// The columns first..first + count of a row as the products read it, out of floats that T holds.
template <class T>
HEADWISE_INLINE void take_part(const LinearArgs& args, int64_t row, int64_t first, int64_t count,
                               const float* from, void* taken) {
  if (args.packed) {
    take_packed(taken_row(args, row, taken), first, from, count);
    return;
  }
  auto* to = static_cast<typename Taken<T>::Type*>(taken) + row * padded(args.width);
  take_plain<T>(from, count, to + first);
}

// A whole row.
template <class T>
HEADWISE_INLINE void take_row(const LinearArgs& args, int64_t row, const float* from, void* taken) {
  take_part<T>(args, row, 0, args.width, from, taken);
  if (!args.packed)
    pad_row(static_cast<typename Taken<T>::Type*>(taken) + row * padded(args.width), args.width);
}

// Rows of W that are multiplied before their outputs are written: some 16 KiB, which the second
// pass over more than four rows of x finds in the cache.
HEADWISE_INLINE int rows_at_once(int64_t bytes) {
  const int64_t rows = 16384 / (bytes > 0 ? bytes : 1) / 4 * 4;
  return int(rows < 4 ? 4 : rows < kBlock ? rows : kBlock);
}

// The products of `rows` rows of x with the rows first..first + count of W. Calls emit(row, at, n,
// products) with those of one row of x and the n rows of W from `at` on.
template <class T, class Emit>
HEADWISE_INLINE void linear_by_rows(const typename Taken<T>::Type* x, int64_t rows, int64_t width,
                                    const StridedRows<T>& weight, int64_t first, int64_t count,
                                    Scratch scratch, const Emit& emit) {
  const int64_t pitch = padded(width), end = first + count;
  const int step = rows_at_once(StridedRows<T>::bytes(width));
  float* product = scratch.take<float>(rows * kBlock);
  for (int64_t block = first; block < end; block += step) {
    const int n = int(end - block < step ? end - block : step);
    const int64_t next = block + step;
    Ahead ahead;
    ahead.add(weight, next, end - next < step ? end - next : step, width);
    for (int j = 0; j < n; j += 4) {
      const T* line[4];  // past the last row the last one stands in
      for (int k = 0; k < 4; ++k) line[k] = weight.row(block + (j + k < n ? j + k : n - 1));
      by_rows(rows, [&](auto R, int64_t row) HEADWISE_LAMBDA {
        float* to = product + row * kBlock + j;
#if defined(HEADWISE_PAIRS)
        if constexpr (Same<T, bf16>::value) {
          score_tile_dot<R.value>(x + row * pitch, pitch, line, width, to, ahead);
          return;
        }
#endif
        if constexpr (!Same<typename Taken<T>::Type, bf16>::value)
          score_tile<R.value, StridedRows<T>>(x + row * pitch, pitch, line, width, to, ahead);
      });
    }
    for (int64_t row = 0; row < rows; ++row) emit(row, block, n, product + row * kBlock);
  }
}

// The same for W stored transposed: `weight` has `width` lines of at least first + count elements.
template <class T, class Emit>
HEADWISE_INLINE void linear_by_columns(const typename Taken<T>::Type* x, int64_t rows,
                                       int64_t width, const StridedRows<T>& weight, int64_t first,
                                       int64_t count, Scratch scratch, const Emit& emit) {
  const int64_t pitch = padded(width), out_pitch = padded(count);
  const StridedRows<T> stripe = {weight.base + first, weight.stride};
  float* sum = scratch.take<float>(rows * out_pitch);
  float* part = scratch.take<float>(rows * kBlock);
  float* one = scratch.take<float>(rows);
  __builtin_memset(sum, 0, sizeof(float) * rows * out_pitch);
  for (int64_t row = 0; row < rows; ++row) one[row] = 1.0f;
  for (int64_t block = 0; block < width; block += kBlock) {
    const int n = int(width - block < kBlock ? width - block : kBlock);
    const int64_t next = block + kBlock;
    Ahead ahead;
    ahead.add(stripe, next, width - next < kBlock ? width - next : kBlock, count);
    const T* line[kBlock];
    for (int j = 0; j < n; ++j) line[j] = stripe.row(block + j);
    for (int64_t row = 0; row < rows; ++row)
      for (int j = 0; j < n; ++j) part[row * kBlock + j] = to_float(x[row * pitch + block + j]);
    by_rows(rows, [&](auto R, int64_t row) HEADWISE_LAMBDA {
      weigh<R.value, StridedRows<T>>(part + row * kBlock, line, n, count, one + row,
                                     sum + row * out_pitch, out_pitch, ahead);
    });
  }
  for (int64_t row = 0; row < rows; ++row) emit(row, first, int(count), sum + row * out_pitch);
}

#if defined(HEADWISE_AMX)
// The same as by rows, by the tile registers: four tiles of 16 rows of W at a time, of `all` there
// are, with all rows of x as pairs. Rows behind the last whole tile are read with some before them.
template <class Emit>
HEADWISE_INLINE void linear_by_tiles(const bf16* x, int64_t rows, int64_t width,
                                     const StridedRows<bf16>& weight, int64_t all, int64_t first,
                                     int64_t count, Scratch scratch, const Emit& emit) {
  constexpr int64_t kPitch = kBlock + 16;  // a tile may begin up to 15 rows before a block
  const int64_t line = weight.stride * 2, end = first + count;
  bf16* pairs = scratch.take<bf16>(16 * padded(width));
  float* sums = scratch.take<float>(16 * kBlock);
  float* product = scratch.take<float>(16 * kPitch) + 16;
  int64_t begin[16];
  for (int64_t row = 0; row < rows; ++row) begin[row] = row * padded(width);
  PairLayout::pack_queries({}, x, begin, int(rows), width, pairs);
  const PairEngine registers;
  for (int64_t block = first; block < end; block += kBlock) {
    const int n = int(end - block < kBlock ? end - block : kBlock);
    const int64_t next = block + kBlock;
    Ahead ahead;
    ahead.add(weight, next, end - next < kBlock ? end - next : kBlock, width);
    int64_t at[4];  // behind the last tile it stands in
    for (int t = 0; t < 4; ++t) {
      const int64_t from = block + (16 * t < n ? 16 * t : (n - 1) / 16 * 16);
      at[t] = from < all - 16 ? from : all - 16;
    }
    multiply_tiles(pairs, weight.row(at[0]), weight.row(at[1]), weight.row(at[2]),
                   weight.row(at[3]), line, width, sums, ahead);
    for (int t = 0; t < (n + 15) / 16; ++t) {
      __m512i out[16];
      for (int j = 0; j < 16; ++j) out[j] = _mm512_load_si512(sums + t * 256 + j * 16);
      transpose(out);
      for (int64_t row = 0; row < rows; ++row)
        _mm512_storeu_si512(product + row * kPitch + at[t] - block, out[row]);
    }
    for (int64_t row = 0; row < rows; ++row) emit(row, block, n, product + row * kPitch);
  }
}
#endif

// Any of them; x as `take_row` made it.
template <class T, class Emit>
HEADWISE_INLINE void linear_as_stored(const void* taken, const LinearArgs& args,
                                      const LinearWeight& weight, int64_t first, int64_t count,
                                      Scratch scratch, const Emit& emit) {
  if (weight.is_packed()) {
    linear_packed(args, weight.packed, taken, weight.begin, first, count, scratch, emit);
    return;
  }
  const auto* x = static_cast<const typename Taken<T>::Type*>(taken);
  const StridedRows<T> rows = {static_cast<const T*>(weight.data), weight.stride};
  if (weight.transposed) {
    linear_by_columns<T>(x, args.rows, args.width, rows, first, count, scratch, emit);
    return;
  }
#if defined(HEADWISE_AMX)
  if constexpr (Same<T, bf16>::value)
    if (args.rows >= kTileRows && args.width % 32 == 0 && weight.rows >= 16) {
      linear_by_tiles(x, args.rows, args.width, rows, weight.rows, first, count, scratch, emit);
      return;
    }
#endif
  linear_by_rows<T>(x, args.rows, args.width, rows, first, count, scratch, emit);
}

// Numbers as T holds them, in place.
template <class T>
HEADWISE_INLINE void hold(float* x, int64_t count) {
  if constexpr (!Same<T, float>::value) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(x + i, as_held<T>(load(x + i)));
    for (; i < count; ++i) x[i] = as_held<T>(x[i]);
  }
}

// Products plus a bias, where there is one, as T holds them, in floats.
template <class T>
HEADWISE_INLINE void add_bias_held(const float* product, const T* bias, int n, float* to) {
  if (bias == nullptr) {
    for (int j = 0; j < n; ++j) to[j] = product[j];
  } else {
    for (int j = 0; j < n; ++j) to[j] = product[j] + to_float(bias[j]);
  }
  hold<T>(to, n);
}

// The outputs first..first + count of one weight. `taken` is what take_rows made.
template <class T>
void linear(const LinearArgs& args, const LinearWeight& weight, int64_t first, int64_t count,
            const void* taken, char* memory) {
  const T* bias = static_cast<const T*>(weight.bias);
  const auto emit = [&](int64_t row, int64_t at, int n, const float* product) HEADWISE_LAMBDA {
    const int64_t offset = row * weight.rows + at;
    if (weight.wide) {
      add_bias_held(product, bias == nullptr ? bias : bias + at, n,
                    static_cast<float*>(weight.out) + offset);
      return;
    }
    T* to = static_cast<T*>(weight.out) + offset;
    if (bias == nullptr) {
      for (int j = 0; j < n; ++j) from_float(product[j], to + j);
    } else {
      for (int j = 0; j < n; ++j) from_float(product[j] + to_float(bias[at + j]), to + j);
    }
  };
  linear_as_stored<T>(taken, args, weight, first, count, {memory}, emit);
}

// A row of T in floats.
template <class T>
HEADWISE_INLINE void widen_row(const T* from, int64_t width, float* to) {
  int64_t i = 0;
  for (; i + W <= width; i += W) store(to + i, load(from + i));
  for (; i < width; ++i) to[i] = to_float(from[i]);
}

template <class T>
void take_rows(const LinearArgs& args, int64_t first, int64_t count, void* taken, char* memory) {
  float* wide = Scratch{memory}.take<float>(args.width);
  for (int64_t row = first; row < first + count; ++row) {
    widen_row(static_cast<const T*>(args.x) + row * args.x_row, args.width, wide);
    take_row<T>(args, row, wide, taken);
  }
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
