// cp.async.bulk: copies that one thread begins and that go on by themselves, of contiguous bytes or of a box of a tensor.
//
// A copy into shared memory lands some rounds of the scheduler later (with a seed, a random number) and counts its bytes
// in at an mbarrier. A copy from shared memory has read it when its group was waited for.
#include <algorithm>

#include "ops.h"
#include "tensor_map.h"

namespace sim {
namespace {

constexpr u32 kUnit = 16;

u32 shared_offset(u64 address) { return u32(address & 0xffffffff); }
u64 address_of(Warp& w, const Inst& i, int operand, int lane) {
  return w.at(i, operand)[lane] + u64(i.operands[size_t(operand)].offset);
}

std::vector<Delivery::Piece> contiguous(Warp& w, const Inst& i, u32 to, u64 global, u32 bytes) {
  if (bytes % kUnit || to % kUnit || global % kUnit || !bytes)
    fail(w, i, "misaligned: a bulk copy of " + std::to_string(bytes) + " bytes");
  return {{to, global, bytes}};
}

// The box of a tensor map at the coordinates, row after row; what lies outside of the tensor is zero.
std::vector<Delivery::Piece> box(Warp& w, const Inst& i, const Operand& map, int lane, u32 shared) {
  const u64 at = w.slot(map.slot)[lane] + u64(map.offset);
  TensorMap t;
  if (space_of(at) == Space::Param) std::memcpy(&t, reach(w, i, lane, Space::Param, at, 64, Access::Read), sizeof t);
  else std::memcpy(&t, global_bytes(w, i, at, 128, Access::Read), sizeof t);
  if (t.magic != TensorMap::kMagic) fail(w, i, "no tensor map is there");
  if (map.parts.size() != t.rank || i.k != int(t.rank))
    fail(w, i, "a tensor map of " + std::to_string(t.rank) + " dimensions with " + std::to_string(map.parts.size()) +
                   " coordinates");
  const u32 align = t.swizzle ? 128 : kUnit;
  if (shared % align) fail(w, i, "misaligned: a box at shared offset " + std::to_string(shared));
  std::vector<Delivery::Piece> pieces;
  u32 rows = 1, position = 0;
  for (u32 d = 1; d < t.rank; ++d) rows *= t.box[d];
  const i64 first = i32(w.slot(map.parts[0])[lane]);
  for (u32 row = 0; row < rows; ++row) {
    bool inside = true;
    u64 address = t.address;
    for (u32 d = 1, rest = row; d < t.rank; rest /= t.box[d], ++d) {
      const i64 c = i64(i32(w.slot(map.parts[d])[lane])) + i64(rest % t.box[d]);
      inside &= c >= 0 && c < i64(t.size[d]);
      address += u64(c) * t.stride[d - 1];
    }
    for (u32 e = 0; e < t.box[0]; e += kUnit / t.bytes, position += kUnit) {
      const u32 to = t.permuted(shared + position);
      const i64 c = first + e, whole = kUnit / t.bytes;
      const bool aligned = (address + u64(c) * t.bytes) % kUnit == 0;
      if (inside && aligned && c >= 0 && c + whole <= i64(t.size[0])) pieces.push_back({to, address + u64(c) * t.bytes, kUnit});
      else
        for (i64 k = 0; k < whole; ++k) {
          const bool in = inside && c + k >= 0 && c + k < i64(t.size[0]);
          pieces.push_back({to + u32(k) * t.bytes, in ? address + u64(c + k) * t.bytes : 0, t.bytes});
        }
    }
  }
  return pieces;
}

void check_global(Warp& w, const Inst& i, const Delivery::Piece& p, Access access) {
  if (!p.global) return;
  if (p.bytes % kUnit == 0 && p.global % kUnit == 0) global_bytes(w, i, p.global, p.bytes, access);
  else reach(w, i, kSeveral, Space::Global, p.global, p.bytes, access);
}

// flag: a tensor map. Operands: [to], [from] or [map, {..}], (bytes,) [mbarrier]
void load(Warp& w, const Inst& i, u32 lanes) {
  each(lanes, [&](int l) {
    const u32 to = shared_offset(address_of(w, i, 0, l)), mbarrier = shared_offset(address_of(w, i, i.flag ? 2 : 3, l));
    Mbarrier& m = mbarrier_at(w, i, l, mbarrier);
    if (!m.published && !before(w, l, m.maker, m.made, m.maker_lane, true))
      fail(w, i, "an mbarrier that the asynchronous proxy cannot see yet: no fence came since mbarrier.init");
    auto pieces = i.flag ? box(w, i, i.operands[1], l, to)
                         : contiguous(w, i, to, address_of(w, i, 1, l), u32(w.at(i, 2)[l]));
    for (const auto& p : pieces) check_global(w, i, p, Access::Read), begin_write(w, i, l, p.shared, p.bytes);
    begin_delivery(w.block, {&w, &i, l, mbarrier, 0, false, 0, release(w, 1u << l), std::move(pieces)});
  });
}

void store(Warp& w, const Inst& i, u32 lanes) {
  each(lanes, [&](int l) {
    const u32 from = shared_offset(address_of(w, i, 1, l));
    auto pieces = i.flag ? box(w, i, i.operands[0], l, from)
                         : contiguous(w, i, from, address_of(w, i, 0, l), u32(w.at(i, 2)[l]));
    for (const auto& p : pieces) begin_read(w, i, l, p.shared, p.bytes), check_global(w, i, p, Access::Write);
    w.stores.push_back({l, w.stored[l], std::move(pieces), false});
  });
}
void commit(Warp& w, const Inst&, u32 lanes) { each(lanes, [&](int l) { ++w.stored[l]; }); }
void wait(Warp& w, const Inst& i, u32 lanes) {   // (with .read the writes may still be under way: nobody looks yet)
  const u32 open = u32(w.at(i, 0)[0]);
  for (size_t k = 0; k < w.stores.size();) {
    auto& s = w.stores[k];
    if (!(lanes >> s.lane & 1) || s.group + open >= w.stored[s.lane]) { ++k; continue; }
    for (const auto& p : s.pieces) {
      if (p.global) std::memcpy(reinterpret_cast<void*>(p.global), w.block.shared.data() + p.shared, p.bytes);
      end_read(w, s.lane, p.shared, p.bytes);
    }
    w.stores.erase(w.stores.begin() + i64(k));
  }
}

void nothing(Warp&, const Inst&, u32) {}

void finish(Block& b, Delivery& d) {
  const auto it = b.mbarriers.find(d.mbarrier);
  if (it == b.mbarriers.end()) fail(*d.warp, *d.inst, "the mbarrier is gone before what it waits for is delivered");
  Mbarrier& m = it->second;
  u32 bytes = 0;
  for (const auto& p : d.pieces) {
    u8* to = b.shared.data() + p.shared;
    if (p.global) std::memcpy(to, reinterpret_cast<const void*>(p.global), p.bytes);
    else std::memset(to, 0, p.bytes);
    end_write(b, m.agent, p.shared, p.bytes);
    bytes += p.bytes;
  }
  const bool copies = d.copies;
  if (copies) land(*d.warp, *d.inst, d.lane, d.end, m.agent + 1);
  const u32 now = ++b.now;
  if (copies) m.gathering.join(d.past);
  m.gathering.seen.of(m.agent + copies).join({now, 0, 0});
  if (copies && !m.pending) fail(*d.warp, *d.inst, "more arrivals than " + state_of(m, d.mbarrier) + " expects");
  arrive(b, m, d.mbarrier, copies, bytes);
}

}  // namespace

void begin_delivery(Block& b, Delivery&& d) {
  constexpr u32 kLongest = 4;
  d.delay = b.launch.device.options.seed ? b.launch.draw() % kLongest : 0;
  for (const Delivery& other : b.deliveries)   // an arrival waits for all cp.async of the lane before it
    if (d.copies && other.copies && other.warp == d.warp && other.lane == d.lane) d.delay = std::max(d.delay, other.delay);
  b.deliveries.push_back(std::move(d));
}

bool deliver(Block& b) {
  bool any = false;
  for (size_t k = 0; k < b.deliveries.size();) {
    if (b.deliveries[k].delay) { --b.deliveries[k++].delay, any = true; continue; }
    Delivery d = std::move(b.deliveries[k]);
    b.deliveries.erase(b.deliveries.begin() + i64(k));
    finish(b, d), any = true;
  }
  return any;
}

Handler decode_bulk(Inst& i, Modifiers& m) {
  if (m.op == "prefetch" && m.take("tensormap")) return m.list.clear(), nothing;
  if (m.op != "cp" || m.list.size() < 2 || m.list[1] != "bulk") return nullptr;
  m.take("async"), m.take("bulk");
  if (m.take("commit_group")) return commit;
  if (m.take("wait_group")) return m.take("read"), wait;
  if (m.take("prefetch")) return m.list.clear(), nothing;
  i.flag = m.take("tensor");
  if (i.flag) i.k = m.take_any({"1d", "2d", "3d", "4d", "5d"}) + 1, m.take("tile");
  m.take("L2::cache_hint"), m.take("global"), m.take("shared::cta");
  i.counted = Class::AsyncCopy;
  if (m.take("bulk_group")) return i.space == Space::Global ? store : nullptr;
  return i.space == Space::Shared && m.take("mbarrier::complete_tx::bytes") ? load : nullptr;
}

}  // namespace sim
