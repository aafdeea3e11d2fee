// paged_attention by tensor cores, for queries and pages of one 16-bit dtype: 64 queries, sixteen a warp, over 64 or 32
// tokens at a time, as in FlashAttention-2 (arXiv:2307.08691). Scores stay in registers, where the weights that they
// become are an operand of the second product. A weight is there as two numbers of T, or bf16 would keep eight bits of
// it. In fp16 weights are times 2^15, or small ones would fall below its range; the division at the end undoes that.
//
// Width: columns that keys and values have at most. Limit: reading keys and values for few queries, products for many.
#pragma once
#include "kernels/cuda/async.cuh"
#include "kernels/cuda/paged.cuh"
#include "kernels/cuda/rows.cuh"

namespace peftops::cuda {

constexpr int kMmaQueries = 64;

template <class T, int Width> struct PagedTiles {
  static constexpr int kTokens = Width > 64 ? 32 : 64;   // so that two blocks of threads have room
  static constexpr int kRow = Width + 8;                 // 8 more: the eight rows of a matrix lie in different banks
  T query[kMmaQueries][kRow], key[kTokens][kRow], value[kTokens][kRow];
};

template <class T> constexpr float kLargestWeight = 1;
template <> constexpr float kLargestWeight<__half> = 1 << 15;

// Rows to a tile, in 16 bytes at a time if `wide`. at(i): where row i begins, or kNoRow for zeros, or kBadRow for
// NaN.
constexpr int64_t kNoRow = -1, kBadRow = -2;
template <class T, int Rows, int Row, class F>
__device__ void fetch_rows(T (&tile)[Rows][Row], const void* tensor, int64_t width, bool wide, const F& at) {
  constexpr int kUnits = (Row - 8) / 8;
  const T* rows = static_cast<const T*>(tensor);
  const int column = threadIdx.x % kUnits * 8, count = int(width) - column;
  for (int i = threadIdx.x / kUnits; i < Rows; i += kPagedThreads / kUnits) {
    const int64_t from = at(i);
    T* to = &tile[i][column];
    if (wide && from != kBadRow) {
      const bool exists = from >= 0 && count > 0;
      copy_async(to, exists ? rows + from + column : rows, exists);
      continue;
    }
    for (int c = 0; c < 8; ++c)
      to[c] = from == kNoRow || c >= count ? from_float<T>(0.f)
            : from == kBadRow              ? from_float<T>(kNotANumber)
                                           : rows[from + column + c];
  }
}

// Two neighbours as a register of an operand: rounded, and what rounding left of them.
template <class T> __device__ void split_pair(float x, float y, uint32_t& high, uint32_t& low) {
  const Pack<T> both = {{from_float<T>(x), from_float<T>(y)}};
  const Pack<T> rest = {{from_float<T>(x - to_float(both.at[0])), from_float<T>(y - to_float(both.at[1]))}};
  high = reinterpret_cast<const uint32_t&>(both), low = reinterpret_cast<const uint32_t&>(rest);
}

template <class T, int Width>
__global__ void __launch_bounds__(kPagedThreads, 2) paged_by_mma(PagedAttention a, bool wide_query, bool wide) {
  extern __shared__ __align__(16) unsigned char shared[];
  constexpr int kMmaTokens = PagedTiles<T, Width>::kTokens;
  auto& tiles = *reinterpret_cast<PagedTiles<T, Width>*>(shared);
  const PagedQueries q(a, blockIdx.x, kMmaQueries);
  const PagedParts parts(q);
  if (!has_part(q, parts)) return;
  const int lane = threadIdx.x % kWarp, own_row = threadIdx.x / kWarp * 16 + lane / 4;   // and the one eight below
  int from[2], to[2];   // tokens that its two queries see
#pragma unroll
  for (int h = 0; h < 2; ++h) from[h] = q.from(own_row + 8 * h), to[h] = q.position(own_row + 8 * h);
  const int top_row = own_row / 16 * 16, end_row = top_row + 16 < q.n ? top_row + 16 : q.n;   // of the warp
  fetch_rows(tiles.query, a.query, a.d, wide_query, [&](int i) { return i < q.n ? q.at_query(i) : kNoRow; });

  PagedWeight all[2];
  const PartsOfBlock mine(q, parts);
  for (int part = mine.first; part <= mine.last; ++part) {
    PagedWeight own[2];
    float sum[Width / 8][4] = {};
    for (int t = parts.from(part) / kMmaTokens * kMmaTokens; t < parts.to(part); t += kMmaTokens) {
      const auto row_of = [&](const PageStrides& at) {
        return [&](int i) {
          if (t + i >= q.length) return kNoRow;
          const int page = q.page_of(t + i);
          return page < 0 ? kBadRow : q.offset(page, at, t + i);
        };
      };
      __syncthreads();   // the chunk before is done with
      fetch_rows(tiles.key, a.key, a.d, wide, row_of(a.key_at));
      commit_copies();
      fetch_rows(tiles.value, a.value, a.dv, wide, row_of(a.value_at));
      commit_copies();
      wait_for_copies<1>();
      __syncthreads();
      const bool seen = top_row < end_row && t <= q.position(end_row - 1) && t + kMmaTokens > q.from(top_row);
      float score[kMmaTokens / 8][4] = {};
      if (seen) {
#pragma unroll
        for (int k = 0; k < Width; k += 16) {
          if (k >= a.d) break;
          uint32_t x[4], b[4];
          load_matrices(x, &tiles.query[top_row + lane % 16][k + lane / 16 * 8]);
#pragma unroll
          for (int n = 0; n < kMmaTokens / 16; ++n) {
            load_matrices(b, &tiles.key[16 * n + lane % 8 + lane / 16 * 8][k + lane / 8 % 2 * 8]);
            multiply<T>(score[2 * n], x, b[0], b[1]);
            multiply<T>(score[2 * n + 1], x, b[2], b[3]);
          }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float high = own[h].top, added = 0.f;
#pragma unroll
          for (int s = 0; s < kMmaTokens / 4; ++s) {
            float& v = score[s / 2][2 * h + s % 2];
            const int token = t + s / 2 * 8 + lane % 4 * 2 + s % 2;
            v = token >= from[h] && token <= to[h] ? v * (a.scale * kLog2e) : -__builtin_inff();
            high = fmaxf(high, v);
          }
#pragma unroll
          for (int step = 1; step < 4; step *= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, step));
#pragma unroll
          for (int s = 0; s < kMmaTokens / 4; ++s) {
            float& v = score[s / 2][2 * h + s % 2];
            v = exp2f(v - high) * kLargestWeight<T>, added += v;
          }
#pragma unroll
          for (int step = 1; step < 4; step *= 2) added += __shfl_xor_sync(~0u, added, step);
          const float down = exp2f(own[h].top - high);
          own[h].total = __fmaf_rn(own[h].total, down, added), own[h].top = high;
#pragma unroll
          for (int s = 0; s < Width / 4; ++s) sum[s / 2][2 * h + s % 2] *= down;
        }
      }
      wait_for_copies<0>();
      __syncthreads();
      if (!seen) continue;
#pragma unroll
      for (int k = 0; k < kMmaTokens / 16; ++k) {
        uint32_t high[4], low[4], b[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* weights = &score[2 * k + i / 2][i % 2 * 2];
          split_pair<T>(weights[0], weights[1], high[i], low[i]);
        }
#pragma unroll
        for (int n = 0; n < Width / 16; ++n) {
          if (16 * n >= a.dv) break;
          load_transposed(b, &tiles.value[16 * k + lane % 16][16 * n + lane / 16 * 8]);
          multiply<T>(sum[2 * n], high, b[0], b[1]);
          multiply<T>(sum[2 * n], low, b[0], b[1]);
          multiply<T>(sum[2 * n + 1], high, b[2], b[3]);
          multiply<T>(sum[2 * n + 1], low, b[2], b[3]);
        }
      }
    }
    finish_part<2>(q, mine, part, all, own, [&](const auto& f) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int n = 0; n < Width / 8; ++n) {
          const int column = 8 * n + lane % 4 * 2;
          if (own_row + 8 * h < q.n && column < a.dv)
            f(h, own_row + 8 * h, Few<2>{{sum[n][2 * h], sum[n][2 * h + 1]}}, column);
        }
    });
  }
}

}  // namespace peftops::cuda
