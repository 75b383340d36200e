// Attention of few rows to a context: every key and value is widened once and used for all rows.
//
// A task takes all rows (the queries of all heads of a group) of one kv head over a part of the
// context, in blocks of kBlock keys: scores, running softmax, weighted sum of the values. Online
// softmax: Milakov and Gimelshein 2018, arXiv 1805.02867.
#pragma once

#include "finish.h"
#include "rowwise_float.h"
#include "rowwise_integers.h"
#include "rowwise_pairs.h"
#include "scores.h"

namespace headwise {
namespace HEADWISE_ISA {

// Running softmax of one row: the weights replace the scores; what is there must be multiplied by
// the returned decay. A row that has seen nothing keeps a maximum of -inf.
HEADWISE_INLINE float soften(float* score, float* top, float* total) {
  vf high = load(score);
#pragma GCC unroll 4
  for (int j = W; j < kBlock; j += W) high = larger(load(score + j), high);
  const float block = largest(high);
  const float now = block > *top ? block : *top;
  const float shift = now == -kInfinity ? 0.0f : now;
  vf added = vf{};
#pragma GCC unroll 4
  for (int j = 0; j < kBlock; j += W) {
    const vf weight = exp(load(score + j) - shift);
    store(score + j, weight);
    added += weight;
  }
  const float decay = now == *top ? 1.0f : exp(splat(*top - shift))[0];
  *total = *total * decay + sum(added);
  *top = now;
  return decay;
}

// The body of a task. KeyRows and ValueRows say how rows are found and widened.
template <class KeyRows, class ValueRows>
void attend_rowwise(const Task& task, const KeyRows& keys, const ValueRows& values, char* memory) {
  constexpr bool kDot = kHasPairs && Same<typename KeyRows::Element, bf16>::value &&
                        Same<typename ValueRows::Element, bf16>::value;
  constexpr bool kIntegers = kHasIntegers && KeyRows::kBits == 8 && ValueRows::kBits == 8;
  const AttendArgs& args = *task.args;
  const int64_t rows = task.rows, dim = args.dim, value_dim = args.value_dim;
  const int64_t query_width = padded(dim), width = padded(value_dim);
  Scratch scratch = {memory};
  float* top = scratch.take<float>(rows);
  float* total = scratch.take<float>(rows);
  float* decay = scratch.take<float>(rows);
  float* score = scratch.take<float>(rows * kBlock);
  [[maybe_unused]] bf16* weights = scratch.take<bf16>(rows * kBlock);
  [[maybe_unused]] int16_t* whole = reinterpret_cast<int16_t*>(weights);
  float* sum = scratch.take<float>(rows * width);
  Segments ended(rows, width, &scratch);
  const auto columns = [&](float* of, int64_t row, int64_t v) HEADWISE_LAMBDA {
    return of + row * width + v;
  };
  float* row_sum = scratch.take<float>(2 * width);
  float* query = scratch.take<float>(rows * query_width);
  bf16* narrow = reinterpret_cast<bf16*>(query);
  // a row's integers lie at the beginning of its floats
  [[maybe_unused]] const int16_t* query_whole = reinterpret_cast<const int16_t*>(query);
  [[maybe_unused]] float* query_unit = scratch.take<float>(rows);
  [[maybe_unused]] Whole* weights_whole = scratch.take<Whole>(rows);

  for (int64_t row = 0; row < rows; ++row) {
    top[row] = -kInfinity;
    total[row] = 0.0f;
    const int64_t offset = task.batch * args.query_batch + task.head(row) * args.query_head +
                           task.query(row) * args.query_row;
    // unscaled, which is exact: the scale is applied to the scores
    if constexpr (kDot) {
      const bf16* from = static_cast<const bf16*>(args.query) + offset;
      for (int64_t d = 0; d < query_width; ++d)
        narrow[row * query_width + d] = d < dim ? from[d] : bf16{0};
    } else {
      with_dtype(args.dtype, args.query, [&](const auto* base) HEADWISE_LAMBDA {
        for (int64_t d = 0; d < query_width; ++d)
          query[row * query_width + d] = d < dim ? to_float(base[offset + d]) : 0.0f;
      });
      if constexpr (KeyRows::kBits == 4) rotate_row(query + row * query_width, dim);
#if defined(__AVX2__)
      if constexpr (kIntegers) {
        float* own = query + row * query_width;
        int32_t unused;
        query_unit[row] = to_integers(own, query_width, most_of_query(dim),
                                      reinterpret_cast<int16_t*>(own), &unused);
      }
#endif
    }
  }
  __builtin_memset(sum, 0, sizeof(float) * rows * width);

  const Span span = task.span();
  const int64_t base = task.base();
  const bool as_they_are = plain(args.options);
  for (int64_t block = span.begin; block < span.end; block += kBlock) {
    const int count = span.count(block);
    if (block > span.begin && (block - base) % task.sequence->segment == 0)
      ended.end_segment(top, total, sum, columns);
    if (!task.visible(block, count)) continue;
    const int64_t next = block + kBlock;
    Ahead ahead;
    ahead.add(keys, next, span.coming(next), dim);
    ahead.add(values, next, span.coming(next), value_dim);

    typename KeyRows::Row key[kBlock];
    typename ValueRows::Row value[kBlock];
    alignas(64) float key_scale[kBlock], value_scale[kBlock];
    find_rows(keys, block, count, args.scale, key, key_scale);
    find_rows(values, block, count, 1.0f, value, value_scale);
    for (int k = 0; k < count; k += 4)
      by_rows(rows, [&](auto R, int64_t row) HEADWISE_LAMBDA {
        float* to = score + row * kBlock + k;
#if defined(HEADWISE_PAIRS)
        if constexpr (kDot) {
          score_tile_dot<R.value>(narrow + row * query_width, query_width, key + k, dim, to, ahead);
          return;
        }
#endif
#if defined(__AVX2__)
        if constexpr (kIntegers) {
          score_integers<R.value>(query_whole + row * 2 * query_width, 2 * query_width, key + k,
                                  dim, to, ahead);
          return;
        }
#endif
        score_tile<R.value, KeyRows>(query + row * query_width, query_width, key + k, dim, to,
                                     ahead);
      });

    const bool edge = span.edge(block);
    for (int64_t row = 0; row < rows; ++row) {
      float* s = score + row * kBlock;
      for (int j = (count + 3) / 4 * 4; j < kBlock; ++j) s[j] = 0.0f;
      const float factor = kIntegers ? query_unit[row] : 1.0f;
      for (int j = 0; j < kBlock; j += W) {
        const vf scale = KeyRows::kScaled ? load(key_scale + j) * factor : splat(args.scale);
        store(s + j, rounded(load(s + j) * scale));
      }
      if (!as_they_are || edge) apply_options(task, row, block, count, s);
      decay[row] = soften(s, top + row, total + row);
      if constexpr (ValueRows::kScaled)
        for (int j = 0; j < kBlock; j += W) store(s + j, load(s + j) * load(value_scale + j));
#if defined(__AVX2__)
      if constexpr (kIntegers) {
        Whole& known = weights_whole[row];
        known.unit = to_integers(s, kBlock, kMostOfWeight, whole + row * kBlock, &known.sum);
      }
#endif
#if defined(HEADWISE_PAIRS)
      if constexpr (kDot) {
        for (int j = 0; j < kBlock; j += 32)
          _mm512_storeu_si512(
              weights + row * kBlock + j,
              (__m512i)_mm512_cvtne2ps_pbh((__m512)load(s + j + 16), (__m512)load(s + j)));
      }
#endif
    }

    by_rows(rows, [&](auto R, int64_t row) HEADWISE_LAMBDA {
      float* to = sum + row * width;
#if defined(HEADWISE_PAIRS)
      if constexpr (kDot) {
        weigh_dot<R.value>(weights + row * kBlock, value, (count + 1) / 2 * 2, value_dim,
                           decay + row, to, width, ahead);
        return;
      }
#endif
#if defined(__AVX2__)
      if constexpr (kIntegers) {
        weigh_integers<R.value>(whole + row * kBlock, weights_whole + row, value,
                                (count + 1) / 2 * 2, value_dim, decay + row, to, width, ahead);
        return;
      }
#endif
      weigh<R.value, ValueRows>(score + row * kBlock, value, count, value_dim, decay + row, to,
                                width, ahead);
    });
  }

  if (ended.used) ended.end_segment(top, total, sum, columns);
  const float* all = ended.used ? ended.sum : sum;
  finish(
      task, ended.used ? ended.top : top, ended.used ? ended.total : total,
      [&](int64_t row, float* to) HEADWISE_LAMBDA {
        __builtin_memcpy(to, all + row * width, sizeof(float) * width);
      },
      row_sum);
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
