// A few rows of x against a weight in codes of four bits (codes4.h), straight from the packed codes: every row of the
// weight is read once, in order, and only the result is written. Lanes run along the columns of the weight, in the
// order of a strip's codes in memory: x is permuted into that order once per call.
//
// Limit: reading the codes; at four rows and more, decoding into a panel (product.h) is faster.
#pragma once
#include "kernels/cpu/dot.h"
#include "kernels/cpu/codes4.h"
#if defined(__AVX512F__)
#include "kernels/cpu/product_int16.h"
#endif
#if defined(PEFTOPS_DOT8)
#include "kernels/cpu/dot_int8.h"
#endif

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// The column that the j-th shift of a dword by four bits moves to the lowest bits: j ^ 1 if the high half of a byte
// comes first.
template <class Weight> constexpr int column_of(int j) { return Codes<Weight>::kHighFirst ? j ^ 1 : j; }

// x as the dot product reads it. Lane l of vector j of a strip holds column 8 l + column_of(j).
template <class Weight, class T> void pack_dot(const T* x, int64_t rows, int64_t ld, int64_t cols, float* out) {
  for (int64_t k = 0; k < cols; k += kStrip)
    for (int64_t m = 0; m < rows; ++m, out += kStrip) {
      float strip[kStrip] = {};
      each_vector(at_most(kStrip, cols - k), [&](int64_t i, int64_t n) {
        store(strip + i, load_upto(x + m * ld + k + i, n));
      });
      for (int j = 0; j < 8; ++j)
        for (int lane = 0; lane < kLanes; ++lane) out[j * kLanes + lane] = strip[8 * lane + column_of<Weight>(j)];
    }
}

template <class Weight> struct Dot32 {
  // Rows of the weight that share the loads of M rows of x.
  static constexpr int together(int M) { return M == 1 ? 1 : 4; }

  const float* x;   // [strips][M][8][kLanes]
  Table16 table{Codes<Weight>::at};

  template <int M, int R>
  void add(const Int (&strip)[R], int64_t i, const Vec (&scale)[R], Vec (&total)[M][R]) const {
    const float* at = x + i * M * kStrip;
    Vec sum[M][R];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      Vec w[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) w[r] = table(shift_right(strip[r], 4 * j));
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const Vec v = load(at + (m * 8 + j) * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[m][r] = j ? fma(w[r], v, sum[m][r]) : w[r] * v;
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) total[m][r] = fma(sum[m][r], scale[r], total[m][r]);
  }
};

#if defined(__AVX512F__)
// The same with x and the codes in int16, see product_int16.h; 8 products a lane fit an int32.
template <class Weight> struct Dot16 {
  static constexpr int together(int M) { return M <= 2 ? 1 : 4; }

  const int16_t* x;      // [strips][M][4][2 * kLanes]
  const float* factor;   // [strips][M]
  Int table = load_int(kCode16<Weight>.at);

  template <int M, int R>
  void add(const Int (&strip)[R], int64_t i, const Vec (&scale)[R], Vec (&total)[M][R]) const {
    const int16_t* at = x + i * M * kStrip;
    Int sum[M][R];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      Int w[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) w[r] = _mm512_permutexvar_epi16(shift_right(strip[r], 4 * j), table);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const Int v = load_int(at + (m * 4 + j) * 2 * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[m][r] = _mm512_dpwssd_epi32(j ? sum[m][r] : as_int(zero()), w[r], v);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) total[m][r] = fma(_mm512_cvtepi32_ps(sum[m][r]), scale[r] * set(factor[i * M + m]), total[m][r]);
  }
};

// Word l of vector j of a strip holds column 4 l + column_of(j). Returns the rows that fit, a bit for each: no strip of theirs
// is wide.
template <class Weight, class T>
uint32_t pack_dot16(const T* x, int64_t rows, int64_t ld, int64_t cols, int16_t* out, float* factor) {
  uint64_t unfit = 0;
  for (int64_t k = 0; k < cols; k += kStrip) {
    T strips[kDotRows][kStrip] = {};
    for (int64_t m = 0; m < rows; ++m) memcpy(strips[m], x + m * ld + k, at_most(kStrip, cols - k) * sizeof(T));
    const Ranges16 ranges(T{}, rows, kStrip, [&](int64_t m) { return &strips[m][0]; });
    unfit |= ranges.unfit | ranges.wide;
    for (int64_t m = 0; m < rows; ++m, out += kStrip) {
      *factor++ = ranges.scale[m] / Codes<Weight>::kFactor16;
      int32_t whole[kStrip];
      for (int i = 0; i < kStrip; i += kLanes)
        store_int(whole + i, _mm512_cvtps_epi32(load(strips[m] + i) * set(ranges.inverse[m])));
      for (int j = 0; j < 4; ++j)
        for (int l = 0; l < 2 * kLanes; ++l) out[j * 2 * kLanes + l] = int16_t(whole[4 * l + column_of<Weight>(j)]);
    }
  }
  return uint32_t(~unfit) & ((1u << rows) - 1);
}
#endif

#if defined(PEFTOPS_DOT8)
// The same with x and the codes in int8, see dot_int8.h.
template <class Weight> struct Dot8 {
  static constexpr int together(int M) { return M == 1 ? 2 : 1; }

  Bytes x;

  template <int M, int R>
  void add(const Int (&strip)[R], int64_t i, const Vec (&scale)[R], Vec (&total)[M][R]) const {
    const Int nibble = set_int(0x0f0f0f0f);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      const Int low = look_up_bytes(kSigned8<Weight>.at, strip[r] & nibble);
      const Int high = look_up_bytes(kSigned8<Weight>.at, shift_right(strip[r], 4) & nibble);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const Int sum = dot_signed(dot_signed(as_int(zero()), low, x.low<M>(i, m)), high, x.high<M>(i, m));
        total[m][r] = fma(to_float(sum), scale[r] * x.factor<M>(i, m), total[m][r]);
      }
    }
  }
};
#endif

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
  const auto add = [&](int64_t first, int64_t k, int64_t cols, const Bytes& bytes) {
    add_dots(b, first, bytes.rows, Strips<Weight>(w, k, cols), Dot8<Weight>{bytes}, s);
  };
  accumulate_bytes<Codes<Weight>::kHighFirst>(b, w.cols, x, 1 / Codes<Weight>::kFactor8, s, add, redo);
}
#endif

}  // namespace
}  // namespace peftops::cpu::PEFTOPS_ISA
