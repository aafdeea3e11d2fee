// What happened before what: vector clocks over the warps of a block and over those who write for them meanwhile.
//
// Time is one counter for the block. A warp that hands something on (arrives at an mbarrier or at a named barrier)
// leaves its past there and advances the time; who waits for it takes that past over. Two accesses to a byte, one of
// them a write, must be ordered so: within a block by barriers of either kind, within a warp by __syncwarp (or any .sync
// operation of the whole warp), between blocks by the end of the launch. Atomics are ordered by themselves.
//
// An agent is a warp, or what an mbarrier counts in: bulk copies (even numbers from kAgents on) and the cp.async of
// cp.async.mbarrier.arrive (odd ones). Bulk copies and wgmma see memory through the asynchronous proxy: what they read
// and others wrote needs a fence.proxy.async on the way as well, and `fenced` is the past before such a fence.
#pragma once
#include <algorithm>
#include <vector>

#include "types.h"

namespace sim {

constexpr u8 kSeveral = 0xff;               // several warps, or several lanes
constexpr u32 kAgents = 32, kMostAgents = 0xfe;

struct Seen {   // of an agent: what all its lanes did up to `all`, and what some lanes did up to `some`
  u32 all = 0, some = 0, lanes = 0;

  bool covers(u32 time, u8 lane) const {
    return time <= all || (time <= some && lane < kLanes && lanes >> lane & 1);
  }
  void join(const Seen& other) {
    const bool everyone = other.lanes && lanes && (other.lanes | lanes) == kAllLanes;
    all = std::max({all, other.all, everyone ? std::min(some, other.some) : 0});
    some = std::max(some, other.some), lanes |= other.lanes;
  }
};

struct Clock {
  std::vector<Seen> at;   // by agent

  Seen& of(u32 agent) {
    if (agent >= at.size()) at.resize(agent + 1);
    return at[agent];
  }
  bool covers(u32 agent, u32 time, u8 lane) const { return agent < at.size() && at[agent].covers(time, lane); }
  void join(const Clock& other) {
    if (at.size() < other.at.size()) at.resize(other.at.size());
    for (size_t k = 0; k < other.at.size(); ++k) at[k].join(other.at[k]);
  }
};

struct Past {
  Clock seen, fenced;
  void join(const Past& other) { seen.join(other.seen), fenced.join(other.fenced); }
};

// Who touched a byte last, and when.
struct Shadow {
  u32 written = 0, read = 0;               // time + 1; 0: never
  u32 writer_block = 0, reader_block = 0;
  u8 writer_warp = 0, writer_lane = 0, reader_warp = 0, reader_lane = 0;
  u8 flight = 0;                           // see Flight
  u16 reading = 0;                         // asynchronous operations that read it at the moment
};
enum Flight : u8 { Landed, Copying, Delivering, Object };   // the target of a cp.async, of a bulk copy; an mbarrier

}  // namespace sim
