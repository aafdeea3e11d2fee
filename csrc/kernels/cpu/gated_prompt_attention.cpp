// Compiled once for each of the builds of cpu/kernel.h.
//
// Both products of an attention, for sixteen queries at a time, with everything between them in L1; see
// prompt_softmax.h. Limit: reading query and out, and writing y. K = 10 tokens cost less than that.
#include "kernels/cpu/prompt_softmax.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// 128 queries in a unit make up for converting its prompts.
int64_t blocks_of(const GatedPrompt& in) { return ceil_div(Plan::queries_of(in), 128); }

struct Forward : PromptSoftmax<Needs::forward> {
  Tile weighted;   // [kQueries][dv], the sum of p value

  Forward(const GatedPrompt& in, void* scratch)
      : PromptSoftmax(in, blocks_of(in), scratch), weighted(take(kQueries, padded(in.dv))) {}

  template <class T> void attend(const Queries& q) {
    take_queries<T>(q);
    each_chunk([&] {
      scores();
      exponentiate();
      if (first == 0) return multiply<false>(q.n, columns_of(p), value, n, weighted);
      for (int64_t i = 0; i < q.n; ++i)
        for (int64_t c = 0; c < weighted.ld; c += kLanes)
          store(weighted.row(i) + c, load(weighted.row(i) + c) * set(rescale[i]));
      multiply<true>(q.n, columns_of(p), value, n, weighted);
    });
  }

  template <class T> void add(const GatedPromptAdd& a, const Queries& q) const {
    for (int64_t i = 0; i < q.n; ++i) {
      const T* from = static_cast<const T*>(a.out) + q.offset(i, a.out_at);
      T* to = static_cast<T*>(a.y) + q.offset(i, a.y_at);
      if (q.gate[i] != 0) {
        const Vec factor = set(q.gate[i] / sum[i]);
        each_vector(in.dv, [&](int64_t c, int64_t n) {
          store_upto(to + c, n, fma(load(weighted.row(i) + c), factor, load_upto(from + c, n)));
        });
      } else if (to != from) {   // the gate is 0: not even the sign of a zero may change
        memcpy(to, from, in.dv * sizeof(T));
      }
    }
  }
};
static_assert(4 * (Forward::floats(kMaxPromptHeadDim) + kQueries * kMaxPromptHeadDim) <= kScratchBytes);

}  // namespace

int64_t gated_prompt_add(const GatedPromptAdd& a, int64_t begin, int64_t end, void* scratch) {
  if (begin < end) with_type(a.in.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    Forward work(a.in, scratch);
    for (int64_t index = begin; index < end; ++index) {
      const Unit u(a.in, work.plan, index);
      work.start(u);
      for (int64_t tile = 0; tile < u.queries; tile += kQueries) {
        Queries q(a.in, u, tile);
        for (int64_t head = 0; head < u.heads; ++head) {
          q.choose(u.head + head);
          work.choose(u, head);
          bool open = false;
          for (float gate : q.gate) open |= gate != 0;
          if (open) work.attend<T>(q);
          work.add<T>(a, q);
        }
      }
    }
  });
  return Plan(a.in, blocks_of(a.in)).count;
}

}  // namespace peftops::cpu::PEFTOPS_ISA
