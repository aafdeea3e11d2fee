// Low-rank terms of many adapters in one batch (S-LoRA, arXiv:2311.03285): the contract between the kernels
// and everyone above them. Row i of x belongs to adapter a, which has rank r_a and scaling s_a of its own:
//
//   multi_lora_add       u_i = x_i F^T,  y_i += s_a u_i G          forward: F is A, G is B^T, x and y their namesakes;
//                                                                  backward: F is B^T, G is A, x is g, y is dx
//   multi_lora_gradient  dF  = s_a sum over a's rows of u_i^T x_i   dA from g B and x; dB from x A^T and g
//
// Rows come grouped: `order` lists them adapter after adapter, and a segment is one adapter's piece of that
// list. A row in no segment (the base alone) is not touched. Sums are fp32, in an order that depends on the
// shapes and the sizes of the segments alone.
//
// Where factors lie. Both factors of an adapter are stored by rank, A as [r, in] and B as its transpose
// [r, out], so that one kernel reads both and a row of x needs each byte once. An adapter is one flat run of
// elements (all its layers, A before B^T), cut into pages that lie anywhere in the pool. The kernel itself follows the
// pages: a segment points to its adapter's page list, and element e is at storage[pages[e >> page_shift] << page_shift
// | e & mask]. Pointers per row would need pages as wide as the widest layer; gathering the pages first would read and
// write every factor once more, and the time of a decoding step is the time to read factors. A look-up costs a few
// instructions for every line of kLoraLine elements. Factor rows are padded with zeros to whole lines, and pages are
// whole lines, so no line is split.
#pragma once
#include "kernels/cpu/kernel.h"
#ifdef PEFTOPS_CUDA
#include "kernels/cuda/kernel.h"
#endif
#include "kernels/dtype.h"

namespace peftops {

constexpr int64_t kLoraLine = 64;
constexpr int64_t kLoraMaxRank = 8192;   // u of sixteen rows must fit into the scratch of a thread

struct LoraPool {
  const void* storage;    // [pages << page_shift] of dtype
  int page_shift;         // pages of 2^page_shift elements, a line at least
  DType dtype;
};

// The rows order[begin .. end) and what one adapter does to them.
struct LoraSegment {
  int64_t begin, end;
  const int32_t* pages;   // the adapter's, in order
  int64_t first, second;  // the elements at which F and G begin
  int64_t r;              // kLoraMaxRank at most
  float scale;
};

struct LoraSegments {
  const int64_t* order;
  const LoraSegment* at;
  int64_t count;
};

struct MultiLoraAdd {
  const void* x;          // [m, k] of dtype
  void* y;                // [m, n] of dtype, read and written
  float* u;               // [m, ldu]; r columns of a segment's rows are written
  LoraPool pool;          // holds each F as [r, k], each G as [r, n]
  LoraSegments segments;
  int64_t k, n, ldu;
  DType dtype;
};

struct MultiLoraGradient {
  const float* u;         // [m, ldu]
  const void* x;          // [m, k] of x_dtype
  LoraSegments segments;  // `first` is where a segment's dF begins in d; pages are not used
  float* d;               // dF as [r, k] if by_rank, else [k, r]
  int64_t k, ldu;
  bool by_rank;
  DType x_dtype;
};

PEFTOPS_CPU_KERNELS(Kernel<MultiLoraAdd> multi_lora_add; Kernel<MultiLoraGradient> multi_lora_gradient;)

#ifdef PEFTOPS_CUDA
// All arrays of a LoraSegments lie on the device, too. A segment of multi_lora_add has at most kLoraPiece rows, a tile
// of the tensor cores. An adapter with more rows has several segments.
constexpr int64_t kLoraPiece = 16;
namespace cuda { Kernel<MultiLoraAdd> multi_lora_add; Kernel<MultiLoraGradient> multi_lora_gradient; }
#endif

}  // namespace peftops
