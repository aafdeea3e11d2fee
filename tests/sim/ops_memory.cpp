// ld st cvta prefetch, and the atomic operations.
#include <algorithm>

#include "ops.h"

namespace sim {
namespace {

// The lanes' addresses, and the space they are in: one for all, as nvcc's generic accesses are in practice.
Space resolve(Warp& w, const Inst& i, const Operand& o, u32 lanes, u64* address) {
  const u64* base = w.slot(o.slot);
  each(lanes, [&](int l) { address[l] = base[l] + u64(o.offset); });
  return i.space == Space::Generic ? space_of(address[__builtin_ctz(lanes)]) : i.space;
}

// Constant memory hands out one address at a time: others of a warp wait for their turn.
void count_replays(const Inst& i, u32 lanes, const u64* address) {
  u64 all[kLanes];
  int n = 0;
  each(lanes, [&](int l) { all[n++] = address[l]; });
  std::sort(all, all + n);
  i.count.replays += u64(std::unique(all, all + n) - all - 1);
}

void count(Warp& w, const Inst& i, Space space, u32 lanes, const u64* address, u32 bytes, bool write) {
  if (space == Space::Global) count_sectors(w, i, lanes, address, bytes, write);
  else if (space == Space::Shared) count_waves(i, lanes, address, bytes);
  else if (space == Space::Local) ++i.count.local;
  else if (space == Space::Const) count_replays(i, lanes, address);
}

int part(const Operand& o, int k) { return o.kind == Operand::Vector ? o.parts[k] : o.slot; }

void load(Warp& w, const Inst& i, u32 lanes) {
  u64 address[kLanes];
  const Space space = resolve(w, i, i.operands[1], lanes, address);
  const u32 size = size_of(i.type), bytes = size * i.vector, unused = 64 - 8 * size;
  count(w, i, space, lanes, address, bytes, false);
  each(lanes, [&](int l) {
    const u8* p = reach(w, i, l, i.space, address[l], bytes, Access::Read);
    for (int k = 0; k < i.vector; ++k) {
      const int slot = part(i.operands[0], k);
      if (slot < 0) continue;
      u64 v = 0;
      std::memcpy(&v, p + k * size, size);
      if (is_signed(i.type)) v = u64(i64(v << unused) >> unused) & low_bits(w.function.width[slot]);
      w.slot(slot)[l] = v;
    }
  });
}

void store(Warp& w, const Inst& i, u32 lanes) {
  u64 address[kLanes];
  const Space space = resolve(w, i, i.operands[0], lanes, address);
  const u32 size = size_of(i.type), bytes = size * i.vector;
  count(w, i, space, lanes, address, bytes, true);
  each(lanes, [&](int l) {
    u8* p = reach(w, i, l, i.space, address[l], bytes, Access::Write);
    for (int k = 0; k < i.vector; ++k) std::memcpy(p + k * size, w.slot(part(i.operands[1], k)) + l, size);
  });
}

void to_generic(Warp& w, const Inst& i, u32 lanes) {
  u64* d = w.at(i, 0);
  const u64* a = w.at(i, 1);
  const u64 window = i.space == Space::Shared ? kSharedWindow : i.space == Space::Local ? kLocalWindow
                     : i.space == Space::Param ? kParamWindow : 0;
  each(lanes, [&](int l) { d[l] = a[l] | window; });
}
void from_generic(Warp& w, const Inst& i, u32 lanes) {
  u64* d = w.at(i, 0);
  const u64* a = w.at(i, 1);
  const bool window = i.space == Space::Shared || i.space == Space::Local || i.space == Space::Param;
  each(lanes, [&](int l) { d[l] = window ? a[l] & ~kWindowMask : a[l]; });
}
void nothing(Warp&, const Inst&, u32) {}

enum Update : u8 { Plus, Least, Most, Both, Either, Differ, Exchange, CompareAndSwap };

template <class T> u64 update(u8 how, u64 old, u64 operand, u64 other) {
  const auto a = T::get(old), b = T::get(operand);
  switch (how) {
    case Plus: return T::put(decltype(a)(a + b));
    case Least: return T::put(std::min(a, b));
    case Most: return T::put(std::max(a, b));
    case Exchange: return operand;
    case CompareAndSwap: return old == operand ? other : old;
    default:
      if constexpr (std::is_integral_v<decltype(a)>) return T::put(how == Both ? a & b : how == Either ? a | b : a ^ b);
      return old;
  }
}

// flag: red, which returns nothing. T is a number of numbers.h; N how many of them share a word.
template <class T, int N = 1> void atomic(Warp& w, const Inst& i, u32 lanes) {
  const int first = i.flag ? 0 : 1;
  const u64 *operand = w.at(i, first + 1), *other = i.variant == CompareAndSwap ? w.at(i, first + 2) : operand;
  u64 address[kLanes];
  const Space space = resolve(w, i, i.operands[first], lanes, address);
  const u32 bytes = size_of(i.type), bits = 8 * bytes / N;
  count(w, i, space, lanes, address, bytes, true);
  each(lanes, [&](int l) {
    u8* p = reach(w, i, l, i.space, address[l], bytes, Access::Atomic);
    u64 old = 0, result = 0;
    std::memcpy(&old, p, bytes);
    for (int k = 0; k < N; ++k) {
      const auto piece = [&](u64 v) { return v >> k * bits & low_bits(bits); };
      result |= update<T>(i.variant, piece(old), piece(operand[l]), piece(other[l])) << k * bits;
    }
    std::memcpy(p, &result, bytes);
    if (!i.flag && i.operands[0].kind == Operand::Register) w.at(i, 0)[l] = old;
  });
}

}  // namespace

Handler decode_memory(Inst& i, Modifiers& m) {
  if (m.op == "ld" || m.op == "st") {
    for (const char* hint : {"nc",
                             "ca",
                             "cg",
                             "cs",
                             "lu",
                             "cv",
                             "wb",
                             "wt",
                             "volatile",
                             "relaxed",
                             "weak",
                             "acquire",
                             "release",
                             "cta",
                             "gpu",
                             "sys",
                             "L1::no_allocate",
                             "L1::evict_first",
                             "L1::evict_last",
                             "L2::128B",
                             "L2::256B",
                             "L2::64B"})
      m.take(hint);   // where a value is cached changes no result
    i.vector = m.take("v4") ? 4 : m.take("v2") ? 2 : 1;
    i.counted = m.op == "ld" ? Class::Load : Class::Store;
    return m.op == "ld" ? load : store;
  }
  if (m.op == "cvta") return m.take("to") ? from_generic : to_generic;
  if (m.op == "prefetch" || m.op == "prefetchu") return m.list.clear(), nothing;
  return nullptr;
}

Handler decode_atomic(Inst& i, Modifiers& m) {
  if (m.op != "atom" && m.op != "red") return nullptr;
  i.flag = m.op == "red";
  i.counted = Class::Atomic;
  for (const char* order : {"relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys", "noftz"}) m.take(order);
  const int how = m.take_any({"add", "min", "max", "and", "or", "xor", "exch", "cas"});
  if (how < 0) return nullptr;
  i.variant = u8(how);
  switch (i.type) {
    case Type::F32: return atomic<Float<>>;
    case Type::F64: return atomic<Double>;
    case Type::F16: return atomic<Half<>>;
    case Type::BF16: return atomic<Bfloat<>>;
    case Type::F16x2: return atomic<Half<>, 2>;
    case Type::BF16x2: return atomic<Bfloat<>, 2>;
    case Type::S32: return atomic<Int<i32>>;
    case Type::S64: return atomic<Int<i64>>;
    case Type::B16: case Type::U16: return atomic<Int<u16>>;
    case Type::B32: case Type::U32: return atomic<Int<u32>>;
    case Type::B64: case Type::U64: return atomic<Int<u64>>;
    default: return nullptr;
  }
}

}  // namespace sim
