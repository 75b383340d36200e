// The tile kernel's products of pairs of bf16 by the tile registers of AMX.
#pragma once

#include "tiles_pairs.h"

namespace headwise {
namespace HEADWISE_ISA {

#define HEADWISE_TILE_ZERO(t) asm volatile("tilezero %%tmm" #t ::: "memory")
#define HEADWISE_TILE_LOAD(t, from, bytes) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(from), "r"(int64_t(bytes)) : "memory")
#define HEADWISE_TILE_STORE(t, to, bytes) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(to), "r"(int64_t(bytes)) : "memory")
// tmm c += tmm a (16 rows of 32) times tmm b (16 pairs of rows of 16)
#define HEADWISE_TILE_DOT(c, a, b) \
  asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory")

// Four tiles of 16 rows of a matrix, `line` bytes apart, by 16 rows of pairs [width/2][16][2]: to
// [tile][16 rows of the matrix][16].
HEADWISE_INLINE void multiply_tiles(const bf16* pairs, const bf16* a, const bf16* b, const bf16* c,
                                    const bf16* d, int64_t line, int64_t width, float* to,
                                    Ahead& ahead) {
  HEADWISE_TILE_ZERO(0);
  HEADWISE_TILE_ZERO(1);
  HEADWISE_TILE_ZERO(2);
  HEADWISE_TILE_ZERO(3);
  const auto ask = [&]() HEADWISE_LAMBDA {
    for (int i = 0; i < 16; ++i) ahead.tick();
  };
  for (int64_t at = 0; at < width; at += 32) {
    HEADWISE_TILE_LOAD(6, pairs + at * 16, 64);
    HEADWISE_TILE_LOAD(4, a + at, line);
    ask();
    HEADWISE_TILE_DOT(0, 4, 6);
    HEADWISE_TILE_LOAD(5, b + at, line);
    ask();
    HEADWISE_TILE_DOT(1, 5, 6);
    HEADWISE_TILE_LOAD(4, c + at, line);
    ask();
    HEADWISE_TILE_DOT(2, 4, 6);
    HEADWISE_TILE_LOAD(5, d + at, line);
    ask();
    HEADWISE_TILE_DOT(3, 5, 6);
  }
  HEADWISE_TILE_STORE(0, to, 64);
  HEADWISE_TILE_STORE(1, to + 256, 64);
  HEADWISE_TILE_STORE(2, to + 512, 64);
  HEADWISE_TILE_STORE(3, to + 768, 64);
}

// Weights: [row tile][kBlock/32][16][32]. O: [row tile][16 columns][16][16].
struct PairEngine : PairLayout {
  PairEngine() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~PairEngine() { asm volatile("tilerelease" ::: "memory"); }

  static HEADWISE_INLINE float* columns(float* sum, int64_t width, int64_t row, int64_t column) {
    return sum + row / 16 * 16 * width + column / 16 * 256 + row % 16 * 16;
  }

  static HEADWISE_INLINE void keep(__m512i* pair, int at, bf16* weights) {
    transpose(pair);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(weights + at * 32 + i * 32, pair[i]);
  }

  static void scores(const bf16* query, int64_t tile, int64_t tiles, Block<bf16> keys, int64_t dim,
                     bool first, float* to, Ahead& ahead) {
    const int64_t pitch = keys.stride * 2, step = 16 * keys.stride;
    const int64_t next = kBlock * 16;  // floats from a row tile to the next
    int64_t t = 0;
    for (; t + 2 <= tiles; t += 2)
      for (int k = 0; k < kBlock; k += 32) {
        float* at = to + t * next + k * 16;
        const bf16* key = keys.rows + k * keys.stride;
        score_square(query + t * tile, tile, key, pitch, step, dim, first, at, at + next, ahead);
      }
    if (t < tiles)
      score_column(query + t * tile, keys.rows, pitch, step, dim, first, to + t * next, ahead);
  }

  // Two row tiles, 32 keys.
  static HEADWISE_INLINE void score_square(const bf16* row, int64_t tile, const bf16* key,
                                           int64_t pitch, int64_t step, int64_t dim, bool first,
                                           float* at, float* below, Ahead& ahead) {
    open(first, at, below, at + 256, below + 256);
    for (int64_t d = 0; d < dim; d += 32) {
      HEADWISE_TILE_LOAD(6, row + d * 16, 64);
      ahead.tick();
      HEADWISE_TILE_LOAD(4, key + d, pitch);
      ahead.tick();
      HEADWISE_TILE_DOT(0, 4, 6);
      HEADWISE_TILE_LOAD(7, row + tile + d * 16, 64);
      HEADWISE_TILE_DOT(1, 4, 7);
      ahead.tick();
      HEADWISE_TILE_LOAD(5, key + step + d, pitch);
      HEADWISE_TILE_DOT(2, 5, 6);
      ahead.tick();
      HEADWISE_TILE_DOT(3, 5, 7);
    }
    close(at, below, at + 256, below + 256);
  }

  // One row tile, 64 keys.
  static HEADWISE_INLINE void score_column(const bf16* row, const bf16* key, int64_t pitch,
                                           int64_t step, int64_t dim, bool first, float* at,
                                           Ahead& ahead) {
    open(first, at, at + 256, at + 512, at + 768);
    for (int64_t d = 0; d < dim; d += 32) {
      HEADWISE_TILE_LOAD(6, row + d * 16, 64);
      ahead.tick();
      HEADWISE_TILE_LOAD(4, key + d, pitch);
      ahead.tick();
      HEADWISE_TILE_DOT(0, 4, 6);
      ahead.tick();
      HEADWISE_TILE_LOAD(5, key + step + d, pitch);
      ahead.tick();
      HEADWISE_TILE_DOT(1, 5, 6);
      ahead.tick();
      HEADWISE_TILE_LOAD(4, key + 2 * step + d, pitch);
      ahead.tick();
      HEADWISE_TILE_DOT(2, 4, 6);
      ahead.tick();
      HEADWISE_TILE_LOAD(5, key + 3 * step + d, pitch);
      ahead.tick();
      HEADWISE_TILE_DOT(3, 5, 6);
      ahead.tick();
    }
    close(at, at + 256, at + 512, at + 768);
  }

  // Sums in the tiles 0 to 3: from zero, or from what is there; and back.
  static HEADWISE_INLINE void open(bool zero, const float* a, const float* b, const float* c,
                                   const float* d) {
    if (zero) {
      HEADWISE_TILE_ZERO(0);
      HEADWISE_TILE_ZERO(1);
      HEADWISE_TILE_ZERO(2);
      HEADWISE_TILE_ZERO(3);
    } else {
      HEADWISE_TILE_LOAD(0, a, 64);
      HEADWISE_TILE_LOAD(1, b, 64);
      HEADWISE_TILE_LOAD(2, c, 64);
      HEADWISE_TILE_LOAD(3, d, 64);
    }
  }
  static HEADWISE_INLINE void close(float* a, float* b, float* c, float* d) {
    HEADWISE_TILE_STORE(0, a, 64);
    HEADWISE_TILE_STORE(1, b, 64);
    HEADWISE_TILE_STORE(2, c, 64);
    HEADWISE_TILE_STORE(3, d, 64);
  }

  static void weigh(const bf16* weights, int64_t tiles, const bf16* values, int count, int columns,
                    int64_t width, float* sum, Ahead& ahead) {
    const int64_t next = kBlock * 16;  // weights from a row tile to the next
    int64_t t = 0;
    for (; t + 2 <= tiles; t += 2)
      for (int c = 0; c < columns; c += 32) {
        const bf16* value = values + c / 16 * kValueTile;
        float* at = sum + t * 16 * width + c * 16;
        float* below = at + 16 * width;
        open(false, at, at + 256, below, below + 256);
        for (int j = 0; j < count; j += 32) {
          HEADWISE_TILE_LOAD(6, value + j * 16, 64);
          HEADWISE_TILE_LOAD(4, weights + t * next + j * 16, 64);
          HEADWISE_TILE_DOT(0, 4, 6);
          ahead.tick();
          HEADWISE_TILE_LOAD(7, value + kValueTile + j * 16, 64);
          HEADWISE_TILE_DOT(1, 4, 7);
          ahead.tick();
          HEADWISE_TILE_LOAD(5, weights + (t + 1) * next + j * 16, 64);
          HEADWISE_TILE_DOT(2, 5, 6);
          ahead.tick();
          HEADWISE_TILE_DOT(3, 5, 7);
          ahead.tick();
        }
        close(at, at + 256, below, below + 256);
      }
    if (t == tiles) return;
    float* at = sum + t * 16 * width;
    HEADWISE_TILE_LOAD(0, at, 64);
    HEADWISE_TILE_LOAD(1, at + 256, 64);
    if (columns > 32) {
      HEADWISE_TILE_LOAD(2, at + 512, 64);
      HEADWISE_TILE_LOAD(3, at + 768, 64);
    }
    for (int j = 0; j < count; j += 32) {
      const bf16* value = values + j * 16;
      HEADWISE_TILE_LOAD(4, weights + t * next + j * 16, 64);
      HEADWISE_TILE_LOAD(6, value, 64);
      HEADWISE_TILE_DOT(0, 4, 6);
      ahead.tick();
      HEADWISE_TILE_LOAD(7, value + kValueTile, 64);
      HEADWISE_TILE_DOT(1, 4, 7);
      ahead.tick();
      if (columns > 32) {
        HEADWISE_TILE_LOAD(6, value + 2 * kValueTile, 64);
        HEADWISE_TILE_DOT(2, 4, 6);
        ahead.tick();
        HEADWISE_TILE_LOAD(7, value + 3 * kValueTile, 64);
        HEADWISE_TILE_DOT(3, 4, 7);
        ahead.tick();
      }
    }
    HEADWISE_TILE_STORE(0, at, 64);
    HEADWISE_TILE_STORE(1, at + 256, 64);
    if (columns > 32) {
      HEADWISE_TILE_STORE(2, at + 512, 64);
      HEADWISE_TILE_STORE(3, at + 768, 64);
    }
  }
};

}  // namespace HEADWISE_ISA
}  // namespace headwise
