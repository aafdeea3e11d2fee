// A few neighbouring elements in the registers of a thread, and the loads and stores that move them at once.
#pragma once
#include "kernels/cuda/device.cuh"

namespace peftops::cuda {

// Words that one instruction moves. Stores are spelled out: the compiler merges parts of them with those of a tail.
__device__ inline void move(uint32_t (&to)[1], const void* p) { to[0] = *static_cast<const uint32_t*>(p); }
__device__ inline void move(uint32_t (&to)[2], const void* p) {
  const uint2 v = *static_cast<const uint2*>(p);
  to[0] = v.x, to[1] = v.y;
}
__device__ inline void move(uint32_t (&to)[4], const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
__device__ inline void move(void* p, const uint32_t (&v)[1]) {
  asm volatile("st.global.b32 [%0], %1;" :: "l"(__cvta_generic_to_global(p)), "r"(v[0]) : "memory");
}
__device__ inline void move(void* p, const uint32_t (&v)[2]) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" :: "l"(__cvta_generic_to_global(p)), "r"(v[0]), "r"(v[1]) : "memory");
}
__device__ inline void move(void* p, const uint32_t (&v)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :: "l"(__cvta_generic_to_global(p)), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}

// N elements that are neighbours, as far as there are so many; zeros after them.
template <int N> struct Few {
  float at[N] = {};

  template <class T> union Whole { uint32_t words[N * sizeof(T) / 4]; T at[N]; __device__ Whole() {} };

  template <class T> __device__ void load(const T* p) {   // all of them, aligned to their size
    Whole<T> whole;
    move(whole.words, p);
#pragma unroll
    for (int i = 0; i < N; ++i) at[i] = to_float(whole.at[i]);
  }
  template <class T> __device__ void load(const T* p, int64_t count) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) at[i] = to_float(p[i]);
  }
  template <class T> __device__ void store(T* p, int64_t count, bool wide) const {
    if constexpr (N > 1)   // one is a word or less
      if (wide && count >= N) {
        Whole<T> whole;
#pragma unroll
        for (int i = 0; i < N; ++i) whole.at[i] = from_float<T>(at[i]);
        return move(p, whole.words);
      }
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) p[i] = from_float<T>(at[i]);
  }
  // From element `first` on, of a tensor whose dtype is known at run time.
  __device__ void store(void* p, DType dtype, int64_t first, int64_t count, bool wide) const {
    if (dtype == DType::f32) store(static_cast<float*>(p) + first, count, wide);
    else if (dtype == DType::bf16) store(static_cast<__nv_bfloat16*>(p) + first, count, wide);
    else store(static_cast<__half*>(p) + first, count, wide);
  }
  __device__ void keep(uint32_t bits) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (!(bits >> i & 1)) at[i] = 0.f;
  }
};

}  // namespace peftops::cuda
