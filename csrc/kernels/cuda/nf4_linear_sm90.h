// The forward product of nf4_linear.h on an H100 or H200, by wgmma: built where the list of architectures has 90.
#pragma once
#include "kernels/nf4_linear.h"

namespace peftops::cuda {

struct Nf4LinearSm90 {
  Nf4Linear of;
  int rows, parts;   // of x a block of threads, and of the depth
  float* sums;       // [parts, m, n], or null with one part
};

enum class Sm90 { faster, always };

// How to multiply so; with 0 parts, not at all: the shapes or types do not allow it, or another way is faster. An error
// where it is always wanted and the current device is of another capability than 9.0.
cudaError_t plan_wgmma(const Nf4Linear&, Sm90 wanted, Way library, Nf4LinearSm90* plan);
Kernel<Nf4LinearSm90> nf4_linear_sm90;

}  // namespace peftops::cuda
