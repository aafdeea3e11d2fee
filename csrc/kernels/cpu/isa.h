// Which build of a CPU kernel to call. Included by bindings only, never by a kernel file: those are
// compiled once per ISA, and an inline function they share would be merged by the linker into ONE copy,
// perhaps the AVX-512 one (numpy#25274, FBGEMM#46).
#pragma once
#include "kernels/cpu/kernel.h"

namespace peftops::cpu {

enum class Isa { scalar, avx2, avx512, avx512bf16 };   // in the order of the names in isa.cpp

Isa best_isa();                 // of what this build has and this CPU runs
Isa isa_limit();                // at the start $PEFTOPS_ISA, else no limit
void set_isa_limit(Isa);
const char* isa_name(Isa);
bool parse_isa(const char* name, Isa& isa);

inline Isa isa() { return isa_limit() < best_isa() ? isa_limit() : best_isa(); }

template <class Args>
Kernel<Args>* pick(Kernel<Args>* scalar, Kernel<Args>* avx2, Kernel<Args>* avx512, Kernel<Args>* avx512bf16) {
  switch (isa()) {
    case Isa::avx512bf16: return avx512bf16;
    case Isa::avx512:     return avx512;
    case Isa::avx2:       return avx2;
    default:              return scalar;
  }
}

}  // namespace peftops::cpu

#if defined(__x86_64__)
#define PEFTOPS_PICK(kernel)                                                          \
  peftops::cpu::pick(&peftops::cpu::scalar::kernel, &peftops::cpu::avx2::kernel,      \
                     &peftops::cpu::avx512::kernel, &peftops::cpu::avx512bf16::kernel)
#else
#define PEFTOPS_PICK(kernel) (&peftops::cpu::scalar::kernel)
#endif
