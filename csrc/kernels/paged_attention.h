// Attention over keys and values that lie in pages, as servers keep them (PagedAttention, arXiv:2309.06180): the
// contract between the kernels and everyone above them.
//
//   paged_attention   y = sum over j of p[j] value[j],   p = softmax over the j that the query sees of scale * q . key[j]
//
// Sequence s has lengths[s] tokens; token j lies in page table[s][j / page_size], at j % page_size. Its `rows` queries
// are those of its last tokens: query i stands at position lengths[s] - rows + i, and sees the tokens up to its own,
// or the last `window` of these. A query before position 0 is padding, and its y is 0. No page is read beyond a
// sequence's length.
//
// All sums are fp32, over 32 or 64 tokens at a time from position 0 on: the bits of y depend on the tokens of the tiles
// that the query sees, and not on the other queries, the pages, or the threads.
//
// On CUDA a part of kPagedPart tokens is summed alone, and the parts of a query are put together in their order. So few
// queries of a long sequence are work for many blocks of threads, and have the bits that many queries have:
//
//   paged_attention   a block of threads for each part, which leaves its sums in `sums`; or one for all parts, which
//                     keeps what it has there
//   paged_gather      y from the sums of the parts, if each had its own
#pragma once
#include "kernels/cpu/kernel.h"
#ifdef PEFTOPS_CUDA
#include "kernels/cuda/kernel.h"
#endif
#include "kernels/dtype.h"

namespace peftops {

// Where the rows of pages lie, in elements; a row itself is contiguous.
struct PageStrides { int64_t page, head, token; };

struct PagedAttention {
  const void* query;       // [batch, heads, rows, d]; a row is contiguous
  const void* key;         // [pages, kv_heads, page_size, d] of page_dtype
  const void* value;       // [pages, kv_heads, page_size, dv] of page_dtype
  const int32_t* table;    // [batch, most_pages]
  const int32_t* lengths;  // [batch]
  void* y;                 // [batch, rows, heads, dv], contiguous
  int64_t query_batch, query_head, query_row;   // strides
  PageStrides key_at, value_at;
  int64_t batch, heads, rows, d, dv, kv_heads, page_size, most_pages;
  int64_t window;          // tokens; the largest number if attention has no window
  float scale;
  DType dtype;             // of query and y
  DType page_dtype;
  // CUDA's alone. Lengths and pages are on the device, where nobody has checked them: what is out of range gives NaN.
  int64_t pages;
  float* sums;             // [batch, kv_heads, rows * group, slots, slot]: dv sums of values, of weights, top score
  int64_t slots;           // as many as parts, or one; none if there is one part
  int64_t slot;            // floats: dv + 2, and as many more as make whole sectors
};

constexpr int64_t kMaxPagedHeadDim = 512, kMaxQueries = (int64_t(1) << 31) - 1;   // of a batch, in all heads
constexpr int64_t kPagedPart = 512;    // tokens
constexpr int64_t kFewQueries = 16;    // of a head of keys: so many, and each part has its block of threads

PEFTOPS_CPU_KERNELS(Kernel<PagedAttention> paged_attention;)

#ifdef PEFTOPS_CUDA
namespace cuda {
Kernel<PagedAttention> paged_attention, paged_gather;
}
#endif

}  // namespace peftops
