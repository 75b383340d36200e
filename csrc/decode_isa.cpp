// The decode kernels, compiled once for each instruction set: HEADWISE_ISA is its namespace.

#ifndef HEADWISE_ISA
#error "define HEADWISE_ISA as the name of the instruction set"
#endif

#include "decode.h"
