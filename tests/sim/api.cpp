// The interpreter for Python (ctypes): load PTX, allow memory, launch, read reports. tests/sim/__init__.py wraps it.
#include <algorithm>

#include "runtime.h"

namespace sim {

Runtime& runtime() {
  static Runtime r;
  return r;
}

int Runtime::fail(int code, const std::string& what) {
  error = what;
  return status = code;
}

Module* Runtime::load(const std::string& ptx) {
  try {
    modules.push_back(parse(ptx));
    return modules.back().get();
  } catch (const std::exception& e) {
    constexpr int kInvalidPtx = 218;
    fail(kInvalidPtx, e.what());
    return nullptr;
  }
}

int Runtime::launch(Module& m, const std::string& kernel, Dim3 grid, Dim3 block, size_t dynamic_shared,
                    size_t opted_in, void** args) {
  constexpr int kInvalidValue = 1, kInvalidConfiguration = 9, kInvalidFunction = 98, kLaunchFailure = 719;
  constexpr u32 kMaxThreads = 1024, kMaxBlockZ = 64, kMaxGridYZ = 65535, kMaxGridX = 0x7fffffff;
  const auto it = m.functions.find(kernel);
  if (it == m.functions.end()) return fail(kInvalidFunction, "no kernel " + kernel);
  Function& f = *it->second;
  const u64 threads = u64(block.x) * block.y * block.z;
  if (!threads || threads > kMaxThreads || block.z > kMaxBlockZ)
    return fail(kInvalidConfiguration, kernel + ": a block of " + std::to_string(threads) + " threads");
  if (f.max_threads && threads > f.max_threads)
    return fail(kInvalidConfiguration,
                kernel + ": " + std::to_string(threads) + " threads, more than its launch bounds");
  if (!grid.x || !grid.y || !grid.z || grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ)
    return fail(kInvalidConfiguration, kernel + ": a grid of " + std::to_string(grid.x) + " x " +
                                           std::to_string(grid.y) + " x " + std::to_string(grid.z));
  // The whole of it, unless the launcher has said how much dynamic memory there may be beside the static.
  constexpr size_t kUnasked = 48 * 1024, kMost = 227 * 1024;
  const size_t limit = opted_in ? std::min(f.static_shared + opted_in, kMost) : kUnasked;
  if (f.static_shared + dynamic_shared > limit)
    return fail(kInvalidValue, kernel + ": " + std::to_string(f.static_shared + dynamic_shared) +
                                   " bytes of shared memory, " + std::to_string(limit) + " are allowed");
  std::vector<u8> params(f.param_bytes + 16);
  for (size_t k = 0; k < f.params.size(); ++k)
    std::memcpy(params.data() + f.params[k].offset, args[k], f.params[k].size);
  for (const auto& v : m.variables) device.allow(v.second.data, v.second.bytes, v.second.constant);
  try {
    Launch launch{device, f, grid, block, u32(dynamic_shared), params.data(), {}};
    launch.run();
    reports.push_back(report_json(launch));
    tables.push_back(report_table(launch));
  } catch (const std::exception& e) {
    return fail(kLaunchFailure, e.what());
  }
  return 0;
}

}  // namespace sim

using namespace sim;

extern "C" {

// What goes wrong here is said at once; nothing is left for the next cudaGetLastError of a launcher.
static int said(int status) { return runtime().status = 0, status; }

void* sim_load(const char* ptx) {
  void* module = runtime().load(ptx);
  return said(0), module;
}

int sim_launch(void* module, const char* kernel, const u32* grid, const u32* block, size_t dynamic_shared,
               void** args) {
  constexpr size_t kLargest = 227 * 1024;
  return said(runtime().launch(*static_cast<Module*>(module), kernel, {grid[0], grid[1], grid[2]},
                               {block[0], block[1], block[2]}, dynamic_shared, kLargest, args));
}

void sim_allow(const void* p, size_t bytes, int read_only) { runtime().device.allow(p, bytes, read_only != 0); }
void sim_forbid_all() { runtime().device.ranges.clear(); }

void sim_options(int races, int memory, u32 seed, int perturb, u64 watchdog, u64 last_blocks) {
  runtime().device.options = {races != 0, memory != 0, seed, perturb != 0, watchdog, last_blocks};
}

int sim_modules() { return int(runtime().modules.size()); }
const char* sim_text(int module) { return runtime().modules[size_t(module)]->text.c_str(); }
int sim_replace(int module, const char* ptx) {   // in place: launchers that know the module run the new text
  if (!runtime().load(ptx)) return said(0);
  *runtime().modules[size_t(module)] = std::move(*runtime().modules.back());
  runtime().modules.pop_back();
  return 1;
}

int sim_covered(int module, const char* kernel, int line) {   // whether a launch came by this line of the kernel's body
  const Function& f = *runtime().modules[size_t(module)]->functions.at(kernel);
  return size_t(line) < f.covered.size() && f.covered[size_t(line)];
}

const char* sim_error() { return runtime().error.c_str(); }

const char* sim_reports(int table) {   // of the launches since sim_forget
  static std::string text;
  Runtime& r = runtime();
  text = table ? "" : "[";
  for (size_t k = 0; k < r.reports.size(); ++k) text += table ? r.tables[k] : (k ? ", " : "") + r.reports[k];
  if (!table) text += "]";
  return text.c_str();
}
void sim_forget() { runtime().reports.clear(), runtime().tables.clear(); }

}  // extern "C"
