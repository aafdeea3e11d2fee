// Compiled once for each of the builds of cpu/kernel.h.
//
// The softmax is computed again, and with it the gradient of each score; the rest are four products of sixteen
// queries and a chunk of tokens, all in L1; see prompt_softmax.h. Limit: reading query and g, writing dquery.
#include "kernels/cpu/prompt_softmax.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

struct Backward : PromptSoftmax<Needs::backward> {
  Tile g, g_t;           // [kQueries][dv], [dv][kQueries]
  Tile t;                // [tokens][kQueries] g . value
  Tile dquery;           // [kQueries][d]
  float* mean;           // [kQueries] the mean of t under p
  Tile dkey, dvalue;     // [K], of the unit
  float* dgate;          // [heads / kv_heads]

  Backward(const GatedPrompt& in, int64_t blocks, void* scratch) : PromptSoftmax(in, blocks, scratch) {
    g = take(kQueries, padded(in.dv)), g_t = take(padded(in.dv), kQueries);
    t = take(chunk_of(in.d, in.dv), kQueries), dquery = take(kQueries, padded(in.d)), mean = take(1, kQueries).p;
  }

  // The unit's share of the gradients of its head-th head.
  void choose_gradients(const GatedPromptBackward& a, const Unit& u, int64_t head) {
    const int64_t index = (u.prompt * in.kv_heads + u.head + head) * plan.blocks + u.block;
    dkey = {a.partial + index * a.partial_stride, query.ld}, dvalue = {dkey.row(in.tokens), g.ld};
    dgate = dvalue.row(in.tokens);
  }

  void score_gradients() const {
    scores();
    multiply<false>(n, columns_of(value_t), g_t, in.dv, t);
  }

  // mean, over all chunks; leaves p and t of the last one behind.
  void find_mean() {
    for (int64_t i = 0; i < kQueries; i += kLanes) store(mean + i, zero());
    each_chunk([&] {
      score_gradients();
      exponentiate();
      for (int64_t i = 0; i < kQueries; i += kLanes) {
        Vec total = load(mean + i) * load(rescale + i);
        for (int64_t j = 0; j < n; ++j) total = fma(load(p.row(j) + i), load(t.row(j) + i), total);
        store(mean + i, total);
      }
    });
    for (int64_t i = 0; i < kQueries; i += kLanes) store(mean + i, load(mean + i) / load(sum + i));
  }

  // Makes p the weight gate * p of g in dvalue, and t the weight e of query in dkey and of key in dquery.
  void weigh(const Queries& q, bool exponentiated) const {
    for (int64_t i = 0; i < kQueries; i += kLanes) {
      const Vec factor = load(q.gate + i) / load(sum + i), high = load(top + i), middle = load(mean + i);
      for (int64_t j = 0; j < n; ++j) {
        const Vec e = load(p.row(j) + i), weight = (exponentiated ? e : exp2(e - high)) * factor;
        store(p.row(j) + i, weight);
        store(t.row(j) + i, weight * (load(t.row(j) + i) - middle) * set(in.scale));
      }
    }
  }

  template <class T> void add_gradients(const GatedPromptBackward& a, const Queries& q) {
    take_queries<T>(q);
    q.gather<T>(a.g, a.g_at, in.dv, g);
    transpose_tile(g, 1.f, g_t);
    find_mean();
    for (int64_t i = 0; i < q.n; ++i) dgate[q.at[i].member] += mean[i];

    memset(dquery.p, 0, q.n * dquery.ld * sizeof(float));
    each_chunk([&] {
      if (!plan.whole) score_gradients();
      weigh(q, plan.whole);
      multiply<true>(n, rows_of<kQueries>(p), g, q.n, {dvalue.row(first), dvalue.ld});
      multiply<true>(n, rows_of<kQueries>(t), query, q.n, {dkey.row(first), dkey.ld});
      if (a.dquery) multiply<true>(q.n, columns_of(t), key, n, dquery);
    });
    for (int64_t i = 0; a.dquery && i < q.n; ++i) {
      T* to = static_cast<T*>(a.dquery) + q.offset(i, a.dquery_at);
      each_vector(in.d, [&](int64_t c, int64_t n) {
        const Vec sum = load(dquery.row(i) + c);
        store_upto(to + c, n, a.add_to_dquery ? load_upto(to + c, n) + sum : sum);
      });
    }
  }

  static constexpr int64_t floats(int64_t d) {   // with dv = d
    return PromptSoftmax::floats(d) + 3 * kQueries * d + (chunk_of(d, d) + 1) * kQueries;
  }
};
static_assert(4 * Backward::floats(kMaxPromptHeadDim) <= kScratchBytes);

// to[i] = the sum of the blocks' partial[i]
template <class T> void add_blocks(const float* partial, int64_t stride, int64_t blocks, T* to, int64_t length) {
  each_vector(length, [&](int64_t c, int64_t n) {
    Vec sum = zero();
    for (int64_t b = 0; b < blocks; ++b) sum = sum + load_upto(partial + b * stride + c, n);
    store_upto(to + c, n, sum);
  });
}

}  // namespace

int64_t gated_prompt_backward(const GatedPromptBackward& a, int64_t begin, int64_t end, void* scratch) {
  if (begin < end) with_type(a.in.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    Backward work(a.in, a.blocks, scratch);
    for (int64_t index = begin; index < end; ++index) {
      const Unit u(a.in, work.plan, index);
      work.start(u);
      for (int64_t head = 0; head < u.heads; ++head) {
        work.choose_gradients(a, u, head);
        memset(work.dkey.p, 0, a.partial_stride * sizeof(float));
      }
      for (int64_t tile = 0; tile < u.queries; tile += kQueries) {
        Queries q(a.in, u, tile);
        for (int64_t head = 0; head < u.heads; ++head) {
          q.choose(u.head + head);
          work.choose(u, head);
          work.choose_gradients(a, u, head);
          work.add_gradients<T>(a, q);
        }
      }
    }
  });
  return Plan(a.in, a.blocks).count;
}

// A unit of work is a token of a prompt head. The first of a head also takes the gates that it serves.
int64_t gated_prompt_reduce(const GatedPromptReduce& a, int64_t begin, int64_t end, void*) {
  const int64_t blocks = a.blocks, group = a.heads / a.kv_heads;
  const int64_t d = padded(a.d), dv = padded(a.dv), gates = a.tokens * (d + dv);
  with_type(a.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t token = index % a.tokens, head = index / a.tokens;   // head: of a prompt
      const float* partial = a.partial + head * blocks * a.partial_stride;
      add_blocks(partial + token * d, a.partial_stride, blocks, static_cast<T*>(a.dkey) + index * a.d, a.d);
      add_blocks(partial + a.tokens * d + token * dv, a.partial_stride, blocks,
                 static_cast<T*>(a.dvalue) + index * a.dv, a.dv);
      if (token > 0 || head >= a.kv_heads) continue;
      for (int64_t i = 0; i < group; ++i) {
        float sum = 0;
        for (int64_t prompt = 0; prompt < a.prompts; ++prompt)
          for (int64_t b = 0; b < blocks; ++b)
            sum += a.partial[((prompt * a.kv_heads + head) * blocks + b) * a.partial_stride + gates + i];
        a.dgate[head * group + i] = sum;
      }
    }
  });
  return a.prompts * a.kv_heads * a.tokens;
}

}  // namespace peftops::cpu::PEFTOPS_ISA
