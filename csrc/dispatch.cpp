// Which level of the kernels this machine runs.

#include "attend_args.h"

#if defined(HEADWISE_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace headwise {

#define HEADWISE_DECLARE(isa)                                                     \
  namespace isa {                                                                 \
  void attend_task(const AttendArgs&, const Plan&, int64_t index, char* scratch); \
  void project_task(const ProjectArgs&, int64_t head, char* scratch);             \
  void quantize_task(const QuantizeArgs&, int64_t first, int64_t count, char*);   \
  }

HEADWISE_DECLARE(baseline)
#if defined(HEADWISE_X86)
HEADWISE_DECLARE(avx2)
HEADWISE_DECLARE(avx512)
HEADWISE_DECLARE(avx512bf16)
HEADWISE_DECLARE(amx)

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

Kernels kernels(int level) {
  if (level < kBaseline || level > best_level()) return {nullptr, nullptr, nullptr, false};
#if defined(HEADWISE_X86)
  if (level == kAmx) return {amx::attend_task, amx::project_task, amx::quantize_task, true};
  if (level == kAvx512Bf16)
    return {avx512bf16::attend_task, avx512bf16::project_task, avx512bf16::quantize_task, true};
  if (level == kAvx512)
    return {avx512::attend_task, avx512::project_task, avx512::quantize_task, false};
  if (level == kAvx2) return {avx2::attend_task, avx2::project_task, avx2::quantize_task, false};
#endif
  return {baseline::attend_task, baseline::project_task, baseline::quantize_task, false};
}

}  // namespace headwise
