// Compiled once per ISA into namespace peftops::cpu::{scalar,avx2,avx512,avx512bf16}; see CMakeLists.txt.
//
// Both products of an attention, for sixteen queries at a time, with everything between them in L1; see
// prompt_softmax.h. Limit: reading query and out, and writing y. K = 10 tokens cost less than that.
#include "kernels/cpu/prompt_softmax.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

struct Forward : PromptSoftmax {
  Tile sum_pv;   // [kQueries][dv], the sum of p value

  Forward(const GatedPrompt& in, void* scratch) : PromptSoftmax(in, scratch), sum_pv(take(kQueries, padded(in.dv))) {}

  template <class T> void attend(const Unit& u, const Queries& q, bool loaded) {
    start<T>(q);
    each_chunk(u, loaded, [&] {
      scores();
      exponentiate();
      if (first == 0) return multiply<false>(kQueries, as_columns(p), value, n, sum_pv);
      for (int64_t i = 0; i < kQueries; ++i)
        each_vector(sum_pv.ld, [&](int64_t c, int64_t) { store(sum_pv.row(i) + c, load(sum_pv.row(i) + c) * set(rescale[i])); });
      multiply<true>(kQueries, as_columns(p), value, n, sum_pv);
    });
  }

  template <class T> void add(const GatedPromptAdd& a, const Queries& q) const {
    for (int64_t i = 0; i < q.n; ++i) {
      const T* from = static_cast<const T*>(a.out) + q.offset(i, a.out_at);
      T* to = static_cast<T*>(a.y) + q.offset(i, a.y_at);
      if (q.gate[i] != 0) {
        const Vec factor = set(q.gate[i] / sum[i]);
        each_vector(in.dv, [&](int64_t c, int64_t n) {
          store_upto(to + c, n, fma(load(sum_pv.row(i) + c), factor, load_upto(from + c, n)));
        });
      } else if (to != from) {   // shut: not even the sign of a zero may change
        memcpy(to, from, in.dv * sizeof(T));
      }
    }
  }
};

}  // namespace

int64_t gated_prompt_add(const GatedPromptAdd& a, int64_t begin, int64_t end, void* scratch) {
  if (begin < end) with_type(a.in.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    Forward work(a.in, scratch);
    for (int64_t index = begin; index < end; ++index) {
      const Unit u(a.in, index);
      bool loaded = false;
      for (int64_t tile = 0; tile < u.count; tile += kQueries) {
        const Queries q(a.in, u, tile);
        bool open = false;
        for (float gate : q.gate) open |= gate != 0;
        if (open) work.attend<T>(u, q, loaded);
        loaded |= open;
        work.add<T>(a, q);
      }
    }
  });
  return Unit::count_of(a.in);
}

}  // namespace peftops::cpu::PEFTOPS_ISA
