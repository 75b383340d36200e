// Attention of many rows (queries of all heads of a group) to a context, as products of tiles.
//
// A task takes a tile of rows of one kv head over a part of the context, in blocks of kBlock keys:
// S = K Q^T, running softmax, O = O + P V. Scores lie transposed, [row tile][kBlock][W]: those of W
// rows for one key are one vector, so that the softmax has no horizontal step. An `Engine` holds
// what depends on dtype and instruction set: the layouts of queries, weights and values, and the
// two products. FlashAttention: Dao et al. 2022, arXiv 2205.14135.
#pragma once

#include "finish.h"
#include "scores.h"
#include "tiles_float.h"
#if defined(HEADWISE_AMX)
#include "tiles_amx.h"
#elif defined(HEADWISE_PAIRS)
#include "tiles_dot.h"
#endif

namespace headwise {
namespace HEADWISE_ISA {

// Running softmax of W rows: from scores, times `scale` of 0 or more, to weights. `decay` is what
// earlier sums are multiplied by; true where that is 1 for all. A row that has seen nothing keeps a
// maximum of -inf.
template <class Engine>
HEADWISE_INLINE bool soften_rows(float* score, float scale, float* top, float* total, float* decay,
                                 [[maybe_unused]] typename Engine::Weight* weights, Ahead& ahead) {
  vf high = load(score), other = load(score + W);
  for (int j = 2; j < kBlock; j += 2) {
    high = larger(load(score + j * W), high);
    other = larger(load(score + (j + 1) * W), other);
  }
  // rounding keeps the order: this is the largest of the products
  high = rounded(larger(high, other) * scale);
  const vf before = load(top);
  const vf now = larger(high, before);
  const vf shift = select((vi)(now == -kInfinity), vf{}, now);
  vf added = vf{}, also = vf{};
  if constexpr (Engine::kPairs) {
#if defined(HEADWISE_PAIRS)
    for (int at = 0; at < kBlock / 2; at += 16) {
      __m512i pair[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const float* from = score + 2 * (at + i) * W;
        ahead.tick();
        const vf even = exp_near(rounded(load(from) * scale) - shift);
        const vf odd = exp_near(rounded(load(from + W) * scale) - shift);
        ahead.tick();
        added += even;
        also += odd;
        pair[i] = Engine::pairs(even, odd);
      }
      Engine::keep(pair, at, weights);
    }
#endif
  } else {
    for (int j = 0; j < kBlock; j += 2) {
      ahead.tick();
      const vf even = exp(rounded(load(score + j * W) * scale) - shift);
      const vf odd = exp(rounded(load(score + (j + 1) * W) * scale) - shift);
      store(score + j * W, even);
      store(score + (j + 1) * W, odd);
      added += even;
      also += odd;
    }
  }
  const vf factor = exp(before - shift);
  store(decay, factor);
  store(total, load(total) * factor + (added + also));
  store(top, now);
  return all((vi)(now == before));
}

// Whether integers of keys and values that share their memory stand for the same numbers.
HEADWISE_INLINE bool same_scales(const AttendArgs& args) {
  if (args.bits == 0) return true;
  const Scales &key = args.key_scales, &value = args.value_scales;
  return args.value_dim == args.dim && key.data == value.data && key.batch == value.batch &&
         key.head == value.head && key.row == value.row;
}

// The keys first..first + count as the engine's product reads them: in place where it can.
template <class Engine, class Rows>
HEADWISE_INLINE Block<typename Engine::Element> key_block(const Rows& rows, int64_t first,
                                                          int count, int64_t dim,
                                                          typename Engine::Element* stage) {
  typedef typename Engine::Element Element;
  if constexpr (Same<typename Rows::Element, Element>::value) {
    if (count == kBlock && dim % Engine::kAlign == 0 && rows.run(first, kBlock) == kBlock)
      return {rows.row(first), rows.stride};
  }
  const int64_t pitch = Engine::pitch(dim);
  if constexpr (Engine::kPairs)
    copy_rows(rows, first, count, dim, stage, pitch);
  else
    widen_rows(rows, first, count, dim, stage, pitch);
  return {stage, pitch};
}

// The body of a task. The tails are the second part of query and key, if there is one.
template <class Engine, class KeyRows, class ValueRows>
void attend_tiles(const Task& task, const KeyRows& keys, const KeyRows& tails,
                  const ValueRows& values, char* memory) {
  typedef typename Engine::Element Element;
  typedef typename Engine::Weight Weight;
  const AttendArgs& args = *task.args;
  const int64_t rows = task.rows, tiles = (rows + W - 1) / W, all_rows = tiles * W;
  const int64_t dim = args.dim, tail_dim = args.tail_dim, value_dim = args.value_dim;
  const int64_t width = padded(value_dim);
  const int64_t key_width = Engine::key_width(dim), tail_width = Engine::key_width(tail_dim);
  const int64_t query_tile = (key_width + tail_width) * W;  // elements of W queries
  const bool value_is_key = args.value == args.key && value_dim <= dim &&
                            args.value_row == args.key_row && args.value_head == args.key_head &&
                            args.value_batch == args.key_batch && same_scales(args);
  Engine engine;
  Scratch scratch = {memory};
  float* top = scratch.take<float>(all_rows);
  float* total = scratch.take<float>(all_rows);
  float* decay = scratch.take<float>(all_rows);
  const TileOptions options(task, all_rows, &scratch);
  Element* query = scratch.take<Element>(tiles * query_tile);
  float* score = scratch.take<float>(all_rows * kBlock);
  Weight* weights =
      Engine::kPairs ? scratch.take<Weight>(all_rows * kBlock) : reinterpret_cast<Weight*>(score);
  Element* key_stage = scratch.take<Element>(kBlock * Engine::pitch(dim));
  Element* tail_stage = scratch.take<Element>(kBlock * Engine::pitch(tail_dim));
  Element* value_stage = scratch.take<Element>(Engine::value_elements(value_dim));
  float* sum = scratch.take<float>(all_rows * width);
  Segments ended(all_rows, width, &scratch);
  const auto columns = [&](float* of, int64_t row, int64_t v) HEADWISE_LAMBDA {
    return Engine::columns(of, width, row, v);
  };
  float* row_sum = scratch.take<float>(2 * width);

  for (int64_t row = 0; row < all_rows; ++row) {
    top[row] = -kInfinity;
    total[row] = 0.0f;
  }
  for (int64_t t = 0; t < tiles; ++t) {
    int64_t lines[W], tail_lines[W];
    const int count = int(rows - t * W < W ? rows - t * W : W);
    for (int i = 0; i < count; ++i) {
      const int64_t head = task.head(t * W + i), index = task.query(t * W + i);
      lines[i] = task.batch * args.query_batch + head * args.query_head + index * args.query_row;
      tail_lines[i] = task.batch * args.query_tail_batch + head * args.query_tail_head +
                      index * args.query_tail_row;
    }
    // unscaled, which is exact: the scale is applied to the scores
    Element* to = query + t * query_tile;
    Engine::pack_queries(args, args.query, lines, count, dim, to);
    if (tail_dim > 0)
      Engine::pack_queries(args, args.query_tail, tail_lines, count, tail_dim, to + key_width * W);
  }
  __builtin_memset(sum, 0, sizeof(float) * all_rows * width);

  const Span span = task.span();
  const int64_t base = task.base();
  const bool combined = !plain(args.options) || !(args.scale >= 0.0f);
  for (int64_t block = span.begin; block < span.end; block += kBlock) {
    const int count = span.count(block);
    if (block > span.begin && (block - base) % task.sequence->segment == 0)
      ended.end_segment(top, total, sum, columns);
    if (!task.visible(block, count)) continue;
    const int64_t next = block + kBlock;
    Ahead ahead;
    ahead.add(keys, next, span.coming(next), dim);
    if (tail_dim > 0) ahead.add(tails, next, span.coming(next), tail_dim);
    if (!value_is_key) ahead.add(values, next, span.coming(next), value_dim);

    const Block<Element> key = key_block<Engine>(keys, block, count, dim, key_stage);
    engine.scores(query, query_tile, tiles, key, key_width, true, score, ahead);
    if (tail_dim > 0) {
      const Block<Element> tail = key_block<Engine>(tails, block, count, tail_dim, tail_stage);
      engine.scores(query + key_width * W, query_tile, tiles, tail, tail_width, false, score,
                    ahead);
    }

    const bool edge = span.edge(block);
    for (int64_t t = 0; t < tiles; ++t) {
      float* s = score + t * kBlock * W;
      if (combined || edge) options.apply(t * W, block, count, s);
      if (edge) options.hide(t * W, block, count, s);
      const bool same =
          soften_rows<Engine>(s, combined || edge ? 1.0f : args.scale, top + t * W, total + t * W,
                              decay + t * W, weights + t * kBlock * W, ahead);
      if (same) continue;
      for (int64_t row = t * W; row < (t + 1) * W; ++row) {
        if (decay[row] == 1.0f) continue;
        for (int64_t v = 0; v < width; v += 16) {
          float* to = Engine::columns(sum, width, row, v);
          for (int i = 0; i < 16; i += W) store(to + i, load(to + i) * decay[row]);
        }
      }
    }

    if constexpr (Engine::kPairs) {
      for (int64_t column = 0; column < value_dim; column += 64) {
        const int columns = int(value_dim - column < 64 ? value_dim - column : 64);
        Engine::pack_values(values, block, count, value_dim, column, value_stage, ahead);
        engine.weigh(weights, tiles, value_stage, count, columns, width,
                     Engine::columns(sum, width, 0, column), ahead);
      }
    } else {
      const Block<Element> value =
          value_is_key && value_dim % W == 0
              ? key
              : key_block<typename Engine::Values>(values, block, count, value_dim, value_stage);
      engine.weigh(weights, tiles, value, count, value_dim, width, sum, ahead);
    }
  }

  if (ended.used) ended.end_segment(top, total, sum, columns);
  float* all = ended.used ? ended.sum : sum;
  finish(
      task, ended.used ? ended.top : top, ended.used ? ended.total : total,
      [&](int64_t row, float* to) HEADWISE_LAMBDA {
        for (int64_t v = 0; v < width; v += 16)
          __builtin_memcpy(to + v, columns(all, row, v), 16 * sizeof(float));
      },
      row_sum);
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
