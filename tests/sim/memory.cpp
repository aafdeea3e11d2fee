// Every address that a kernel touches comes through reach(): it finds the byte behind the address and checks bounds,
// alignment, permission, initialisation and races (order.h). Each byte remembers its last writer and reader and the time.
#include "machine.h"

#include <algorithm>

namespace sim {

void Device::allow(const void* p, u64 bytes, bool read_only) {
  u64 begin = reinterpret_cast<u64>(p), end = begin + bytes;
  auto it = ranges.lower_bound(begin);
  if (it != ranges.begin()) --it;
  while (it != ranges.end() && it->second.begin < end) {
    const auto other = it->second;
    it = other.end > begin ? ranges.erase(it) : std::next(it);
    // Two arguments may be views of one storage. What is written was freed and given out again.
    if (bytes && other.end > begin && read_only && other.read_only)
      begin = std::min(begin, other.begin), end = std::max(end, other.end);
  }
  if (bytes) ranges[begin] = {begin, end, read_only};
}

void fail(const Warp& w, const Inst& i, const std::string& what) {
  const Dim3& b = w.block.index;
  throw Error(what + ", in " + w.function.name + ", block (" + std::to_string(b.x) + ", " + std::to_string(b.y) + ", " +
              std::to_string(b.z) + "), warp " + std::to_string(w.id) + ", line " + std::to_string(i.line) + ": " +
              i.text);
}

Page& Launch::page_of(u64 address) {
  const u64 number = address / kPageBytes;
  if (number != last_page) last_page = number, last = &pages[number];
  return *last;
}

namespace {

constexpr u32 kSeveralBlocks = ~0u;

// Whether what (block, agent, lane) did at `time` is not ordered before this warp's lane.
[[gnu::always_inline]] inline bool concurrent(const Warp& w, int lane, u32 time, u32 block, u8 agent, u8 other) {
  if (block != w.block.number) return time != 0;
  if (time <= w.block.last_barrier && (agent < kAgents || agent == kSeveral)) return false;
  if (agent == w.id) return other != lane && time > w.last_sync;
  return agent == kSeveral || !w.function.roles || !before(w, lane, agent, time, other);
}

std::string agent_name(const Warp& w, u8 agent) {
  if (agent == kSeveral) return "several warps";
  if (agent < kAgents) return "warp " + std::to_string(agent);
  for (const auto& m : w.block.mbarriers)
    if (m.second.agent == (agent & ~1u))
      return std::string(agent & 1 ? "a cp.async" : "a bulk copy") + " of the mbarrier at " + std::to_string(m.first);
  return "an asynchronous copy";
}

[[noreturn]] void race(const Warp& w, const Inst& i, int lane, const char* what, u32 block, u8 agent, u8 other) {
  std::string who = block != w.block.number ? "another block"
                    : agent != w.id         ? agent_name(w, agent)
                    : other == kSeveral     ? "other lanes of its warp"
                                            : "lane " + std::to_string(other) + " of its warp";
  fail(w, i, "race: " + std::string(what) + " by " + who + " without a barrier, lane " + std::to_string(lane));
}

// The first of several readers that is not before this warp's lane; -1 if all are.
int unordered_reader(const Warp& w, int lane, const u32* row) {
  for (int k = 0; k < int(w.block.warps.size()); ++k)
    if (concurrent(w, lane, row[k], w.block.number, u8(k), kSeveral)) return k;
  return -1;
}

// Of a byte of shared memory that several warps read, the block knows all of them, so that each may hand it on by itself.
void note_several(Warp& w, int lane, Shadow& s, u64 offset) {
  const u32 now = w.block.now + 1;
  u32* row = w.block.readers_of(offset);
  if (s.reader_warp != kSeveral) {
    if (s.reader_warp != w.id) {
      std::fill_n(row, w.block.warps.size(), 0);
      row[s.reader_warp] = s.read, row[w.id] = now, s.reader_warp = kSeveral;
    }
  } else if (row[w.id] != now) {
    row[w.id] = now;
    if (unordered_reader(w, lane, row) < 0) {
      s.reader_warp = u8(w.id), s.reader_lane = u8(lane), s.read = now;
      return;
    }
  }
  s.reader_lane = kSeveral, s.read = now;
}

// Earlier readers matter only as long as a write now would race with them.
[[gnu::always_inline]] inline void note_reader(Warp& w, int lane, Shadow& s, u64 offset, bool shared) {
  if (!concurrent(w, lane, s.read, s.reader_block, s.reader_warp, s.reader_lane)) {
    s.reader_block = w.block.number, s.reader_warp = u8(w.id), s.reader_lane = u8(lane);
  } else if (shared && w.function.roles) {
    return note_several(w, lane, s, offset);
  } else {
    if (s.reader_block != w.block.number) s.reader_block = kSeveralBlocks;
    if (s.reader_warp != w.id) s.reader_warp = kSeveral;
    s.reader_lane = kSeveral;
  }
  s.read = w.block.now + 1;
}

[[gnu::always_inline]] inline void check_writer(const Warp& w, const Inst& i, int lane, const Shadow& s, const char* what) {
  if (concurrent(w, lane, s.written, s.writer_block, s.writer_warp, s.writer_lane))
    race(w, i, lane, what, s.writer_block, s.writer_warp, s.writer_lane);
}
void check_readers(Warp& w, const Inst& i, int lane, const Shadow& s, u64 offset, bool shared) {
  if (!concurrent(w, lane, s.read, s.reader_block, s.reader_warp, s.reader_lane)) return;
  const bool rows = shared && w.function.roles && s.reader_warp == kSeveral;
  const int reader = rows ? unordered_reader(w, lane, w.block.readers_of(offset)) : s.reader_warp;
  if (reader >= 0) race(w, i, lane, "write after read", s.reader_block, u8(reader), s.reader_lane);
}

inline void note_read(Warp& w, const Inst& i, int lane, Shadow& s, u64 offset, bool shared) {
  check_writer(w, i, lane, s, "read after write");
  note_reader(w, lane, s, offset, shared);
}

void note_write(Warp& w, const Inst& i, int lane, Shadow& s, u64 offset, bool shared) {
  check_writer(w, i, lane, s, "write after write");
  check_readers(w, i, lane, s, offset, shared);
  s.written = w.block.now + 1, s.read = 0;
  s.writer_block = w.block.number, s.writer_warp = u8(w.id), s.writer_lane = u8(lane);
}

void check_flight(const Warp& w, const Inst& i, const Shadow& s, u64 offset, bool reads, bool writes) {
  const std::string where = ", shared offset " + std::to_string(offset);
  if (s.flight == Object) fail(w, i, "the bytes of an mbarrier" + where);
  if (s.flight == Delivering)
    fail(w, i, std::string(reads ? "read" : "write") + " of what a bulk copy has not delivered yet" + where);
  if (s.flight == Copying && reads) fail(w, i, "read of a cp.async that was not waited for" + where);
  if (s.reading && writes) fail(w, i, "write to what an asynchronous operation still reads" + where);
}

void check_bounds(const Warp& w, const Inst& i, u64 offset, u32 bytes) {
  const size_t size = w.block.shared.size();
  if (offset + bytes > size)
    fail(w, i,
         "shared memory out of bounds: " + std::to_string(bytes) + " bytes at " + std::to_string(offset) + " of " +
             std::to_string(size));
}

u8* reach_shared(Warp& w, const Inst& i, int lane, u64 address, u32 bytes, Access access) {
  Block& b = w.block;
  const u64 offset = address & 0xffffffff;
  check_bounds(w, i, offset, bytes);
  if (offset % bytes)
    fail(w, i, "misaligned: " + std::to_string(bytes) + " bytes at shared offset " + std::to_string(offset));
  for (u64 k = offset; k < offset + bytes; ++k) {
    Shadow& s = b.shadow[k];
    if (s.flight | s.reading) check_flight(w, i, s, k, access != Access::Write, access != Access::Read);
    if (access != Access::Write && !s.written)
      fail(w, i, "uninitialised shared memory at offset " + std::to_string(k));
    if (!b.launch.device.options.check_races || access == Access::Atomic) s.written = std::max(s.written, 1u);
    else if (access == Access::Read) note_read(w, i, lane, s, k, true);
    else note_write(w, i, lane, s, k, true);
  }
  return b.shared.data() + offset;
}

const Range* range_of(Launch& launch, u64 address, u32 bytes, u64& beyond) {
  Range& last = launch.last_range;
  if (address >= last.begin && address + bytes <= last.end) return &last;
  auto it = launch.device.ranges.upper_bound(address);
  if (it == launch.device.ranges.begin()) return nullptr;
  --it;
  beyond = address + bytes - it->second.end;
  if (address + bytes > it->second.end) return nullptr;
  last = it->second;
  return &last;
}

u8* reach_global(Warp& w, const Inst& i, int lane, u64 address, u32 bytes, Access access) {
  Launch& launch = w.block.launch;
  const Options& options = launch.device.options;
  if (address % bytes)
    fail(w, i,
         "misaligned: " + std::to_string(bytes) + " bytes at a global address that is " +
             std::to_string(address % bytes) + " modulo " + std::to_string(bytes));
  bool read_only = false;
  if (options.check_memory) {
    u64 beyond = 0;
    const Range* range = range_of(launch, address, bytes, beyond);
    if (!range)
      fail(w, i,
           std::string(access == Access::Read ? "read" : "write") +
               " out of bounds of global memory: " + std::to_string(bytes) + " bytes" +
               (beyond && beyond < 1 << 20 ? ", " + std::to_string(beyond) + " beyond the end of an allocation" : "") +
               ", lane " + std::to_string(lane));
    read_only = range->read_only;
    if (read_only && access != Access::Read) fail(w, i, "write to read-only memory");
  }
  if (options.check_races && !read_only && access != Access::Atomic) {
    Page& page = launch.page_of(address);
    if (!page.shadow) page.shadow = std::make_unique<Shadow[]>(kPageBytes);
    Shadow* s = page.shadow.get() + address % kPageBytes;   // aligned, so within the page
    for (u32 k = 0; k < bytes; ++k)
      access == Access::Read ? note_read(w, i, lane, s[k], 0, false) : note_write(w, i, lane, s[k], 0, false);
  }
  return reinterpret_cast<u8*>(address);
}

}  // namespace

u8* reach(Warp& w, const Inst& i, int lane, Space space, u64 address, u32 bytes, Access access) {
  if (space == Space::Generic) {
    space = space_of(address);
    if (space != Space::Global) address &= ~kWindowMask;
  }
  switch (space) {
    case Space::Shared: return reach_shared(w, i, lane, address, bytes, access);
    case Space::Param:
      address &= ~kWindowMask;
      if (address + bytes > w.function.param_bytes) fail(w, i, "out of bounds of the parameters");
      return const_cast<u8*>(w.block.launch.params) + address;
    case Space::Local:
      if (address + bytes > w.function.local_bytes) fail(w, i, "out of bounds of local memory");
      return w.local.data() + size_t(lane) * w.function.local_bytes + address;
    default: return reach_global(w, i, lane, address, bytes, access);
  }
}

// A bulk copy writes shared memory from when it begins until it is delivered. Whatever was there before must be over.
void begin_write(Warp& w, const Inst& i, int lane, u32 offset, u32 bytes) {
  check_bounds(w, i, offset, bytes);
  for (u32 k = offset; k < offset + bytes; ++k) {
    Shadow& s = w.block.shadow[k];
    if (s.flight | s.reading) check_flight(w, i, s, k, false, true);
    if (w.block.launch.device.options.check_races) {
      check_writer(w, i, lane, s, "write after write");
      check_readers(w, i, lane, s, k, true);
      if (s.written > 1 && (s.writer_warp < kAgents || s.writer_warp & 1) &&
          !before(w, lane, s.writer_warp, s.written, s.writer_lane, true))
        fail(w, i, "a bulk copy writes over what threads wrote, without a fence.proxy.async between, shared offset " +
                       std::to_string(k));
    }
    s.flight = Delivering;
  }
}
void end_write(Block& b, u32 agent, u32 offset, u32 bytes) {
  for (u32 k = offset; k < offset + bytes; ++k) {
    Shadow& s = b.shadow[k];
    s.flight = Landed, s.written = b.now + 1, s.read = 0;
    s.writer_block = b.number, s.writer_warp = u8(agent), s.writer_lane = kSeveral;
  }
}

// wgmma and bulk stores read shared memory until they are waited for; from then on it is a read of the warp's.
const u8* begin_read(Warp& w, const Inst& i, int lane, u32 offset, u32 bytes) {
  check_bounds(w, i, offset, bytes);
  for (u32 k = offset; k < offset + bytes; ++k) {
    Shadow& s = w.block.shadow[k];
    if (s.flight) check_flight(w, i, s, k, true, false);
    if (!s.written) fail(w, i, "uninitialised shared memory at offset " + std::to_string(k));
    if (w.block.launch.device.options.check_races) {
      check_writer(w, i, lane, s, "read after write");
      if (s.written > 1 && (s.writer_warp < kAgents || s.writer_warp & 1) &&
          !before(w, lane, s.writer_warp, s.written, s.writer_lane, true))
        fail(w, i, "the asynchronous proxy reads what threads wrote, without a fence.proxy.async between, shared offset " +
                       std::to_string(k));
    }
    ++s.reading;
  }
  return w.block.shared.data() + offset;
}
void end_read(Warp& w, int lane, u32 offset, u32 bytes) {
  for (u32 k = offset; k < offset + bytes; ++k) {
    Shadow& s = w.block.shadow[k];
    --s.reading;
    if (w.block.launch.device.options.check_races) note_reader(w, lane, s, k, true);
  }
}

u8* global_bytes(Warp& w, const Inst& i, u64 address, u32 bytes, Access access) {
  for (u32 k = 0; k < bytes; k += 16) reach_global(w, i, kSeveral, address + k, 16, access);
  return reinterpret_cast<u8*>(address);
}

// A warp's request takes as many 32-byte sectors as it touches, and at best as its bytes fill.
void count_sectors(Warp& w, const Inst& i, u32 lanes, const u64* address, u32 bytes, bool write) {
  u64 seen[2 * kLanes];
  int n = 0;
  each(lanes, [&](int l) {
    for (u64 s = address[l] / kSectorBytes; s <= (address[l] + bytes - 1) / kSectorBytes; ++s)
      if (std::find(seen, seen + n, s) == seen + n) seen[n++] = s;
  });
  i.count.sectors += u64(n);
  i.count.ideal_sectors += (u64(__builtin_popcount(lanes)) * bytes + kSectorBytes - 1) / kSectorBytes;
  for (int k = 0; k < n; ++k) {
    Page& page = w.block.launch.page_of(seen[k] * kSectorBytes);
    (write ? page.sector_written : page.sector_read)[seen[k] % (kPageBytes / kSectorBytes)] = true;
  }
}

// Shared memory serves 32 banks of 4 bytes at a time: a warp's 4-byte accesses in one pass, its 8-byte accesses in
// two halves, its 16-byte accesses in four quarters, and more where lanes want different words of a bank.
void count_waves(const Inst& i, u32 lanes, const u64* address, u32 bytes) {
  const u32 words = std::max(bytes / 4, 1u), group = kLanes / words;
  for (u32 first = 0; first < kLanes; first += group) {
    const u32 part = lanes & u32(low_bits(group) << first);
    u64 word[kBanks][kLanes];
    u8 used[kBanks] = {};
    u32 passes = 0;
    each(part, [&](int l) {
      for (u32 k = 0; k < words; ++k) {
        const u64 at = address[l] / 4 + k;
        u64* bank = word[at % kBanks];
        u8& n = used[at % kBanks];
        if (std::find(bank, bank + n, at) == bank + n) bank[n++] = at, passes = std::max<u32>(passes, n);
      }
    });
    i.count.waves += passes;
  }
  constexpr u32 kBytesPerPass = 4 * kBanks;
  i.count.ideal_waves += std::max(1u, (u32(__builtin_popcount(lanes)) * bytes + kBytesPerPass - 1) / kBytesPerPass);
}

}  // namespace sim
