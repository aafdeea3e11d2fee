// The parts of a multi-stage pipeline: asynchronous copies from global to shared memory, and the loads of matrix
// fragments from there.
#pragma once
#include "kernels/cuda/device.cuh"

namespace peftops::cuda {

constexpr int kStages = 4;   // of every pipeline: the one that is read, and three ahead

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 16 bytes; zeros if they do not exist.
__device__ inline void copy_async(void* to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared_address(to)), "l"(from), "r"(exists ? 16 : 0) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Open>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Open) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements, a row of the q-th at the address of lane 8 q + row.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ inline void load_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// Brings a panel of Rows rows and Units units of 16 bytes, a step along the rows at a time, to shared memory: by all
// threads, whose addresses are worked out once. Swizzle(unit, row): where in its row a unit goes.
template <class T, int Threads, int Rows, int Units, class Swizzle> struct PanelCopy {
  static constexpr int kEach = Rows * Units / Threads, kApart = Threads / Units, kPerUnit = 16 / sizeof(T);
  static_assert(Rows * Units % Threads == 0 && kApart % 8 == 0, "a thread has the same unit of every row, and swizzle");
  const T* from;       // this thread's unit of its first row
  int64_t stride;      // from row to row
  int rows, columns;   // that exist from that row, and from that unit on

  __device__ PanelCopy(const T* matrix, int64_t first_row, int64_t all_rows, int64_t all_columns)
      : stride(all_columns) {
    const int64_t row = first_row + threadIdx.x / Units, left = all_rows - row;
    const int column = threadIdx.x % Units * kPerUnit;
    from = matrix + (left > 0 ? row : 0) * stride + column;
    rows = left < Rows ? int(left) : Rows, columns = int(all_columns) - column;
  }
  __device__ void operator()(uint4 (&to)[Rows][Units], int step) const {
    const int row = threadIdx.x / Units, unit = Swizzle::of(threadIdx.x % Units, row), column = step * (Units * kPerUnit);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const bool exists = i * kApart < rows && column < columns;
      copy_async(&to[row + i * kApart][unit], exists ? from + i * kApart * stride + column : from, exists);
    }
  }
};

}  // namespace peftops::cuda
