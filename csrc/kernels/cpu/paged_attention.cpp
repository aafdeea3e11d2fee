// Compiled once for each of the builds of cpu/kernel.h.
//
// Up to sixteen queries that share a head of keys go at a time, over 32 tokens at a time, as in flash attention. The
// tokens lie across the lanes, so decoding, with few queries, uses all lanes. Limit: reading keys and values.
#include "kernels/cpu/exp2.h"
#include "kernels/cpu/tile_product.h"
#include "kernels/paged_attention.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

constexpr int64_t kQueries = 16, kTokens = 32, kPad = 16;
constexpr float kLog2e = 1.44269504088896f, kNone = -1e30f;   // kNone: less than any score, and finite

constexpr int64_t padded(int64_t n) { return ceil_div(n, kPad) * kPad; }

// One tile of queries of one sequence and one head of keys.
struct Attention {
  const PagedAttention& a;
  const int64_t group, d, dv;
  Tile query, query_t, keys, key_t, values, p, sum;
  float top[kQueries], total[kQueries], rescale[kQueries];
  int64_t at[kQueries];   // positions of the queries

  Attention(const PagedAttention& a, void* scratch)
      : a(a), group(a.heads / a.kv_heads), d(padded(a.d)), dv(padded(a.dv)) {
    float* rest = static_cast<float*>(scratch);
    const auto take = [&](int64_t rows, int64_t cols) { return Tile{(rest += rows * cols) - rows * cols, cols}; };
    query = take(kQueries, d), query_t = take(d, kQueries), keys = take(kTokens, d), key_t = take(d, kTokens);
    values = take(kTokens, dv), p = take(kQueries, kTokens), sum = take(kQueries, dv);
  }
  static constexpr int64_t floats(int64_t d) {   // with dv = d
    return 3 * kQueries * d + 3 * kTokens * d + kQueries * kTokens;
  }

  template <class T, class P> void run(int64_t sequence, int64_t kv_head, int64_t first) {
    const int64_t n = at_most(kQueries, a.rows * group - first), length = a.lengths[sequence];
    int64_t begin = length, end = 0;
    for (int64_t i = 0; i < kQueries; ++i) {
      if (i >= n) {
        memset(query.row(i), 0, d * sizeof(float));
        continue;
      }
      const int64_t row = (first + i) / group, head = kv_head * group + (first + i) % group;
      at[i] = length - a.rows + row;
      top[i] = kNone, total[i] = 0;
      if (from(i) < begin) begin = from(i);
      if (at[i] + 1 > end) end = at[i] + 1;
      widen_row(static_cast<const T*>(a.query) + sequence * a.query_batch + head * a.query_head + row * a.query_row, a.d,
                query.row(i), d);
    }
    transpose_tile(query, a.scale * kLog2e, query_t);
    memset(sum.p, 0, kQueries * dv * sizeof(float));
    for (int64_t t = begin / kTokens * kTokens; t < end; t += kTokens) {
      load_tokens<P>(sequence, kv_head, t, at_most(kTokens, length - t));
      multiply<false>(n, columns_of(query_t), key_t, a.d, p);
      for (int64_t i = 0; i < n; ++i) exponentiate(i, t);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < dv; c += kLanes) store(sum.row(i) + c, load(sum.row(i) + c) * set(rescale[i]));
      multiply<true>(n, rows_of<kTokens>(p), values, kTokens, sum);
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = (first + i) / group, head = kv_head * group + (first + i) % group;
      T* y = static_cast<T*>(a.y) + ((sequence * a.rows + row) * a.heads + head) * a.dv;
      const Vec share = set(at[i] < 0 ? 0.f : 1.f / total[i]);
      each_vector(a.dv, [&](int64_t c, int64_t m) { store_upto(y + c, m, load(sum.row(i) + c) * share); });
    }
  }

 private:
  // The first token that a query sees.
  int64_t from(int64_t i) const { return at[i] + 1 > a.window ? at[i] + 1 - a.window : 0; }

  // n tokens from t on. Behind them values are set to 0, because 0 times the old content may be NaN. Keys keep their
  // old content, because their scores are replaced.
  template <class P> void load_tokens(int64_t sequence, int64_t kv_head, int64_t t, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      const int64_t page = a.table[sequence * a.most_pages + (t + j) / a.page_size], token = (t + j) % a.page_size;
      const auto row = [&](const void* pages, const PageStrides& s) {
        return static_cast<const P*>(pages) + page * s.page + kv_head * s.head + token * s.token;
      };
      widen_row(row(a.key, a.key_at), a.d, keys.row(j), d);
      widen_row(row(a.value, a.value_at), a.dv, values.row(j), dv);
    }
    memset(values.row(n), 0, (kTokens - n) * dv * sizeof(float));
    transpose_tile(keys, 1.f, key_t);
  }

  template <class F> static float across(Vec v, const F& f) {
    float lanes[kLanes], result;
    store(lanes, v);
    result = lanes[0];
    for (int l = 1; l < kLanes; ++l) result = f(result, lanes[l]);
    return result;
  }

  // Scores of query i become p = 2^(score - top); `rescale` scales down the sums that were made with a lower top.
  void exponentiate(int64_t i, int64_t t) {
    float* row = p.row(i);
    for (int64_t j = 0; j < kTokens; ++j)
      if (t + j < from(i) || t + j > at[i]) row[j] = -__builtin_inff();
    Vec highest = set(top[i]);
    for (int64_t j = 0; j < kTokens; j += kLanes) highest = max(load(row + j), highest);   // passes a NaN over
    const float high = across(highest, [](float a, float b) { return a > b ? a : b; });
    const float down = across(exp2(set(top[i] - high)), [](float a, float) { return a; });
    Vec sums = zero();
    for (int64_t j = 0; j < kTokens; j += kLanes) {
      const Vec e = exp2(load(row + j) - set(high));
      store(row + j, e);
      sums = sums + e;
    }
    const float added = across(sums, [](float a, float b) { return a + b; });
    total[i] = total[i] * down + added, top[i] = high, rescale[i] = down;
  }
};
static_assert(4 * Attention::floats(kMaxPagedHeadDim) <= kScratchBytes);

}  // namespace

int64_t paged_attention(const PagedAttention& a, int64_t begin, int64_t end, void* scratch) {
  const int64_t tiles = ceil_div(a.rows * (a.heads / a.kv_heads), kQueries);
  if (begin < end) with_type(a.dtype, [&](auto t) {
    with_type(a.page_dtype, [&](auto p) {
      using T = typename decltype(t)::type;
      using P = typename decltype(p)::type;
      Attention work(a, scratch);
      for (int64_t unit = begin; unit < end; ++unit)
        work.run<T, P>(unit / tiles / a.kv_heads, unit / tiles % a.kv_heads, unit % tiles * kQueries);
    });
  });
  return a.batch * a.kv_heads * tiles;
}

}  // namespace peftops::cpu::PEFTOPS_ISA
