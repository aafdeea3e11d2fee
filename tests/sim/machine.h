// The machine that runs a launch: warps in a block, their memory, and what is known of every byte of it.
#pragma once
#include <unordered_map>

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

// Who touched a byte last, and when. Time is a counter that barriers advance.
struct Shadow {
  u32 written = 0, read = 0;               // time + 1; 0: never
  u32 writer_block = 0, reader_block = 0;
  u8 writer_warp = 0, writer_lane = 0, reader_warp = 0, reader_lane = 0;
  bool in_flight = false;                  // the target of a cp.async that was not waited for
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

struct Copy { u32 to; u64 from; u8 bytes, size; u32 group; };   // of cp.async
struct Copies { std::vector<Copy> open; u32 committed = 0; };

struct Block {
  Launch& launch;
  Dim3 index;
  u32 number = 0;
  std::vector<u8> shared;
  std::vector<Shadow> shadow;
  u32 now = 1, last_barrier = 1;   // time, and when the whole block last met
  std::vector<std::unique_ptr<Warp>> warps;
};

struct Warp {
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

// async.cpp: lets the copies of groups before `end` land.
void land(Warp&, const Inst&, int lane, u32 end);

// report.cpp
std::string report_json(const Launch&);
std::string report_table(const Launch&);

}  // namespace sim
