// The largest of some scores, in time linear in their number. No torch.
#pragma once

#include <stdint.h>

namespace headwise {

// Writes the places of the `top` largest of scores[first..stop), ascending; of equal ones the first
// are taken. What `mask` has a byte of 0 for (at every `step`; null: nothing) is not among them;
// the rest of `to` is -1. NaN is larger than all numbers.
void select_largest(const float* scores, int64_t first, int64_t stop, const unsigned char* mask,
                    int64_t step, int64_t top, int32_t* to);

}  // namespace headwise
