// The forward product of nf4_linear.h on an H100 or H200, by wgmma: built where the list of architectures has 90.
#pragma once
#include "kernels/nf4_linear.h"

namespace peftops::cuda {

bool has_wgmma(const Nf4Linear&);   // whether it can be multiplied so
Kernel<Nf4Linear> nf4_linear_sm90;

}  // namespace peftops::cuda
