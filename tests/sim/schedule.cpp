// Runs a launch: block after block, the warps of a block in turns.
//
// The lanes of a warp run together as long as they agree on what comes next. When they part, those with the lowest
// program counter go first, and lanes that meet again go on together. A warp runs until it must wait: for the block
// at a barrier, or for its own lanes at a .sync operation. With a seed, warps take turns of random length in random
// order, so a kernel that leans on one order is found out.
#include <algorithm>

#include "machine.h"

namespace sim {
namespace {

u32 members(Warp& w, const Inst& i, u32 lanes) {   // the lanes that a .sync operation waits for
  if (i.member < 0 || i.operands.empty()) return kAllLanes;
  return u32(w.at(i, i.member)[__builtin_ctz(lanes)]);
}

void go_on(Warp& w, u32 lanes, u32 to) {
  if (w.together) w.pc_all = to;
  else each(lanes, [&](int l) { w.pc[l] = to; });
}

void branch(Warp& w, const Inst& i, u32 lanes, u32 taken, u32 pc) {
  if (taken == lanes) return go_on(w, lanes, i.target);
  if (!taken) return go_on(w, lanes, pc + 1);
  ++i.count.divergent;
  w.scatter();
  go_on(w, taken, i.target);
  go_on(w, lanes & ~taken, pc + 1);
}

void branch_by_table(Warp& w, const Inst& i, u32 lanes, u32 taken, u32 pc) {
  w.scatter();
  go_on(w, lanes & ~taken, pc + 1);
  each(taken, [&](int l) {
    const u64 index = w.at(i, 0)[l];
    if (index >= i.table.size())
      fail(w, i, "brx.idx: index " + std::to_string(index) + " of " + std::to_string(i.table.size()));
    w.pc[l] = i.table[index];
  });
}

void enter_barrier(Warp& w, const Inst& i, u32 lanes) {
  if (i.flag && lanes != w.alive) fail(w, i, "divergent barrier: only some lanes of the warp are here");
  w.scatter();
  // The operands after the result and before the predicate of a bar.red.
  const int first = i.variant ? 1 : 0, last = int(i.operands.size()) - first;
  each(lanes, [&](int l) {
    w.barrier_id[l] = last > first ? u32(w.at(i, first)[l]) : 0;
    w.barrier_threads[l] = last > first + 1 ? u32(w.at(i, first + 1)[l]) : 0;
  });
  w.at_barrier |= lanes;
}

// Whether all lanes that a .sync operation names are here; if not, those here wait for the others.
bool gathered(Warp& w, const Inst& i, u32 lanes, u32 at_pc, bool stuck) {
  const u32 named = members(w, i, lanes);
  if (lanes & ~named) fail(w, i, "a lane is not in its own membermask");
  if (named & w.started & ~w.alive) fail(w, i, "the membermask names lanes that have exited");
  const u32 missing = named & w.alive & ~lanes;
  if (!missing) return true;
  const u32 can_come = w.alive & ~w.at_barrier & ~at_pc;
  if (stuck || (at_pc & missing) || !(can_come & missing))
    fail(w, i, "the membermask names lanes that do not come here");
  w.scatter();
  w.waiting |= lanes;
  return false;
}

}  // namespace

Warp::Warp(Block& b, const Function& f, int number)
    : block(b), function(f), id(number), file(size_t(f.slots) * kLanes, 0xbadbadbadbadbadbull),
      predicates(size_t(f.predicates), 0xaaaaaaaa), local(size_t(f.local_bytes) * kLanes, 0xff) {
  for (const auto& c : f.constants) std::fill_n(slot(c.first), kLanes, c.second);
  for (const auto& t : f.truths) predicates[size_t(t.first)] = t.second ? kAllLanes : 0;
}

u64 Warp::run(u64 quantum) {
  Launch& launch = block.launch;
  u64 n = 0;
  waits = false;
  while (!quantum || n < quantum) {
    u32 runnable = alive & ~at_barrier & ~waiting;
    const bool stuck = !runnable;   // all that is left waits for lanes of its own warp
    if (stuck) runnable = alive & waiting;
    if (!runnable) return n;
    u32 pc_now = pc_all, lanes = alive;
    if (!together) {
      pc_now = ~0u, lanes = 0;
      each(runnable, [&](int l) { pc_now = std::min(pc_now, pc[l]); });
      each(alive & ~at_barrier, [&](int l) { lanes |= u32(pc[l] == pc_now) << l; });
      waiting &= ~lanes;
      if (lanes == alive) together = true, pc_all = pc_now;
    }
    const Inst& i = function.code[pc_now];
    u32 active = lanes;
    if (i.guard >= 0) active &= i.guard_negated ? ~predicates[i.guard] : predicates[i.guard];
    if (i.flow == Flow::Converge && active) {
      if (!gathered(*this, i, active, lanes, stuck)) continue;
      if (active == alive) meet(*this);
    }
    ++n;
    if (++launch.issued > launch.device.options.watchdog) fail(*this, i, "watchdog: the kernel does not end");
    if (active || i.flow == Flow::Branch) ++i.count.issued, i.count.lanes += u64(__builtin_popcount(active));
    switch (i.flow) {
      case Flow::Branch: branch(*this, i, lanes, active, pc_now); continue;
      case Flow::Table: branch_by_table(*this, i, lanes, active, pc_now); continue;
      case Flow::Exit:
        if (!function.roles) each(active, [&](int l) { land(*this, i, l, ~0u); });   // else an mbarrier sees to it
        alive &= ~active;
        go_on(*this, lanes & ~active, pc_now + 1);
        continue;
      case Flow::Barrier:
        if (active) enter_barrier(*this, i, active);
        go_on(*this, lanes & ~active, pc_now + 1);
        continue;
      default:
        if (active && (function.wgmma || function.shifts_registers)) check_registers(*this, i);
        if (active) i.run(*this, i, active);
        if (!again) go_on(*this, lanes, pc_now + 1);
        if (!gives_way) continue;
        again = gives_way = false, waits = true;
        return n;
    }
  }
  return n;
}

namespace {

void set_special(Warp& w, const std::string& name, u32 lane, u64 value) {
  const auto it = w.function.special.find(name);
  if (it != w.function.special.end()) w.slot(it->second)[lane] = value;
}

void check_special(const Function& f) {
  for (const auto& s : f.special) {
    static const char* known[] = {"%tid.x",           "%tid.y",       "%tid.z",       "%ntid.x",
                                  "%ntid.y",          "%ntid.z",      "%ctaid.x",     "%ctaid.y",
                                  "%ctaid.z",         "%nctaid.x",    "%nctaid.y",    "%nctaid.z",
                                  "%laneid",          "%warpid",      "%lanemask_lt", "%lanemask_le",
                                  "%lanemask_eq",     "%lanemask_gt", "%lanemask_ge", "%dynamic_smem_size",
                                  "%total_smem_size", "%clock",       "%clock64",     "%globaltimer"};
    if (std::none_of(std::begin(known), std::end(known), [&](const char* k) { return s.first == k; }))
      throw Error("unknown special register " + s.first + " in " + f.name);
  }
}

void start(Warp& w) {
  const Launch& launch = w.block.launch;
  const Dim3 &b = launch.block, &g = launch.grid, &at = w.block.index;
  const u32 threads = b.x * b.y * b.z, first = u32(w.id) * kLanes;
  static_cast<Progress&>(w) = {};
  if (w.function.wgmma) w.changed.resize(size_t(w.function.slots));
  w.alive = w.started = u32(low_bits(std::min(threads - first, u32(kLanes))));
  w.together = true, w.pc_all = 0, w.at_barrier = w.waiting = 0, w.last_sync = w.block.now;
  for (u32 l = 0; l < kLanes; ++l) {
    const u32 t = first + l;
    w.copies[l] = {};
    set_special(w, "%tid.x", l, t % b.x), set_special(w, "%tid.y", l, t / b.x % b.y),
        set_special(w, "%tid.z", l, t / b.x / b.y);
    set_special(w, "%ntid.x", l, b.x), set_special(w, "%ntid.y", l, b.y), set_special(w, "%ntid.z", l, b.z);
    set_special(w, "%ctaid.x", l, at.x), set_special(w, "%ctaid.y", l, at.y), set_special(w, "%ctaid.z", l, at.z);
    set_special(w, "%nctaid.x", l, g.x), set_special(w, "%nctaid.y", l, g.y), set_special(w, "%nctaid.z", l, g.z);
    set_special(w, "%laneid", l, l), set_special(w, "%warpid", l, u64(w.id));
    set_special(w, "%lanemask_lt", l, low_bits(l)), set_special(w, "%lanemask_le", l, low_bits(l + 1));
    set_special(w, "%lanemask_eq", l, 1u << l), set_special(w, "%lanemask_gt", l, u32(~low_bits(l + 1)));
    set_special(w, "%lanemask_ge", l, u32(~low_bits(l)));
    set_special(w, "%dynamic_smem_size", l, launch.dynamic_shared);
    set_special(w, "%total_smem_size", l, w.block.shared.size());
  }
}

// Lets the lanes pass that wait at barrier `id`, and gives them the result of a bar.red.
void open_barrier(Block& b, u32 id, bool whole_block) {
  u32 arrived = 0, yes = 0;
  std::vector<std::pair<Warp*, u32>> passing;
  for (auto& w : b.warps) {
    u32 lanes = 0;
    each(w->at_barrier, [&](int l) { lanes |= u32(w->barrier_id[l] == id) << l; });
    if (!lanes) continue;
    passing.push_back({w.get(), lanes});
    arrived += u32(__builtin_popcount(lanes));
    each(lanes, [&](int l) {
      const Inst& i = w->function.code[w->pc[l]];
      if (i.variant) yes += w->predicate(i.operands.back()) >> l & 1;
    });
  }
  const bool hands_on = !whole_block || b.warps[0]->function.roles;   // else the time of the barrier says it all
  Past past;
  const auto meeting = b.meetings.find(id);
  if (meeting != b.meetings.end()) past = std::move(meeting->second.past), b.meetings.erase(meeting);
  if (hands_on)
    for (auto& [w, lanes] : passing) past.join(release(*w, lanes));
  if (whole_block) b.last_barrier = ++b.now;
  ++b.events;
  for (auto& [w, lanes] : passing) {
    if (hands_on) acquire(*w, lanes, past);
    w->at_barrier &= ~lanes;
    w->last_sync = std::max(w->last_sync, b.last_barrier);
    if (lanes == w->alive) meet(*w);
    for (u32 rest = lanes; rest; rest &= rest - 1) {
      const int l = __builtin_ctz(rest);
      const Inst& i = w->function.code[w->pc[l]++];
      if (i.variant == 1) w->at(i, 0)[l] = yes;
      else if (i.variant)
        w->set_predicate(i.operands[0].slot, 1u << l, (i.variant == 2 ? yes == arrived : yes > 0) ? kAllLanes : 0);
    }
  }
}

bool open_barriers(Block& b) {
  struct Waiting { u32 here = 0, needed = 0; };
  std::map<u32, Waiting> barriers;
  u32 alive = 0;
  for (auto& w : b.warps) {
    alive += u32(__builtin_popcount(w->alive));
    each(w->at_barrier, [&](int l) {
      Waiting& barrier = barriers[w->barrier_id[l]];
      ++barrier.here, barrier.needed = w->barrier_threads[l];
    });
  }
  bool opened = false;
  for (const auto& [id, barrier] : barriers) {
    const u32 needed = barrier.needed ? barrier.needed : alive;
    const auto meeting = b.meetings.find(id);
    const u32 here = barrier.here + (meeting == b.meetings.end() ? 0 : meeting->second.arrived);
    if (here < needed) continue;
    if (here > needed && barrier.needed)
      fail(*b.warps[0], b.warps[0]->function.code[0], "barrier " + std::to_string(id) + ": " + std::to_string(here) +
           " threads arrive where " + std::to_string(needed) + " are expected");
    open_barrier(b, id, barrier.here >= alive);
    opened = true;
  }
  return opened;
}

// What each warp waits for, when none can go on.
[[noreturn]] void deadlock(Block& b) {
  std::string what = "deadlock: all wait";
  const Warp* first = nullptr;
  for (auto& w : b.warps)
    if (w->at_barrier) {
      first = first ? first : w.get();
      what += "; warp " + std::to_string(w->id) + " at barrier " +
              std::to_string(w->barrier_id[__builtin_ctz(w->at_barrier)]);
    }
  for (const auto& [offset, m] : b.mbarriers) {
    if (m.waiting.empty()) continue;
    what += "; warp";
    for (const auto& waiting : m.waiting) what += " " + std::to_string(waiting.first);
    what += " for " + state_of(m, offset);
  }
  for (auto& w : b.warps)
    if (!first && w->alive) first = w.get();
  const u32 pc = first->at_barrier ? first->pc[__builtin_ctz(first->at_barrier)]
                 : first->together ? first->pc_all : first->pc[__builtin_ctz(first->alive)];
  fail(*first, first->function.code[pc], what);
}

void run_block(Block& b) {
  Launch& launch = b.launch;
  std::vector<Warp*> order;
  for (auto& w : b.warps) start(*w), order.push_back(w.get());
  constexpr u32 kLongestTurn = 64, kSpin = 1 << 16;   // a warp that spins must let the others go on
  constexpr u32 kPatience = 200;                      // rounds in which nothing happens but waiting
  for (u32 idle = 0;;) {
    u64 done = 0;
    const u64 events = b.events;
    if (launch.device.options.seed)
      for (size_t k = order.size(); k > 1; --k) std::swap(order[k - 1], order[launch.draw() % k]);
    for (Warp* w : order) done += w->run(launch.device.options.seed ? 1 + launch.draw() % kLongestTurn : kSpin);
    if (std::all_of(order.begin(), order.end(), [](Warp* w) { return !w->alive; })) return end_of_block(b);
    const bool opened = open_barriers(b), landed = deliver(b);
    if (opened || landed) continue;
    if (!done)
      for (Warp* w : order)
        if (w->at_barrier)
          fail(*w, w->function.code[w->pc[__builtin_ctz(w->at_barrier)]],
               "deadlock: a barrier that not all threads reach");
    const bool all_wait = std::all_of(order.begin(), order.end(),
                                      [](Warp* w) { return w->waits || !(w->alive & ~w->at_barrier); });
    idle = all_wait && events == b.events ? idle + 1 : 0;
    if (idle > kPatience) deadlock(b);
  }
}

}  // namespace

void Block::reset() {
  std::fill(shared.begin(), shared.end(), u8(0xff));
  std::fill(shadow.begin(), shadow.end(), Shadow{});
  now = last_barrier = 1, agents = kAgents, events = 0, registers = 0;
  mbarriers.clear(), deliveries.clear(), meetings.clear();
  groups.assign((warps.size() + 3) / 4, {});
}

void Launch::run() {
  check_special(function);
  for (Inst& i : function.code) i.count = {};
  random = device.options.seed * 2654435761u | 1;
  Block b(*this, function.static_shared + dynamic_shared);
  const int warps = int((block.x * block.y * block.z + kLanes - 1) / kLanes);
  for (int k = 0; k < warps; ++k) b.warps.push_back(std::make_unique<Warp>(b, function, k));
  const u64 blocks = u64(grid.x) * grid.y * grid.z, last_blocks = device.options.last_blocks;
  for (u64 n = last_blocks && last_blocks < blocks ? blocks - last_blocks : 0; n < blocks; ++n) {
    b.index = {u32(n % grid.x), u32(n / grid.x % grid.y), u32(n / grid.x / grid.y)};
    b.number = u32(n);
    b.reset();
    run_block(b);
  }
  for (const Inst& i : function.code)
    if (i.count.issued) function.covered[size_t(i.ptx_line)] = true;
}

}  // namespace sim
