// The largest of some scores, in time linear in their number. No torch.
#pragma once

#include "kernels.h"

namespace headwise {

// Bytes of a mask, one at every `step`: what has 0 is not chosen. data of null: nothing is hidden.
struct Seen {
  const unsigned char* data;
  int64_t step;

  bool at(int64_t i) const { return data == nullptr || data[i * step] != 0; }
};

// Bytes of scratch that a selection among `count` scores takes.
inline int64_t select_bytes(int64_t count) { return 8 * count + 64; }

// Writes the places of the `top` largest of scores[0..stop), ascending; of equal ones the first are
// taken. What is not `seen` is not among them; the rest of `to` is -1. NaN is larger than all
// numbers. Returns how many were written before the rest.
int64_t select_largest(const Kernels& kernels, const float* scores, int64_t stop, Seen seen,
                       int64_t top, int32_t* to, char* scratch);

// What a choice is to have: the first and the last keys in any case, `least` keys at least and
// `most` at most; between these as few as weigh `mass` of all, or, where mass is negative, `most`.
struct Budget {
  int64_t first, recent, least, most;
  double mass;
};

// Writes the places of the keys that a budget takes, as select_largest does, `most` numbers.
// Weights are not negative, or NaN; those of the first and last keys are written over.
void select_budget(const Kernels& kernels, float* weights, int64_t stop, Seen seen,
                   const Budget& budget, int32_t* to, char* scratch);

}  // namespace headwise
