// Built once, with baseline flags: it must run on any CPU in order to ask what the CPU has.
#include "kernels/cpu/isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace peftops::cpu {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512bf16"};

Isa detect() {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks the OS (XGETBV) whether it saves the wide registers.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
  // Every CPU with AVX2 has F16C, which older compilers cannot be asked about.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::scalar;
}

Isa limit_from_environment() {
  Isa limit = Isa::avx512bf16;
  const char* name = std::getenv("PEFTOPS_ISA");
  if (name && *name && !parse_isa(name, limit))
    std::fprintf(stderr, "peftops: PEFTOPS_ISA=%s is none of scalar, avx2, avx512, avx512bf16; ignored\n", name);
  return limit;
}

std::atomic<Isa>& limit() {
  static std::atomic<Isa> value{limit_from_environment()};
  return value;
}

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa isa_limit() { return limit().load(std::memory_order_relaxed); }
void set_isa_limit(Isa isa) { limit().store(isa); }
const char* isa_name(Isa isa) { return kNames[int(isa)]; }

bool parse_isa(const char* name, Isa& isa) {
  for (int i = 0; i < 4; ++i)
    if (!std::strcmp(name, kNames[i])) return isa = Isa(i), true;
  return false;
}

}  // namespace peftops::cpu
