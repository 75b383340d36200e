// Attention, for operators that attend among other things.
#pragma once

#include "../kernels.h"

namespace headwise {

// Plans and runs a call that was checked, on PyTorch's threads.
void run_attend(const AttendArgs& args, const Kernels& kernels);
// The same of a call with chosen keys. Throws where one of those does not exist.
void attend_chosen(const AttendArgs& args, const Kernels& kernels);

}  // namespace headwise
