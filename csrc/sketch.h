// What the keys of a cache weigh for a query, by their sketch: keys of 4 bits, rotated, with a
// scale for each 32 elements.
//
// Lanes are keys. A row of the sketch is cut into words of 32 bits, eight elements each, and the
// words of W keys are transposed, so that no sum runs across lanes. Queries are rounded to 8 bits,
// one scale for each, an error far below that of the keys.
#pragma once

#include "rotation.h"
#include "rows.h"

namespace headwise {
namespace HEADWISE_ISA {

// Elements of a word, and words that share a scale.
constexpr int kWordElements = 8, kGroupWords = kInt4Group / kWordElements;

// The sum of a group's products of unsigned elements, 0 to 15, with integers of a query.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
// two sums, so that none waits for the other
struct GroupSum {
  __m512i even = _mm512_setzero_si512(), odd = _mm512_setzero_si512();
  HEADWISE_INLINE void add(vi evens, vi odds, const int32_t* query) {
    add_to(even, evens, query);
    add_to(odd, odds, query + 1);
  }
  HEADWISE_INLINE void begin(int32_t more) { even = _mm512_set1_epi32(more); }
  HEADWISE_INLINE vf sum(int32_t) const {
    return (vf)_mm512_cvtepi32_ps(_mm512_add_epi32(even, odd));
  }
  // GCC moves a sum to another register and back, and broadcasts in an instruction of its own
  static HEADWISE_INLINE void add_to(__m512i& total, vi elements, const int32_t* query) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(total) : "v"(elements), "m"(*query));
  }
};
#elif defined(__AVX512BW__)
// in 16 bits: eight sums of two products, each of 15 * 127 at most
struct GroupSum {
  __m512i total = _mm512_setzero_si512();
  HEADWISE_INLINE void begin(int32_t) {}
  HEADWISE_INLINE void add(vi evens, vi odds, const int32_t* query) {
    add_to(evens, query[0]);
    add_to(odds, query[1]);
  }
  HEADWISE_INLINE void add_to(vi elements, int32_t query) {
    const __m512i products = _mm512_maddubs_epi16((__m512i)elements, _mm512_set1_epi32(query));
    total = _mm512_add_epi16(total, products);
  }
  HEADWISE_INLINE vf sum(int32_t more) const {
    const __m512i all = _mm512_madd_epi16(total, _mm512_set1_epi16(1));
    return (vf)_mm512_cvtepi32_ps(_mm512_add_epi32(all, _mm512_set1_epi32(more)));
  }
};
#elif defined(__AVX2__)
struct GroupSum {
  __m256i total = _mm256_setzero_si256();
  HEADWISE_INLINE void begin(int32_t) {}
  HEADWISE_INLINE void add(vi evens, vi odds, const int32_t* query) {
    add_to(evens, query[0]);
    add_to(odds, query[1]);
  }
  HEADWISE_INLINE void add_to(vi elements, int32_t query) {
    const __m256i products = _mm256_maddubs_epi16((__m256i)elements, _mm256_set1_epi32(query));
    total = _mm256_add_epi16(total, products);
  }
  HEADWISE_INLINE vf sum(int32_t more) const {
    const __m256i all = _mm256_madd_epi16(total, _mm256_set1_epi16(1));
    return (vf)_mm256_cvtepi32_ps(_mm256_add_epi32(all, _mm256_set1_epi32(more)));
  }
};
#else
struct GroupSum {
  vf total = vf{};
  HEADWISE_INLINE void begin(int32_t) {}
  HEADWISE_INLINE void add(vi evens, vi odds, const int32_t* query) {
    add_to(evens, query[0]);
    add_to(odds, query[1]);
  }
  HEADWISE_INLINE void add_to(vi elements, int32_t query) {
    for (int i = 0; i < 4; ++i)
      total += __builtin_convertvector((vi)((vu)elements >> (8 * i) & 15u), vf) *
               float(int8_t(uint32_t(query) >> (8 * i)));
  }
  HEADWISE_INLINE vf sum(int32_t more) const { return total + float(more); }
};
#endif

// Rows of queries that are multiplied at once, of `left`.
constexpr int kSketchRows = kRegisters >= 32 ? 6 : 4;
HEADWISE_INLINE int64_t tile_of(int64_t left) {
  return left >= kSketchRows ? kSketchRows : left >= 3 ? 3 : left;
}

// The queries of a part as the products read them, in tiles of rows.
struct SketchQueries {
  int32_t* words;  // [tiles][words][rows of a tile][2]: a word's even elements, and the odd ones
  int32_t* more;   // [rows][groups]: -8 times the sum of a group, as elements are 8 too large
  float* unit;     // [rows]: what an integer stands for, times the scale of scores

  SketchQueries(const SketchArgs& args, const SketchPart& part) {
    const int64_t rows = part.rows(args);
    words = reinterpret_cast<int32_t*>(part.taken);
    more = words + rows * 2 * args.words();
    unit = reinterpret_cast<float*>(more + rows * args.groups());
  }
};

// Rotates and rounds the queries of a part.
inline void take_sketch_queries(const SketchArgs& args, const SketchPart& part, char* memory) {
  const int64_t words = args.words(), groups = args.groups(), rows = part.rows(args);
  const SketchQueries taken(args, part);
  float* row = reinterpret_cast<float*>(memory);
  int64_t first = 0, tile = tile_of(rows);  // of the row
  for (int64_t r = 0; r < rows; ++r) {
    if (r == first + tile) first = r, tile = tile_of(rows - r);
    const int64_t head = part.head * args.group() + r % args.group();
    const int64_t at = part.batch * args.query_batch + head * args.query_head +
                       (part.query + r / args.group()) * args.query_row;
    with_dtype(args.dtype, args.query, [&](const auto* base) HEADWISE_LAMBDA {
      for (int64_t d = 0; d < args.dim; ++d) row[d] = to_float(base[at + d]);
    });
    rotate_row(row, args.dim);
    for (int64_t d = args.dim; d < words * kWordElements; ++d) row[d] = 0.0f;
    float top = 0.0f;
    for (int64_t d = 0; d < args.dim; ++d) {
      const float size = row[d] < 0.0f ? -row[d] : row[d];
      top = size > top || size != size ? size : top;
    }
    // what is below can be nothing beside any other number
    const float factor = top > 1e-30f ? 127.0f / top : 0.0f;
    taken.unit[r] =
        (top == top && top < kInfinity ? top / 127.0f : __builtin_nanf("")) * args.scale;
    for (int64_t g = 0; g < groups; ++g) taken.more[r * groups + g] = 0;
    for (int64_t w = 0; w < words; ++w) {
      uint32_t halves[2] = {0, 0};
      for (int i = 0; i < kWordElements; ++i) {
        float x = row[w * kWordElements + i] * factor;
        x = x != x ? 0.0f : x < -127.0f ? -127.0f : x > 127.0f ? 127.0f : x;
        const int32_t integer = int32_t((x + 12582912.0f) - 12582912.0f);
        halves[i % 2] |= uint32_t(uint8_t(int8_t(integer))) << (i / 2 * 8);
        taken.more[r * groups + w / kGroupWords] -= 8 * integer;
      }
      int32_t* to = taken.words + (first * words + w * tile + r - first) * 2;
      to[0] = int32_t(halves[0]);
      to[1] = int32_t(halves[1]);
    }
  }
}

#if defined(__AVX512BW__)
// Up to 16 words of each of 16 rows, in turn: to[w] has word w of every row. row(i) is where a row
// is.
template <class Row>
HEADWISE_INLINE void transpose_words(const Row& row, int words, int32_t* to) {
  const __mmask16 some = __mmask16((1u << words) - 1);
  __m512i x[16], y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = _mm512_maskz_loadu_epi32(some, row(i));
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  // x[4 * a + b] has, in its quarter c, word 4 * c + b of the rows 4 * a and following
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) {
    const __m512i low = _mm512_shuffle_i32x4(x[b], x[4 + b], 0x44);
    const __m512i high = _mm512_shuffle_i32x4(x[b], x[4 + b], 0xee);
    const __m512i low2 = _mm512_shuffle_i32x4(x[8 + b], x[12 + b], 0x44);
    const __m512i high2 = _mm512_shuffle_i32x4(x[8 + b], x[12 + b], 0xee);
    y[b] = _mm512_shuffle_i32x4(low, low2, 0x88);
    y[4 + b] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    y[8 + b] = _mm512_shuffle_i32x4(high, high2, 0x88);
    y[12 + b] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int w = 0; w < 16; ++w) _mm512_storeu_si512(to + w * W, y[w]);
}

// Four words of each of 16 rows that lie side by side.
HEADWISE_INLINE void transpose_fours(const char* rows, int32_t* to) {
  alignas(64) static const int32_t kFirst[16] = {0, 4, 8, 12, 16, 20, 24, 28,
                                                 1, 5, 9, 13, 17, 21, 25, 29};
  const __m512i first = _mm512_load_si512(kFirst);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(2));
  const __m512i a = _mm512_loadu_si512(rows), b = _mm512_loadu_si512(rows + 64);
  const __m512i c = _mm512_loadu_si512(rows + 128), d = _mm512_loadu_si512(rows + 192);
  const __m512i ab = _mm512_permutex2var_epi32(a, first, b);
  const __m512i cd = _mm512_permutex2var_epi32(c, first, d);
  const __m512i ab2 = _mm512_permutex2var_epi32(a, second, b);
  const __m512i cd2 = _mm512_permutex2var_epi32(c, second, d);
  _mm512_storeu_si512(to, _mm512_shuffle_i64x2(ab, cd, 0x44));
  _mm512_storeu_si512(to + 16, _mm512_shuffle_i64x2(ab, cd, 0xee));
  _mm512_storeu_si512(to + 32, _mm512_shuffle_i64x2(ab2, cd2, 0x44));
  _mm512_storeu_si512(to + 48, _mm512_shuffle_i64x2(ab2, cd2, 0xee));
}
#else
template <class Row>
HEADWISE_INLINE void transpose_words(const Row& row, int words, int32_t* to) {
  for (int i = 0; i < W; ++i)
    for (int w = 0; w < words; ++w) __builtin_memcpy(to + w * W + i, row(i) + 4 * w, 4);
}
#endif

// The same for rows of any number of bytes; what is missing in the last word is 0.
template <class Row>
HEADWISE_INLINE void transpose_rows(const Row& row, int64_t bytes, int32_t* to) {
  int64_t at = 0;
  for (; at + 4 <= bytes; at += 64) {
    const int64_t words = (bytes - at) / 4 < 16 ? (bytes - at) / 4 : 16;
    transpose_words([&](int i) HEADWISE_LAMBDA { return row(i) + at; }, int(words), to + at / 4 * W);
  }
  const int64_t whole = bytes / 4;
  if (bytes % 4 == 0) return;
  for (int i = 0; i < W; ++i) {
    to[whole * W + i] = 0;
    __builtin_memcpy(to + whole * W + i, row(i) + 4 * whole, bytes % 4);
  }
}

// Rows of a sketch, of keys or of their scales, `stride` bytes apart in pages `page` apart.
struct SketchRows {
  const char* base;
  int64_t stride, page, bytes;
  Places places;

  HEADWISE_INLINE const char* at(int64_t index) const {
    return base + places.offset(index, stride, page);
  }
  // The words of the W rows from `block` on. Past the row before `stop` that one stands in; what it
  // gives is hidden.
  HEADWISE_INLINE void take(int64_t block, int64_t stop, int32_t* to) const {
    if (block + W <= stop && places.together(block, W) == W) {
      const char* first = at(block);
#if defined(__AVX512BW__)
      if (bytes == 16 && stride == 16) {
        transpose_fours(first, to);
        return;
      }
#endif
      transpose_rows([&](int i) HEADWISE_LAMBDA { return first + i * stride; }, bytes, to);
      return;
    }
    const char* rows[W];
    for (int i = 0; i < W; ++i) rows[i] = at(block + i < stop ? block + i : stop - 1);
    transpose_rows([&](int i) HEADWISE_LAMBDA { return rows[i]; }, bytes, to);
  }
};

// The products of R rows of queries with the W keys of `keys` and `scales`, at `score` and `pitch`
// further for each row.
template <int R>
HEADWISE_INLINE void sketch_products(const SketchArgs& args, const SketchQueries& queries,
                                     int64_t first, const int32_t* keys, const int32_t* scales,
                                     float* score, int64_t pitch, const char* next_keys,
                                     const char* next_scales) {
  const int64_t words = args.words(), groups = args.groups();
  const int32_t* own = queries.words + first * 2 * words;
  vf total[R] = {};
  for (int64_t g = 0; g < groups; ++g) {
    GroupSum sums[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r].begin(queries.more[(first + r) * groups + g]);
    prefetch(next_scales + g * 64);
    const int64_t end = (g + 1) * kGroupWords < words ? (g + 1) * kGroupWords : words;
    for (int64_t w = g * kGroupWords; w < end; ++w) {
      prefetch(next_keys + w * 64);
      vi both;
      __builtin_memcpy(&both, keys + w * W, sizeof both);
      both ^= int32_t(0x88888888);  // -8 to 7 becomes 0 to 15
      const vi even = both & 0x0f0f0f0f, odd = (vi)((vu)both >> 4) & 0x0f0f0f0f;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r].add(even, odd, own + (w * R + r) * 2);
    }
    vf scale;
    __builtin_memcpy(&scale, scales + g * W, sizeof scale);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      total[r] += sums[r].sum(queries.more[(first + r) * groups + g]) * scale;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) store(score + r * pitch, total[r] * queries.unit[first + r]);
}

// Keys ahead of their use that memory is asked for.
constexpr int64_t kSketchAhead = 128;

// What the keys first..stop weigh for each row of a part, up to a factor of each row: e^(score -
// max), with the maximum and the sum of these keys. Of a key that is hidden it is 0; what is no
// number stays that, and enters neither.
inline void sketch_scores(const SketchArgs& args, const SketchPart& part, int64_t first,
                          int64_t stop, char* memory) {
  const int64_t words = args.words(), groups = args.groups(), rows = part.rows(args);
  Scratch scratch = {memory};
  int32_t* keys = scratch.take<int32_t>((words + 15) / 16 * 16 * W);
  int32_t* scales = scratch.take<int32_t>((groups + 15) / 16 * 16 * W);
  const SketchQueries queries(args, part);
  const Places places = {args.table == nullptr ? nullptr : args.table + part.batch * args.table_row,
                         args.page_shift, nullptr};
  const int64_t sequence = args.table == nullptr ? part.batch : 0;
  const auto rows_at = [&](const void* base, int64_t bytes, int64_t batch, int64_t head,
                           int64_t row, int64_t count) HEADWISE_LAMBDA {
    const char* begin = static_cast<const char*>(base);
    return SketchRows{begin + bytes * (sequence * batch + part.head * head), bytes * row,
                      bytes * batch, bytes * count, places};
  };
  const SketchRows key_rows =
      rows_at(args.keys, 1, args.key_batch, args.key_head, args.key_row, args.dim / 2);
  const SketchRows scale_rows =
      rows_at(args.scales.data, 4, args.scales.batch, args.scales.head, args.scales.row, groups);
  const int64_t range = first / kSketchRange, pitch = args.pitch();
  // the thread goes on with the next range, mostly
  const int64_t held = args.held(part.batch);
  for (int64_t block = first; block < stop; block += W) {
    const int64_t ahead = block + kSketchAhead < held ? block + kSketchAhead : block;
    const char *next_keys = key_rows.at(ahead), *next_scales = scale_rows.at(ahead);
    key_rows.take(block, stop, keys);
    scale_rows.take(block, stop, scales);
    float* score = part.weights + block;
    for (int64_t r = 0; r < rows;) {
      const auto take = [&](auto count) HEADWISE_LAMBDA {
        sketch_products<decltype(count)::value>(args, queries, r, keys, scales, score + r * pitch,
                                                pitch, next_keys, next_scales);
        r += decltype(count)::value;
      };
      const int64_t tile = tile_of(rows - r);
      if (tile == kSketchRows)
        take(Number<kSketchRows>{});
      else if (tile == 3)
        take(Number<3>{});
      else if (tile == 2)
        take(Number<2>{});
      else
        take(Number<1>{});
    }
  }
  const int64_t end = (stop + W - 1) / W * W;  // rows have room for whole vectors
  const vf none = splat(-kInfinity);
  for (int64_t r = 0; r < rows; ++r) {
    float* score = part.weights + r * pitch;
    if (args.softcap > 0.0f)
      for (int64_t j = first; j < end; j += W)
        store(score + j, args.softcap * tanh(load(score + j) / args.softcap));
    const int64_t query = part.query + r / args.group();
    const int64_t last = args.stop(part.batch, query);
    for (int64_t j = first > last ? first : last; j < end; ++j) score[j] = -kInfinity;
    for (int64_t j = stop; j < end; ++j) score[j] = -kInfinity;
    if (args.mask.data != nullptr) {
      const ScoreStrides& strides = args.mask.strides;
      const unsigned char* seen = args.mask.data + strides.offset(part.batch, 0, query, 0);
      for (int64_t j = first; j < stop; ++j)
        if (seen[j * strides.key] == 0) score[j] = -kInfinity;
    }
    vf tops[2] = {none, none};
    int64_t j = first;
    for (; j + 2 * W <= end; j += 2 * W)
      for (int i = 0; i < 2; ++i) tops[i] = larger(load(score + j + i * W), tops[i]);
    if (j < end) tops[0] = larger(load(score + j), tops[0]);
    const float most = largest(larger(tops[0], tops[1]));
    // with nothing seen there is nothing to subtract from -inf
    const float less = most > -kInfinity ? most : 0.0f;
    vf sums[2] = {};
    const auto weigh = [&](int64_t at, vf& to) HEADWISE_LAMBDA {
      const vf weight = exp_near(load(score + at) - less);
      store(score + at, weight);
      to += weight;
    };
    for (j = first; j + 2 * W <= end; j += 2 * W) {
      weigh(j, sums[0]);
      weigh(j + W, sums[1]);
    }
    if (j < end) weigh(j, sums[0]);
    float total = sum(sums[0] + sums[1]);
    if (total != total) {  // what is no number enters no sum
      vf known = vf{};
      for (j = first; j < end; j += W) {
        const vf weight = load(score + j);
        known += select((vi)(weight == weight), weight, vf{});
      }
      total = sum(known);
    }
    part.maxima[r * args.ranges() + range] = most;
    part.sums[r * args.ranges() + range] = total;
  }
}

// From what sketch_scores found in all ranges to the softmax weights of a part's only query.
inline void sketch_weights(const SketchArgs& args, const SketchPart& part, int64_t stop,
                           const SketchWeights& to) {
  const int64_t group = args.group(), ranges = args.ranges(), pitch = args.pitch();
  const auto power = [](float x) HEADWISE_LAMBDA { return exp(splat(x))[0]; };
  for (int64_t g = 0; g < group; ++g) {
    const float* maxima = part.maxima + g * ranges;
    const float sink = args.sinks == nullptr ? -kInfinity : args.sinks[part.head * group + g];
    float top = sink, all = 0.0f;
    for (int64_t i = 0; i < ranges; ++i) top = maxima[i] > top ? maxima[i] : top;
    for (int64_t i = 0; i < ranges; ++i) {
      const float own = maxima[i] > -kInfinity ? power(maxima[i] - top) : 0.0f;
      to.factor[g * ranges + i] = own;
      all += own * part.sums[g * ranges + i];
    }
    const float total = all + (sink > -kInfinity ? power(sink - top) : 0.0f);
    const float each = total > 0.0f ? 1.0f / total : 1.0f;
    for (int64_t i = 0; i < ranges; ++i) to.factor[g * ranges + i] *= each;
    to.mass[g] = all * each;
  }
  for (int64_t first = 0; first < stop; first += kSketchRange) {
    const int64_t end = first + kSketchRange < stop ? first + kSketchRange : stop;
    for (int64_t j = first; j < end; j += W) {
      vf weight = vf{};
      for (int64_t g = 0; g < group; ++g)
        weight += load(part.weights + g * pitch + j) * to.factor[g * ranges + first / kSketchRange];
      store(to.sum + j, weight);
    }
  }
}

}  // namespace HEADWISE_ISA
}  // namespace headwise
