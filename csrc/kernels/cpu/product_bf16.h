// The product of product.h for bf16 activations where the CPU multiplies bf16 itself (AVX512-BF16, ARMv8.6): twice
// the multiply-adds per instruction, nothing to scale, fp32 sums. The decoded weight is rounded to bf16 once, as in a
// dense bf16 layer. There is no other difference to fp32.
//
// For a few rows, decoding takes longer than multiplying. There P holds codes alone, and leaves the scales of its
// segments for the sums: one look-up (vpermw) gives two codes, rounded to bf16. For many rows the visits to C, one for
// every segment, take longer than that saves.
//
// vdpbf16ps and bfdot multiply pairs. Steps are paired i with i + 4 inside each eight, as in product_int16.h.
#pragma once
#include "kernels/cpu/product.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

constexpr int64_t kBf16CodeRows = 24;   // at more, P is decoded

// Views into the scratch of the fp32 product: half of it, since a pair takes the place of a float. Behind that lie the
// scales of a P of codes, [kPanels][kBf16Segments][2 * kLanes].
constexpr int64_t kBf16Pairs = kDepth / 2, kBf16Stride = kBf16Pairs + kLanes, kBf16Segments = kDepth / 32;
static_assert(kBf16Pairs + kBf16Segments <= kDepth);

// A tile of A: rows of pairs.
inline void pack_tile_bf16(const bf16* x, int64_t ldx, int64_t rows, int64_t steps, int32_t* out) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < steps; k += 2 * kLanes) {
      const int64_t n = at_most(kLanes, (steps - k) / 2);
      const bf16* from = x + i * ldx + k;
      const Int words = n == kLanes ? load_int(from) : load_int_n(from, n);
      store_int(out + i * kBf16Stride + k / 2, interleave_halves(words));
    }
}

// Each run of `segment` pairs has one scale. Without scales, all of them are one run.
template <int R, bool kScaled>
__attribute__((noinline)) void tile_bf16(const int32_t* a, const int32_t* p, const float* scales, int64_t pairs, int64_t segment, float* c) {
  for (int64_t first = 0; first < pairs; first += segment, scales += 2 * kLanes) {
    Vec sum[R][2];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = zero();
    for (int64_t t = first; t < first + segment; ++t) {
      const Int b0 = load_int(p + t * 2 * kLanes), b1 = load_int(p + (t * 2 + 1) * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const Int x = set_int(a[i * kBf16Stride + t]);
        sum[i][0] = dot_bf16(sum[i][0], x, b0);
        sum[i][1] = dot_bf16(sum[i][1], x, b1);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        float* at = c + i * Scratch::kCols + v * kLanes;
        store(at, kScaled ? fma(sum[i][v], load(scales + v * kLanes), load(at)) : sum[i][v] + load(at));
      }
  }
}

template <bool kScaled, int R = kTileRows, class... Args> void tile_bf16_of(int64_t rows, const Args&... args) {
  if (rows == R) return tile_bf16<R, kScaled>(args...);
  if constexpr (R > 1) tile_bf16_of<kScaled, R - 1>(rows, args...);
}

// Adds the product over `depth` steps, a multiple of 8, to a block of C. P packs its panels with
// pack_bf16(col, t, steps, pairs), or, if it is kScaled, with pack_bf16(col, t, steps, pairs, scales).
template <class Right>
void accumulate_bf16(const Block& b, int64_t depth, const bf16* x, int64_t ldx, const Right& right, const Scratch& s) {
  constexpr int64_t kWidth = 2 * kLanes;
  int32_t* panels = reinterpret_cast<int32_t*>(s.panels);
  int32_t* left = reinterpret_cast<int32_t*>(s.left);
  float* scales = s.panels + kBf16Pairs * Scratch::kCols;
  for (int64_t t = 0; t < depth; t += kDepth) {
    const int64_t steps = at_most(kDepth, depth - t);
    int64_t segment = steps;
    for (int64_t j = 0; j < b.panels; ++j) {
      const int64_t col = b.col + j * kWidth;
      int32_t* pairs = panels + j * kBf16Pairs * kWidth;
      if constexpr (Right::kScaled) {
        segment = right.segment;
        right.pack_bf16(col, t, steps, pairs, scales + j * kBf16Segments * kWidth);
      } else {
        right.pack_bf16(col, t, steps, pairs);
      }
    }
    each_tile(b.rows, kTileRows, [&](int64_t row, int64_t rows) {
      pack_tile_bf16(x + (b.row + row) * ldx + t, ldx, rows, steps, left);
      for (int64_t j = 0; j < b.panels; ++j)
        tile_bf16_of<Right::kScaled>(rows, left, panels + j * kBf16Pairs * kWidth, scales + j * kBf16Segments * kWidth,
                                     steps / 2, segment / 2, s.c + row * Scratch::kCols + j * kWidth);
    });
  }
}

// Any P of product.h, decoded in fp32 and rounded.
template <int V, class Right> struct AsBf16 {
  static constexpr bool kScaled = false;
  static constexpr int64_t kChunk = 128;   // steps at once: 16 KB
  const Right& right;

  void pack_bf16(int64_t col, int64_t t, int64_t steps, int32_t* out) const {
    float panel[kChunk * V * kLanes];
    for (int64_t first = 0; first < steps; first += kChunk) {
      const int64_t n = at_most(kChunk, steps - first);
      right.pack(col, t + first, n, panel);
      for (const float* p = panel; p < panel + n * V * kLanes; p += 8 * V * kLanes)
        for (int i = 0; i < 4 * V; ++i, out += kLanes)
          store_int(out, pair_bf16(load(p + i * kLanes), load(p + (i + 4 * V) * kLanes)));
    }
  }
};

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
