// Which level of the kernels this machine runs.

#include "kernels.h"

#if defined(HEADWISE_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace headwise {

namespace baseline {
extern const Kernels kKernels;
}
#if defined(HEADWISE_X86)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512bf16 {
extern const Kernels kKernels;
}
namespace amx {
extern const Kernels kKernels;
}

namespace {

// Whether the processor has AMX for bf16 and the system lets this process use its registers.
bool amx_allowed() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool present = (d >> 24 & 1) && (d >> 22 & 1);
  return present && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
#else
  return false;
#endif
}

}  // namespace
#endif

int best_level() {
#if defined(HEADWISE_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  // F16C came before AVX2 in every processor; GCC 12 has no name for it here
  if (!avx2) return kBaseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (!avx512) return kAvx2;
  const bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (!bf16) return kAvx512;
  static const bool tiles = amx_allowed();
  return tiles ? kAmx : kAvx512Bf16;
#else
  return kBaseline;
#endif
}

const Kernels* kernels(int level) {
  if (level < kBaseline || level > best_level()) return nullptr;
#if defined(HEADWISE_X86)
  static const Kernels* const of_level[] = {&baseline::kKernels, &avx2::kKernels, &avx512::kKernels,
                                            &avx512bf16::kKernels, &amx::kKernels};
  return of_level[level];
#else
  return &baseline::kKernels;
#endif
}

}  // namespace headwise
