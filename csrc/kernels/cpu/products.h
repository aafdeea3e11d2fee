// The products that this build has: fp32 everywhere, and those in narrower numbers where the instruction set has
// instructions for them.
#pragma once
#include "kernels/cpu/product.h"
#if defined(__AVX512F__)
#include "kernels/cpu/product_int16.h"
#include "kernels/cpu/product_int8.h"
#endif
#if defined(__AVX512BF16__)
#include "kernels/cpu/product_bf16.h"
#endif
