// add sub mul mad fma div rem min max abs neg copysign, and the approximate functions.
#include "ops.h"

namespace sim {
namespace {

// Integers wrap: computed in 64 unsigned bits, cut to their width.
struct Add {
  template <class T> T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) return T(u64(a) + u64(b));
    else return a + b;
  }
};
struct Sub {
  template <class T> T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) return T(u64(a) - u64(b));
    else return a - b;
  }
};
struct Mul {
  template <class T> T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) return T(u64(a) * u64(b));
    else return a * b;
  }
};
struct MulAdd { template <class T> T operator()(T a, T b, T c) const { return T(u64(a) * u64(b) + u64(c)); } };
struct Fma { template <class T> T operator()(T a, T b, T c) const { return std::fma(a, b, c); } };
struct FmaCut {   // towards zero: of the sum rounded to odd, what float has no room for
  template <class T> T operator()(T a, T b, T c) const {
    if constexpr (!std::is_same_v<T, float>) return std::fma(a, b, c);   // which no kernel cuts
    else {
      const double sum = add_to_odd(double(a) * b, c);
      const float near = float(sum);
      return std::fabs(double(near)) > std::fabs(sum) ? std::nextafter(near, 0.f) : near;
    }
  }
};
struct FmaHalf {   // the product of two halves is exact in double; the sum is rounded once, by Half::put
  double operator()(float a, float b, float c) const { return add_to_odd(double(a) * b, c); }
};
struct Div {
  template <class T> T operator()(T a, T b) const {
    if constexpr (!std::is_integral_v<T>) return a / b;
    else if (b == 0) return T(-1);
    else return std::is_signed_v<T> && b == T(-1) ? T(0 - u64(a)) : T(a / b);
  }
};
struct Rem {
  template <class T> T operator()(T a, T b) const {
    if (b == 0) return a;
    return std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
  }
};
template <bool Max, bool KeepNan> struct Extreme {
  template <class T> T operator()(T a, T b) const {
    if constexpr (!std::is_integral_v<T>) {
      if (std::isnan(a) || std::isnan(b)) {
        if (KeepNan || (std::isnan(a) && std::isnan(b))) return as<T>(std::conditional_t<sizeof(T) == 4, u32, u64>(
            sizeof(T) == 4 ? 0x7fffffffu : 0x7fffffffffffffffull));
        return std::isnan(a) ? b : a;
      }
      if (a == b) return std::signbit(a) == Max ? b : a;   // -0 is less than 0
    }
    return (a < b) == Max ? b : a;
  }
};
struct Neg {
  template <class T> T operator()(T a) const {
    if constexpr (std::is_integral_v<T>) return T(0 - u64(a));
    else return -a;
  }
};
struct Abs {
  template <class T> T operator()(T a) const {
    if constexpr (std::is_integral_v<T>) return a < 0 ? T(0 - u64(a)) : a;
    else return std::fabs(a);
  }
};
struct CopySign { template <class T> T operator()(T sign, T a) const { return std::copysign(a, sign); } };
struct Rcp { template <class T> T operator()(T a) const { return T(1) / a; } };
struct Sqrt { template <class T> T operator()(T a) const { return std::sqrt(a); } };
struct Rsqrt { template <class T> T operator()(T a) const { return T(1 / std::sqrt(double(a))); } };
struct Exp2 { template <class T> T operator()(T a) const { return T(std::exp2(double(a))); } };
struct Log2 { template <class T> T operator()(T a) const { return T(std::log2(double(a))); } };
struct Sin { template <class T> T operator()(T a) const { return T(std::sin(double(a))); } };
struct Cos { template <class T> T operator()(T a) const { return T(std::cos(double(a))); } };
struct Tanh { template <class T> T operator()(T a) const { return T(std::tanh(double(a))); } };

template <class T, class Twice> struct Wide {   // the whole product of two T
  static Twice product(u64 a, u64 b) { return Twice(T(a)) * Twice(T(b)); }
  template <bool Add> static void wide(Warp& w, const Inst& i, u32 lanes) {
    u64* d = w.at(i, 0);
    const u64 *a = w.at(i, 1), *b = w.at(i, 2), *c = Add ? w.at(i, 3) : a;
    each(lanes, [&](int l) { d[l] = (u64(product(a[l], b[l])) + (Add ? c[l] : 0)) & low_bits(16 * sizeof(T)); });
  }
  template <bool Add> static void high(Warp& w, const Inst& i, u32 lanes) {
    u64* d = w.at(i, 0);
    const u64 *a = w.at(i, 1), *b = w.at(i, 2), *c = Add ? w.at(i, 3) : a;
    each(lanes, [&](int l) {
      d[l] = (u64(product(a[l], b[l]) >> (8 * sizeof(T))) + (Add ? c[l] : 0)) & low_bits(8 * sizeof(T));
    });
  }
};
template <bool Add, bool High> Handler wide_product(Type t) {
#define SIM_WIDE(T, Twice) return High ? &Wide<T, Twice>::template high<Add> : &Wide<T, Twice>::template wide<Add>
  switch (t) {
    case Type::U16: SIM_WIDE(u16, u32);
    case Type::S16: SIM_WIDE(i16, i32);
    case Type::U32: SIM_WIDE(u32, u64);
    case Type::S32: SIM_WIDE(i32, i64);
    case Type::U64: if (High) SIM_WIDE(u64, unsigned __int128); return nullptr;
    case Type::S64: if (High) SIM_WIDE(i64, __int128); return nullptr;
    default: return nullptr;
  }
#undef SIM_WIDE
}

void dp4a(Warp& w, const Inst& i, u32 lanes) {
  u64* d = w.at(i, 0);
  const u64 *a = w.at(i, 1), *b = w.at(i, 2), *c = w.at(i, 3);
  const auto byte = [](u64 v, int k, Type t) { return t == Type::S32 ? i32(i8(v >> 8 * k)) : i32(u8(v >> 8 * k)); };
  each(lanes, [&](int l) {
    u32 sum = u32(c[l]);
    for (int k = 0; k < 4; ++k) sum += u32(byte(a[l], k, i.type) * byte(b[l], k, i.type2));
    d[l] = sum;
  });
}

// What hardware may make of an approximate function: up to 2 units in the last place, pseudo-random.
template <class F> void approximate(Warp& w, const Inst& i, u32 lanes) {
  u64* d = w.at(i, 0);
  const u64* a = w.at(i, 1);
  each(lanes, [&](int l) {
    const float exact = F()(as<float>(u32(a[l])));
    i32 error = 0;
    if (w.block.launch.device.options.perturb && std::isnormal(exact))
      error = i32((u32(a[l]) * 2654435761u) >> 30) - 1;
    d[l] = as<u32>(exact) + u32(error);
  });
}
template <class F> Handler function_of(Inst& i, bool approx, bool ftz) {
  i.counted = Class::Special;
  return approx && !ftz && i.type == Type::F32 ? approximate<F> : of_float<1, F>(i.type, ftz);
}

}  // namespace

Handler decode_arithmetic(Inst& i, Modifiers& m) {
  const std::string& op = m.op;
  const Type t = i.type;
  const bool real = is_float(t) || t == Type::F16x2 || t == Type::BF16x2;
  if (op == "add" || op == "sub" || op == "mul" || op == "mad" || op == "fma" || op == "div") {
    if (real) {
      const bool cut = op == "fma" && t == Type::F32 && m.take("rz");
      if (!cut) m.take("rn");
      const bool full = op == "div" && (m.take("full") || m.take("approx"));
      (void)full;   // computed exactly rounded, which is within the error that they allow
      const bool ftz = m.take("ftz"), sat = m.take("sat");
      if (op == "add") return of_float<2, Add>(t, ftz, sat);
      if (op == "sub") return of_float<2, Sub>(t, ftz, sat);
      if (op == "mul") return of_float<2, Mul>(t, ftz, sat);
      if (op == "div") return of_float<2, Div>(t, ftz);
      if (cut) return of_float<3, FmaCut>(t, ftz, sat);
      return of_float<3, Fma, FmaHalf>(t, ftz, sat);
    }
    if (op == "add") return of_int<2, Add>(t);
    if (op == "sub") return of_int<2, Sub>(t);
    if (op == "div") return of_int<2, Div>(t);
    const bool adds = op == "mad";
    if (op == "mul" || adds) {
      if (m.take("wide")) return adds ? wide_product<true, false>(t) : wide_product<false, false>(t);
      if (m.take("hi")) return adds ? wide_product<true, true>(t) : wide_product<false, true>(t);
      m.take("lo");
      return adds ? of_int<3, MulAdd>(t) : of_int<2, Mul>(t);
    }
    return nullptr;
  }
  if (op == "rem") return of_int<2, Rem>(t);
  if (op == "min" || op == "max") {
    const bool max = op == "max";
    if (!real) return max ? of_int<2, Extreme<true, false>>(t) : of_int<2, Extreme<false, false>>(t);
    const bool ftz = m.take("ftz");
    if (m.take("NaN"))
      return max ? of_float<2, Extreme<true, true>>(t, ftz) : of_float<2, Extreme<false, true>>(t, ftz);
    return max ? of_float<2, Extreme<true, false>>(t, ftz) : of_float<2, Extreme<false, false>>(t, ftz);
  }
  if (op == "neg") return real ? of_float<1, Neg>(t, m.take("ftz")) : of_int<1, Neg>(t);
  if (op == "abs") return real ? of_float<1, Abs>(t, m.take("ftz")) : of_int<1, Abs>(t);
  if (op == "copysign") return t == Type::F32 || t == Type::F64 ? of_float<2, CopySign>(t) : nullptr;
  if (op == "dp4a") return dp4a;

  if (op != "rcp" && op != "sqrt" && op != "rsqrt" && op != "ex2" && op != "lg2" && op != "sin" && op != "cos" &&
      op != "tanh")
    return nullptr;
  const bool approx = m.take("approx"), ftz = m.take("ftz");
  m.take("rn");
  if (op == "rcp") return function_of<Rcp>(i, approx, ftz);
  if (op == "sqrt") return function_of<Sqrt>(i, approx, ftz);
  if (op == "rsqrt") return function_of<Rsqrt>(i, approx, ftz);
  if (op == "ex2") return function_of<Exp2>(i, approx, ftz);
  if (op == "lg2") return function_of<Log2>(i, approx, ftz);
  if (op == "sin") return function_of<Sin>(i, approx, ftz);
  if (op == "cos") return function_of<Cos>(i, approx, ftz);
  return function_of<Tanh>(i, approx, ftz);
}

}  // namespace sim
