// Hopper's engine for copies: one thread asks for a box of a matrix in global memory, and the engine writes it to shared
// memory, swizzled if wanted, with zeros in place of rows that do not exist. It counts the bytes at an mbarrier.
#pragma once
#include <cuda.h>

#include "kernels/cuda/wgmma.cuh"

namespace peftops::cuda {

// One arrival, and so many bytes to come.
__device__ inline void expect(Mbarrier barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier.address), "r"(bytes) : "memory");
}
// The box whose first element is in this column and row.
__device__ inline void bring_box(uint32_t to, const CUtensorMap* matrix, int column, int row, Mbarrier barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      ::"r"(to), "l"(matrix), "r"(column), "r"(row), "r"(barrier.address) : "memory");
}

// A matrix of contiguous rows, for kernels: with boxes of so many rows of box_bytes each. Both the matrix and its rows
// begin at multiples of 16 bytes. The runtime knows where the driver's function is, so that nothing links the driver.
template <class Element>
cudaError_t describe(CUtensorMap* map, const Element* matrix, int64_t rows, int64_t columns, int box_rows,
                     int box_bytes, CUtensorMapSwizzle swizzle) {
  static_assert(sizeof(Element) <= 2);
  static std::atomic<void*> known{nullptr};   // the search for it takes longer than its work
  void* function = known.load(std::memory_order_relaxed);
  if (!function) {
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    if (status != cudaSuccess) return status;
    if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    known.store(function, std::memory_order_relaxed);
  }
  const cuuint64_t size[2] = {cuuint64_t(columns), cuuint64_t(rows)}, pitch[1] = {cuuint64_t(columns) * sizeof(Element)};
  const cuuint32_t box[2] = {cuuint32_t(box_bytes / sizeof(Element)), cuuint32_t(box_rows)}, step[2] = {1, 1};
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  const CUresult result =
      encode(map, sizeof(Element) == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 2,
             const_cast<Element*>(matrix), size, pitch, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace peftops::cuda
