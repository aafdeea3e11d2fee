// Rows of a weight in codes of four bits (codes4.h) as columns of P (product.h), for each of the products: dwords of
// eight codes are transposed, so that a lane is a row; a shift and a look-up then give the numbers that the product
// multiplies. See packed_product.h for the view.
#pragma once
#include "kernels/cpu/code_dot.h"
#include "kernels/cpu/products.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

#if defined(PEFTOPS_BF16_CODES)
template <int V, class Weight> struct Bf16Codes;
#endif

template <int V, class Weight> struct CodeColumns {
  static constexpr bool kHasCodes = true, kScaled = false;   // for product_bf16.h
  const Weight& w;
  bool regular = Codes<Weight>::is_regular(w);   // rows start on a byte, and segments lie within a block
  int64_t segment = segment_of(w);

  bool fits_dot() const { return regular; }
  bool fits_dot8() const { return regular; }
  bool fits_int8() const { return regular; }
  bool fits_int16() const { return regular; }
  bool fits_bf16() const { return regular; }
  const CodeColumns& int8() const { return *this; }
  const CodeColumns& int16() const { return *this; }
  const CodeColumns& bf16() const { return *this; }
#if defined(PEFTOPS_BF16_CODES)
  bool fits_bf16_codes() const { return regular; }
  Bf16Codes<V, Weight> bf16_codes() const { return {*this, segment}; }
#endif

  template <class T> void dot(const Block& b, const T* x, const Scratch& s) const { accumulate_dot(b, w, x, s); }
#if defined(PEFTOPS_DOT8)
  template <class T, class Redo> void dot8(const Block& b, const T* x, const Scratch& s, const Redo& redo) const {
    accumulate_dot8(b, w, x, s, redo);
  }
#endif

  // f(d, q): dword d of a strip from column t on, for kLanes rows.
  template <class F> void each_octet(int64_t row, int64_t t, int64_t steps, const F& f) const {
    const int64_t last = w.rows - 1 - row;
    for (int64_t k = 0; k < steps; k += kStrip) {
      const int64_t octets = at_most(kLanes, (steps - k) / 8);
      const uint8_t* p = w.packed + flat_of(w, at_most(row, w.rows - 1), t + k) / 2;
      Int q[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        __builtin_prefetch(p + kDepth / 2, 0, 2);   // where the next panel begins; L1 has no room for it
        q[i] = octets == kLanes ? load_int(p) : load_int_n(p, octets);
        p += i < last ? w.cols / 2 : 0;
      }
      transpose(q);
      for (int64_t d = 0; d < octets; ++d) f(k + 8 * d, q[d]);
    }
  }
  // scales[s][lane]: scale of segment s from column t on.
  void scales(int64_t row, int64_t t, int64_t steps, float* out) const {
    const int64_t first = flat_of(w, row, t);
    if (row + kLanes <= w.rows && Codes<Weight>::scales_of_lanes(w, first, w.cols, segment, steps / segment, out)) return;
    const int shift = __builtin_ctzll(w.block_size);
    for (int i = 0; i < kLanes; ++i) {
      const int64_t flat = flat_of(w, at_most(row + i, w.rows - 1), t);
      for (int64_t s = 0; s < steps / segment; ++s)
        out[s * kLanes + i] = Codes<Weight>::scale_of(w, (flat + s * segment) >> shift);
    }
  }

  void pack(int64_t col, int64_t t, int64_t steps, float* out) const {
    if (!regular) return pack_ragged(col, t, steps, out);
    const Table16 table(Codes<Weight>::at);
    float scale[kDepth / 32 * kLanes];
    for (int v = 0; v < V; ++v, col += kLanes) {
      scales(col, t, steps, scale);
      each_octet(col, t, steps, [&](int64_t k, Int q) {
        const Vec s = load(scale + k / segment * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) store(out + ((k + i) * V + v) * kLanes, table(code_at<Weight>(q, i)) * s);
      });
    }
  }

  // The same for any number of columns: rows may start in the middle of a byte, and blocks may end anywhere.
  void pack_ragged(int64_t col, int64_t t, int64_t steps, float* out) const {
    float rows[kLanes * kDepth];
    for (int v = 0; v < V; ++v) {
      const int64_t row = col + v * kLanes, n = at_most(kLanes, w.rows - row);
      for (int64_t i = 0; i < n; ++i) Codes<Weight>::run(w, flat_of(w, row + i, t), steps, rows + i * kDepth);
      float* lanes = out + v * kLanes;
      each_vector(steps, [&](int64_t k, int64_t m) {
        Int square[kLanes] = {};
        for (int64_t i = 0; i < n; ++i) square[i] = load_int(rows + i * kDepth + k);
        transpose(square);
        for (int64_t i = 0; i < m; ++i) store_int(lanes + (k + i) * V * kLanes, square[i]);
      });
    }
  }

#if defined(PEFTOPS_INT8)
  // For product_int8.h: columns 0, 2, 4, 6 of eight are one half of their bytes, and 1, 3, 5, 7 the other.
  void pack8(int64_t col, int64_t t, int64_t steps, int32_t* out, float* scale, float* zeros) const {
    float lane[kDepth / 32 * kLanes];
    for (int v = 0; v < V; ++v, col += kLanes) {
      scales(col, t, steps, lane);
      for (int64_t s = 0; s < steps / segment; ++s) {
        store(scale + (s * V + v) * kLanes, load(lane + s * kLanes) * set(1.f / Codes<Weight>::kFactor8));
        store(zeros + (s * V + v) * kLanes, set(-Codes<Weight>::kZero8));
      }
      each_octet(col, t, steps, [&](int64_t k, Int q) {
#pragma GCC unroll 2
        for (int d = 0; d < kDwords; ++d)
          store_int(out + ((k / kPerDword + d) * V + v) * kLanes,
                    look_up_bytes(kCode8<Weight>.at, code_at<Weight>(q, d) & set_int(0x0f0f0f0f)));
      });
    }
  }
#endif

#if defined(PEFTOPS_INT16)
  void pack16(int64_t col, int64_t t, int64_t steps, int32_t* out, float* scale) const {
    pack_words(col, t, steps, load_int(kCode16<Weight>.at), Codes<Weight>::kFactor16, out, scale);
  }
  // The codes alone, times a factor, out of a table of 16 bits each. It holds them twice: vpermw reads five bits.
  void pack_words(int64_t col, int64_t t, int64_t steps, Int table, float factor, int32_t* out, float* scale) const {
    float lane[kDepth / 32 * kLanes];
    for (int v = 0; v < V; ++v, col += kLanes) {
      scales(col, t, steps, lane);
      for (int64_t s = 0; s < steps / segment; ++s)
        store(scale + (s * V + v) * kLanes, load(lane + s * kLanes) * set(1.f / factor));
      // A 16-bit look-up sees the low code of each half dword: columns i and i + 4 of the eight.
      each_octet(col, t, steps, [&](int64_t k, Int q) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          store_int(out + ((k / 2 + i) * V + v) * kLanes, _mm512_permutexvar_epi16(code_at<Weight>(q, i), table));
      });
    }
  }
#endif

#if defined(PEFTOPS_BF16)
  void pack_bf16(int64_t col, int64_t t, int64_t steps, int32_t* out) const {
    const Table16 table(Codes<Weight>::at);
    float scale[kDepth / 32 * kLanes];
    for (int v = 0; v < V; ++v, col += kLanes) {
      scales(col, t, steps, scale);
      each_octet(col, t, steps, [&](int64_t k, Int q) {
        const Vec s = load(scale + k / segment * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          store_int(out + ((k / 2 + i) * V + v) * kLanes,
                    pair_bf16(table(code_at<Weight>(q, i)) * s, table(code_at<Weight>(q, i + 4)) * s));
      });
    }
  }
#endif
};

#if defined(PEFTOPS_BF16_CODES)
template <int V, class Weight> struct Bf16Codes {
  static constexpr bool kScaled = true;
  const CodeColumns<V, Weight>& columns;
  int64_t segment;

  void pack_bf16(int64_t col, int64_t t, int64_t steps, int32_t* out, float* scale) const {
    const Int table = twice_bf16(load(Codes<Weight>::at) * set(Codes<Weight>::kFactorBf16));
    columns.pack_words(col, t, steps, table, Codes<Weight>::kFactorBf16, out, scale);
  }
};
#endif

template <class Weight, class F> void with_columns(const Weight& w, const F& f) { f(CodeColumns<2, Weight>{w}); }

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
