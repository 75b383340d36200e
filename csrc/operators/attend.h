// Attention, for operators that attend among other things.
#pragma once

#include "../kernels.h"
#include "tensors.h"

namespace headwise {

// Plans and runs a call that was checked, on PyTorch's threads.
void run_attend(const AttendArgs& args, const Kernels& kernels);
// The same of a call with chosen keys. Throws where one of those does not exist.
void attend_chosen(const AttendArgs& args, const Kernels& kernels);

// page_table [B, pages of a sequence] of a call whose batch, context and lengths are known: the
// entries in use name pages of the pool.
void read_pages(const Tensor& table, int64_t pages, int64_t page_size, AttendArgs* args);

}  // namespace headwise
