// paged_attention of any dtypes and widths, without tensor cores: 16 queries, four a warp, over 32 tokens at a time. A
// lane has a token while scores are made, and then columns of the values. Keys and values come through shared memory in
// slices of 32 columns. Wide: how many slices a result has at most.
#pragma once
#include "kernels/cuda/blocks.cuh"
#include "kernels/cuda/paged.cuh"

namespace peftops::cuda {

constexpr int kLaneQueries = 16, kOwn = kLaneQueries / kPagedWarps, kTokens = 32, kSlice = 32;

struct PagedMemory {
  float query[kLaneQueries][kMaxPagedHeadDim];
  float4 tokens[kTokens][kSlice / 4];   // see columns()
  float weights[kLaneQueries][kTokens];

  // Four columns of a token. Where they lie differs from token to token, so that neither of them meet in a bank.
  __device__ float4& columns(int token, int four) { return tokens[token][four ^ (token % 8)]; }
  __device__ float column(int token, int c) {
    return reinterpret_cast<const float*>(&columns(token, c / 4))[c % 4];
  }
};

// Elements i to i + 4, which begin on 16 bytes, or on 8 if they are of 16 bits.
__device__ inline float4 four_elements(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::f32) return *reinterpret_cast<const float4*>(static_cast<const float*>(p) + i);
  const uint2 bits = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p) + i);
  const auto at = [&](int c) { return element(&bits, dtype, c); };
  return make_float4(at(0), at(1), at(2), at(3));
}

// One slice of this chunk's keys or values. Four threads share a token; zeros for what does not exist.
struct TokenSlice {
  const PagedQueries& q;
  PagedMemory& memory;
  const bool wide;   // whether rows of pages can be read four elements at a time
  int page = 0, token = 0;   // of this thread
  bool exists = false;

  __device__ TokenSlice(const PagedQueries& q, PagedMemory& memory, bool wide) : q(q), memory(memory), wide(wide) {}
  __device__ void begin(int first) {
    token = first + threadIdx.x / 4, exists = token < q.length;
    if (exists) page = q.page_of(token);
  }
  __device__ void fetch(const void* pages, const PageStrides& at, int width, int column) const {
    const int64_t row = q.offset(page, at, token) + column;
    float4 v[2];   // 16 columns apart: what neighbours ask for at once is in whole sectors
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int first = 16 * h + threadIdx.x % 4 * 4, count = exists ? width - column - first : 0;
      if (wide && count >= 4 && page >= 0) {
        v[h] = four_elements(pages, q.a.page_dtype, row + first);
        continue;
      }
      float each[4];
#pragma unroll
      for (int c = 0; c < 4; ++c)
        each[c] = c >= count ? 0.f : page < 0 ? kNotANumber : element(pages, q.a.page_dtype, row + first + c);
      v[h] = make_float4(each[0], each[1], each[2], each[3]);
    }
    __syncthreads();   // whoever read of the slice before is done
    const int j = threadIdx.x / 4, odd = j % 2;   // an odd token begins with the other half
    memory.columns(j, 4 * odd + threadIdx.x % 4) = odd ? v[1] : v[0];
    memory.columns(j, 4 - 4 * odd + threadIdx.x % 4) = odd ? v[0] : v[1];
    __syncthreads();
  }
};
__device__ inline float4 four(const float* p) { return *reinterpret_cast<const float4*>(p); }

template <int Wide> __global__ void __launch_bounds__(kPagedThreads, 2) paged_by_lanes(PagedAttention a, bool wide) {
  __shared__ PagedMemory memory;
  const PagedQueries q(a, blockIdx.x, kLaneQueries);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  TokenSlice slice(q, memory, wide);
  const PagedParts parts(q);
  if (!has_part(q, parts)) return;
  const int d = int(a.d), dv = int(a.dv), padded = (d + 3) / 4 * 4;
  for (int e = threadIdx.x; e < q.n * padded; e += kPagedThreads) {
    const int i = e / padded, c = e % padded;
    memory.query[i][c] = c < d ? element(a.query, a.dtype, q.at_query(i) + c) * (a.scale * kLog2e) : 0.f;
  }
  PagedWeight all[kOwn];
  const PartsOfBlock mine(q, parts);
  for (int part = mine.first; part <= mine.last; ++part) {
    PagedWeight own[kOwn];
    float sum[kOwn][Wide] = {};
    for (int t = parts.from(part) / kTokens * kTokens; t < parts.to(part); t += kTokens) {
      slice.begin(t);
      float score[kOwn] = {};
      for (int column = 0; column < d; column += kSlice) {
        slice.fetch(a.key, a.key_at, d, column);
        const int steps = padded - column < kSlice ? padded - column : kSlice;
#pragma unroll
        for (int o = 0; o < kOwn; ++o) {
          if (warp + kPagedWarps * o >= q.n) break;
          for (int c = 0; c < steps; c += 4) {
            const float4 x = four(&memory.query[warp + kPagedWarps * o][column + c]), k = memory.columns(lane, c / 4);
            score[o] = __fmaf_rn(x.w, k.w, __fmaf_rn(x.z, k.z, __fmaf_rn(x.y, k.y, __fmaf_rn(x.x, k.x, score[o]))));
          }
        }
      }
#pragma unroll
      for (int o = 0; o < kOwn; ++o) {
        const int i = warp + kPagedWarps * o;
        if (i >= q.n) break;
        const bool seen = t + lane >= q.from(i) && t + lane <= q.position(i);
        const float s = seen ? score[o] : -__builtin_inff();
        const float high = fmaxf(own[o].top, over_lanes(s, 5, [](float a, float b) { return fmaxf(a, b); }));
        const float weight = exp2f(s - high), down = exp2f(own[o].top - high);
        own[o].total = __fmaf_rn(own[o].total, down, over_lanes(weight, 5, [](float a, float b) { return a + b; }));
        own[o].top = high;
        memory.weights[i][lane] = weight;
#pragma unroll
        for (int s = 0; s < Wide; ++s) sum[o][s] *= down;
      }
#pragma unroll
      for (int s = 0; s < Wide; ++s) {
        if (s * kSlice >= dv) break;
        slice.fetch(a.value, a.value_at, dv, s * kSlice);
#pragma unroll
        for (int o = 0; o < kOwn; ++o) {
          if (warp + kPagedWarps * o >= q.n) break;
#pragma unroll
          for (int j = 0; j < kTokens; j += 4) {
            const float4 w = four(&memory.weights[warp + kPagedWarps * o][j]);
            const float weight[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[o][s] = __fmaf_rn(weight[i], memory.column(j + i, lane), sum[o][s]);
          }
        }
      }
    }
    finish_part<1>(q, mine, part, all, own, [&](const auto& f) {
#pragma unroll
      for (int o = 0; o < kOwn; ++o)
#pragma unroll
        for (int s = 0; s < Wide; ++s) {
          const int i = warp + kPagedWarps * o;
          const int column = s * kSlice + lane;
          if (i < q.n && column < dv) f(o, i, Few<1>{{sum[o][s]}}, column);
        }
    });
  }
}

}  // namespace peftops::cuda
