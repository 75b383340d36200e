// How the rows of K and V are found in memory, widened, and asked for ahead of their use.
//
// Rows of a cache held otherwise (pages, quantised bytes) need another class like `StridedRows`,
// not another kernel.
#pragma once

#include "attend_args.h"
#include "simd.h"

namespace headwise {
namespace HEADWISE_ISA {

// Rows of T at a fixed distance.
template <class T>
struct StridedRows {
  typedef T Element;
  typedef const T* Row;
  static constexpr int kBytes = W * int(sizeof(T));  // of a vector of elements
  const T* base;
  int64_t stride;

  HEADWISE_INLINE Row row(int64_t index) const { return base + index * stride; }
  static HEADWISE_INLINE vf load(Row row, int64_t at) { return HEADWISE_ISA::load(row + at); }
  static HEADWISE_INLINE vf load_part(Row row, int64_t at, int count) {
    return HEADWISE_ISA::load_part(row + at, count);
  }
};

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
  // Adds `count` rows; at most kRuns calls.
  template <class Rows>
  HEADWISE_INLINE void add(const Rows& rows, int64_t first, int64_t count, int64_t dim) {
    if (count <= 0) return;
    Run& run = runs[filled++];
    run.at = reinterpret_cast<const char*>(rows.row(first));
    run.bytes = dim * int64_t(sizeof(typename Rows::Element));
    run.stride = reinterpret_cast<const char*>(rows.row(first + 1)) - run.at;
    run.rows = count;
    if (run.stride == run.bytes) {  // one long row
      run.bytes *= count;
      run.rows = 1;
    }
    if (filled == 1) enter(0);
  }

  // Asks for one line more, if there is one.
  HEADWISE_INLINE void tick() {
    if (at >= end && !next()) return;
    prefetch(at);
    at += 64;
  }

 private:
  static constexpr int kRuns = 3;
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
