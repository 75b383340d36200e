// Lists of chosen keys, by a set of bits: linear in what was chosen and in the words of the set.

#include "chosen.h"

namespace headwise {

namespace {

// Puts the keys begin..end into a set.
void insert(uint64_t* set, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t word = begin / 64, bit = begin % 64;
    const int64_t count = end - begin < 64 - bit ? end - begin : 64 - bit;
    set[word] |= (~uint64_t(0) >> (64 - count)) << bit;
    begin += count;
  }
}

}  // namespace

int64_t list_keys(const AttendArgs& args, int64_t b, int64_t head, int64_t s, uint64_t* set,
                  int32_t* to, int32_t* wrong) {
  const Options& options = args.options;
  const Chosen& chosen = *options.chosen();
  const int64_t each = options.block_size > 0 ? options.block_size : 1;
  const int64_t last = (args.context + each - 1) / each - 1;
  // what causality, window and length leave
  int64_t start = 0, stop = length_of(args, b);
  if (options.causal) {
    const int64_t position = stop - args.queries + s;
    stop = position + 1;
    if (options.window > 0 && position - options.window + 1 > 0)
      start = position - options.window + 1;
  }
  const int32_t* from = chosen.data + b * chosen.batch +
                        (chosen.heads > 1 ? head : 0) * chosen.head + s * chosen.query;
  bool exists = true;
  for (int64_t i = 0; i < chosen.count; ++i) {
    if (from[i] < -1 || from[i] > last) {
      *wrong = from[i];
      exists = false;
      break;
    }
    const int64_t first = from[i] < 0 ? stop : from[i] * each;
    const int64_t end = first + each < stop ? first + each : stop;
    insert(set, first > start ? first : start, end);
  }
  const unsigned char* mask = options.mask.data;
  if (mask != nullptr) mask += options.mask.strides.offset(b, 0, s, 0);
  int64_t count = 0;
  for (int64_t word = 0; word < words_of(args); ++word) {
    for (uint64_t bits = set[word]; bits != 0; bits &= bits - 1) {
      const int64_t key = word * 64 + __builtin_ctzll(bits);
      if (mask == nullptr || mask[key * options.mask.strides.key]) to[count++] = int32_t(key);
    }
    set[word] = 0;
  }
  return exists ? count : -1;
}

}  // namespace headwise
