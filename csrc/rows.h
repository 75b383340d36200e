// How the rows of K and V are found in memory, widened, and asked for ahead of their use.
//
// Another layout of a cache needs another class like these two, not another kernel.
#pragma once

#include "attend_args.h"
#include "simd.h"

namespace headwise {
namespace HEADWISE_ISA {

// How many of the `count` numbers of a list from `first` on follow one another.
inline int64_t listed_run(const int32_t* list, int64_t first, int64_t count) {
  int64_t length = 1;
  while (length < count && list[first + length] == list[first] + length) ++length;
  return length;
}

// Which rows a sequence has: one after the other or in pages, all of them or those of a list.
struct Places {
  const int32_t* table = nullptr;  // the pages of this sequence; null: none
  int shift = 0;                   // log2 of the rows of a page
  const int32_t* list = nullptr;   // positions of the rows, ascending; null: all of them

  // Where row `index` begins, of rows `stride` apart in pages `page` apart.
  HEADWISE_INLINE int64_t offset(int64_t index, int64_t stride, int64_t page) const {
    if (list != nullptr) index = list[index];
    if (table == nullptr) return index * stride;
    const int64_t within = index & ((int64_t(1) << shift) - 1);
    return table[index >> shift] * page + within * stride;
  }
  // How many of the `count` rows from `first` on follow one another in one page.
  HEADWISE_INLINE int64_t together(int64_t first, int64_t count) const {
    if (list != nullptr) count = listed_run(list, first, count);
    if (table == nullptr) return count;
    const int64_t rows = int64_t(1) << shift;
    const int64_t left = rows - ((list == nullptr ? first : list[first]) & (rows - 1));
    return left < count ? left : count;
  }
  // How many of the `count` rows from `first` on lie `stride` apart.
  HEADWISE_INLINE int64_t run(int64_t first, int64_t count, int64_t stride, int64_t page) const {
    if (list != nullptr) return table == nullptr ? listed_run(list, first, count) : 1;
    if (table == nullptr) return count;
    const int64_t rows = int64_t(1) << shift;
    int64_t length = rows - (first & (rows - 1));
    const int32_t* at = table + (first >> shift);
    // pages are often neighbours
    for (; length < count && at[1] * page == at[0] * page + rows * stride; ++at) length += rows;
    return length < count ? length : count;
  }
};

// Rows of T at a fixed distance, or in pages of such rows.
template <class T>
struct StridedRows {
  typedef T Element;
  typedef const T* Row;
  static constexpr int kBytes = W * int(sizeof(T));  // of a vector of elements
  static constexpr int kBits = 0;                    // of an integer
  static constexpr bool kScaled = false;             // rows are what they say
  const T* base;
  int64_t stride;
  int64_t page = 0;  // from page to page
  Places places = {};

  HEADWISE_INLINE Row row(int64_t index) const { return base + places.offset(index, stride, page); }
  // The row `count` after another one of the same page.
  HEADWISE_INLINE Row after(Row row, int64_t count) const { return row + count * stride; }
  // How many of the `count` rows from `first` on lie `stride` apart.
  HEADWISE_INLINE int64_t run(int64_t first, int64_t count) const {
    return places.run(first, count, stride, page);
  }
  static HEADWISE_INLINE const char* address(Row row) { return reinterpret_cast<const char*>(row); }
  HEADWISE_INLINE int64_t step() const { return bytes(stride); }  // bytes from row to row
  static HEADWISE_INLINE int64_t bytes(int64_t elements) { return elements * int64_t(sizeof(T)); }
  HEADWISE_INLINE float scale(int64_t) const { return 1.0f; }
  static HEADWISE_INLINE vf load(Row row, int64_t at) { return HEADWISE_ISA::load(row + at); }
  static HEADWISE_INLINE vf load_part(Row row, int64_t at, int count) {
    return HEADWISE_ISA::load_part(row + at, count);
  }
};

template <bool B, class Yes, class No>
struct Either {
  typedef Yes Type;
};
template <class Yes, class No>
struct Either<false, Yes, No> {
  typedef No Type;
};

// Rows of integers of BITS bits, and a float scale for each GROUP elements of a row; with GROUP
// of 0 for the whole row, by which what is computed with the integers is then multiplied.
template <int BITS, int GROUP>
struct QuantizedRows {
  typedef int8_t Element;
  struct Scaled {
    const unsigned char* integers;
    const float* scales;
  };
  typedef typename Either<GROUP == 0, const unsigned char*, Scaled>::Type Row;
  static constexpr int kBytes = W * BITS / 8;
  static constexpr int kBits = BITS;
  static constexpr bool kScaled = GROUP == 0;
  const unsigned char* base;
  int64_t stride;
  int64_t page;  // from page to page
  Scales scales;
  Places places;

  HEADWISE_INLINE Row row(int64_t index) const {
    const unsigned char* integers = base + places.offset(index, stride, page);
    if constexpr (GROUP == 0)
      return integers;
    else
      return {integers, scales_of(index)};
  }
  HEADWISE_INLINE Row after(Row row, int64_t count) const {
    if constexpr (GROUP == 0)
      return row + count * stride;
    else
      return {row.integers + count * stride, row.scales + count * scales.row};
  }
  HEADWISE_INLINE int64_t run(int64_t first, int64_t count) const {
    return places.run(first, count, stride, page);
  }
  HEADWISE_INLINE const float* scales_of(int64_t index) const {
    return scales.data + places.offset(index, scales.row, scales.batch);
  }
  HEADWISE_INLINE float scale(int64_t index) const { return GROUP == 0 ? *scales_of(index) : 1.0f; }
  static HEADWISE_INLINE const char* address(Row row) {
    if constexpr (GROUP == 0)
      return reinterpret_cast<const char*>(row);
    else
      return reinterpret_cast<const char*>(row.integers);
  }
  HEADWISE_INLINE int64_t step() const { return stride; }  // bytes from row to row
  static HEADWISE_INLINE int64_t bytes(int64_t elements) { return elements * BITS / 8; }
  static HEADWISE_INLINE vf load(Row row, int64_t at) {
    const char* integers = address(row);
    return scaled(row, at, load_integers<BITS>(integers + at * BITS / 8));
  }
  static HEADWISE_INLINE vf load_part(Row row, int64_t at, int count) {
    char some[W] = {};
    __builtin_memcpy(some, address(row) + at * BITS / 8, (count * BITS + 7) / 8);
    return scaled(row, at, load_integers<BITS>(some));
  }
  static HEADWISE_INLINE vf scaled(Row row, int64_t at, vf x) {
    if constexpr (GROUP == 0)
      return x;
    else
      return x * splat(row.scales[at / GROUP]);
  }
};

// The rows of a block, the keys first..first + count, and their scales times `factor`. Past the
// last key the last one stands in; what it gives is hidden.
template <class Rows>
HEADWISE_INLINE void find_rows(const Rows& rows, int64_t first, int count, float factor,
                               typename Rows::Row* row, [[maybe_unused]] float* scale) {
  for (int64_t at = 0; at < count;) {
    const int64_t run = rows.places.together(first + at, count - at);
    const typename Rows::Row begin = rows.row(first + at);
    for (int64_t i = 0; i < run; ++i) row[at + i] = rows.after(begin, i);
    if constexpr (Rows::kScaled) {
      const float* scales = rows.scales_of(first + at);
      for (int64_t i = 0; i < run; ++i) scale[at + i] = factor * scales[i * rows.scales.row];
    }
    at += run;
  }
  for (int at = count; at < kBlock; ++at) {
    row[at] = row[count - 1];
    if constexpr (Rows::kScaled) scale[at] = scale[count - 1];
  }
}

// Calls what(pointer) with `base` in one of the three dtypes that are served.
template <class What>
HEADWISE_INLINE void with_dtype(Dtype dtype, const void* base, const What& what) {
  if (dtype == kFloat32)
    what(static_cast<const float*>(base));
  else if (dtype == kBfloat16)
    what(static_cast<const bf16*>(base));
  else
    what(static_cast<const f16*>(base));
}

// Rows of a block as the products read them, `stride` elements apart.
template <class T>
struct Block {
  const T* rows;
  int64_t stride;
};

// Rows that will be read next: asked for one cache line at a time, in the order of their addresses,
// evenly between other work. Two requests at once already cost a third of the bandwidth.
class Ahead {
 public:
  // Adds `count` rows; what is more than kRuns runs is not asked for.
  template <class Rows>
  HEADWISE_INLINE void add(const Rows& rows, int64_t first, int64_t count, int64_t dim) {
    while (count > 0 && filled < kRuns) {
      Run& run = runs[filled++];
      run.at = Rows::address(rows.row(first));
      run.bytes = Rows::bytes(dim);
      run.stride = rows.step();
      run.rows = rows.run(first, count);
      first += run.rows;
      count -= run.rows;
      if (run.stride == run.bytes) {  // one long row
        run.bytes *= run.rows;
        run.rows = 1;
      }
      if (filled == 1) enter(0);
    }
  }

  // Asks for one line more, if there is one.
  HEADWISE_INLINE void tick() {
    if (at >= end && !next()) return;
    prefetch(at);
    at += 64;
  }

 private:
  static constexpr int kRuns = 3 * kBlock;  // every row of a block of a list apart
  struct Run {
    const char* at;
    int64_t bytes, stride, rows;
  };
  Run runs[kRuns];
  int filled = 0, current = 0;
  const char *at = nullptr, *end = nullptr;

  HEADWISE_INLINE void enter(int index) {
    current = index;
    at = runs[index].at;
    end = at + runs[index].bytes;
  }
  // To the next row; false at the end.
  bool next() {
    if (current >= filled) return false;
    Run& run = runs[current];
    if (--run.rows > 0) {
      run.at += run.stride;
      enter(current);
      return true;
    }
    if (current + 1 >= filled) {
      current = filled;
      return false;
    }
    enter(current + 1);
    return true;
  }
};

template <class A, class B>
struct Same {
  static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
  static constexpr bool value = true;
};

template <int N>
struct Number {
  static constexpr int value = N;
};

// Memory of one task, cut out of its thread's scratch.
struct Scratch {
  char* at;
  template <class T>
  HEADWISE_INLINE T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(at);
    at += (int64_t(sizeof(T)) * count + 63) / 64 * 64;
    return taken;
  }
};

}  // namespace HEADWISE_ISA
}  // namespace headwise
