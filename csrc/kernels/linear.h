// A linear layer over a packed weight W [n, k], with its low-rank term: the common part of the contracts of all formats
// (nf4_linear.h, group_linear.h, mxfp4_linear.h).
//
//   forward   y  = x W^T + bias + scaling * u B^T      u from lora_shrink or qalora_shrink
//   backward  dx = g W + v A                           v likewise
//
// W is decoded in registers or a panel at a time; the whole dense W is never written. Sums are fp32, in an
// order that depends on the shapes alone.
//
// If a matrix library is faster, CUDA has kernels that write its operands (LibraryOperands). These do hold W, rounded
// to the type of x, in memory.
#pragma once
#include <cstdint>

#include "kernels/dtype.h"

namespace peftops {

template <class Weight> struct Linear {
  Weight weight;         // rows = n, cols = k
  const void* x;         // [m, k]
  const void* bias;      // [n] of bias_dtype, or null
  const float* u;        // [m, r], or null when r is 0
  const void* b;         // lora_B [n, r] of b_dtype
  void* y;               // [m, n]
  int64_t m, r;
  float scaling;
  bool int8;             // x may be rounded to int8, see cpu/product_int8.h
  DType dtype;           // of x and y
  DType bias_dtype, b_dtype;
};

template <class Weight> struct LinearBackward {
  Weight weight;         // rows = n, cols = k
  const void* g;         // [m, n]
  const float* v;        // [m, r], or null when r is 0
  const void* a;         // lora_A [r, k] of a_dtype
  void* dx;              // [m, k]
  int64_t m, r;
  DType dtype;           // of g and dx
  DType a_dtype;
};

#ifdef PEFTOPS_CUDA
// y = left right^T: [x | scaling u | 1] [W | lora_B | bias]^T, a number that the type cannot hold is split into parts,
// and zeros fill the depth up to whole units of 16 bytes. For some rows of W at a time; `left` is written with the
// first of them.
template <class Weight> struct LibraryOperands {
  Linear<Weight> of;     // its y is not touched
  void* left;            // [m, depth] of of.dtype; null where depth is k, and x will do
  void* right;           // [rows, depth]
  int64_t depth;         // operands_depth(of)
  int64_t first, rows;   // of W
};

enum class Way { faster, kernels, library };
#endif

}  // namespace peftops
