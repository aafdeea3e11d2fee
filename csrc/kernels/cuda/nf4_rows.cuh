// An NF4 weight for rows.cuh. A byte of codes is half a fragment register: a pair of elements, found in a table with a
// copy for each bank.
#pragma once
#include "kernels/cuda/async.cuh"
#include "kernels/cuda/nf4_decode.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/nf4_linear.h"

namespace peftops::cuda {

constexpr int kChunk = 64;    // columns that share an absmax at most
constexpr int kScales = 64;   // chunks whose absmax values are decoded at a time

// Codes are rounded to the type of x, all of them times a factor that puts them close to what the type can hold. Of
// 4096 factors in [1, 2), over quantised normal weights: the least error in bf16, 8.7e-4 rms of the weight instead
// of 1.5e-3 at factor 1, and a bias of 4e-5 instead of 4e-4; in fp16 1.0e-4 instead of 1.9e-4, and 3e-6. The sums are
// divided by it. bf16 has the range of fp32, in which 64 of its largest numbers have no sum: a 128th of them has.
template <class T> constexpr float kCodeFactor = 1.f;
template <> constexpr float kCodeFactor<__nv_bfloat16> = 1.37451171875f / 128;
template <> constexpr float kCodeFactor<__half> = 1.5751953125f;

template <class T> struct alignas(16) PairTable {
  uint32_t at[256][kWarp];   // [byte][lane]: the element of the high nibble, and above it that of the low one

  __device__ static T of(int code) { return from_float<T>(__fmul_rn(kCodeFactor<T>, nf4_codes.at[code])); }
  template <int Threads> __device__ void fill() {   // by all of them, four copies at a time; a barrier must follow
    constexpr int kFours = kWarp / 4;
#pragma unroll 4
    for (int i = threadIdx.x; i < 256 * kFours; i += Threads) {
      const int byte = i / kFours;
      const T pair[2] = {of(byte >> 4), of(byte & 15)};
      const uint32_t word = *reinterpret_cast<const uint32_t*>(pair);
      reinterpret_cast<uint4*>(at)[i] = make_uint4(word, word, word, word);
    }
  }
};

// This lane's column of it, by its address in shared memory: of the i-th of four bytes, an instruction takes the byte out,
// one makes the address of it, and one looks it up.
struct PairColumn {
  uint32_t address;
  template <class T> __device__ explicit PairColumn(const PairTable<T>& table)
      : address(shared_address(&table.at[0][threadIdx.x % kWarp])) {}
  __device__ uint32_t operator()(uint32_t bytes, int i) const {
    constexpr uint32_t kRow = kWarp * sizeof(uint32_t);
    uint32_t pair;
    asm("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(__byte_perm(bytes, 0, 0x4440 + i) * kRow + address));
    return pair;
  }
  // After the barrier that says that the table is filled: look-ups have an address that only this makes, so none is earlier.
  __device__ void is_filled() { asm volatile("" : "+r"(address)); }
};

template <class T, int Outs> struct Nf4Stream {
  static constexpr int kBits = 4, kColumns = kChunk, kPieces = 1, kOuts = Outs;
  static constexpr bool kZeros = false, kEarlyScales = true, kHoldsScales = true;
  static constexpr float kFactor = kCodeFactor<T>;
  struct Memory {
    PairTable<T> pairs;
    float scale[kOuts][kScales + 1];
  };
  const Nf4Weight& w;
  int log_block;

  template <int Threads> __device__ PairColumn begin(Memory& memory) const {
    memory.pairs.template fill<Threads>();
    return PairColumn(memory.pairs);
  }
  __device__ static constexpr int staged() { return kScales; }
  __device__ static constexpr int parts() { return 1; }

  // The absmax values of a stage, on their way from memory to shared memory: what a thread has of them, not decoded yet.
  template <int Threads> struct Scales {
    static constexpr int kEach = kOuts * kScales / Threads;
    float scale[kEach], offset;
    uint8_t code[kEach];

    __device__ void load(const Nf4Stream& of, int64_t first, int begin) {
      const Nf4Weight& w = of.w;
      offset = offset_of(w);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int e = threadIdx.x + i * Threads;
        const int64_t row = first + e / kScales, column = (begin + int64_t(e % kScales)) * kChunk;
        scale[i] = 0.f, code[i] = 0;
        if (row >= w.rows || column >= w.cols) continue;
        const int64_t block = (w.first + row * w.cols + column) >> of.log_block;
        scale[i] = w.absmax ? w.absmax[block] : w.absmax_scale[uint64_t(block) / kAbsmaxBlock];
        if (!w.absmax) code[i] = w.absmax_code[block];
      }
    }
    __device__ void store(const Nf4Stream& of, Memory& memory, int) const {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int e = threadIdx.x + i * Threads;
        memory.scale[e / kScales][e % kScales] =
            of.w.absmax ? scale[i] : __fadd_rn(__fmul_rn(dynamic_map.at[code[i]], scale[i]), offset);
      }
    }
  };
  // Two bytes, four columns.
  __device__ void decode(const PairColumn& pairs, const uint2 (&codes)[1], int i, uint32_t& low, uint32_t& high) const {
    const uint32_t bytes = i < 2 ? codes[0].x : codes[0].y;
    low = pairs(bytes, i % 2 * 2), high = pairs(bytes, i % 2 * 2 + 1);
  }
  __device__ Affine affine(const Memory& memory, int row, int begin, int chunk, int) const {
    return {memory.scale[row][chunk - begin], 0.f};
  }
};

// Whether there are W and x, and they can be read in such chunks.
inline bool has_chunks(const Nf4Linear& a) {
  return a.weight.cols > 0 && a.dtype != DType::f32 && a.weight.cols % kChunk == 0 &&
         a.weight.block_size % kChunk == 0 && aligned(a.weight.packed, 8) && aligned(a.x, 16);
}

}  // namespace peftops::cuda
