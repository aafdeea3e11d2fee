// The bindings of this machine with the kernels of another: each kernel's name leads to a process that runs it. The
// pointers that a binding takes from tensors are noted on the way (-Wl,--wrap), so that the process knows what to bring.
#include <sys/prctl.h>
#include <unistd.h>

#include <mutex>
#include <stdexcept>
#include <vector>

#include "all_kernels.h"
#include "kernels.h"
#include "sim/torch/extent.h"

namespace {

int to_guest = -1, from_guest = -1;
std::vector<Range> ranges;   // of the operator that runs

template <class T> void send(const T* p, size_t count) {
  const char* at = reinterpret_cast<const char*>(p);
  for (size_t left = count * sizeof(T); left;) {
    const ssize_t n = write(to_guest, at, left);
    if (n <= 0) throw std::runtime_error("the guest has died; its last words are on stderr");
    at += n, left -= size_t(n);
  }
}

// Threads of torch take turns; so every call of a kernel is one of the guest's.
int64_t call(int32_t kernel, const void* args, int64_t begin, int64_t end) {
  static std::mutex turn;
  const std::lock_guard<std::mutex> mine(turn);
  const Call message{kernel, int32_t(ranges.size()), reinterpret_cast<uint64_t>(args), begin, end};
  send(&message, 1);
  send(ranges.data(), ranges.size());
  int64_t units;
  if (read(from_guest, &units, sizeof units) != sizeof units)
    throw std::runtime_error("the guest has died; its last words are on stderr");
  return units;
}

enum Number : int32_t {
#define PEFTOPS_NUMBER(name, Args) k_##name,
  PEFTOPS_ARM_KERNELS(PEFTOPS_NUMBER)
};

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void arm_guest(int to, int from, int pid) {
  to_guest = to, from_guest = from;
  prctl(PR_SET_PTRACER, pid, 0, 0, 0);   // it reads and writes this process's memory
}
// Before an operator: the tensors of the last one are nothing to it.
__attribute__((visibility("default"))) void arm_begin() { ranges.clear(); }

AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle, const void**);
AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle, void**);
AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** p) {
  const AOTITorchError error = __real_torch_get_const_data_ptr(tensor, p);
  if (!error) ranges.push_back({reinterpret_cast<uint64_t>(*p), extent_of(tensor), false});
  return error;
}
AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** p) {
  const AOTITorchError error = __real_torch_get_mutable_data_ptr(tensor, p);
  if (!error) ranges.push_back({reinterpret_cast<uint64_t>(*p), extent_of(tensor), true});
  return error;
}

}  // extern "C"

namespace peftops::cpu {
#define PEFTOPS_STUB(build, name, Args) \
  namespace build { int64_t name(const Args& args, int64_t begin, int64_t end, void*) { return call(k_##name, &args, begin, end); } }
#define PEFTOPS_STUBS(name, Args) PEFTOPS_EACH_BUILD(PEFTOPS_STUB, name, Args)
PEFTOPS_ARM_KERNELS(PEFTOPS_STUBS)
}  // namespace peftops::cpu
