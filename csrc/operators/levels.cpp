// headwise::best_level: the highest level of the kernels that this machine runs.

#include <torch/csrc/stable/library.h>

#include "../kernels.h"

namespace {

int64_t best_level() { return headwise::best_level(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(headwise, m) { m.def("best_level() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(headwise, CompositeExplicitAutograd, m) {
  m.impl("best_level", TORCH_BOX(&best_level));
}
