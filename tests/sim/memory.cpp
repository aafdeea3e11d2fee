// Every address that a kernel touches comes through reach(): it finds the byte behind the address and checks bounds,
// alignment, permission, initialisation and races.
//
// Races. Two accesses to a byte, one of them a write, must be ordered: within a block by a barrier, within a warp by
// __syncwarp (or any .sync operation of the whole warp), between blocks by the end of the launch. Each byte remembers
// its last writer and reader and the time; barriers advance the time. Atomics are ordered by themselves.
#include "machine.h"

#include <algorithm>

namespace sim {

void Device::allow(const void* p, u64 bytes, bool read_only) {
  const u64 begin = reinterpret_cast<u64>(p), end = begin + bytes;
  auto it = ranges.lower_bound(begin);
  if (it != ranges.begin()) --it;
  while (it != ranges.end() && it->second.begin < end)   // memory was freed and given out again
    it = it->second.end > begin ? ranges.erase(it) : std::next(it);
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
constexpr u8 kSeveral = 0xff;

// Whether what (block, warp, lane) did at `time` is not ordered before this warp's lane.
bool concurrent(const Warp& w, int lane, u32 time, u32 block, u8 warp, u8 other) {
  if (time == 0) return false;
  if (block != w.block.number) return true;
  if (warp != w.id) return time > w.block.last_barrier;
  return other != lane && time > w.last_sync;
}

[[noreturn]] void race(const Warp& w, const Inst& i, int lane, const char* what, u32 block, u8 warp, u8 other) {
  std::string who = block != w.block.number ? "another block"
                    : warp == kSeveral      ? "several warps"
                    : warp != w.id          ? "warp " + std::to_string(warp)
                    : other == kSeveral     ? "other lanes of its warp"
                                            : "lane " + std::to_string(other) + " of its warp";
  fail(w, i, "race: " + std::string(what) + " by " + who + " without a barrier, lane " + std::to_string(lane));
}

void note_read(Warp& w, const Inst& i, int lane, Shadow& s) {
  if (concurrent(w, lane, s.written, s.writer_block, s.writer_warp, s.writer_lane))
    race(w, i, lane, "read after write", s.writer_block, s.writer_warp, s.writer_lane);
  // Earlier readers matter only as long as a write now would race with them.
  if (concurrent(w, lane, s.read, s.reader_block, s.reader_warp, s.reader_lane)) {
    if (s.reader_block != w.block.number) s.reader_block = kSeveralBlocks;
    if (s.reader_warp != w.id) s.reader_warp = kSeveral;
    s.reader_lane = kSeveral;
  } else {
    s.reader_block = w.block.number, s.reader_warp = u8(w.id), s.reader_lane = u8(lane);
  }
  s.read = w.block.now + 1;
}

void note_write(Warp& w, const Inst& i, int lane, Shadow& s) {
  if (concurrent(w, lane, s.written, s.writer_block, s.writer_warp, s.writer_lane))
    race(w, i, lane, "write after write", s.writer_block, s.writer_warp, s.writer_lane);
  if (concurrent(w, lane, s.read, s.reader_block, s.reader_warp, s.reader_lane))
    race(w, i, lane, "write after read", s.reader_block, s.reader_warp, s.reader_lane);
  s.written = w.block.now + 1;
  s.writer_block = w.block.number, s.writer_warp = u8(w.id), s.writer_lane = u8(lane);
}

u8* reach_shared(Warp& w, const Inst& i, int lane, u64 address, u32 bytes, Access access) {
  Block& b = w.block;
  const u64 offset = address & 0xffffffff;
  if (offset + bytes > b.shared.size())
    fail(w, i,
         "shared memory out of bounds: " + std::to_string(bytes) + " bytes at " + std::to_string(offset) + " of " +
             std::to_string(b.shared.size()));
  if (offset % bytes)
    fail(w, i, "misaligned: " + std::to_string(bytes) + " bytes at shared offset " + std::to_string(offset));
  for (u64 k = offset; k < offset + bytes; ++k) {
    Shadow& s = b.shadow[k];
    if (access != Access::Write) {
      if (s.in_flight) fail(w, i, "read of a cp.async that was not waited for, shared offset " + std::to_string(k));
      if (!s.written) fail(w, i, "uninitialised shared memory at offset " + std::to_string(k));
    }
    if (!b.launch.device.options.check_races || access == Access::Atomic) s.written = std::max(s.written, 1u);
    else if (access == Access::Read) note_read(w, i, lane, s);
    else note_write(w, i, lane, s);
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
    for (u32 k = 0; k < bytes; ++k) access == Access::Read ? note_read(w, i, lane, s[k]) : note_write(w, i, lane, s[k]);
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
