// A stand-in for libcudart.so.13: host code that nvcc compiled, launchers included, runs on it unchanged.
//
// nvcc registers a fat binary when the library is loaded; the PTX in it (compute_80, not compressed) is what runs.
// Device pointers are host pointers, and every call is finished when it returns. Streams are accepted and remembered,
// so that a test can see that a launch went to the one it was given.
#include <cstdlib>
#include <unordered_map>

#include "runtime.h"

using namespace sim;

namespace {

struct Kernel {
  Module* module;
  std::string name;
  size_t opted_in;   // bytes of dynamic shared memory that the launcher asked for; 0 before it does
};
struct Configuration { Dim3 grid, block; size_t shared; void* stream; };

constexpr size_t kLargestShared = 227 * 1024;
constexpr int kInvalidValue = 1, kNotSupported = 801, kInvalidFunction = 98, kInvalidImage = 200, kNoBinary = 209;

std::unordered_map<const void*, Kernel> kernels;
std::vector<Configuration> configurations;
void* last_stream;
int capability = 80, multiprocessors = 108;

template <class T> T at(const u8* p, size_t offset) {
  T v;
  std::memcpy(&v, p + offset, sizeof v);
  return v;
}

// {magic u32, version u16, header bytes u16, bytes u64}, then entries
// {kind u16 (1: PTX), .., header bytes u32 @4, bytes u64 @8, compressed bytes u32 @16}.
Module* load_fat_binary(const u8* region) {
  constexpr u32 kMagic = 0xba55ed50;
  constexpr u16 kPtx = 1;
  for (;; region += at<u16>(region, 6)) {   // nvcc 13 puts an empty region first
    if (at<u32>(region, 0) != kMagic) return runtime().fail(kInvalidImage, "not a fat binary"), nullptr;
    if (at<u64>(region, 8)) break;
  }
  const u8* entry = region + at<u16>(region, 6);
  for (const u8* end = entry + at<u64>(region, 8); entry < end; entry += at<u32>(entry, 4) + at<u64>(entry, 8)) {
    if (at<u16>(entry, 0) != kPtx) continue;
    if (at<u32>(entry, 16))
      return runtime().fail(kInvalidImage, "the PTX is compressed; build it with --compress-mode=none"), nullptr;
    const char* text = reinterpret_cast<const char*>(entry + at<u32>(entry, 4));
    return runtime().load(std::string(text, strnlen(text, at<u64>(entry, 8))));
  }
  return runtime().fail(kNoBinary, "no PTX in the fat binary"), nullptr;
}

}  // namespace

extern "C" {

struct FatBinaryWrapper { u32 magic, version; const u8* data; void* file; };

void** __cudaRegisterFatBinary(void* wrapper) {
  return new void*[1]{load_fat_binary(static_cast<FatBinaryWrapper*>(wrapper)->data)};
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  kernels[host] = {static_cast<Module*>(handle[0]), name, 0};
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

u32 __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  const Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared, *static_cast<void**>(stream) = c.stream;
  return 0;
}
int cudaLaunchKernel(const void* host, Dim3 grid, Dim3 block, void** args, size_t shared, void* stream) {
  const auto it = kernels.find(host);
  if (it == kernels.end()) return runtime().fail(kInvalidFunction, "a launch of what is no kernel");
  if (!it->second.module) return runtime().status;   // said when it was loaded
  last_stream = stream;
  const Kernel& k = it->second;
  return runtime().launch(*k.module, k.name, grid, block, shared, k.opted_in, args);
}
// A kernel that may begin early begins in its turn, which is one of the orders that there are.
struct LaunchConfiguration { Dim3 grid, block; size_t shared; void* stream; void* attributes; u32 count; };
int cudaLaunchKernelExC(const LaunchConfiguration* c, const void* host, void** args) {
  return cudaLaunchKernel(host, c->grid, c->block, args, c->shared, c->stream);
}
int __cudaGetKernel(void** kernel, const void* host) { return *kernel = const_cast<void*>(host), 0; }
int __cudaLaunchKernel(void* kernel, Dim3 grid, Dim3 block, void** args, size_t shared, void* stream) {
  return cudaLaunchKernel(kernel, grid, block, args, shared, stream);
}

int cudaFuncSetAttribute(const void* host, int attribute, int value) {
  constexpr int kMaxDynamicShared = 8, kPreferredCarveout = 9;
  if (attribute == kPreferredCarveout) return 0;
  const auto it = kernels.find(host);
  if (it == kernels.end() || attribute != kMaxDynamicShared || value < 0 || size_t(value) > kLargestShared)
    return runtime().fail(kInvalidValue,
                          "cudaFuncSetAttribute: " + std::to_string(attribute) + " = " + std::to_string(value));
  it->second.opted_in = size_t(value);
  return 0;
}

int cudaGetLastError() {
  const int status = runtime().status;
  runtime().status = 0;
  return status;
}
int cudaPeekAtLastError() { return runtime().status; }
const char* cudaGetErrorString(int status) { return status ? runtime().error.c_str() : "no error"; }
const char* cudaGetErrorName(int status) { return status ? "cudaErrorSimulated" : "cudaSuccess"; }

int cudaGetDevice(int* device) { return *device = 0, 0; }
int cudaSetDevice(int) { return 0; }
int cudaGetDeviceCount(int* n) { return *n = 1, 0; }
int cudaDeviceGetAttribute(int* value, int attribute, int) {   // an A100's, but for what sim_pretend says
  switch (attribute) {
    case 16: return *value = multiprocessors, 0;
    case 75: return *value = capability / 10, 0;
    case 76: return *value = capability % 10, 0;
    case 97: return *value = 163 * 1024, 0;            // shared memory per block, opted in
    case 81: return *value = 164 * 1024, 0;            // shared memory per multiprocessor
    default: return runtime().fail(kNotSupported, "cudaDeviceGetAttribute: " + std::to_string(attribute));
  }
}

// (the host's malloc: device pointers are host pointers, and none of it is in memory's list of what may be touched)
int cudaMallocManaged(void** p, size_t bytes, unsigned) {
  *p = bytes <= size_t(1) << 40 ? std::malloc(bytes) : nullptr;
  return *p ? 0 : runtime().fail(2, "cudaMallocManaged: " + std::to_string(bytes) + " bytes");
}
int cudaFree(void* p) { return std::free(p), 0; }

int cudaMemsetAsync(void* p, int value, size_t bytes, void*) { return std::memset(p, value, bytes), 0; }
int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, void*) { return std::memcpy(to, from, bytes), 0; }
int cudaStreamSynchronize(void*) { return 0; }
int cudaDeviceSynchronize() { return 0; }

void* sim_last_stream() { return last_stream; }
void sim_pretend(int of_capability, int count) { capability = of_capability, multiprocessors = count; }

}  // extern "C"
