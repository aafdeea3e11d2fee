// The clocks of a block's warps: what is handed on, taken over and fenced. order.h says how they are read.
#include "machine.h"

namespace sim {

bool before(const Warp& w, int lane, u32 agent, u32 time, u8 other, bool fenced) {
  const auto covers = [&](const Past& p) { return (fenced ? p.fenced : p.seen).covers(agent, time, other); };
  return covers(w.past) || (lane < kLanes && w.early_lanes >> lane & 1 && covers(w.early));
}

void meet(Warp& w) {
  w.last_sync = ++w.block.now;
  if (!w.early_lanes) return;
  w.past.join(w.early);
  w.early = {}, w.early_lanes = 0;
}

// Lanes that are not the whole warp hand on what all lanes did until they last met, and what they did themselves.
Past release(Warp& w, u32 lanes) {
  const u32 now = w.block.now++;
  Past p = w.past;
  if (w.early_lanes & lanes) p.join(w.early);
  Seen& own = p.seen.of(u32(w.id));
  own.join(lanes == w.alive ? Seen{now + 1, 0, 0} : Seen{w.last_sync, now + 1, lanes});
  ++w.block.events;
  return p;
}

void acquire(Warp& w, u32 lanes, const Past& p) {
  if (lanes == w.alive) return w.past.join(p);
  w.early.join(p), w.early_lanes |= lanes;
  if (w.early_lanes != w.alive) return;
  w.past.join(w.early);
  w.early = {}, w.early_lanes = 0;
}

// What the lanes know of comes before all that the asynchronous proxy does after them.
void fence_proxy(Warp& w, u32 lanes) {
  const u32 now = ++w.block.now;
  const Seen own = lanes == w.alive ? Seen{now, 0, 0} : Seen{w.last_sync, now, lanes};
  w.past.fenced.join(w.past.seen);
  for (u32 k = 0; k < w.block.warps.size(); ++k) w.past.fenced.of(k).join({w.block.last_barrier, 0, 0});
  w.past.fenced.of(u32(w.id)).join(own);
  if (w.early_lanes & lanes) w.early.fenced.join(w.early.seen);
}

}  // namespace sim
