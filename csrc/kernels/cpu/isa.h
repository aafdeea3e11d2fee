// Which build of a CPU kernel to call. Included by bindings only, never by a kernel file. Kernel files are compiled
// once per ISA, and the linker would merge an inline function that they share into ONE copy, perhaps the AVX-512 one
// (numpy#25274, FBGEMM#46).
#pragma once
#include <initializer_list>
#include <string>

#include "kernels/cpu/kernel.h"

namespace peftops::cpu {

#define PEFTOPS_NAME_OF(build, ...) build,
#define PEFTOPS_ISA_OF(build, ...) Isa::build,
enum class Isa { PEFTOPS_EACH_BUILD(PEFTOPS_NAME_OF) };
constexpr Isa kIsas[] = {PEFTOPS_EACH_BUILD(PEFTOPS_ISA_OF)};
#undef PEFTOPS_ISA_OF
#undef PEFTOPS_NAME_OF

Isa best_isa();                 // of what this build has and this CPU runs
Isa isa_limit();                // at the start $PEFTOPS_ISA, else no limit
void set_isa_limit(Isa);
const char* isa_name(Isa);
bool parse_isa(const char* name, Isa& isa);
std::string isa_names();        // all that this build has: "scalar, avx2, avx512, avx512bf16"

inline Isa isa() { return isa_limit() < best_isa() ? isa_limit() : best_isa(); }

template <class K> K* pick(const std::initializer_list<K*>& builds) { return builds.begin()[int(isa())]; }

}  // namespace peftops::cpu

#define PEFTOPS_ADDRESS_IN(build, kernel) &peftops::cpu::build::kernel,
#define PEFTOPS_PICK(kernel) peftops::cpu::pick({PEFTOPS_EACH_BUILD(PEFTOPS_ADDRESS_IN, kernel)})
