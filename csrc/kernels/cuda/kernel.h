// How a CUDA kernel is called: enqueued on the caller's stream, on the current device. It does not allocate and does
// not wait, so it may be captured into a CUDA graph. It returns only the error of the launch.
#pragma once
#include <cuda_runtime_api.h>

namespace peftops::cuda {

template <class Args> using Kernel = cudaError_t(const Args&, cudaStream_t);

}  // namespace peftops::cuda
