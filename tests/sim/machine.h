// The machine that runs a launch: warps in a block, their memory, and what is known of every byte of it.
#pragma once
#include <unordered_map>

#include "order.h"
#include "ptx.h"

namespace sim {

struct Dim3 { u32 x = 1, y = 1, z = 1; };

struct Options {
  bool check_races = true;
  bool check_memory = true;     // global addresses must lie in an allowed range
  u32 seed = 0;                 // of the warp schedule; 0: in order, each warp until it blocks
  bool perturb = false;         // approximate functions and tensor-core sums err as hardware may
  u64 watchdog = 2'000'000'000;  // warp instructions per launch
  u64 last_blocks = 0;          // run no more than this many of a grid's last blocks; 0: all
};

constexpr u32 kPageBytes = 4096, kSectorBytes = 32, kBanks = 32;
struct Page {
  bool sector_read[kPageBytes / kSectorBytes] = {}, sector_written[kPageBytes / kSectorBytes] = {};
  std::unique_ptr<Shadow[]> shadow;
};

struct Range { u64 begin, end; bool read_only; };

// Addresses that kernels may touch. Device pointers are host pointers.
struct Device {
  Options options;
  std::map<u64, Range> ranges;

  void allow(const void* p, u64 bytes, bool read_only);
  void forbid(const void* p) { ranges.erase(reinterpret_cast<u64>(p)); }
};

struct Launch {
  Device& device;
  Function& function;
  Dim3 grid, block;
  u32 dynamic_shared;
  const u8* params;
  std::unordered_map<u64, Page> pages;
  Range last_range{1, 0, false};
  u64 last_page = ~0ull;
  Page* last = nullptr;
  u64 issued = 0;
  u32 random = 1;

  void run();
  Page& page_of(u64 address);
  u32 draw() { return random ^= random << 13, random ^= random >> 17, random ^= random << 5; }
};

struct Copy { u32 to; u64 from; u8 bytes, size; u32 group, serial; };   // of cp.async
struct Copies { std::vector<Copy> open; u32 committed = 0, begun = 0; };

struct Mbarrier {
  u32 expected = 0, pending = 0, phase = 0;   // arrivals of a phase, those that are missing; phases that are over
  i64 bytes = 0;                              // expected less delivered
  u32 agent = kAgents;                        // of what is delivered to it
  u32 made = 0;                               // when, by which warp and lane
  u8 maker = 0, maker_lane = 0;
  bool published = false;                     // by fence.mbarrier_init
  Past gathering, done;                       // of those who arrived so far; of the phases that are over
  std::map<int, u32> waiting;                 // by warp: the phase that it found unfinished
};

// What goes on beside the warps: a bulk copy, or the arrival that follows a lane's cp.async.
struct Delivery {
  struct Piece { u32 shared; u64 global; u32 bytes; };   // global 0: zeros
  Warp* warp;
  const Inst* inst;
  int lane;
  u32 mbarrier;                // its shared offset
  u32 delay;                   // rounds of the scheduler
  bool copies;                 // it waits for the lane's cp.async before `end`; else it is a bulk copy
  u32 end;
  Past past;                   // of who began it
  std::vector<Piece> pieces;
};

struct Meeting { u32 arrived = 0; Past past; };   // at a named barrier: bar.arrive, and what those left there

// What the warps of a group of four must do alike, in order: wgmma and setmaxnreg.
struct Group {
  struct Step { u32 pc; u64 a, b; u32 flags; };
  std::vector<Step> steps;
};

struct Block {
  Launch& launch;
  Dim3 index;
  u32 number = 0;
  std::vector<u8> shared;
  std::vector<Shadow> shadow;
  std::vector<u32> readers;        // of a byte that several warps read: for each of them when; made when needed
  u32 now = 1, last_barrier = 1;   // time, and when the whole block last met
  std::vector<std::unique_ptr<Warp>> warps;
  std::map<u32, Mbarrier> mbarriers;   // by shared offset
  u32 agents = kAgents;                // numbers given to mbarriers
  std::vector<Delivery> deliveries;
  std::map<u32, Meeting> meetings;
  std::vector<Group> groups;
  u64 events = 0;                      // what may let a waiting warp go on
  u32 registers = 0;                   // that warps hold, where setmaxnreg shifts them

  Block(Launch& l, u32 bytes) : launch(l), shared(bytes), shadow(bytes) {}
  void reset();
  u32* readers_of(u64 offset) {
    if (readers.empty()) readers.resize(shared.size() * warps.size());
    return readers.data() + offset * warps.size();
  }
};

// What a wgmma or a bulk store that was not waited for still reads.
struct Reading { u32 group, offset, bytes; };

// What a warp has behind it and under way; it begins anew in every block.
struct Progress {
  Past past, early;          // before all of its lanes; before early_lanes alone, until the lanes meet
  u32 early_lanes = 0;
  // Its turn ends, because what it waits for is not there, and the instruction is repeated. Its last turn ended so.
  bool gives_way = false, again = false, waits = false;
  u32 registers = 0;         // a lane may have, after setmaxnreg; 0: it was not run

  // wgmma: groups of operations, and the registers that belong to them.
  u32 committed = 0, steps = 0;
  std::vector<Reading> readings;
  struct Touch { u32 group; bool sums; };
  std::map<int, Touch> in_flight;   // by slot: accumulators, and operands A
  std::vector<u32> changed;         // by slot: the epoch of the last write by another instruction
  u32 epoch = 1;                    // wgmma.fence begins one

  // bulk stores of a lane, read at wait_group
  struct Store { int lane; u32 group; std::vector<Delivery::Piece> pieces; bool read; };
  std::vector<Store> stores;
  u32 stored[kLanes] = {};
};

struct Warp : Progress {
  Block& block;
  const Function& function;
  int id;
  std::vector<u64> file;
  std::vector<u32> predicates;
  u32 started = 0, alive = 0;
  u32 pc[kLanes] = {};
  bool together = true;      // all live lanes are at pc_all; pc[] counts only when they are not
  u32 pc_all = 0;
  u32 at_barrier = 0, waiting = 0;   // lanes that wait for the block; for lanes of their own warp
  u32 barrier_id[kLanes] = {}, barrier_threads[kLanes] = {};
  u32 last_sync = 1;         // when its lanes last met, by Block::now
  std::vector<u8> local;
  Copies copies[kLanes];
  Warp(Block&, const Function&, int id);
  u64* slot(int s) { return file.data() + size_t(s) * kLanes; }
  u64* at(const Inst& i, int operand) { return slot(i.operands[operand].slot); }
  u32 predicate(const Operand& o) const { return o.negated ? ~predicates[o.slot] : predicates[o.slot]; }
  void set_predicate(int s, u32 lanes, u32 value) { predicates[s] = (predicates[s] & ~lanes) | (value & lanes); }
  void scatter() {           // from pc_all to pc[]
    if (together) for (u32& p : pc) p = pc_all;
    together = false;
  }
  u64 run(u64 quantum);      // until it blocks or used up its quantum (0: none); the instructions issued
};

[[noreturn]] void fail(const Warp&, const Inst&, const std::string& what);

// memory.cpp: addresses, checks, counters of memory.
constexpr u64 kWindowMask = 0xffffull << 48, kSharedWindow = 0xfff1ull << 48, kLocalWindow = 0xfff2ull << 48,
              kParamWindow = 0xfff3ull << 48;
inline Space space_of(u64 address) {
  switch (address & kWindowMask) {
    case kSharedWindow: return Space::Shared;
    case kLocalWindow: return Space::Local;
    case kParamWindow: return Space::Param;
    default: return Space::Global;
  }
}
enum class Access : u8 { Read, Write, Atomic };
u8* reach(Warp&, const Inst&, int lane, Space, u64 address, u32 bytes, Access);
void count_sectors(Warp&, const Inst&, u32 lanes, const u64* address, u32 bytes, bool write);
void count_waves(const Inst&, u32 lanes, const u64* address, u32 bytes);

u8* global_bytes(Warp&, const Inst&, u64 address, u32 bytes, Access);   // of a bulk copy, by multiples of 16

// ops_matrix.cpp: lets the copies of groups before `end` land; or for an agent all that were begun before.
void land(Warp&, const Inst&, int lane, u32 end, u32 agent = 0);

// order.cpp: the past that lanes hand on; that they take over; a fence.proxy.async; whether an agent's deed is before.
Past release(Warp&, u32 lanes);
void acquire(Warp&, u32 lanes, const Past&);
void fence_proxy(Warp&, u32 lanes);
void meet(Warp&);   // all lanes of the warp are together
bool before(const Warp&, int lane, u32 agent, u32 time, u8 other, bool fenced = false);
void begin_write(Warp&, const Inst&, int lane, u32 offset, u32 bytes);   // by a bulk copy
void end_write(Block&, u32 agent, u32 offset, u32 bytes);
const u8* begin_read(Warp&, const Inst&, int lane, u32 offset, u32 bytes);         // by the asynchronous proxy
void end_read(Warp&, int lane, u32 offset, u32 bytes);

// ops_mbarrier.cpp
Mbarrier& mbarrier_at(Warp&, const Inst&, int lane, u64 address);
void arrive(Block&, Mbarrier&, u32 offset, u32 count, i64 bytes);
std::string state_of(const Mbarrier&, u32 offset);
// ops_bulk.cpp: one round of the scheduler has passed; whether something landed.
bool deliver(Block&);
void begin_delivery(Block&, Delivery&&);
// registers.cpp: before an instruction of a kernel that has wgmma or setmaxnreg.
void check_registers(Warp&, const Inst&);
// ops_wgmma.cpp
void in_step(Warp&, const Inst&, Group::Step);
void end_of_block(Block&);

// report.cpp
std::string report_json(const Launch&);
std::string report_table(const Launch&);

}  // namespace sim
