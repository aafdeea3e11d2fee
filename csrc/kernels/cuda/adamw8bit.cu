// A block of threads moves a unit, 4096 elements of one tensor; a thread holds two packs of 8 and their moments in
// registers from the first read to the last write. Blocks of up to 256 elements are lanes of a warp, larger ones several
// warps. The tensors are a table among the kernel's parameters, so a graph keeps it and no copy is needed. Limit:
// reading and writing, 18 bytes an element.
#include "kernels/adamw8bit.h"
#include "kernels/cuda/blocks.cuh"

namespace peftops::cuda {
namespace {

constexpr int kPack = 8, kTile = kWarp * kPack, kTiles = int(kAdamWUnit) / kTile, kPacks = kTiles / kBlockWarps;
constexpr int kTensors = 52;   // of one launch: parameters are 4 KB at most

struct Table {
  AdamW8bit a;                     // a.tensors is a pointer of the host, and cannot be used here
  int64_t first_unit;
  int count;
  AdamWTensor tensors[kTensors];
};
static_assert(sizeof(Table) <= 4096);

__constant__ DynamicCode codes[2] = {kFirstCode, kSecondCode};

template <class T> __device__ void load8(const void* from, int64_t i, int64_t n, float (&v)[kPack]) {
  const T* p = static_cast<const T*>(from) + i;
  if (n - i >= kPack && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
    constexpr int N = Pack<T>::kSize;
#pragma unroll
    for (int k = 0; k < kPack; k += N) {
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(p + k);
#pragma unroll
      for (int l = 0; l < N; ++l) v[k + l] = to_float(pack.at[l]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kPack; ++k) v[k] = i + k < n ? to_float(p[k]) : 0.f;
  }
}
template <class T> __device__ void store8(void* to, int64_t i, int64_t n, const float (&v)[kPack]) {
  T* p = static_cast<T*>(to) + i;
  if (n - i >= kPack && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
    constexpr int N = Pack<T>::kSize;
#pragma unroll
    for (int k = 0; k < kPack; k += N) {
      Pack<T> pack;
#pragma unroll
      for (int l = 0; l < N; ++l) pack.at[l] = from_float<T>(v[k + l]);
      *reinterpret_cast<Pack<T>*>(p + k) = pack;
    }
  } else {
#pragma unroll
    for (int k = 0; k < kPack; ++k)
      if (i + k < n) p[k] = from_float<T>(v[k]);
  }
}
__device__ void load8(const void* p, DType dtype, int64_t i, int64_t n, float (&v)[kPack]) {
  if (dtype == DType::f32) load8<float>(p, i, n, v);
  else if (dtype == DType::bf16) load8<__nv_bfloat16>(p, i, n, v);
  else load8<__half>(p, i, n, v);
}
__device__ void store8(void* p, DType dtype, int64_t i, int64_t n, const float (&v)[kPack]) {
  if (dtype == DType::f32) store8<float>(p, i, n, v);
  else if (dtype == DType::bf16) store8<__nv_bfloat16>(p, i, n, v);
  else store8<__half>(p, i, n, v);
}

struct alignas(8) Bytes { uint8_t at[kPack]; };

__device__ Bytes load_codes(const void* codes, int64_t i) {
  const uint8_t* p = static_cast<const uint8_t*>(codes) + i;
  if (reinterpret_cast<uintptr_t>(p) % 8 == 0) return *reinterpret_cast<const Bytes*>(p);
  Bytes b;
#pragma unroll
  for (int k = 0; k < kPack; ++k) b.at[k] = p[k];
  return b;
}
__device__ void store_codes(void* codes, int64_t i, const Bytes& b) {
  uint8_t* p = static_cast<uint8_t*>(codes) + i;
  if (reinterpret_cast<uintptr_t>(p) % 8 == 0) {
    *reinterpret_cast<Bytes*>(p) = b;
    return;
  }
#pragma unroll
  for (int k = 0; k < kPack; ++k) p[k] = b.at[k];
}

// The lines of both codes, where 32 lanes may look up as many of them.
struct Lines {
  float2 place[2][8], value[2][8];   // slope and offset

  __device__ void fill() {
    if (threadIdx.x < 16) {
      const int which = threadIdx.x / 8, at = threadIdx.x % 8;
      const DynamicCode& c = codes[which];
      place[which][at] = make_float2(c.slope[at], c.offset[at]);
      value[which][at] = make_float2(c.value_slope[at], c.value_offset[at]);
    }
  }
};
__device__ float on_line(float x, float2 line) { return __fadd_rn(__fmul_rn(x, line.x), line.y); }

__device__ float decode_first(const Lines& lines, int code) {
  const float number = float(code) - 127.f, place = fabsf(number) + 0.5f;
  return copysignf(on_line(place, lines.value[0][__float_as_uint(place) >> 23 & 7]), number);
}
__device__ float decode_second(const Lines& lines, int code) {
  const float place = float(code) + 1.5f;
  return on_line(place, lines.value[1][__float_as_uint(place) >> 23 & 7]);
}
template <int Which> __device__ float place_of(const Lines& lines, float x) {
  int e = 0;
#pragma unroll
  for (int i = 0; i < 6; ++i) e += x > codes[Which].bound[i];
  return on_line(x, lines.place[Which][e]);
}
__device__ int encode_first(const Lines& lines, float scaled) {
  return __float2int_rz(__fadd_rn(copysignf(place_of<0>(lines, fabsf(scaled)), scaled), 127.5f));
}
__device__ int encode_second(const Lines& lines, float v, float inverse) {
  return max(__float2int_rz(place_of<1>(lines, __fmul_rn(v, inverse))), int(v > 0.f));
}

__device__ bool is_apart(float m, float v) { return !(v <= kMostSecond) || !(fabsf(m) <= __FLT_MAX__); }
__device__ uint32_t mark_of(float m, float v) {
  const bool is_number = fabsf(m) <= __FLT_MAX__ && fabsf(v) <= __FLT_MAX__;
  return is_number ? (__float_as_uint(v) + 0x7fffffu) >> 23 : 255u;
}

// The largest magnitudes of a block, by their bits; the sign of the second says whether something is apart.
struct Most { uint32_t first, second; };
__device__ Most both(Most a, Most b) {
  constexpr uint32_t kSign = 0x80000000u;
  return {max(a.first, b.first), max(a.second & ~kSign, b.second & ~kSign) | ((a.second | b.second) & kSign)};
}
__device__ Most over_lanes(Most v, int log_lanes) {
  for (int step = 1; step < 1 << log_lanes; step *= 2)
    v = both(v, {__shfl_xor_sync(~0u, v.first, step), __shfl_xor_sync(~0u, v.second, step)});
  return v;
}
__device__ float inverse_of(float absmax) { return __fdiv_rn(1.f, fmaxf(absmax, kLeastAbsmax)); }

// What a lane holds of a tensor: 8 elements from i on.
struct Held {
  float m[kPack], v[kPack];

  __device__ void read(const AdamW8bit& a, const AdamWTensor& t, const Lines& lines, int64_t i, int64_t kept) {
    if (!t.first_absmax) {
      load8<float>(t.first, i, t.n, m);
      load8<float>(t.second, i, t.n, v);
      return;
    }
    const bool has = i < kept;
    const Bytes first = has ? load_codes(t.first, i) : Bytes{}, second = has ? load_codes(t.second, i) : Bytes{};
    const float first_absmax = has ? t.first_absmax[i / a.block_size] : 0.f;
    const float second_absmax = has ? t.second_absmax[i / a.block_size] : 0.f;
    const bool marked = signbit(second_absmax);
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      m[k] = __fmul_rn(decode_first(lines, first.at[k]), first_absmax);
      v[k] = __fmul_rn(decode_second(lines, second.at[k]), fabsf(second_absmax));
      if (marked && second.at[k] == 0 && first.at[k] >= kLeastMark)
        m[k] = 0.f, v[k] = __uint_as_float(uint32_t(first.at[k]) << 23);
    }
  }

  __device__ Most move(const AdamW8bit& a, const AdamWTensor& t, int64_t i) {
    Most most = {0, 0};
    if (i >= t.n) {
#pragma unroll
      for (int k = 0; k < kPack; ++k) m[k] = v[k] = 0.f;
      return most;
    }
    float p[kPack], g[kPack];
    load8(t.parameter, t.dtype, i, t.n, p);
    load8(t.grad, t.grad_dtype, i, t.n, g);
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      m[k] = __fadd_rn(__fmul_rn(a.beta1, m[k]), __fmul_rn(a.rest1, g[k]));
      v[k] = __fadd_rn(__fmul_rn(a.beta2, v[k]), __fmul_rn(__fmul_rn(a.rest2, g[k]), g[k]));
      const float size = __fmul_rn(a.size, m[k]), root = __fadd_rn(__fsqrt_rn(v[k]), a.floor);
      p[k] = __fsub_rn(__fmul_rn(a.decay, p[k]), __fdiv_rn(size, root));
      if (i + k >= t.n) m[k] = v[k] = 0.f;
      const bool apart = is_apart(m[k], v[k]);
      const uint32_t first = __float_as_uint(m[k]) & 0x7fffffffu, second = __float_as_uint(v[k]);
      most = both(most, apart ? Most{0, 0x80000000u} : Most{first, second});
    }
    store8(t.parameter, t.dtype, i, t.n, p);
    return most;
  }

  __device__ void write(const AdamWTensor& t, const Lines& lines, int64_t i, Most most) const {
    const bool marked = most.second >> 31;
    const float by_first = inverse_of(__uint_as_float(most.first));
    const float by_second = inverse_of(__uint_as_float(most.second & 0x7fffffffu));
    Bytes first, second;
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      if (marked && is_apart(m[k], v[k])) {
        first.at[k] = uint8_t(mark_of(m[k], v[k])), second.at[k] = 0;
        continue;
      }
      first.at[k] = uint8_t(encode_first(lines, __fmul_rn(m[k], by_first)));
      second.at[k] = uint8_t(encode_second(lines, v[k], by_second));
      if (marked && second.at[k] == 0 && first.at[k] >= kLeastMark) second.at[k] = 1;
    }
    store_codes(t.first, i, first);
    store_codes(t.second, i, second);
  }
};

__global__ void __launch_bounds__(kBlockThreads) step(const __grid_constant__ Table table) {
  __shared__ Lines lines;
  __shared__ Most most_of_tile[kTiles];
  lines.fill();
  __syncthreads();

  const AdamW8bit& a = table.a;
  const int64_t unit = table.first_unit + blockIdx.x;
  int which = 0;
  while (which + 1 < table.count && table.tensors[which + 1].units_before <= unit) ++which;
  const AdamWTensor& t = table.tensors[which];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t begin = (unit - t.units_before) * kAdamWUnit, kept = ceil_div(t.n, a.block_size) * a.block_size;
  const int lanes = a.block_size < kTile ? int(a.block_size) / kPack : kWarp, log_lanes = 31 - __clz(lanes);
  const int tiles = a.block_size > kTile ? int(a.block_size) / kTile : 1;   // of a block

  Held held[kPacks];
  Most most[kPacks];
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int tile = j * kBlockWarps + warp;
    const int64_t i = begin + (tile * kWarp + lane) * kPack;
    held[j].read(a, t, lines, i, kept);
    most[j] = over_lanes(held[j].move(a, t, i), log_lanes);
    if (!t.first_absmax) {
      store8<float>(t.first, i, t.n, held[j].m);
      store8<float>(t.second, i, t.n, held[j].v);
    }
    if (lane == 0) most_of_tile[tile] = most[j];
  }
  if (!t.first_absmax) return;
  if (tiles > 1) __syncthreads();
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int tile = j * kBlockWarps + warp, first_tile = tile / tiles * tiles;
    const int64_t i = begin + (tile * kWarp + lane) * kPack;
    for (int k = 0; tiles > 1 && k < tiles; ++k) most[j] = both(most[j], most_of_tile[first_tile + k]);
    if (i >= kept) continue;
    held[j].write(t, lines, i, most[j]);
    if (lane % lanes == 0 && tile == first_tile) {
      t.first_absmax[i / a.block_size] = __uint_as_float(most[j].first);
      t.second_absmax[i / a.block_size] = __uint_as_float(most[j].second);
    }
  }
}

}  // namespace

cudaError_t adamw8bit(const AdamW8bit& a, cudaStream_t stream) {
  Table table = {a, 0, 0, {}};
  for (int64_t begin = 0; begin < a.count; begin += kTensors) {
    const int64_t end = a.count - begin < kTensors ? a.count : begin + kTensors;
    const int64_t units = (end < a.count ? a.tensors[end].units_before : a.units) - a.tensors[begin].units_before;
    if (units == 0) continue;
    table.first_unit = a.tensors[begin].units_before;
    table.count = int(end - begin);
    for (int64_t i = begin; i < end; ++i) table.tensors[i - begin] = a.tensors[i];
    step<<<unsigned(units), kBlockThreads, 0, stream>>>(table);
    if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace peftops::cuda
