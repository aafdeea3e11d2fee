// Compiled once for each of the builds of cpu/kernel.h.
//
// Two passes over kLanes blocks: the first reads them from memory for their maxima, the second from
// cache and codes them. A block size is a multiple of every kLanes, so only the weight's last block
// has a tail. Limit: reading the weight once and writing an eighth (fp32) or a quarter of it.
#include "kernels/nf4_quantize.h"
#include "kernels/cpu/simd.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// The number of midpoints below v; a NaN gets 0.
struct NearestCode {
  Table16 midpoints{kNf4Midpoints.below};

  Int operator()(Vec v) const {
    const Vec b = fma(v, fma(v * v, set(kBucket[2]), set(kBucket[1])), set(kBucket[0]));
    const Int c = truncate(max(b, zero()));
    return add_if_greater(v, midpoints(c), c, 1);
  }
};

// The same for the 255 midpoints of the dynamic map, by bisection: the first four steps decide among
// sixteen midpoints that fit a table, the last four fetch theirs.
struct NearestDynamic {
  float coarse[20] = {};   // every sixteenth midpoint

  NearestDynamic() { for (int i = 0; i < 16; ++i) coarse[i] = kDynamicMidpoints.below[16 * i + 15]; }
  Int operator()(Vec v) const {
    Int c = add_if_greater(v, set(coarse[7]), as_int(zero()), 8);
    c = add_if_greater(v, Table16(coarse + 3)(c), c, 4);
    c = add_if_greater(v, Table16(coarse + 1)(c), c, 2);
    c = shift_left(add_if_greater(v, Table16(coarse)(c), c, 1), 4);
    c = add_if_greater(v, gather(kDynamicMidpoints.below + 7, c), c, 8);
    c = add_if_greater(v, gather(kDynamicMidpoints.below + 3, c), c, 4);
    c = add_if_greater(v, gather(kDynamicMidpoints.below + 1, c), c, 2);
    return add_if_greater(v, gather(kDynamicMidpoints.below, c), c, 1);
  }
};

// max |w| over n elements, one partial maximum a lane. Magnitudes are compared as the integers that
// their bits are, which orders them alike and puts NaN above infinity above every number.
template <class T> Int most_of(const T* w, int64_t n) {
  Int most = as_int(zero());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) most = max_int(most, as_int(abs(load(w + i))));
  if (i < n) most = max_int(most, as_int(abs(load_n(w + i, n - i))));
  return most;
}

// absmax and its reciprocal for each of n <= kLanes blocks, from their partial maxima.
void finish(Int (&most)[kLanes], int64_t n, float* absmax, float* inverse) {
  transpose(most);
  for (int i = 1; i < kLanes; ++i) most[0] = max_int(most[0], most[i]);
  const Vec a = as_float(most[0]);
  store_n(absmax, n, a);
  store(inverse, set(1.f) / max(a, set(kSmallestAbsmax)));
  for (int64_t i = 0; i < n; ++i) {
    if (absmax[i] <= __FLT_MAX__) continue;
    absmax[i] = __builtin_nanf("");   // an infinity or a NaN: no number describes this block
    inverse[i] = 0.f;
  }
}

template <class T> void code_block(const NearestCode& nearest, const T* w, int64_t n, float inverse,
                                   uint8_t* packed) {
  const Vec scale = set(inverse);
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    pack_codes(packed + i / 2, nearest(load(w + i) * scale), nearest(load(w + i + kLanes) * scale));
  for (; i < n; i += kLanes) {
    const int64_t left = at_most(kLanes, n - i);
    uint8_t both[kLanes];
    pack_codes(both, nearest(load_n(w + i, left) * scale), as_int(zero()));
    memcpy(packed + i / 2, both, (left + 1) / 2);
  }
}

template <class T> void quantize(const Nf4Quantize& a, int64_t block_begin, int64_t block_end) {
  const NearestCode nearest;
  const T* w = static_cast<const T*>(a.weight);
  const auto length = [&](int64_t b) { return at_most(a.block_size, a.n - b * a.block_size); };
  for (int64_t b = block_begin; b < block_end; b += kLanes) {
    const int64_t blocks = at_most(kLanes, block_end - b);
    Int most[kLanes] = {};
    for (int64_t i = 0; i < blocks; ++i) most[i] = most_of(w + (b + i) * a.block_size, length(b + i));
    float inverse[kLanes];
    finish(most, blocks, a.absmax + b, inverse);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t begin = (b + i) * a.block_size;
      code_block(nearest, w + begin, length(b + i), inverse[i], a.packed + begin / 2);
    }
  }
}

}  // namespace

int64_t nf4_quantize(const Nf4Quantize& a, int64_t begin, int64_t end, void*) {
  const int64_t blocks = ceil_div(a.n, a.block_size), per_unit = kMaxBlock * 4 / a.block_size;
  with_type(a.dtype, [&](auto t) {
    quantize<typename decltype(t)::type>(a, begin * per_unit, at_most(end * per_unit, blocks));
  });
  return ceil_div(blocks, per_unit);
}

int64_t nf4_quantize_absmax(const Nf4QuantizeAbsmax& a, int64_t group_begin, int64_t group_end, void*) {
  const NearestDynamic nearest;
  for (int64_t g = group_begin; g < group_end; ++g) {
    const int64_t begin = g * kAbsmaxBlock, n = at_most(kAbsmaxBlock, a.blocks - begin);
    float centred[kAbsmaxBlock] = {}, inverse[kLanes];
    for (int64_t i = 0; i < n; ++i) centred[i] = a.absmax[begin + i] - *a.offset;
    Int most[kLanes] = {most_of(centred, n)};
    finish(most, 1, a.scale + g, inverse);
    int32_t code[kAbsmaxBlock];
    for (int64_t i = 0; i < kAbsmaxBlock; i += kLanes)
      store_int(code + i, nearest(load(centred + i) * set(inverse[0])));
    if (!(a.scale[g] + *a.offset <= __FLT_MAX__) && a.scale[g] <= __FLT_MAX__) {
      const auto value = [&](int c) { return kDynamicMap.at[c] * a.scale[g] + *a.offset; };
      for (int64_t i = 0; i < n; ++i) while (!(value(code[i]) <= __FLT_MAX__)) --code[i];
    }
    for (int64_t i = 0; i < n; ++i) a.code[begin + i] = uint8_t(code[i]);
  }
  return ceil_div(a.blocks, kAbsmaxBlock);
}

}  // namespace peftops::cpu::PEFTOPS_ISA
