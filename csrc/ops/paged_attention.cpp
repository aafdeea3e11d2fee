#include "kernels/paged_attention.h"

#include <algorithm>

#include "ops/bind.h"

namespace peftops::ops {
namespace {

constexpr const char* kOp = "paged_attention";

// Pages may lie in a larger storage, with tokens and heads in any order; the elements of a row are contiguous.
PageStrides strides_of(const char* name, const Tensor& pages) {
  PEFTOPS_CHECK(pages.size(-1) == 1 || pages.stride(-1) == 1, kOp, ": the last dim of ", name, " must be contiguous");
  return {pages.stride(0), pages.stride(1), pages.stride(2)};
}

#ifndef PEFTOPS_CUDA
// Checks that every page of a sequence exists, because the kernel does not check the table.
void check_table(const PagedAttention& a, int64_t pages) {
  for (int64_t s = 0; s < a.batch; ++s) {
    const int64_t length = a.lengths[s];
    PEFTOPS_CHECK(length >= 0 && length <= a.most_pages * a.page_size, kOp, ": lengths must be from 0 to ",
                    a.most_pages * a.page_size, ", which ", a.most_pages, " pages hold, not ", length);
    for (int64_t i = 0; i * a.page_size < length; ++i) {
      const int64_t page = a.table[s * a.most_pages + i];
      PEFTOPS_CHECK(page >= 0 && page < pages, kOp, ": block_table has page ", page, " for sequence ", s,
                      ", but the pages are 0 to ", pages - 1);
    }
  }
}
#endif

Tensor attend(const Tensor& query_, const Tensor& key, const Tensor& value, const Tensor& table_,
              const Tensor& lengths_, double scale, int64_t window) {
  const OnDevice device(kOp, {{"query", query_}, {"key_pages", key}, {"value_pages", value}, {"block_table", table_},
                              {"lengths", lengths_}});
  PEFTOPS_CHECK(query_.dim() == 4, kOp, ": query must have shape [batch, heads, rows, d], not ", shape_of(query_));
  PEFTOPS_CHECK(key.dim() == 4 && value.dim() == 4, kOp, ": pages must have shape [pages, kv_heads, page_size, d], not ",
                  shape_of(key), " and ", shape_of(value));
  const Tensor query = query_.size(3) <= 1 || query_.stride(3) == 1 ? query_ : torch::stable::contiguous(query_);
  const Tensor table = as_contiguous(table_), lengths = as_contiguous(lengths_);
  PagedAttention a{};
  a.batch = query.size(0), a.heads = query.size(1), a.rows = query.size(2), a.d = query.size(3);
  a.kv_heads = key.size(1), a.page_size = key.size(2), a.dv = value.size(3);
  check_shape(kOp, "key_pages", key, {key.size(0), a.kv_heads, a.page_size, a.d});
  check_shape(kOp, "value_pages", value, {key.size(0), a.kv_heads, a.page_size, a.dv});
  PEFTOPS_CHECK(a.kv_heads > 0 && a.heads % a.kv_heads == 0, kOp, ": ", a.kv_heads, " heads of pages do not divide ",
                  a.heads, " query heads");
  PEFTOPS_CHECK(a.page_size > 0, kOp, ": a page must have at least one token");
  for (const int64_t d : {a.d, a.dv})
    PEFTOPS_CHECK(d > 0 && d <= kMaxPagedHeadDim, kOp, ": a head must have 1 to ", kMaxPagedHeadDim, " dims, not ", d);
  PEFTOPS_CHECK(table.dim() == 2 && table.size(0) == a.batch, kOp, ": block_table must have shape [", a.batch,
                  ", most pages of a sequence], not ", shape_of(table));
  check_shape(kOp, "lengths", lengths, {a.batch});
  PEFTOPS_CHECK(a.batch * a.heads * a.rows <= kMaxQueries && a.page_size <= kMaxQueries, kOp, ": there may be ",
                  kMaxQueries, " queries and tokens of a page, not ", a.batch * a.heads * a.rows, " and ", a.page_size);
  PEFTOPS_CHECK(window > 0, kOp, ": window must be at least 1, not ", window);
  PEFTOPS_CHECK(value.scalar_type() == key.scalar_type(), kOp, ": key_pages and value_pages must have one dtype");
  a.dtype = dtype_of(kOp, "query", query), a.page_dtype = dtype_of(kOp, "key_pages", key);
  a.table = integers_of<int32_t>(kOp, "block_table", table), a.lengths = integers_of<int32_t>(kOp, "lengths", lengths);
  a.most_pages = table.size(1), a.window = window, a.scale = float(scale);
  a.query = query.const_data_ptr(), a.key = key.const_data_ptr(), a.value = value.const_data_ptr();
  a.query_batch = query.stride(0), a.query_head = query.stride(1), a.query_row = query.stride(2);
  a.key_at = strides_of("key_pages", key), a.value_at = strides_of("value_pages", value);
  Tensor y = empty(query, {a.batch, a.rows, a.heads, a.dv}, query.scalar_type());
  a.y = y.mutable_data_ptr();
#ifdef PEFTOPS_CUDA
  if (y.numel() == 0) return y;
  const int64_t queries = a.rows * (a.heads / a.kv_heads);
  const int64_t parts = (a.most_pages * a.page_size + kPagedPart - 1) / kPagedPart;
  a.pages = key.size(0), a.slots = parts <= 1 ? 0 : queries <= kFewQueries ? parts : 1;
  a.slot = (a.dv + 2 + 7) / 8 * 8;
  Tensor sums = empty(query, {a.batch, a.kv_heads, queries, a.slots, a.slot}, ScalarType::Float);
  a.sums = sums.mutable_data_ptr<float>();
  run(PEFTOPS_PICK(paged_attention), a, 0);
  if (a.slots > 1) run(PEFTOPS_PICK(paged_gather), a, 0);
#else
  check_table(a, key.size(0));
  if (y.numel() == 0) return y;
  int64_t tokens = 0;
  for (int64_t s = 0; s < a.batch; ++s) tokens += std::min<int64_t>(a.lengths[s], a.rows + window);
  run(PEFTOPS_PICK(paged_attention), a, tokens * a.rows * a.heads * (a.d + a.dv));
#endif
  return y;
}

}  // namespace

PEFTOPS_IMPLEMENTATIONS(m) { m.impl("paged_attention", TORCH_BOX(&attend)); }

}  // namespace peftops::ops
