// The products that this build has: fp32 everywhere, and those in narrower numbers where the instruction set has
// instructions for them (simd.h).
#pragma once
#include "kernels/cpu/product.h"
#if defined(PEFTOPS_INT16)
#include "kernels/cpu/product_int16.h"
#endif
#if defined(PEFTOPS_INT8)
#include "kernels/cpu/product_int8.h"
#endif
#if defined(PEFTOPS_BF16)
#include "kernels/cpu/product_bf16.h"
#endif
