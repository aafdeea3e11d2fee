// Runs the CPU kernels of AArch64 for a process of another architecture, under qemu-aarch64:
//
//   guest BUILD PID    calls come on stdin (kernels.h), numbers of units go to stdout
//
// A kernel gets the very addresses that the caller has. Before it runs, the pages of the tensors come over from the
// caller's memory, and afterwards what has changed in them goes back. What else the kernel reads (its arguments) comes
// when it faults; what it writes elsewhere ends the program. Tensors do not wait for a fault: qemu 7.2 repeats a store of
// two registers that faulted on the second page at the address of the next one. Both machines are little-endian with
// 64-bit pointers, so that a contract's struct is the same in both.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "all_kernels.h"
#include "kernels.h"

namespace {

constexpr uintptr_t kPage = 4096;
constexpr int kNoReplace = 0x100000;   // MAP_FIXED_NOREPLACE, which old headers lack

struct Page {
  bool written;
  uint8_t before[kPage];
};
std::map<uintptr_t, Page*>* pages;
int memory;   // of the caller

[[noreturn]] void die(const char* why, uintptr_t at) {
  std::fprintf(stderr, "guest: %s, at %p\n", why, reinterpret_cast<void*>(at));
  _exit(1);
}

void bring(uintptr_t at, bool written) {
  void* p = reinterpret_cast<void*>(at);
  Page*& page = (*pages)[at];
  if (page) {
    if (written && !page->written) mprotect(p, kPage, PROT_READ | PROT_WRITE);
    page->written |= written;
    return;
  }
  if (mmap(p, kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | kNoReplace, -1, 0) != p) die("no room", at);
  if (pread(memory, p, kPage, off_t(at)) != ssize_t(kPage)) die("the caller has no memory", at);
  page = new Page{written, {}};
  std::memcpy(page->before, p, kPage);
  if (!written) mprotect(p, kPage, PROT_READ);
}

void fault(int, siginfo_t* info, void*) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(info->si_addr) / kPage * kPage;
  if (pages->count(at)) die("a kernel writes where it may only read", uintptr_t(info->si_addr));
  bring(at, false);
}

void give_back() {
  for (const auto& [at, page] : *pages) {
    const uint8_t* now = reinterpret_cast<const uint8_t*>(at);
    for (uintptr_t i = 0, end; page->written && i < kPage; i = end) {
      const bool changed = now[i] != page->before[i];
      for (end = i + 1; end < kPage && (now[end] != page->before[end]) == changed;) ++end;
      if (changed && pwrite(memory, now + i, end - i, off_t(at + i)) != ssize_t(end - i)) die("cannot give back", at);
    }
    munmap(reinterpret_cast<void*>(at), kPage);
    delete page;
  }
  pages->clear();
}

using Run = int64_t(uint64_t args, int64_t begin, int64_t end, void* scratch);
template <auto kernel, class Args> int64_t run(uint64_t args, int64_t begin, int64_t end, void* scratch) {
  return kernel(*reinterpret_cast<const Args*>(args), begin, end, scratch);
}
#define PEFTOPS_SCALAR(name, Args) run<&peftops::cpu::scalar::name, Args>,
#define PEFTOPS_NEON_OF(name, Args) run<&peftops::cpu::neon::name, Args>,
using namespace peftops;
Run* const kScalar[] = {PEFTOPS_ARM_KERNELS(PEFTOPS_SCALAR)};
Run* const kNeon[] = {PEFTOPS_ARM_KERNELS(PEFTOPS_NEON_OF)};

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  Run* const* kernels = std::strcmp(arguments[1], "neon") ? kScalar : kNeon;
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%s/mem", arguments[2]);
  memory = open(path, O_RDWR);
  if (memory < 0) return std::perror(path), 1;
  pages = new std::map<uintptr_t, Page*>;
  struct sigaction action = {};
  action.sa_sigaction = fault;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, nullptr);
  void* scratch = std::aligned_alloc(kPage, cpu::kScratchBytes);
  Call call;
  while (std::fread(&call, sizeof call, 1, stdin) == 1) {
    for (int i = 0; i < call.ranges; ++i) {
      Range range;
      if (std::fread(&range, sizeof range, 1, stdin) != 1) return 1;
      for (uintptr_t at = range.at / kPage * kPage; at < range.at + range.bytes; at += kPage) bring(at, range.written);
    }
    const int64_t units = kernels[call.kernel](call.args, call.begin, call.end, scratch);
    give_back();
    std::fwrite(&units, sizeof units, 1, stdout);
    std::fflush(stdout);
  }
}
