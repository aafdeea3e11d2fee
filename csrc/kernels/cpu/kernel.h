// The shape of every CPU kernel, and the builds that it comes in.
//
// The work is cut into independent units of about the same size. kernel(args, begin, end, scratch) does the units
// [begin, end), with kScratchBytes of scratch that no other thread uses meanwhile. It returns the number of all units;
// kernel(args, 0, 0, nullptr) does no work and only returns that number.
#pragma once
#include <cstdint>

namespace peftops::cpu {

template <class Args> using Kernel = int64_t(const Args&, int64_t begin, int64_t end, void* scratch);

constexpr int64_t kScratchBytes = 640 << 10;   // most of a core's L2; product.h fills it

}  // namespace peftops::cpu

// The builds, one for each instruction set, from the narrowest to the widest. A kernel file is compiled once for each,
// into namespace peftops::cpu::<build>, which is its PEFTOPS_ISA. This is the only list of them: CMakeLists.txt has the
// compiler's flags of each, cpu/isa.cpp tells which of them a CPU runs, and Python calls _C.isas().
#if defined(__x86_64__)
#define PEFTOPS_EACH_BUILD(f, ...) \
  f(scalar, __VA_ARGS__) f(avx2, __VA_ARGS__) f(avx512, __VA_ARGS__) f(avx512bf16, __VA_ARGS__)
#elif defined(__aarch64__)
#define PEFTOPS_EACH_BUILD(f, ...) f(scalar, __VA_ARGS__) f(neon, __VA_ARGS__) f(neonbf16, __VA_ARGS__)
#else
#define PEFTOPS_EACH_BUILD(f, ...) f(scalar, __VA_ARGS__)
#endif

// Declares the kernels of a contract, in every build.
#define PEFTOPS_IN_BUILD(build, ...) namespace build { __VA_ARGS__ }
#define PEFTOPS_CPU_KERNELS(...) \
  namespace cpu { PEFTOPS_EACH_BUILD(PEFTOPS_IN_BUILD, __VA_ARGS__) }
