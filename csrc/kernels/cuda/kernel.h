// How a CUDA kernel is called: enqueued on the caller's stream, on the current device. It allocates nothing and waits
// for nothing, so it may be captured into a CUDA graph; what it returns is the error of the launch alone.
#pragma once
#include <cuda_runtime_api.h>

namespace peftops::cuda {

template <class Args> using Kernel = cudaError_t(const Args&, cudaStream_t);

}  // namespace peftops::cuda
