// What a launch cost, from the counters of its instructions: as JSON for tests, as a table for people.
#include <algorithm>
#include <cstdarg>
#include <cstdio>

#include "machine.h"

namespace sim {
namespace {

std::string format(const char* f, ...) {
  char text[512];
  va_list args;
  va_start(args, f);
  std::vsnprintf(text, sizeof text, f, args);
  va_end(args);
  return text;
}
using ull = unsigned long long;

Counters total(const Function& f, std::initializer_list<Class> classes) {
  Counters t;
  for (const Inst& i : f.code) {
    if (std::find(classes.begin(), classes.end(), i.counted) == classes.end()) continue;
    t.issued += i.count.issued, t.lanes += i.count.lanes, t.divergent += i.count.divergent;
    t.sectors += i.count.sectors, t.ideal_sectors += i.count.ideal_sectors;
    t.waves += i.count.waves, t.ideal_waves += i.count.ideal_waves, t.local += i.count.local;
    t.replays += i.count.replays;
  }
  return t;
}

std::string sectors_json(const Counters& c, u64 unique) {
  return format("{\"sectors\": %llu, \"ideal\": %llu, \"unique\": %llu}", ull(c.sectors), ull(c.ideal_sectors),
                ull(unique));
}
std::string waves_json(const Counters& c) {
  return format("{\"waves\": %llu, \"ideal\": %llu}", ull(c.waves), ull(c.ideal_waves));
}

std::string escaped(const std::string& s) {
  std::string r;
  for (char c : s) r += c == '"' || c == '\\' ? std::string("\\") + c : std::string(1, c);
  return r;
}

std::map<int, Counters> by_line(const Function& f) {
  std::map<int, Counters> lines;
  for (const Inst& i : f.code) {
    Counters& c = lines[i.line];
    c.issued += i.count.issued, c.lanes += i.count.lanes, c.divergent += i.count.divergent;
    c.sectors += i.count.sectors, c.ideal_sectors += i.count.ideal_sectors;
    c.waves += i.count.waves, c.ideal_waves += i.count.ideal_waves, c.local += i.count.local;
  }
  return lines;
}

}  // namespace

std::string report_json(const Launch& launch) {
  const Function& f = launch.function;
  u64 unique_read = 0, unique_written = 0;
  for (const auto& page : launch.pages)
    for (u32 s = 0; s < kPageBytes / kSectorBytes; ++s)
      unique_read += page.second.sector_read[s], unique_written += page.second.sector_written[s];
  const Counters load = total(f, {Class::Load}), store = total(f, {Class::Store}),
                 copies = total(f, {Class::AsyncCopy}), branches = total(f, {Class::Branch}),
                 matrix = total(f, {Class::Ldmatrix}), atomics = total(f, {Class::Atomic});
  Counters read = load;   // from global memory, whichever way
  read.sectors += copies.sectors, read.ideal_sectors += copies.ideal_sectors;
  const auto issued = [&](Class c) { return ull(total(f, {c}).issued); };
  std::string s = "{\"kernel\": \"" + escaped(f.name) + "\"";
  s += format(", \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared_bytes\": %u", launch.grid.x, launch.grid.y,
              launch.grid.z, launch.block.x, launch.block.y, launch.block.z, f.static_shared + launch.dynamic_shared);
  s += format(", \"instructions\": %llu, ", ull(launch.issued));
  s += "\"global_read\": " + sectors_json(read, unique_read) +
       ", \"global_write\": " + sectors_json(store, unique_written);
  s += ", \"shared_load\": " + waves_json(load) + ", \"shared_store\": " + waves_json(store);
  s += ", \"ldmatrix\": " + waves_json(matrix) + ", \"async_copy\": " + waves_json(copies);
  s += format(
      ", \"mma\": %llu, \"wgmma\": %llu, \"barriers\": %llu, \"shuffles\": %llu, \"votes\": %llu, \"atomics\": %llu, \"special\": %llu",
      issued(Class::Mma), issued(Class::Wgmma), issued(Class::Barrier), issued(Class::Shuffle), issued(Class::Vote), ull(atomics.issued),
      issued(Class::Special));
  s += format(", \"branches\": %llu, \"divergent\": %llu, \"local\": %llu, \"constant_replays\": %llu, \"lines\": {",
              ull(branches.issued), ull(branches.divergent), ull(load.local + store.local), ull(load.replays));
  const char* comma = "";
  for (const auto& [line, c] : by_line(f)) {
    s += format(
        "%s\"%d\": {\"issued\": %llu, \"lanes\": %llu, \"sectors\": %llu, \"ideal_sectors\": %llu, \"waves\": %llu, "
        "\"ideal_waves\": %llu, \"divergent\": %llu, \"local\": %llu}",
        comma, line, ull(c.issued), ull(c.lanes), ull(c.sectors), ull(c.ideal_sectors), ull(c.waves),
        ull(c.ideal_waves), ull(c.divergent), ull(c.local));
    comma = ", ";
  }
  return s + "}}";
}

std::string report_table(const Launch& launch) {
  std::string s = format("%s  grid %u x %u x %u, block %u x %u x %u, %u bytes of shared memory\n",
                         launch.function.name.c_str(), launch.grid.x, launch.grid.y, launch.grid.z, launch.block.x,
                         launch.block.y, launch.block.z, launch.function.static_shared + launch.dynamic_shared);
  s += "  line      issued  lanes/32     sectors   ideal       waves   ideal  divergent  local\n";
  for (const auto& [line, c] : by_line(launch.function)) {
    if (!c.issued) continue;
    s += format("%6d %11llu %9.2f %11llu %7llu %11llu %7llu %10llu %6llu\n", line, ull(c.issued),
                double(c.lanes) / double(c.issued * kLanes), ull(c.sectors), ull(c.ideal_sectors), ull(c.waves),
                ull(c.ideal_waves), ull(c.divergent), ull(c.local));
  }
  return s;
}

}  // namespace sim
