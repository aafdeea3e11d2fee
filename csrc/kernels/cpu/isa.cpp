// Built once, with baseline flags: it must run on any CPU in order to ask what the CPU has.
#include "kernels/cpu/isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

namespace peftops::cpu {
namespace {

#define PEFTOPS_TEXT_OF(build, ...) #build,
constexpr const char* kNames[] = {PEFTOPS_EACH_BUILD(PEFTOPS_TEXT_OF)};
#undef PEFTOPS_TEXT_OF

Isa detect() {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks the OS (XGETBV) whether it saves the wide registers.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
  // Every CPU with AVX2 has F16C, which older compilers cannot be asked about.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::avx2 : Isa::scalar;
#elif defined(__aarch64__)
  return Isa::neon;   // part of the architecture
#else
  return Isa::scalar;
#endif
}

Isa limit_from_environment() {
  Isa limit = *(std::end(kIsas) - 1);
  const char* name = std::getenv("PEFTOPS_ISA");
  if (name && *name && !parse_isa(name, limit))
    std::fprintf(stderr, "peftops: PEFTOPS_ISA=%s is none of %s; ignored\n", name, isa_names().c_str());
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
  for (Isa each : kIsas)
    if (!std::strcmp(name, isa_name(each))) return isa = each, true;
  return false;
}

std::string isa_names() {
  std::string names;
  for (Isa each : kIsas) names += (names.empty() ? "" : ", ") + std::string(isa_name(each));
  return names;
}

}  // namespace peftops::cpu
