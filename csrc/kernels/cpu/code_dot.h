// A few rows of x against a weight in codes of four bits (codes4.h), straight from the packed codes: every row of the
// weight is read once, in order, and only the result is written. Lanes run along the columns of the weight, in the
// order of a strip's codes in memory: x is permuted into that order once per call.
//
// Limit: reading the codes; at four rows and more, decoding into a panel (product.h) is faster.
#pragma once
#include "kernels/cpu/code_strip.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// How the columns [k, k + cols) of a weight fall into strips, the last of which may be broken.
template <class Weight> struct Strips {
  const Weight& w;
  int64_t k, cols, segment, segments, per_strip, whole, rest;
  Int which, inside, low;   // each lane's segment in a strip; lanes of the broken strip inside the row; the lower half

  Strips(const Weight& w, int64_t k, int64_t cols)
      : w(w), k(k), cols(cols), segment(segment_of(w)), segments(cols / segment), per_strip(kStrip / segment),
        whole(cols / kStrip), rest(cols % kStrip / 8) {
    int32_t lane[3][kLanes];
    for (int i = 0; i < kLanes; ++i)
      lane[0][i] = int32_t(i * 8 / segment), lane[1][i] = i < rest ? -1 : 0, lane[2][i] = i < kLanes / 2 ? -1 : 0;
    which = load_int(lane[0]), inside = load_int(lane[1]), low = load_int(lane[2]);
  }
  const uint8_t* packed(int64_t row) const { return w.packed + flat_of(w, row, k) / 2; }

  // Whether a strip has one scale: where a vector has eight lanes, a look-up of sixteen takes long.
  bool have_one() const { return kLanes < 16 && per_strip == 1; }
  // Each lane's scale, of a strip whose scales are at `at`.
  template <bool kOne> Vec scale(const float* at) const { return kOne ? set(*at) : Table16(at)(which); }
  // The scales of `rows` rows from `row` on, one row after the other.
  void scales(int64_t row, int64_t rows, float* out) const {
    if (segment == w.block_size && cols == w.cols)
      return Codes<Weight>::scales(w, flat_of(w, row, 0) / segment, rows * segments, out);
    for (int64_t i = 0; i < rows; ++i, out += segments) {
      const int64_t flat = flat_of(w, row + i, k);
      if (segment == w.block_size) {
        Codes<Weight>::scales(w, flat / segment, segments, out);
      } else {
        for (int64_t s = 0; s < segments; ++s) out[s] = Codes<Weight>::scale_of(w, (flat + s * segment) / w.block_size);
      }
    }
  }
};

// c[m][i] += x[m] . weight[row + i], over the strips' columns, for kLanes rows of the weight.
template <int M, bool kOne, class Weight, class Dot>
void dot_lanes(const Strips<Weight>& strips, const Dot& dot, int64_t row, float* c) {
  constexpr int R = Dot::together(M);
  const int64_t rows = at_most(kLanes, strips.w.rows - row);
  float scales[kLanes * kDotCols / 32 + 16];
  strips.scales(row, rows, scales);
  memset(scales + rows * strips.segments, 0, 16 * sizeof(float));   // a table is sixteen wide

  const int64_t ahead = prefetch_ahead(R * strips.w.cols / 2);
  Int partial[M][kLanes];
  for (int i = 0; i < kLanes; i += R) {
    const uint8_t* p[R];
    const float* scale_of[R];
    Vec total[M][R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const int64_t lane = at_most(i + r, rows - 1);
      p[r] = strips.packed(row + lane);
      scale_of[r] = scales + lane * strips.segments;
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) total[m][r] = zero();
    }
    Int codes[R];
    Vec scale[R];
    for (int64_t s = 0; s < strips.whole; ++s) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(p[r] + s * kStrip / 2 + ahead);
        codes[r] = load_int(p[r] + s * kStrip / 2);
        scale[r] = strips.template scale<kOne>(scale_of[r] + s * strips.per_strip);
      }
      dot.template add<M, R>(codes, s, scale, total);
    }
    if (strips.rest) {
      const int64_t s = strips.whole;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        codes[r] = load_int_n(p[r] + s * kStrip / 2, strips.rest);
        const Vec all = strips.template scale<kOne>(scale_of[r] + s * strips.per_strip);   // the next row's, too
        scale[r] = as_float(as_int(all) & strips.inside);
      }
      dot.template add<M, R>(codes, s, scale, total);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) partial[m][i + r] = as_int(total[m][r]);
  }
  add_lanes(partial, c);
}

// Rows that end in the middle of a strip are read two at a time, as one row of twice the columns, so that no lane is
// idle: the strip in the middle has the end of the first and the start of the second. For one row of x, which is packed
// twice.
template <class Weight> bool has_pairs(const Weight& w) {
  return w.cols % kStrip == kStrip / 2 && w.rows % 2 == 0 && 2 * w.cols <= kDotCols;
}
template <class Weight> Weight in_pairs(Weight w) {
  w.rows /= 2, w.cols *= 2;
  return w;
}

// c[i] += x . weight[2 * pair + i] for kLanes rows of the weight; `pair` and `strips` count in pairs.
template <class Weight>
void dot_pairs(const Strips<Weight>& strips, const Dot32<Weight>& dot, int64_t pair, float* c) {
  const int64_t pairs = at_most(kLanes / 2, strips.w.rows - pair);
  float scales[kLanes * kDotCols / 32 + 16];
  strips.scales(pair, pairs, scales);
  memset(scales + pairs * strips.segments, 0, 16 * sizeof(float));

  Int partial[1][kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    const int64_t at = at_most(i / 2, pairs - 1), middle = strips.whole / 2;
    const uint8_t* p = strips.packed(pair + at);
    const float* scale_of = scales + at * strips.segments;
    const auto add = [&](int64_t from, int64_t to, Vec sum) {
      Vec total[1][1] = {{sum}};
      for (int64_t s = from; s < to; ++s)
        dot.template add<1, 1>({load_int(p + s * kStrip / 2)}, s,
                               {strips.template scale<false>(scale_of + s * strips.per_strip)}, total);
      return total[0][0];
    };
    const Int both = as_int(add(middle, middle + 1, zero()));
    partial[0][i] = as_int(add(0, middle, as_float(both & strips.low)));
    partial[0][i + 1] = as_int(add(middle + 1, strips.whole, as_float(both & ~strips.low)));
  }
  add_lanes(partial, c);
}

// Adds the products of `rows` rows of a block, from its row `first` on.
template <class Weight, class Dot>
void add_dots(const Block& b, int64_t first, int64_t rows, const Strips<Weight>& strips, const Dot& dot,
              const Scratch& s) {
  each_lanes(b, strips.w.rows, s, [&](int64_t row, float* c) {
    with_dot_rows(rows, [&](auto m) {
      constexpr int M = decltype(m)::value;
      if (strips.have_one()) dot_lanes<M, true>(strips, dot, row, c + first * Scratch::kCols);
      else dot_lanes<M, false>(strips, dot, row, c + first * Scratch::kCols);
    });
  });
}

// Adds x W^T to a block of C with at most kDotRows rows.
template <class Weight, class T> void accumulate_dot(const Block& b, const Weight& w, const T* x, const Scratch& s) {
  if constexpr (sizeof(T) == sizeof(float))   // Dot16 has a range per strip: the ends of x have nothing in common
    if (b.rows == 1 && has_pairs(w)) {
      T twice[kDotCols];
      for (int i = 0; i < 2; ++i) memcpy(twice + i * w.cols, x + b.row * w.cols, w.cols * sizeof(T));
      const Weight pairs = in_pairs(w);
      pack_dot<Weight>(twice, 1, pairs.cols, pairs.cols, s.panels);
      const Strips<Weight> strips(pairs, 0, pairs.cols);
      const Dot32<Weight> dot{s.panels};
      return each_lanes(b, w.rows, s, [&](int64_t row, float* c) { dot_pairs(strips, dot, row / 2, c); });
    }
  const int64_t chunk = kDotCols / b.rows / kStrip * kStrip;
  for (int64_t k = 0; k < w.cols; k += chunk) {
    const Strips<Weight> strips(w, k, at_most(chunk, w.cols - k));
    const T* from = x + b.row * w.cols + k;
    const auto run = [&](int64_t first, int64_t rows, const auto& dot) {
      add_dots(b, first, rows, strips, dot, s);
    };
    const auto run32 = [&](int64_t first, int64_t rows) {
      pack_dot<Weight>(from + first * w.cols, rows, w.cols, strips.cols, s.panels);
      run(first, rows, Dot32<Weight>{s.panels});
    };
#if defined(PEFTOPS_BF16_CODES)
    if constexpr (is_bf16<T>) {
      bf16* packed = reinterpret_cast<bf16*>(s.panels);
      pack_dot_bf16<Weight>(from, b.rows, w.cols, strips.cols, packed);
      run(0, b.rows, DotBf16<Weight>{packed});
      continue;
    }
#endif
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 2) {
      int16_t* packed = reinterpret_cast<int16_t*>(s.panels);
      float* factor = s.panels + kDotCols;
      const auto pack = [&](int64_t first, int64_t rows) {
        return pack_dot16<Weight>(from + first * w.cols, rows, w.cols, strips.cols, packed, factor);
      };
      const uint32_t fits = pack(0, b.rows);
      if (fits == (1u << b.rows) - 1) {
        run(0, b.rows, Dot16<Weight>{packed, factor});
        continue;
      }
      if (fits) {   // decided for each row by itself, so that its bits do not depend on other rows
        for (int64_t m = 0; m < b.rows; ++m) {
          if (!(fits >> m & 1)) run32(m, 1);
          else if (pack(m, 1)) run(m, 1, Dot16<Weight>{packed, factor});
        }
        continue;
      }
    }
#endif
    run32(0, b.rows);
  }
}

#if defined(PEFTOPS_DOT8)
// The same in int8, for kInt8Rows rows at most. Rows of x that do not fit are done over: redo(rows, scratch).
template <class Weight, class T, class Redo>
void accumulate_dot8(const Block& b, const Weight& w, const T* x, const Scratch& s, const Redo& redo) {
  const auto add = [&](int64_t first, int64_t k, int64_t cols, const Bytes<kByteZero>& bytes) {
    add_dots(b, first, bytes.rows, Strips<Weight>(w, k, cols), Dot8<Weight>{bytes}, s);
  };
  accumulate_bytes<kByteZero, Codes<Weight>::kHighFirst>(b, w.cols, x, 1 / Codes<Weight>::kFactor8, s, add, redo);
}
#endif

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
