// shfl vote match redux activemask, and control: bra brx bar ret trap. The scheduler has seen to it that the lanes of
// a .sync operation are all here.
#include <algorithm>

#include "ops.h"

namespace sim {
namespace {

enum Shuffle : u8 { Up, Down, Butterfly, Index };

void shuffle(Warp& w, const Inst& i, u32 lanes) {
  const u64 *a = w.at(i, 1), *b = w.at(i, 2), *c = w.at(i, 3);
  u64 result[kLanes];
  u32 valid = 0;
  each(lanes, [&](int l) {
    const int step = int(b[l] & 31), clamp = int(c[l] & 31), segment = int(c[l] >> 8 & 31);
    const int high = (l & segment) | (clamp & ~segment), low = l & segment;
    int from;
    bool ok;
    switch (i.variant) {
      case Up: from = l - step, ok = from >= high; break;
      case Down: from = l + step, ok = from <= high; break;
      case Butterfly: from = l ^ step, ok = from <= high; break;
      default: from = low | (step & ~segment), ok = from <= high;
    }
    if (!ok) from = l;
    if (!(lanes >> from & 1))
      fail(w, i, "shuffle: lane " + std::to_string(l) + " reads lane " + std::to_string(from) + ", which is not there");
    result[l] = a[from] & 0xffffffff;
    valid |= u32(ok) << l;
  });
  u64* d = w.at(i, 0);
  each(lanes, [&](int l) { d[l] = result[l]; });
  if (i.operands[0].second >= 0) w.set_predicate(i.operands[0].second, lanes, valid);
}

enum Vote : u8 { All, Any, Uniform, Ballot };
void vote(Warp& w, const Inst& i, u32 lanes) {
  const u32 p = w.predicate(i.operands[1]) & lanes;
  if (i.variant == Ballot) {
    u64* d = w.at(i, 0);
    each(lanes, [&](int l) { d[l] = p; });
    return;
  }
  const bool r = i.variant == All ? p == lanes : i.variant == Any ? p != 0 : p == 0 || p == lanes;
  w.set_predicate(i.operands[0].slot, lanes, r ? kAllLanes : 0);
}

void match_any(Warp& w, const Inst& i, u32 lanes) {
  const u64* a = w.at(i, 1);
  u64 result[kLanes];
  each(lanes, [&](int l) {
    result[l] = 0;
    each(lanes, [&](int k) { result[l] |= u64(a[k] == a[l]) << k; });
  });
  u64* d = w.at(i, 0);
  each(lanes, [&](int l) { d[l] = result[l]; });
}

enum Reduction : u8 { Sum, Least, Most, Both, Either, Differ };
void reduce(Warp& w, const Inst& i, u32 lanes) {
  const u64* a = w.at(i, 1);
  u32 r = u32(a[__builtin_ctz(lanes)]);
  each(lanes & (lanes - 1), [&](int l) {
    const u32 x = u32(a[l]);
    const bool less = i.type == Type::S32 ? i32(x) < i32(r) : x < r;
    switch (i.variant) {
      case Sum: r += x; break;
      case Least: r = less ? x : r; break;
      case Most: r = less ? r : x; break;
      case Both: r &= x; break;
      case Either: r |= x; break;
      default: r ^= x;
    }
  });
  u64* d = w.at(i, 0);
  each(lanes, [&](int l) { d[l] = r; });
}

void active_mask(Warp& w, const Inst& i, u32 lanes) {
  u64* d = w.at(i, 0);
  each(lanes, [&](int l) { d[l] = lanes; });
}

void nothing(Warp&, const Inst&, u32) {}
void trap(Warp& w, const Inst& i, u32) { fail(w, i, "trap"); }

Handler together(Inst& i, Class counted, int member, Handler h) {
  i.flow = Flow::Converge;
  i.counted = counted;
  i.member = member;
  return h;
}

}  // namespace

Handler decode_warp(Inst& i, Modifiers& m) {
  const int last = int(i.operands.size()) - 1;
  if (m.op == "activemask") return active_mask;
  if (m.op == "bar" && m.take("warp")) return m.take("sync"), together(i, Class::Other, 0, nothing);
  if (m.op != "shfl" && m.op != "vote" && m.op != "match" && m.op != "redux") return nullptr;
  if (!m.take("sync")) return nullptr;
  if (m.op == "shfl") {
    const int mode = m.take_any({"up", "down", "bfly", "idx"});
    i.variant = u8(mode);
    return mode < 0 ? nullptr : together(i, Class::Shuffle, last, shuffle);
  }
  if (m.op == "vote") {
    const int mode = m.take_any({"all", "any", "uni", "ballot"});
    i.variant = u8(mode);
    return mode < 0 ? nullptr : together(i, Class::Vote, last, vote);
  }
  if (m.op == "match") return m.take("any") ? together(i, Class::Vote, last, match_any) : nullptr;
  const int mode = m.take_any({"add", "min", "max", "and", "or", "xor"});
  i.variant = u8(mode);
  return mode < 0 ? nullptr : together(i, Class::Shuffle, last, reduce);
}

Handler decode_control(Inst& i, Modifiers& m) {
  if (m.op == "bra" || m.op == "brx") {
    i.flow = m.op == "brx" ? Flow::Table : Flow::Branch;
    i.counted = Class::Branch;
    m.take("uni"), m.take("idx");
    return nothing;
  }
  if (m.op == "ret" || m.op == "exit") {
    i.flow = Flow::Exit;
    return nothing;
  }
  if (m.op == "bar" || m.op == "barrier") {   // variant: none, popc, and, or
    if (m.take("red")) i.variant = u8(m.take_any({"popc", "and", "or"}) + 1);
    else if (!m.take("sync")) return nullptr;
    i.flag = m.op == "bar" || m.take("aligned");
    m.take("cta");
    i.flow = Flow::Barrier;
    i.counted = Class::Barrier;
    return nothing;
  }
  if (m.op == "membar" || m.op == "fence" || m.op == "nanosleep" || m.op == "griddepcontrol")
    return m.list.clear(), nothing;
  if (m.op == "trap" || m.op == "brkpt") return trap;
  return nullptr;
}

}  // namespace sim
