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
// All sums are fp32, over 32 tokens at a time from position 0 on: the bits of y depend on what the query sees, and not
// on the other queries, the pages, or the threads.
#pragma once
#include "kernels/cpu/kernel.h"
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
};

constexpr int64_t kMaxPagedHeadDim = 512;

PEFTOPS_CPU_KERNELS(Kernel<PagedAttention> paged_attention;)

}  // namespace peftops
