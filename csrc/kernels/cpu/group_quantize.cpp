// Compiled once for each of the builds of cpu/kernel.h.
//
// Two passes over kLanes groups of a row: the first reads them from memory for their extremes, the second
// from cache and codes them. Limit: reading the weight once.
#include "kernels/group_quantize.h"
#include "kernels/cpu/group_decode.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// n elements of a group; a group shorter than a vector fills it twice, which changes no extreme.
template <class T> inline Vec load_group(const T* w, int64_t n) {
  if (n >= kLanes) return load(w);
  T twice[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) twice[i] = w[i % n];
  return load(twice);
}

// Scale and zero of each of kLanes groups. `inverse` is the factor of w: 1 / scale, or 0 for codes 0.
struct Ranges { float scale[kLanes], zero[kLanes], inverse[kLanes]; };

template <class T> void find_ranges(const T* w, int64_t group, int64_t groups, float levels, bool symmetric, Ranges& r) {
  Int low[kLanes] = {}, high[kLanes] = {}, spoilt[kLanes] = {};
  for (int64_t g = 0; g < groups; ++g) {
    Vec least = load_group(w + g * group, group), most = least, nan = least - least;
    for (int64_t i = kLanes; i < group; i += kLanes) {
      const Vec v = load(w + g * group + i);
      least = min(least, v), most = max(most, v), nan = nan + (v - v);   // not 0 only for NaN and infinity
    }
    low[g] = as_int(least), high[g] = as_int(most), spoilt[g] = as_int(nan);
  }
  transpose(low), transpose(high), transpose(spoilt);   // so that a lane is a group
  Vec least = as_float(low[0]), most = as_float(high[0]), nan = as_float(spoilt[0]);
  for (int i = 1; i < kLanes; ++i) {
    least = min(least, as_float(low[i])), most = max(most, as_float(high[i])), nan = nan + as_float(spoilt[i]);
  }
  const Vec widest = max(most, zero() - least);
  const Vec scale = ((symmetric ? widest + widest : most - least) + nan) / set(levels);
  store(r.scale, scale);
  store(r.zero, symmetric ? set((levels + 1) / 2) : (zero() - least) / scale);
  store(r.inverse, set(1.f) / scale);
  float constant[kLanes];
  store(constant, least);
  for (int64_t g = 0; g < groups; ++g) {
    if (r.scale[g] >= kSmallestScale && r.scale[g] <= __FLT_MAX__) continue;
    const float c = constant[g], size = c < 0 ? -c : c;
    if (!(r.scale[g] < kSmallestScale)) {   // NaN or infinite
      r.scale[g] = r.zero[g] = __builtin_nanf(""), r.inverse[g] = 0;
    } else if (symmetric || size < kSmallestScale) {
      r.scale[g] = 1, r.zero[g] = symmetric ? (levels + 1) / 2 : 0.f, r.inverse[g] = 1;
    } else {
      r.scale[g] = size, r.zero[g] = c < 0 ? 1.f : -1.f, r.inverse[g] = 1 / size;
    }
  }
}

// Squared error of a group under a scale and a zero.
template <class T> float error_of(const T* w, int64_t group, float scale_, float zero_, float levels) {
  const Vec scale = set(scale_), zero_point = set(zero_), inverse = set(1 / scale_), top = set(levels);
  Vec sum = zero();
  for (int64_t i = 0; i < group; i += kLanes) {
    const Vec v = load_group(w + i, group);
    const Vec code = min(max(v * inverse + zero_point, zero()), top) + set(0x1p23f) - set(0x1p23f);
    const Vec off = (code - zero_point) * scale - v;
    sum = sum + off * off;
  }
  float lane[kLanes], total = 0;
  store(lane, sum);
  for (float l : lane) total += l;
  return total;
}

// The best of the range of group i and narrower ones.
template <class T> void narrow(const T* w, const GroupQuantize& a, float levels, int64_t i, Ranges& r) {
  const float scale = r.scale[i], zero_point = r.zero[i], middle = levels / 2;
  float least = error_of(w, a.group, scale, zero_point, levels);
  for (int64_t step = 1; step <= a.narrower; ++step) {
    const float width = 1 - float(step) / 64, narrower = scale * width;
    const float moved = a.symmetric ? zero_point : middle - (middle - zero_point) / width;
    const float error = error_of(w, a.group, narrower, moved, levels);
    if (error < least) least = error, r.scale[i] = narrower, r.zero[i] = moved, r.inverse[i] = 1 / narrower;
  }
}

// A byte a code. Rounds by adding 2^23, whose last bit is one: the sum's low byte is the code.
template <class T> void code_group(const T* w, int64_t group, float zero_, float inverse_, float levels, uint8_t* codes) {
  const Vec zero_point = set(zero_), inverse = set(inverse_), top = set(levels);
  for (int64_t i = 0; i < group; i += kLanes) {
    const Vec v = load_group(w + i, group) * inverse + zero_point;
    store_bytes(codes + i, as_int(min(max(v, zero()), top) + set(0x1p23f)));
  }
}

template <int B, class T> void quantize_row(const GroupQuantize& a, int64_t row, uint8_t* codes) {
  constexpr float kLevels = (1 << B) - 1;
  const int64_t groups = a.cols / a.group;
  for (int64_t g = 0; g < groups; g += kLanes) {
    const int64_t n = at_most(kLanes, groups - g), at = row * groups + g;
    const T* w = static_cast<const T*>(a.weight) + at * a.group;
    Ranges r;
    find_ranges(w, a.group, n, kLevels, a.symmetric, r);
    for (int64_t i = 0; a.narrower && i < n; ++i) narrow(w + i * a.group, a, kLevels, i, r);
    memcpy(a.scales + at, r.scale, n * sizeof(float));
    memcpy(a.zeros + at, r.zero, n * sizeof(float));
    for (int64_t i = 0; i < n; ++i)
      code_group(w + i * a.group, a.group, r.zero[i], r.inverse[i], kLevels, codes + i * a.group);
    Octets<B>::squeeze(codes, n * a.group / 8, a.packed + at * a.group / 8 * B);
  }
}
static_assert(kLanes * kMaxGroup + kLanes <= kScratchBytes);

}  // namespace

int64_t group_quantize(const GroupQuantize& a, int64_t begin, int64_t end, void* scratch) {
  with_bits(a.bits, [&](auto bits) {
    with_type(a.dtype, [&](auto t) {
      for (int64_t row = begin; row < end; ++row)
        quantize_row<decltype(bits)::value, typename decltype(t)::type>(a, row, static_cast<uint8_t*>(scratch));
    });
  });
  return a.rows;
}

}  // namespace peftops::cpu::PEFTOPS_ISA
