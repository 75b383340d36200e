// From the keys that were chosen for each query to lists of those that it may see. No torch.
#pragma once

#include "attend_args.h"

namespace headwise {

// Numbers of 64 bits that hold a set of an args' keys.
inline int64_t words_of(const AttendArgs& args) { return (args.context + 63) / 64; }

// The keys that a list has room for.
inline int64_t most_listed(const AttendArgs& args) {
  const int64_t each = args.options.block_size > 0 ? args.options.block_size : 1;
  const int64_t count = args.options.chosen()->count;
  return count > args.context / each ? args.context : count * each;
}

// Writes the keys that query s of sequence b may see, of those that were chosen for a head: each of
// them once, ascending. Returns how many, or, where one does not exist, -1 and it in `wrong`. set:
// words_of zeros, which are left so.
int64_t list_keys(const AttendArgs& args, int64_t b, int64_t head, int64_t s, uint64_t* set,
                  int32_t* to, int32_t* wrong);

}  // namespace headwise
