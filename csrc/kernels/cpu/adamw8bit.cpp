// Compiled once for each of the builds of cpu/kernel.h.
//
// Two passes over a block: the first moves the parameter and writes the moments in float32 to the scratch; the second
// encodes them, interleaved with the first pass of the next block. Limit: arithmetic, 95 instructions for each 8
// elements on AVX2. Reading and writing, 18 bytes an element, take less.
#include "kernels/adamw8bit.h"
#include "kernels/cpu/simd.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

// b, with the sign of a: b has none.
inline Vec with_sign_of(Vec a, Vec b) { return as_float(as_int(b) | (as_int(a) & as_int(set(-0.f)))); }

template <bool kSigned> struct Decode {
  const DynamicCode& code = kSigned ? kFirstCode : kSecondCode;
  Table8 slope{code.value_slope}, offset{code.value_offset};

  Vec operator()(const uint8_t* p) const {
    const Vec number = to_float(load_bytes(p)) - set(kSigned ? 127.f : 0.f);
    const Vec place = abs(number) + set(kSigned ? 0.5f : 1.5f);
    const Int at = shift_right(as_int(place), 23);
    const Vec value = place * slope(at) + offset(at);
    return kSigned ? with_sign_of(number, value) : value;
  }
};

template <bool kSigned> struct Encode {
  const DynamicCode& code = kSigned ? kFirstCode : kSecondCode;
  Table8 bound{code.bound}, slope{code.slope}, offset{code.offset};

  Int operator()(Vec number, Vec inverse) const {
    // The bits of a float as an integer are nearly a logarithm: at most the logarithm, and at most 0.03 decades less.
    constexpr float kDecade = 0.30103f / (1 << 23);
    const Vec scaled = number * inverse, x = abs(scaled);
    const Int below = truncate(max(fma(to_float(as_int(x)), set(kDecade), set(6.999f - 127 * 0.30103f)), zero()));
    const Int e = add_if_greater(x, bound(below), below, 1);
    const Vec place = x * slope(e) + offset(e);
    if (kSigned) return truncate(with_sign_of(scaled, place) + set(127.5f));
    return max_int(truncate(place), add_if_greater(number, zero(), as_int(zero()), 1));
  }
};

struct Coder {
  Decode<true> decode_first;
  Decode<false> decode_second;
  Encode<true> encode_first;
  Encode<false> encode_second;
};

// A block whose moments are in the scratch and yet to be coded.
struct Waiting {
  const float *m, *v;
  uint8_t *first, *second;
  Vec by_first, by_second;   // 1 / absmax

  void encode(const Coder& code, int64_t i) const {   // two vectors
    const int64_t j = i + kLanes;
    store_bytes(first + i, code.encode_first(load(m + i), by_first), code.encode_first(load(m + j), by_first));
    store_bytes(second + i, code.encode_second(load(v + i), by_second), code.encode_second(load(v + j), by_second));
  }
};

struct Most { Int first = as_int(zero()), second = as_int(zero()); };   // magnitudes, by the bits

// The step of a vector of elements, whose moments are m and v.
struct Step {
  Vec decay, beta1, rest1, beta2, rest2, size, floor;
  explicit Step(const AdamW8bit& a)
      : decay(set(a.decay)), beta1(set(a.beta1)), rest1(set(a.rest1)), beta2(set(a.beta2)), rest2(set(a.rest2)),
        size(set(-a.size)), floor(set(a.floor)) {}

  Vec operator()(Vec p, Vec g, Vec& m, Vec& v, Most& most) const {
    m = beta1 * m + rest1 * g;
    v = beta2 * v + (rest2 * g) * g;
    most.first = max_int(most.first, as_int(abs(m)));
    most.second = max_int(most.second, as_int(abs(v)));
    return decay * p + (size * m) / (sqrt(v) + floor);
  }
};

// Moves n elements of a parameter. The moments come from `from`, a vector at a time, and go to m and v. Roots and
// quotients use only the divider, so other work is done `beside` them, for each two vectors.
template <class P, class G, class From, class Beside>
inline Most move(const Step& step, P* p, const G* g, int64_t n, float* m, float* v, const From& from,
                 const Beside& beside) {
  Most most;
  int64_t i = 0;
  Vec mi, vi;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    beside(i);
#pragma GCC unroll 2
    for (int64_t j = i; j < i + 2 * kLanes; j += kLanes) {
      from(j, mi, vi);
      store(p + j, step(load(p + j), load(g + j), mi, vi, most));
      store(m + j, mi);
      store(v + j, vi);
    }
  }
  for (; i < n; i += kLanes) {
    const int64_t left = at_most(kLanes, n - i);
    from(i, mi, vi);
    store_n(p + i, left, step(load_n(p + i, left), load_n(g + i, left), mi, vi, most));
    store_n(m + i, left, mi);
    store_n(v + i, left, vi);
  }
  return most;
}

inline float largest(Int most) {
  int32_t lanes[kLanes], bits = 0;
  store_int(lanes, most);
  for (int32_t lane : lanes) bits = lane > bits ? lane : bits;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

inline bool is_apart(float m, float v) { return !(v <= kMostSecond) || !(m - m == 0); }

// The largest of a block, with zeros in place of such elements. `marks` has their first codes, and zero for all others.
void set_apart(float* m, float* v, int64_t n, uint8_t* marks, float& first, float& second) {
  first = second = 0;
  for (int64_t i = 0; i < n; ++i) {
    marks[i] = 0;
    if (is_apart(m[i], v[i])) {
      uint32_t bits;
      memcpy(&bits, v + i, sizeof bits);
      const bool is_number = m[i] - m[i] == 0 && v[i] - v[i] == 0;
      marks[i] = is_number ? uint8_t((bits + 0x7fffff) >> 23) : 255;
      m[i] = v[i] = 0;
    }
    const float size = m[i] < 0 ? -m[i] : m[i];
    first = size > first ? size : first;
    second = v[i] > second ? v[i] : second;
  }
}

void mark(const uint8_t* marks, int64_t n, uint8_t* first, uint8_t* second) {
  for (int64_t i = 0; i < n; ++i) {
    if (marks[i]) first[i] = marks[i], second[i] = 0;
    else if (second[i] == 0 && first[i] >= kLeastMark) second[i] = 1;
  }
}

void read_marks(const uint8_t* first, const uint8_t* second, int64_t n, float* m, float* v) {
  for (int64_t i = 0; i < n; ++i) {
    if (second[i] != 0 || first[i] < kLeastMark) continue;
    const uint32_t bits = uint32_t(first[i]) << 23;
    m[i] = 0;
    memcpy(v + i, &bits, sizeof bits);
  }
}

// Block after block, of one tensor after the other.
struct Blocks {
  const AdamW8bit& a;
  const Step step;
  const Coder code;
  float *m, *v, *other_m, *other_v;
  Waiting waiting;

  Blocks(const AdamW8bit& args, float* scratch)
      : a(args), step(args), m(scratch), v(m + kAdamWUnit), other_m(v + kAdamWUnit), other_v(other_m + kAdamWUnit) {
    nothing_waits();
  }
  // For what is coded meanwhile goes somewhere.
  void nothing_waits() {
    uint8_t* nowhere = reinterpret_cast<uint8_t*>((m < other_m ? m : other_m) + 4 * kAdamWUnit);
    waiting = {other_m, other_v, nowhere, nowhere + kAdamWUnit, zero(), zero()};
  }
  void finish() {
    for (int64_t i = 0; i < a.block_size; i += 2 * kLanes) waiting.encode(code, i);
    nothing_waits();
  }

  // One block of codes, n elements of which the parameter has.
  template <class P, class G> void move_block(const AdamWTensor& t, int64_t b, int64_t n) {
    const int64_t begin = b * a.block_size;
    uint8_t* first = static_cast<uint8_t*>(t.first) + begin;
    uint8_t* second = static_cast<uint8_t*>(t.second) + begin;
    P* p = static_cast<P*>(t.parameter) + begin;
    const G* g = static_cast<const G*>(t.grad) + begin;
    const bool marked = __builtin_signbit(t.second_absmax[b]);
    const Vec first_absmax = set(t.first_absmax[b]), second_absmax = abs(set(t.second_absmax[b]));
    const auto decode = [&](int64_t i, Vec& mi, Vec& vi) {
      mi = code.decode_first(first + i) * first_absmax;
      vi = code.decode_second(second + i) * second_absmax;
    };
    Most most;
    if (marked || n < a.block_size) {
      finish();
      for (int64_t i = 0; i < a.block_size; i += kLanes) {
        Vec mi, vi;
        decode(i, mi, vi);
        store(m + i, mi);
        store(v + i, vi);
      }
      if (marked) read_marks(first, second, n, m, v);
      const auto decoded = [&](int64_t i, Vec& mi, Vec& vi) { mi = load(m + i), vi = load(v + i); };
      most = move(step, p, g, n, m, v, decoded, [](int64_t) {});
      for (int64_t i = n; i < a.block_size; ++i) m[i] = v[i] = 0;
    } else {
      most = move(step, p, g, n, m, v, decode, [&, before = waiting](int64_t i) { before.encode(code, i); });
    }
    float first_most = largest(most.first), second_most = largest(most.second);
    uint8_t marks[kAdamWUnit];
    const bool apart = is_apart(first_most, second_most);
    if (apart) set_apart(m, v, n, marks, first_most, second_most);
    waiting = {m, v, first, second, set(1.f) / max(set(first_most), set(kLeastAbsmax)),
               set(1.f) / max(set(second_most), set(kLeastAbsmax))};
    float* const old_m = m, *const old_v = v;
    m = other_m, v = other_v, other_m = old_m, other_v = old_v;
    t.first_absmax[b] = first_most;
    t.second_absmax[b] = apart ? -second_most : second_most;
    if (apart) {
      finish();
      mark(marks, n, first, second);
    }
  }
};

void unit(Blocks& blocks, const AdamWTensor& t, int64_t begin) {
  const int64_t end = at_most(begin + kAdamWUnit, t.n);
  with_type(t.dtype, [&](auto p_type) {
    with_type(t.grad_dtype, [&](auto g_type) {
      using P = typename decltype(p_type)::type;
      using G = typename decltype(g_type)::type;
      if (t.first_absmax) {
        for (int64_t i = begin; i < end; i += blocks.a.block_size)
          blocks.move_block<P, G>(t, i / blocks.a.block_size, at_most(blocks.a.block_size, end - i));
        return;
      }
      float* first = static_cast<float*>(t.first) + begin;
      float* second = static_cast<float*>(t.second) + begin;
      const int64_t n = end - begin, whole = n / kLanes * kLanes;
      move(blocks.step, static_cast<P*>(t.parameter) + begin, static_cast<const G*>(t.grad) + begin, n, first, second,
           [&](int64_t i, Vec& mi, Vec& vi) {
             mi = i < whole ? load(first + i) : load_n(first + i, n - i);
             vi = i < whole ? load(second + i) : load_n(second + i, n - i);
           },
           [](int64_t) {});
    });
  });
}

}  // namespace

int64_t adamw8bit(const AdamW8bit& a, int64_t begin, int64_t end, void* scratch) {
  if (begin == end) return a.units;
  Blocks blocks(a, static_cast<float*>(scratch));
  const AdamWTensor* t = a.tensors;
  for (int64_t u = begin; u < end; ++u) {
    while (t + 1 < a.tensors + a.count && t[1].units_before <= u) ++t;
    unit(blocks, *t, (u - t->units_before) * kAdamWUnit);
  }
  blocks.finish();
  return a.units;
}

}  // namespace peftops::cpu::PEFTOPS_ISA
