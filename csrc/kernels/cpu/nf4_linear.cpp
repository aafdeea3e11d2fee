// Compiled once per ISA into namespace peftops::cpu::{scalar,avx2,avx512,avx512bf16}; see CMakeLists.txt.
//
// Four ways to the same product, by the number of rows and the dtype:
//   up to 4 rows                      dot products straight from the codes (nf4_dot.h)
//   bf16 x, AVX512-BF16               panels decoded to bf16 (product_bf16.h)
//   16-bit x, AVX-512                 panels decoded to int16 (product_int16.h)
//   otherwise, or rows with odd ends  panels decoded to fp32 (product.h)
#include "kernels/nf4_linear.h"
#include "kernels/cpu/linear_output.h"
#include "kernels/cpu/nf4_dot.h"
#if defined(__AVX512BF16__)
#include "kernels/cpu/product_bf16.h"
#endif

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// Rows of the weight as columns of P, decoded: the codes of kLanes rows are transposed, eight columns to
// a dword, so that a shift and a look-up leave one column of the weight, one row a lane.
template <int V> struct Nf4Columns {
  const Nf4Weight& w;
  int64_t segment = segment_of(w);

  // f(d, q): dword d of a strip from column t on, for kLanes rows.
  template <class F> void each_octet(int64_t row, int64_t t, int64_t steps, const F& f) const {
    for (int64_t k = 0; k < steps; k += kStrip) {
      const int64_t octets = at_most(kLanes, (steps - k) / 8);
      Int q[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const uint8_t* p = w.packed + (at_most(row + i, w.rows - 1) * w.cols + t + k) / 2;
        __builtin_prefetch(p + kDepth / 2);   // where the next panel begins
        q[i] = octets == kLanes ? load_int(p) : load_int_n(p, octets);
      }
      transpose(q);
      for (int64_t d = 0; d < octets; ++d) f(k + 8 * d, q[d]);
    }
  }
  // scales[s][lane]: absmax of segment s from column t on.
  void scales(int64_t row, int64_t t, int64_t steps, float* out) const {
    const int shift = __builtin_ctzll(w.block_size);
    for (int i = 0; i < kLanes; ++i) {
      const int64_t flat = at_most(row + i, w.rows - 1) * w.cols + t;
      for (int64_t s = 0; s < steps / segment; ++s) out[s * kLanes + i] = absmax_of(w, (flat + s * segment) >> shift);
    }
  }

  void pack(int64_t col, int64_t t, int64_t steps, float* out) const {
    const Table16 table(kNf4Code);
    float scale[kDepth / 32 * kLanes];
    for (int v = 0; v < V; ++v, col += kLanes) {
      scales(col, t, steps, scale);
      each_octet(col, t, steps, [&](int64_t k, Int q) {
        const Vec s = load(scale + k / segment * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) store(out + ((k + i) * V + v) * kLanes, table(code_at(q, i)) * s);
      });
    }
  }

#if defined(__AVX512F__)
  void pack16(int64_t col, int64_t t, int64_t steps, int32_t* out, float* scale) const {
    const Int table = load_int(kCode16.at);
    float lane[kDepth / 32 * kLanes];
    for (int v = 0; v < V; ++v, col += kLanes) {
      scales(col, t, steps, lane);
      for (int64_t s = 0; s < steps / segment; ++s)
        store(scale + (s * V + v) * kLanes, load(lane + s * kLanes) * set(1.f / kCodeFactor));
      // A 16-bit look-up sees the low code of each half dword: columns i and i + 4 of the eight.
      each_octet(col, t, steps, [&](int64_t k, Int q) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          store_int(out + ((k / 2 + i) * V + v) * kLanes, _mm512_permutexvar_epi16(code_at(q, i), table));
      });
    }
  }
#endif

#if defined(__AVX512BF16__)
  void pack_bf16(int64_t col, int64_t t, int64_t steps, int32_t* out) const {
    const Table16 table(kNf4Code);
    float scale[kDepth / 32 * kLanes];
    for (int v = 0; v < V; ++v, col += kLanes) {
      scales(col, t, steps, scale);
      each_octet(col, t, steps, [&](int64_t k, Int q) {
        const Vec s = load(scale + k / segment * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          store_int(out + ((k / 2 + i) * V + v) * kLanes,
                    pair_bf16(table(code_at(q, i)) * s, table(code_at(q, i + 4)) * s));
      });
    }
  }
#endif
};

// The same for any number of columns: rows may start in mid-byte, blocks end anywhere.
template <int V> struct RaggedColumns {
  const Nf4Weight& w;

  void pack(int64_t col, int64_t t, int64_t steps, float* out) const {
    float rows[kLanes * kDepth];
    for (int v = 0; v < V; ++v) {
      const int64_t row = col + v * kLanes, n = at_most(kLanes, w.rows - row);
      for (int64_t i = 0; i < n; ++i) decode_run(w, (row + i) * w.cols + t, steps, rows + i * kDepth);
      float* lanes = out + v * kLanes;
      each_vector(steps, [&](int64_t k, int64_t m) {
        Int square[kLanes] = {};
        for (int64_t i = 0; i < n; ++i) square[i] = load_int(rows + i * kDepth + k);
        transpose(square);
        for (int64_t i = 0; i < m; ++i) store_int(lanes + (k + i) * V * kLanes, square[i]);
      });
    }
  }
};

template <class T> void multiply(const Nf4Linear& a, const Block& b, const Scratch& s,
                                    [[maybe_unused]] bool int16 = true) {
  const Nf4Weight& w = a.weight;
  const T* x = static_cast<const T*>(a.x);
  if (a.r)
    with_type(a.b_dtype, [&](auto t) {
      using B = typename decltype(t)::type;
      const Columns<2, B> right{static_cast<const B*>(a.b), w.rows, a.r, a.scaling};
      accumulate<2>(b, a.r, Rows<float>{a.u, a.r}, right, s);
    });
  if (!is_regular(w)) return accumulate<2>(b, w.cols, Rows<T>{x, w.cols}, RaggedColumns<2>{w}, s);
  if (a.m <= kDotRows) return accumulate_dot(b, w, x, s);
  const Nf4Columns<2> columns{w};
#if defined(__AVX512BF16__)
  if constexpr (is_bf16<T>) return accumulate_bf16(b, w.cols, x, w.cols, columns, s);
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2)
    if (int16)
      return accumulate16(b, w.cols, columns.segment, x, w.cols, columns, s,
                          [&](const Block& row, const Scratch& at) { multiply<T>(a, row, at, false); });
#endif
  accumulate<2>(b, w.cols, Rows<T>{x, w.cols}, columns, s);
}

}  // namespace

int64_t nf4_linear(const Nf4Linear& a, int64_t begin, int64_t end, void* scratch) {
  const LinearOutput output{a.y, a.m, a.weight.rows, a.dtype, a.bias, a.bias_dtype};
  return output.each(begin, end, scratch, [&](auto t, const Block& b, const Scratch& s) {
    using T = typename decltype(t)::type;
    multiply<T>(a, b, s);
  });
}

}  // namespace peftops::cpu::PEFTOPS_ISA
