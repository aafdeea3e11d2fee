// How the files of handlers turn a function on numbers into a handler on 32 lanes.
#pragma once
#include "machine.h"
#include "numbers.h"

namespace sim {

// d = f(a), f(a, b) or f(a, b, c) on every lane; Lane is One<T> or Two<T> of numbers.h.
template <int N, class Lane, class F> void map(Warp& w, const Inst& i, u32 lanes) {
  u64* d = w.at(i, 0);
  const u64 *a = w.at(i, 1), *b = N > 1 ? w.at(i, 2) : a, *c = N > 2 ? w.at(i, 3) : a;
  each(lanes, [&](int l) {
    if constexpr (N == 1) d[l] = Lane::apply(F(), a[l]);
    else if constexpr (N == 2) d[l] = Lane::apply(F(), a[l], b[l]);
    else d[l] = Lane::apply(F(), a[l], b[l], c[l]);
  });
}

template <int N, class F> Handler of_unsigned(u32 bytes) {
  switch (bytes) {
    case 2: return map<N, One<Int<u16>>, F>;
    case 4: return map<N, One<Int<u32>>, F>;
    case 8: return map<N, One<Int<u64>>, F>;
    default: return nullptr;
  }
}

template <int N, class F> Handler of_int(Type t) {
  switch (t) {
    case Type::S16: return map<N, One<Int<i16>>, F>;
    case Type::S32: return map<N, One<Int<i32>>, F>;
    case Type::S64: return map<N, One<Int<i64>>, F>;
    default:
      return is_float(t) || t == Type::F16x2 || t == Type::BF16x2 || t == Type::Pred ? nullptr
                                                                                     : of_unsigned<N, F>(size_of(t));
  }
}

// FH: the function on halves, where it differs from that on float and double.
template <int N, class F, class FH = F> Handler of_float(Type t, bool ftz = false, bool sat = false) {
  switch (t) {
    case Type::F32:
      if (sat) return ftz ? map<N, One<Float<true, true>>, F> : map<N, One<Float<false, true>>, F>;
      return ftz ? map<N, One<Float<true>>, F> : map<N, One<Float<>>, F>;
    case Type::F64: return sat ? nullptr : map<N, One<Double>, F>;
    case Type::F16: return sat ? map<N, One<Half<true>>, FH> : map<N, One<Half<>>, FH>;
    case Type::BF16: return sat ? map<N, One<Bfloat<true>>, FH> : map<N, One<Bfloat<>>, FH>;
    case Type::F16x2: return sat ? map<N, Two<Half<true>>, FH> : map<N, Two<Half<>>, FH>;
    case Type::BF16x2: return sat ? map<N, Two<Bfloat<true>>, FH> : map<N, Two<Bfloat<>>, FH>;
    default: return nullptr;
  }
}

}  // namespace sim
