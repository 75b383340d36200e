// Scores of an indexer: for each query and key, sum over heads of weight * max(0, query . key).
//
// The products are those of attention to many rows (tiles.h), where the heads of a query are the
// rows. DeepSeek-V3.2, arXiv 2512.02556, equation 1.
#pragma once

#include "tiles.h"

namespace headwise {
namespace HEADWISE_ISA {

template <class Engine, class T>
void index_scores(const IndexArgs& args, int64_t b, int64_t s, int64_t first, int64_t stop,
                  float* out, char* memory) {
  typedef typename Engine::Element Element;
  const int64_t heads = args.heads, dim = args.dim, tiles = (heads + W - 1) / W;
  const int64_t width = Engine::key_width(dim);
  Engine engine;
  Scratch scratch = {memory};
  float* weight = scratch.take<float>(tiles * W);
  Element* query = scratch.take<Element>(tiles * width * W);
  float* score = scratch.take<float>(tiles * W * kBlock);
  Element* stage = scratch.take<Element>(kBlock * Engine::pitch(dim));

  AttendArgs packing = {};
  packing.dtype = args.dtype;
  for (int64_t t = 0; t < tiles; ++t) {
    int64_t lines[W];
    const int count = int(heads - t * W < W ? heads - t * W : W);
    for (int i = 0; i < count; ++i)
      lines[i] = b * args.query_batch + s * args.query_row + (t * W + i) * args.query_head;
    Engine::pack_queries(packing, args.query, lines, count, dim, query + t * width * W);
  }
  const float* own = args.weight + b * args.weight_batch + s * args.weight_row;
  for (int64_t i = 0; i < tiles * W; ++i) weight[i] = i < heads ? own[i] : 0.0f;

  const StridedRows<T> keys = {static_cast<const T*>(args.key) + b * args.key_batch, args.key_row};
  for (int64_t block = first; block < stop; block += kBlock) {
    const int count = int(stop - block < kBlock ? stop - block : kBlock);
    const int64_t next = block + kBlock;
    Ahead ahead;
    if (next < stop) ahead.add(keys, next, stop - next < kBlock ? stop - next : kBlock, dim);
    const Block<Element> key = key_block<Engine>(keys, block, count, dim, stage);
    engine.scores(query, width * W, tiles, key, width, true, score, ahead);
    for (int j = 0; j < count; ++j) {
      vf all = vf{};
      for (int64_t t = 0; t < tiles; ++t)
        all += load(weight + t * W) * larger(load(score + (t * kBlock + j) * W), vf{});
      out[block + j] = sum(all);
    }
  }
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
