#include "kernels/multi_lora_linear.h"
#include "ops/bind.h"
#include "ops/lora_plan.h"

#include <algorithm>
#include <vector>

namespace peftops::ops {
namespace {

constexpr const char* kOp = "multi_lora_linear";

// The resident adapters of one layer, slot by slot. The slots that a batch names do not change while it runs; another
// thread may fill other slots meanwhile.
struct Slots {
  const int64_t* handles;   // [slots], -1 where none is loaded
  const int32_t* pages;     // [slots, most]
  const int64_t* where;     // [slots, 3]: where A begins, where B^T begins, the rank (0: not adapted here)
  const float* scaling;     // [slots]
  int64_t slots, most;

  Slots(const Tensor& handles_, const Tensor& pages_, const Tensor& where_, const Tensor& scaling_) {
    check_on_host(kOp, {{"handles", handles_}, {"pages", pages_}, {"where", where_}, {"scaling", scaling_}});
    slots = handles_.numel(), most = pages_.size(-1);
    check_shape(kOp, "pages", pages_, {slots, most});
    check_shape(kOp, "where", where_, {slots, 3});
    check_shape(kOp, "scaling", scaling_, {slots});
    handles = integers_of<int64_t>(kOp, "handles", handles_), pages = integers_of<int32_t>(kOp, "pages", pages_);
    where = integers_of<int64_t>(kOp, "where", where_), scaling = floats_of(kOp, "scaling", scaling_);
  }
};

// Rows grouped by adapter: a counting sort by slot, so rows of one adapter keep their order.
struct Grouped {
  std::vector<int64_t> order;
  std::vector<LoraSegment> segments;

  Grouped(const Tensor& index_, int64_t rows, const Slots& at, bool transposed) {
    PEFTOPS_CHECK(index_.scalar_type() == ScalarType::Long, kOp, ": adapter_index must be int64");
    check_on_host(kOp, {{"adapter_index", index_}});
    const Tensor index = as_contiguous(index_);
    PEFTOPS_CHECK(index.numel() == rows, kOp, ": adapter_index must name an adapter for each of the ", rows,
                    " rows of x, not for ", index.numel());
    const int64_t* handle = index.const_data_ptr<int64_t>();
    std::vector<int64_t> next(at.slots + 1);
    for (int64_t i = 0; i < rows; ++i) {
      if (handle[i] == -1) continue;
      const int64_t slot = handle[i] < 0 || at.slots == 0 ? -1 : handle[i] % at.slots;
      PEFTOPS_CHECK(slot >= 0 && at.handles[slot] == handle[i], kOp, ": adapter_index[", i, "] is ", handle[i],
                      ", which is neither -1 nor an adapter that is loaded; indices come from pool.use(names), and are "
                      "out of date once their adapter is evicted or changed");
      ++next[slot + 1];
    }
    for (int64_t s = 0; s < at.slots; ++s) {
      const int64_t r = at.where[3 * s + 2], n = next[s + 1];
      next[s + 1] += next[s];
      if (n && r)
        segments.push_back({next[s], next[s] + n, at.pages + s * at.most, at.where[3 * s + transposed],
                            at.where[3 * s + !transposed], r, at.scaling[s]});
    }
    order.resize(next[at.slots]);
    for (int64_t i = 0; i < rows; ++i)
      if (handle[i] != -1) order[next[handle[i] % at.slots]++] = i;
  }

  int64_t work(int64_t k) const {
    int64_t sum = 0;
    for (const LoraSegment& s : segments) sum += (s.end - s.begin) * s.r * k;
    return sum;
  }
};

LoraPool pool_of(const Tensor& storage) {
  PEFTOPS_CHECK(storage.dim() == 2 && storage.is_contiguous(), kOp,
                  ": storage must be contiguous, [pages, page_size]");
  const int64_t size = storage.size(1);
  PEFTOPS_CHECK(size >= kLoraLine && (size & (size - 1)) == 0, kOp, ": page_size must be a power of two from ",
                  kLoraLine, ", not ", size);
  int shift = 0;
  while (int64_t(1) << shift < size) ++shift;
  return {storage.const_data_ptr(), shift, dtype_of(kOp, "storage", storage)};
}

// y += s u G, in place, with u = x F^T, which is returned: F is A and G is B^T, or if `transposed` the reverse.
Tensor add(Tensor y, const Tensor& x_, const Tensor& index, const Tensor& storage, const Tensor& handles,
                          const Tensor& pages, const Tensor& where, const Tensor& scaling, bool transposed,
                          int64_t max_rank) {
  const OnDevice device(kOp, {{"x", x_}, {"y", y}, {"storage", storage}});
  PEFTOPS_CHECK(y.is_contiguous(), kOp, ": y must be contiguous");
  const Tensor x = as_contiguous(x_);
  const int64_t m = rows_of(x), k = x.size(-1), n = y.size(-1);
  PEFTOPS_CHECK(rows_of(y) == m, kOp, ": y must have the ", m, " rows of x, not ", rows_of(y));
  PEFTOPS_CHECK(x.scalar_type() == y.scalar_type(), kOp, ": x and y must be of one dtype");
  const Slots slots(handles, pages, where, scaling);
  const Grouped rows(index, m, slots, transposed);
  for (const LoraSegment& s : rows.segments)
    PEFTOPS_CHECK(s.r <= std::min(max_rank, kLoraMaxRank), kOp, ": an adapter has rank ", s.r, ", more than ",
                    std::min(max_rank, kLoraMaxRank));
  Tensor u = empty(x, {m, max_rank}, ScalarType::Float);
  fill_with_zeros(u);
  const LoraPool pool = pool_of(storage);
  const LoraPlan plan(x, rows.order, rows.segments, &pool, k, n, kPlannedPiece);
  run(PEFTOPS_PICK(multi_lora_add),
      MultiLoraAdd{x.const_data_ptr(), y.mutable_data_ptr(), u.mutable_data_ptr<float>(), pool, plan.view(), k, n,
                    max_rank, dtype_of(kOp, "x", x)},
      rows.work(k + n));
  return u;
}

// dF of the adapters `wanted`, one after the other: [r, k] each if by_rank, else [k, r]; `total` is the sum of ranks.
Tensor gradient(const Tensor& u_, const Tensor& x_, const Tensor& index, const Tensor& wanted_,
                               const Tensor& handles, const Tensor& pages, const Tensor& where, const Tensor& scaling,
                               bool by_rank, int64_t total) {
  const OnDevice device(kOp, {{"x", x_}, {"u", u_}});
  check_on_host(kOp, {{"wanted", wanted_}});
  const Tensor u = as_contiguous(u_), x = as_contiguous(x_), wanted = as_contiguous(wanted_);
  const int64_t m = rows_of(x), k = x.size(-1), ldu = u.size(-1);
  check_shape(kOp, "u", u, {m, ldu});
  const Slots slots(handles, pages, where, scaling);
  Grouped rows(index, m, slots, false);
  Tensor d = empty(u, {total * k}, ScalarType::Float);
  fill_with_zeros(d);
  std::vector<int64_t> start(slots.slots, -1);
  int64_t ranks = 0;
  for (int64_t i = 0; i < wanted.numel(); ++i) {
    const int64_t handle = integers_of<int64_t>(kOp, "wanted", wanted)[i], slot = handle < 0 ? 0 : handle % slots.slots;
    PEFTOPS_CHECK(handle >= 0 && slots.handles[slot] == handle, kOp,
                    ": an adapter was evicted or changed between forward and backward");
    start[slot] = ranks * k;
    ranks += slots.where[3 * slot + 2];
  }
  PEFTOPS_CHECK(ranks == total, kOp, ": the ranks of the wanted adapters add up to ", ranks, ", not ", total);
  std::vector<LoraSegment> kept;
  for (LoraSegment s : rows.segments) {
    s.first = start[(s.pages - slots.pages) / slots.most];
    if (s.first >= 0) kept.push_back(s);
  }
  rows.segments = std::move(kept);
  const LoraPlan plan(x, rows.order, rows.segments, nullptr, 0, 0, 0);
  run(PEFTOPS_PICK(multi_lora_gradient),
      MultiLoraGradient{floats_of(kOp, "u", u), x.const_data_ptr(), plan.view(), d.mutable_data_ptr<float>(), k, ldu,
                        by_rank, dtype_of(kOp, "x", x)},
      rows.work(k));
  return d;
}

}  // namespace

PEFTOPS_IMPLEMENTATIONS(m) {
  m.impl("multi_lora_add_", TORCH_BOX(&add));
  m.impl("multi_lora_gradient", TORCH_BOX(&gradient));
}

}  // namespace peftops::ops
