// The keys with the largest scores q . k, found while the keys are read once.
//
// Each row has a list of what was larger than its threshold when it was read. A full list is cut to
// the largest by the operator (select.h), which raises the threshold: of random scores few pass it.
// The products are those of attention, to few rows (rowwise) or many (tiles).
#pragma once

#include "rowwise_float.h"
#include "rowwise_pairs.h"
#include "tiles.h"

namespace headwise {
namespace HEADWISE_ISA {

// what(lane) for each score above the threshold of its lane, as NaN is.
template <class What>
HEADWISE_INLINE void each_above(vf score, vf threshold, const What& what) {
  uint32_t above = lanes(~(vi)(score <= threshold));
  for (; above != 0; above &= above - 1) what(__builtin_ctz(above));
}

HEADWISE_INLINE void list_key(const TopPart& part, int64_t row, float score, int64_t place) {
  const int64_t at = row * part.room + part.counts[row]++;
  part.scores[at] = score;
  part.places[at] = int32_t(place);
}

// The keys of a kv head from `first` on, by `score(block, count, ahead)` and then `list(block,
// count, ahead)`, until a list may have no room for one more block. Returns where it stopped.
template <class Rows, class Score, class List>
HEADWISE_INLINE int64_t over_blocks(const TopPart& part, const Rows& keys, int64_t dim,
                                    int64_t first, int64_t stop, const Score& score,
                                    const List& list) {
  for (; first < stop; first += kBlock) {
    for (int64_t row = 0; row < part.rows; ++row)
      if (part.counts[row] + kBlock > part.room) return first;
    const int count = int(stop - first < kBlock ? stop - first : kBlock);
    const int64_t next = first + kBlock;
    Ahead ahead;
    if (next < stop) ahead.add(keys, next, stop - next < kBlock ? stop - next : kBlock, dim);
    score(first, count, ahead);
    list(first, count, ahead);
  }
  return stop;
}

// Few rows: each key is read as vectors, for up to 4 rows at once.
template <class T>
int64_t top_by_rows(const TopArgs& args, const TopPart& part, int64_t first, int64_t stop,
                    char* memory) {
  constexpr bool kDot = kHasPairs && Same<T, bf16>::value;
  const int64_t rows = part.rows, dim = args.dim, width = padded(dim);
  Scratch scratch = {memory};
  float* score = scratch.take<float>(rows * kBlock);
  float* query = scratch.take<float>(rows * width);
  [[maybe_unused]] bf16* narrow = reinterpret_cast<bf16*>(query);
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = static_cast<const T*>(args.query) + args.query_of(part, row);
    for (int64_t d = 0; d < width; ++d) {
      if constexpr (kDot)
        narrow[row * width + d] = d < dim ? from[d] : T{};
      else
        query[row * width + d] = d < dim ? to_float(from[d]) : 0.0f;
    }
  }
  const StridedRows<T> keys = {static_cast<const T*>(args.key) + args.keys_of(part), args.key_row};
  const auto products = [&](int64_t block, int count, Ahead& ahead) HEADWISE_LAMBDA {
    const T* key[kBlock];
    find_rows(keys, block, count, 1.0f, key, nullptr);
    for (int k = 0; k < count; k += 4)
      by_rows(rows, [&](auto R, int64_t row) HEADWISE_LAMBDA {
        float* to = score + row * kBlock + k;
#if defined(HEADWISE_PAIRS)
        if constexpr (kDot) {
          score_tile_dot<R.value>(narrow + row * width, width, key + k, dim, to, ahead);
          return;
        }
#endif
        score_tile<R.value, StridedRows<T>>(query + row * width, width, key + k, dim, to, ahead);
      });
  };
  const auto list = [&](int64_t block, int count, Ahead&) HEADWISE_LAMBDA {
    for (int64_t row = 0; row < rows; ++row) {
      float* own = score + row * kBlock;
      for (int j = count; j < kBlock; ++j) own[j] = -kInfinity;
      const vf threshold = splat(part.thresholds[row]);
      for (int j = 0; j < count; j += W)
        each_above(load(own + j), threshold, [&](int lane) HEADWISE_LAMBDA {
          const int64_t place = block + j + lane;
          if (args.seen(part, place)) list_key(part, row, own[j + lane], place);
        });
    }
  };
  return over_blocks(part, keys, dim, first, stop, products, list);
}

// Many rows: products of tiles, whose lanes are rows.
template <class Engine, class T>
int64_t top_by_tiles(const TopArgs& args, const TopPart& part, int64_t first, int64_t stop,
                     char* memory) {
  typedef typename Engine::Element Element;
  const int64_t rows = part.rows, dim = args.dim, tiles = (rows + W - 1) / W;
  const int64_t width = Engine::key_width(dim);
  Engine engine;
  Scratch scratch = {memory};
  float* score = scratch.take<float>(tiles * W * kBlock);
  Element* query = scratch.take<Element>(tiles * width * W);
  Element* stage = scratch.take<Element>(kBlock * Engine::pitch(dim));
  AttendArgs packing = {};
  packing.dtype = args.dtype;
  for (int64_t t = 0; t < tiles; ++t) {
    int64_t lines[W];
    const int count = int(rows - t * W < W ? rows - t * W : W);
    for (int i = 0; i < count; ++i) lines[i] = args.query_of(part, t * W + i);
    Engine::pack_queries(packing, args.query, lines, count, dim, query + t * width * W);
  }
  const StridedRows<T> keys = {static_cast<const T*>(args.key) + args.keys_of(part), args.key_row};
  const auto products = [&](int64_t block, int count, Ahead& ahead) HEADWISE_LAMBDA {
    const Block<Element> key = key_block<Engine>(keys, block, count, dim, stage);
    engine.scores(query, width * W, tiles, key, width, true, score, ahead);
  };
  // what the products of few rows left to be asked for
  const int lines = int((dim * int64_t(sizeof(T)) + 63) / 64);
  const auto list = [&](int64_t block, int count, Ahead& ahead) HEADWISE_LAMBDA {
    for (int64_t t = 0; t < tiles; ++t) {
      const float* own = score + t * kBlock * W;
      const vf threshold = load(part.thresholds + t * W);
      for (int j = 0; j < count; ++j) {
        for (int line = 0; t == 0 && line < lines; ++line) ahead.tick();
        each_above(load(own + j * W), threshold, [&](int lane) HEADWISE_LAMBDA {
          const int64_t row = t * W + lane;
          if (row < rows && args.seen(part, block + j))
            list_key(part, row, own[j * W + lane], block + j);
        });
      }
    }
  };
  return over_blocks(part, keys, dim, first, stop, products, list);
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
