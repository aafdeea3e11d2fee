// Memory whose pages CUDA moves between the GPU and the host, for peftops/nn/paged_memory.py. The two signatures are
// those that torch.cuda.memory.CUDAPluggableAllocator looks up in a library.
#include <cuda_runtime_api.h>
#include <sys/types.h>

extern "C" __attribute__((visibility("default"))) void* peftops_paged_alloc(ssize_t bytes, int, cudaStream_t) {
  void* p = nullptr;
  if (cudaMallocManaged(&p, size_t(bytes), cudaMemAttachGlobal) == cudaSuccess) return p;
  cudaGetLastError();   // said by what is returned: torch raises its OutOfMemoryError
  return nullptr;
}
extern "C" __attribute__((visibility("default"))) void peftops_paged_free(void* p, ssize_t, int, cudaStream_t) {
  cudaFree(p);
}
