// mbarrier, the fences of proxies, cp.async.mbarrier.arrive, bar.arrive, setmaxnreg and elect.sync: how warps of
// different roles wait for each other.
//
// An mbarrier counts the arrivals and the bytes of a phase; when neither is missing the phase is over, and whoever finds
// it over knows what those did who arrived. Its eight bytes in shared memory are left alone; its state is in the block.
#include "ops.h"

namespace sim {
namespace {

constexpr u32 kObjectBytes = 8, kMostArrivals = (1u << 20) - 1;

u32 offset_of(const u64* base, const Operand& o, int lane) { return u32(base[lane] + u64(o.offset)); }

void init(Warp& w, const Inst& i, u32 lanes) {
  Block& b = w.block;
  each(lanes, [&](int l) {
    const u32 offset = offset_of(w.at(i, 0), i.operands[0], l), count = u32(w.at(i, 1)[l]);
    if (!count || count > kMostArrivals) fail(w, i, "mbarrier.init: " + std::to_string(count) + " arrivals");
    if (b.mbarriers.count(offset)) fail(w, i, "mbarrier.init of an mbarrier that is in use, at " + std::to_string(offset));
    reach(w, i, l, Space::Shared, offset, kObjectBytes, Access::Write);
    if (b.agents + 2 > kMostAgents) fail(w, i, "more mbarriers than the interpreter can tell apart");
    Mbarrier m;
    m.expected = m.pending = count, m.agent = b.agents;
    m.made = b.now + 1, m.maker = u8(w.id), m.maker_lane = u8(l);
    b.agents += 2;
    b.mbarriers[offset] = m;
    for (u32 k = 0; k < kObjectBytes; ++k) b.shadow[offset + k].flight = Object;
  });
}

void invalidate(Warp& w, const Inst& i, u32 lanes) {
  each(lanes, [&](int l) {
    const u32 offset = offset_of(w.at(i, 0), i.operands[0], l);
    const Mbarrier& m = mbarrier_at(w, i, l, offset);
    if (m.bytes) fail(w, i, "mbarrier.inval while " + state_of(m, offset) + " goes on");
    w.block.mbarriers.erase(offset);
    for (u32 k = 0; k < kObjectBytes; ++k) w.block.shadow[offset + k].flight = Landed;
  });
}

void expect(Mbarrier& m, Block& b, i64 bytes) { m.bytes += bytes, ++b.events; }

// flag: .expect_tx; variant: 1 for arrive_drop; combine: operand of the address
void arrive_here(Warp& w, const Inst& i, u32 lanes) {
  const Past past = release(w, lanes);
  const int address = i.combine;
  each(lanes, [&](int l) {
    const u32 offset = offset_of(w.at(i, address), i.operands[address], l);
    Mbarrier& m = mbarrier_at(w, i, l, offset);
    const bool more = int(i.operands.size()) > address + 1;
    const u64 value = more ? w.at(i, address + 1)[l] : 1;
    const u32 count = i.flag ? 1 : u32(value);
    if (address && i.operands[0].kind == Operand::Register) w.at(i, 0)[l] = u64(m.pending) << 32 | m.phase;
    if (!count || count > m.pending)
      fail(w, i, std::to_string(count) + " arrivals where " + std::to_string(m.pending) + " are missing: " +
                     state_of(m, offset));
    m.gathering.join(past);
    if (i.flag) expect(m, w.block, i64(value));
    if (i.variant) m.expected -= count;
    arrive(w.block, m, offset, count, 0);
  });
}

void expect_bytes(Warp& w, const Inst& i, u32 lanes) {
  each(lanes, [&](int l) {
    const u32 offset = offset_of(w.at(i, 0), i.operands[0], l);
    expect(mbarrier_at(w, i, l, offset), w.block, i64(w.at(i, 1)[l]));
  });
}
void complete_bytes(Warp& w, const Inst& i, u32 lanes) {
  each(lanes, [&](int l) {
    const u32 offset = offset_of(w.at(i, 0), i.operands[0], l);
    arrive(w.block, mbarrier_at(w, i, l, offset), offset, 0, i64(w.at(i, 1)[l]));
  });
}

// flag: by parity. A failed wait ends the warp's turn.
void test_wait(Warp& w, const Inst& i, u32 lanes) {
  each(lanes, [&](int l) {
    const u32 offset = offset_of(w.at(i, 1), i.operands[1], l);
    Mbarrier& m = mbarrier_at(w, i, l, offset);
    const u64 which = w.at(i, 2)[l];
    if (!i.flag && m.phase > u32(which) + 1)
      fail(w, i, "a wait for a phase that was followed by another already: " + state_of(m, offset));
    const bool over = i.flag ? (m.phase & 1) != (which & 1) : m.phase > u32(which);
    w.set_predicate(i.operands[0].slot, 1u << l, over ? kAllLanes : 0);
  });
  u32 over = w.predicates[size_t(i.operands[0].slot)] & lanes;
  std::map<u32, u32> by_offset;
  each(lanes, [&](int l) { by_offset[offset_of(w.at(i, 1), i.operands[1], l)] |= 1u << l; });
  for (const auto& [offset, some] : by_offset) {
    Mbarrier& m = w.block.mbarriers.at(offset);
    if (over & some) acquire(w, over & some, m.done), m.waiting.erase(w.id);
    if (some & ~over) m.waiting[w.id] = m.phase, w.gives_way = true;
  }
}

void pending_count(Warp& w, const Inst& i, u32 lanes) {
  const u64* state = w.at(i, 1);
  u64* d = w.at(i, 0);
  each(lanes, [&](int l) { d[l] = state[l] >> 32; });
}

// cp.async.mbarrier.arrive: when the lane's copies have landed. Without .noinc the phase expects one arrival more.
void arrive_after_copies(Warp& w, const Inst& i, u32 lanes) {
  const Past past = release(w, lanes);
  each(lanes, [&](int l) {
    const u32 offset = offset_of(w.at(i, 0), i.operands[0], l);
    Mbarrier& m = mbarrier_at(w, i, l, offset);
    if (!i.flag) ++m.pending;
    Delivery d{&w, &i, l, offset, 0, true, w.copies[l].begun, past, {}};
    begin_delivery(w.block, std::move(d));
  });
}

void fence(Warp& w, const Inst& i, u32 lanes) {
  if (i.space != Space::Global) fence_proxy(w, lanes);
}
void fence_init(Warp& w, const Inst&, u32 lanes) {   // of what these lanes know of
  for (auto& [offset, m] : w.block.mbarriers)
    each(lanes, [&, &m = m](int l) {
      m.published |= (m.maker == w.id && m.maker_lane == l) || before(w, l, m.maker, m.made, m.maker_lane);
    });
}

void bar_arrive(Warp& w, const Inst& i, u32 lanes) {
  if (lanes != w.alive) fail(w, i, "divergent barrier: only some lanes of the warp are here");
  Meeting& meeting = w.block.meetings[u32(w.at(i, 0)[0])];
  meeting.arrived += u32(__builtin_popcount(lanes));
  meeting.past.join(release(w, lanes));
}

void elect(Warp& w, const Inst& i, u32 lanes) {
  const u32 named = u32(w.at(i, 1)[__builtin_ctz(lanes)]);
  const int chosen = __builtin_ctz(named);
  if (i.operands[0].kind == Operand::Register)
    each(lanes, [&](int l) { w.at(i, 0)[l] = u64(chosen); });
  const int p = i.operands[0].kind == Operand::Predicate ? i.operands[0].slot : i.operands[0].second;
  w.set_predicate(p, lanes, 1u << chosen);
}

// Registers a block holds are those of its launch: what some warps give up others may take. variant: 1 for .inc
void set_registers(Warp& w, const Inst& i, u32) {
  constexpr u32 kRegisters = 65536, kMost = 255, kUnit = 8, kLeast = 24, kLimit = 256;
  Block& b = w.block;
  const u32 wanted = u32(w.at(i, 0)[0]), warps = u32(b.warps.size());
  if (wanted < kLeast || wanted > kLimit || wanted % kUnit)
    fail(w, i, "setmaxnreg: " + std::to_string(wanted) + " is no multiple of 8 from 24 to 256");
  const u32 threads = std::max(w.function.max_threads, warps * kLanes), blocks = std::max(w.function.min_blocks, 1u);
  const u32 launched = std::min(kRegisters / (threads * blocks) / kUnit * kUnit, kMost);
  if (!b.registers) b.registers = launched * warps;
  const u32 now = w.registers ? w.registers : launched;
  if (i.variant ? wanted < now : wanted > now)
    fail(w, i, "setmaxnreg: a lane has " + std::to_string(now) + " registers already");
  u32 taken = 0;
  for (const auto& other : b.warps) taken += !other->alive ? 0 : other->registers ? other->registers : launched;
  if (taken - now + wanted > b.registers) {   // until others give theirs
    w.gives_way = w.again = true;
    return;
  }
  w.registers = wanted;
  ++b.events;
  in_step(w, i, {u32(&i - w.function.code.data()), wanted, 0, 0});
}

}  // namespace

Mbarrier& mbarrier_at(Warp& w, const Inst& i, int lane, u64 address) {
  const u32 offset = u32(address);
  const auto it = w.block.mbarriers.find(offset);
  if (it == w.block.mbarriers.end()) fail(w, i, "no mbarrier at shared offset " + std::to_string(offset));
  const Mbarrier& m = it->second;
  const bool own = m.maker == w.id && (m.maker_lane == lane || m.made <= w.last_sync);
  if (w.block.launch.device.options.check_races && !own && m.made > w.block.last_barrier &&
      (m.maker == w.id || !before(w, lane, m.maker, m.made, m.maker_lane)))
    fail(w, i, "race: an mbarrier that warp " + std::to_string(m.maker) + " initialised without a barrier since, at " +
                   std::to_string(offset));
  return it->second;
}

std::string state_of(const Mbarrier& m, u32 offset) {
  return "phase " + std::to_string(m.phase) + " of the mbarrier at " + std::to_string(offset) + " (" +
         std::to_string(m.pending) + " of " + std::to_string(m.expected) + " arrivals missing, " +
         std::to_string(m.bytes) + " bytes)";
}

void arrive(Block& b, Mbarrier& m, u32 offset, u32 count, i64 bytes) {
  m.pending -= count, m.bytes -= bytes, ++b.events;
  if (m.pending || m.bytes) return;
  m.done = m.gathering;
  m.pending = m.expected, ++m.phase;
  for (const auto& [warp, phase] : m.waiting)
    if (m.phase - phase >= 2)
      fail(*b.warps[size_t(warp)], b.warps[size_t(warp)]->function.code[b.warps[size_t(warp)]->pc_all],
           "two phases went by before the warp that waits for the first looked: " + state_of(m, offset));
}

Handler decode_mbarrier(Inst& i, Modifiers& m) {
  if (m.op == "fence" && m.take("proxy")) {
    m.take("async"), m.take("async::generic"), m.take("tensormap::generic"), m.take("alias");
    m.list.clear();
    return fence;
  }
  if (m.op == "fence" && m.take("mbarrier_init")) return m.list.clear(), fence_init;
  if (m.op == "bar" || m.op == "barrier") {
    if (!m.take("arrive")) return nullptr;
    m.take("cta"), m.take("aligned");
    i.counted = Class::Barrier;
    return bar_arrive;
  }
  if (m.op == "elect") {
    m.take("sync");
    i.flow = Flow::Converge, i.counted = Class::Vote, i.member = 1;
    return elect;
  }
  if (m.op == "setmaxnreg") {
    m.take("sync"), m.take("aligned");
    i.variant = u8(m.take_any({"dec", "inc"}));
    i.flow = Flow::Converge;
    return i.variant > 1 ? nullptr : set_registers;
  }
  if (m.op == "cp" && m.list.size() > 1 && m.list[1] == "mbarrier") {
    if (!m.take("async") || !m.take("mbarrier") || !m.take("arrive")) return nullptr;
    i.flag = m.take("noinc");
    i.counted = Class::Barrier;
    return arrive_after_copies;
  }
  if (m.op != "mbarrier") return nullptr;
  i.counted = Class::Barrier;
  for (const char* order : {"release", "acquire", "relaxed", "cta", "cluster"}) m.take(order);
  if (m.take("init")) return init;
  if (m.take("inval")) return invalidate;
  if (m.take("pending_count")) return pending_count;
  if (m.take("complete_tx")) return complete_bytes;
  const bool drop = m.take("arrive_drop");
  if (drop || m.take("arrive")) {
    i.flag = m.take("expect_tx"), i.variant = drop;
    m.take("noComplete");
    i.combine = i.operands[0].kind == Operand::Address ? 0 : 1;   // a state before it, or `_`
    return arrive_here;
  }
  if (m.take("expect_tx")) return expect_bytes;
  if (!m.take("test_wait") && !m.take("try_wait")) return nullptr;
  i.flag = m.take("parity");
  return test_wait;
}

}  // namespace sim
