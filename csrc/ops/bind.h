// The parts of torch that bindings need. Only LibTorch's stable ABI.
//
// A binding is compiled for the CPU into peftops._C and, if its kernels exist for CUDA, with PEFTOPS_CUDA into
// peftops._C_cuda: one source, so the checks and their sentences are the same. The differences are in this file: the
// kernel that PEFTOPS_PICK names, the way in which run() calls it, and the place where PEFTOPS_IMPLEMENTATIONS
// registers it.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "kernels/cpu/isa.h"
#ifdef PEFTOPS_CUDA
#include "kernels/cuda/kernel.h"
#endif
#include "kernels/dropout.h"
#include "kernels/dtype.h"

namespace peftops::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raises RuntimeError with one sentence, made of the parts. STD_TORCH_CHECK would put the path of this file before it.
// A function would evaluate the parts at every call, so PEFTOPS_CHECK is a macro.
template <class... Parts> [[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}
#define PEFTOPS_CHECK(condition, ...) \
  if (condition) {                    \
  } else                              \
    peftops::ops::fail(__VA_ARGS__)

// Raises if a call of torch failed; `what` names the task. torch has printed the reason.
inline void check_torch(AOTITorchError status, const char* what) {
  PEFTOPS_CHECK(status == AOTI_TORCH_SUCCESS, "peftops: torch could not ", what);
}

inline bool is_float(const Tensor& t) {
  const ScalarType s = t.scalar_type();
  return s == ScalarType::Float || s == ScalarType::BFloat16 || s == ScalarType::Half;
}

inline DType dtype_of(const char* op, const char* name, ScalarType s) {
  switch (s) {
    case ScalarType::Float:    return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half:     return DType::f16;
    default:
      fail(op, ": ", name, " must be float32, bfloat16 or float16, not ", torch::headeronly::toString(s));
  }
}
inline DType dtype_of(const char* op, const char* name, const Tensor& t) { return dtype_of(op, name, t.scalar_type()); }

// "[4, 8]"
inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

inline void check_shape(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> want) {
  bool same = t.dim() == int64_t(want.size());
  std::string s = "[";
  int64_t i = 0;
  for (int64_t n : want) {
    same = same && t.size(i) == n;
    s += (i++ ? ", " : "") + std::to_string(n);
  }
  PEFTOPS_CHECK(same, op, ": ", name, " must have shape ", s, "], not ", shape_of(t));
}

inline void check_last_dim(const char* op, const char* name, const Tensor& t, int64_t want) {
  PEFTOPS_CHECK(t.dim() >= 1 && t.size(-1) == want, op, ": the last dim of ", name, " must be ", want,
                  ", but its shape is ", shape_of(t));
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline int64_t rows_of(const Tensor& t) {   // the product of all dims except the last
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

// The system hands out new memory a page at a time, and the first access to pages of 4 KB takes several times as long
// as writing them. So this asks for pages of 2 MB. The system may ignore the hint.
inline void prefer_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kWorthIt = 8 << 20, kPage = 4096;
  if (bytes < kWorthIt) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// An argument: its name and its tensor, or null if it was not given.
struct Named {
  const char* name;
  const Tensor* tensor;
  Named(const char* n, const Tensor& t) : name(n), tensor(&t) {}
  Named(const char* n, const std::optional<Tensor>& t) : name(n), tensor(t ? &*t : nullptr) {}
};
using Arguments = std::initializer_list<Named>;

inline std::string device_of(const Tensor& t) {
  return t.is_cpu() ? "cpu" : t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device";
}

// A kernel does not check addresses: an address of another device would destroy the GPU's context.
inline void check_one_device(const char* op, Arguments arguments) {
  const Named& first = *arguments.begin();
  const auto device = first.tensor->device();
  for (const Named& other : arguments)
    PEFTOPS_CHECK(!other.tensor || other.tensor->device() == device, op, ": ", other.name, " is on ",
                    device_of(*other.tensor), ", but ", first.name, " on ", device_of(*first.tensor));
}

// Raises unless the arguments are on the CPU: the host reads them itself, also for a kernel on a GPU.
inline void check_on_host(const char* op, Arguments arguments) {
  for (const Named& one : arguments)
    PEFTOPS_CHECK(one.tensor->is_cpu(), op, ": ", one.name, " must be on the CPU, not on ", device_of(*one.tensor));
}

// An uninitialised contiguous tensor on the device of `like`. It calls the C shim directly: the dispatcher would take a
// microsecond more, and a whole product of one row may take only twenty.
inline Tensor empty(const Tensor& like, const int64_t* shape, int64_t dims, ScalarType dtype) {
  constexpr int64_t kMaxDims = 64;   // torch's own limit
  int64_t strides[kMaxDims], stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= shape[i] > 0 ? shape[i] : 1;
  }
  const auto device = like.device();
  AtenTensorHandle handle;
  const auto kind = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  check_torch(aoti_torch_empty_strided(dims, shape, strides, kind, int32_t(device.type()), device.index(), &handle),
              "allocate a result");
  Tensor result(handle);
  if (result.is_cpu()) prefer_huge_pages(result.mutable_data_ptr(), result.numel() * int64_t(result.element_size()));
  return result;
}
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return empty(like, shape.begin(), int64_t(shape.size()), dtype);
}
// The same with the dtype of `like` and its dims, except the last one.
inline Tensor empty_with_last_dim(const Tensor& like, int64_t last) {
  std::vector<int64_t> shape(like.sizes().begin(), like.sizes().end());
  shape.back() = last;
  return empty(like, shape.data(), int64_t(shape.size()), like.scalar_type());
}

inline void fill_with_zeros(Tensor& t) {
#ifdef PEFTOPS_CUDA
  torch::stable::zero_(t);
#else
  if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0, size_t(t.numel()) * t.element_size());   // else it has no memory
#endif
}

inline const float* floats_of(const char* op, const char* name, const Tensor& t) {
  PEFTOPS_CHECK(t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32");
  return t.const_data_ptr<float>();
}

template <class T> const T* integers_of(const char* op, const char* name, const Tensor& t) {
  constexpr ScalarType want = sizeof(T) == 8 ? ScalarType::Long : ScalarType::Int;
  PEFTOPS_CHECK(t.scalar_type() == want, op, ": ", name, " must be ", torch::headeronly::toString(want), ", not ",
                torch::headeronly::toString(t.scalar_type()));
  return t.const_data_ptr<T>();
}

// Dropout as an argument of the operators: a probability, and one int64 that is read if p > 0.
inline Dropout dropout_of(const char* op, double p, const std::optional<Tensor>& seed) {
  PEFTOPS_CHECK(p >= 0 && p < 1, op, ": dropout_p must be in [0, 1), not ", p);
  if (p == 0) return {nullptr, 0};
  PEFTOPS_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, op,
                  ": dropout needs a seed, one int64");
  return {seed->const_data_ptr<int64_t>(), p};
}

#ifdef PEFTOPS_CUDA
#undef PEFTOPS_PICK
#define PEFTOPS_PICK(kernel) (ops::CudaKernel(#kernel, &peftops::cuda::kernel))

// The first line of every binding: the code after it runs on the device of all its tensors.
class OnDevice {
 public:
  OnDevice(const char* op, Arguments arguments) {
    check_one_device(op, arguments);
    check_torch(aoti_torch_create_device_guard(arguments.begin()->tensor->get_device_index(), &guard_),
                "switch to the device");
  }
  ~OnDevice() { aoti_torch_delete_device_guard(guard_); }
  OnDevice(const OnDevice&) = delete;

 private:
  DeviceGuardHandle guard_ = nullptr;
};

template <class Args> struct CudaKernel {
  const char* name;
  cuda::Kernel<Args>* launch;
  CudaKernel(const char* n, cuda::Kernel<Args>* l) : name(n), launch(l) {}
};

// Enqueues a CUDA kernel on torch's current stream of the current device.
template <class Args> void run(CudaKernel<Args> kernel, const Args& args, int64_t, int64_t = 1) {
  int device = 0;
  void* stream = nullptr;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    check_torch(aoti_torch_get_current_cuda_stream(device, &stream), "tell its stream");
    status = kernel.launch(args, static_cast<cudaStream_t>(stream));
  }
  PEFTOPS_CHECK(status == cudaSuccess, kernel.name, ": ", cudaGetErrorString(status));
}
#else
struct OnDevice { OnDevice(const char* op, Arguments arguments) { check_one_device(op, arguments); } };

// Cache-line aligned working memory of one thread, kept from call to call.
inline void* scratch() {
  struct Free { void operator()(void* p) const { std::free(p); } };
  thread_local const std::unique_ptr<void, Free> memory(std::aligned_alloc(4096, cpu::kScratchBytes));
  PEFTOPS_CHECK(memory, "peftops: out of memory for ", cpu::kScratchBytes, " bytes of scratch");
  return memory.get();
}

// Runs a CPU kernel on torch's own threads, each with an equal range of the units. `work` estimates multiply-adds or
// elements: a thread gets at least as much work as it takes time to wake another thread. If the units are of several
// `parts`, such as experts, and each is long, a thread takes its range in pieces, and then pieces of the other ranges:
// a core may be slower, or have other work. A piece is as large as a part, because a kernel packs x for each piece.
template <class Args> void run(cpu::Kernel<Args>* kernel, const Args& args, int64_t work, int64_t parts = 1) {
  constexpr int64_t kWorkPerThread = 1 << 17, kLong = 1 << 20, kPieces = 8;
  const int64_t units = kernel(args, 0, 0, nullptr);
  if (units == 0) return;
  const int64_t threads = work / kWorkPerThread + 1, grain = (units + threads - 1) / threads;
  const int64_t ranges = parts > 1 && work / parts >= kLong ? int64_t(torch::stable::get_num_threads()) : 1;
  if (ranges == 1) {
    torch::stable::parallel_for(0, units, grain,
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end, scratch()); });
    return;
  }
  const int64_t piece = std::max(units / ranges / kPieces, units / parts) + 1;
  struct alignas(64) Range { std::atomic<int64_t> next; int64_t end; };   // a cache line each
  std::vector<Range> all(ranges);
  for (int64_t i = 0; i < ranges; ++i) all[i].next = units * i / ranges, all[i].end = units * (i + 1) / ranges;
  torch::stable::parallel_for(0, ranges, 1, [&](int64_t first, int64_t) {
    for (int64_t i = 0; i < ranges; ++i) {
      Range& range = all[(first + i) % ranges];
      for (int64_t begin; (begin = range.next.fetch_add(piece, std::memory_order_relaxed)) < range.end;)
        kernel(args, begin, std::min(begin + piece, range.end), scratch());
    }
  });
}
#endif

// The library and the dispatch key of this build.
#ifndef PEFTOPS_LIBRARY
#define PEFTOPS_LIBRARY peftops
#endif
#ifndef PEFTOPS_KEY
#ifdef PEFTOPS_CUDA
#define PEFTOPS_KEY CUDA
#else
#define PEFTOPS_KEY CPU
#endif
#endif
#define PEFTOPS_IMPLEMENT(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)
#define PEFTOPS_IMPLEMENTATIONS(m) PEFTOPS_IMPLEMENT(PEFTOPS_LIBRARY, PEFTOPS_KEY, m)

}  // namespace peftops::ops
