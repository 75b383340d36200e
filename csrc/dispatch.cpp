// Which level of the kernels this machine runs.

#include "decode_args.h"

namespace headwise {

#define HEADWISE_DECLARE(isa)                                                  \
  namespace isa {                                                              \
  void decode_task(const DecodeArgs&, const Plan&, int64_t task, char* scratch); \
  }

HEADWISE_DECLARE(baseline)
#if defined(HEADWISE_X86)
HEADWISE_DECLARE(avx2)
HEADWISE_DECLARE(avx512)
HEADWISE_DECLARE(avx512bf16)
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
  const bool bf16 =
      __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  return bf16 ? kAvx512Bf16 : kAvx512;
#else
  return kBaseline;
#endif
}

TaskFunction task_function(int level) {
  if (level < kBaseline || level > best_level()) return nullptr;
#if defined(HEADWISE_X86)
  if (level == kAvx512Bf16) return avx512bf16::decode_task;
  if (level == kAvx512) return avx512::decode_task;
  if (level == kAvx2) return avx2::decode_task;
#endif
  return baseline::decode_task;
}

}  // namespace headwise
