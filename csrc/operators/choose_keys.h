// Choices of keys, for operators that attend to what was chosen.
#pragma once

#include "../select.h"
#include "tensors.h"

namespace headwise {

// Reads keys uint8 [B,K,L,D/2] and scales float32 [B,K,L,groups], or pages of them with their
// table [B,n], into args, whose query and context are known; L may be more than the context.
void read_sketch(const Tensor& keys, const Tensor& scales, const MaybeTensor& table,
                 const char* operation, SketchArgs* args);

void check_budget(const Budget& budget, const char* operation);

// Writes what each query gets, int32 [B,K,S,most], and the part of the softmax that is left,
// [B,H,S].
void choose(const SketchArgs& args, const Budget& budget, const Kernels& kernels, int32_t* chosen,
            float* rest);

}  // namespace headwise
