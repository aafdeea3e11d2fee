// The forward product of nf4_linear.h on an H100 or H200, by wgmma: built where the list of architectures has 90.
#pragma once
#include "kernels/nf4_linear.h"

namespace peftops::cuda {

// Whether it can be multiplied so. An error where the current device is of another capability than 9.0.
cudaError_t takes_wgmma(const Nf4Linear&, bool* result);
Kernel<Nf4Linear> nf4_linear_sm90;

}  // namespace peftops::cuda
