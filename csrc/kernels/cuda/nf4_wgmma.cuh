// y = x W^T for many rows of 16-bit x on Hopper: y^T = W x^T by wgmma, W decoded into registers.
//
// A block of threads has 128 rows of W, Rows rows of x, and all or a part of the depth. One warpgroup fills a ring of
// stages in shared memory, 64 columns at a time: the engine for copies (tma.cuh) brings x and the codes, and a thread
// works out the scales of a row of W. Two warpgroups multiply, 64 rows of W each. They wait for each other by an mbarrier
// a stage and direction. Blocks with parts of the depth write fp32 sums, which a second kernel adds up in order.
//
// Sums are kept in units of the current absmax: before a chunk is added they are multiplied by the absmax before over the
// absmax now, and at the end by the last. So W is never rounded with its absmax, and there is one set of accumulators.
//
// wgmma reads the registers of A while it runs, and ptxas (13.0) does not know this across the back edge of a loop: with
// one chunk an iteration it put the next chunk's codes into the same registers. With two they have their own, and
// test_nf4_sm90.py reads the machine code.
//
// The low-rank term is more depth, [x | scaling u] [W | lora_B]^T, 16 ranks a stage. u and often lora_B are fp32, so each
// is the sum of three bf16 numbers, which have the range of fp32, and eight products add up all pairs of them but the
// smallest.
//
// The error. Let there be c = k / 64 chunks and S the sum of magnitudes |x w| of a result. Each product with a code is
// exact and each of the k additions errs by 2^-24 (on hardware, which cuts, 2^-23) of what is there, as in nf4_many.cuh.
// A chunk's rescaling rounds a quotient and a product: 2 * 2^-24. What a chunk contributed is rescaled at most c times, by
// quotients whose true product telescopes to its absmax over the last, and then once by the last absmax and the factor of
// the codes, two products more. So the error is at most (k + 2 c + 2) 2^-24 S to first order, and k / 32 + 2 more terms
// than nf4_many.cuh's bound of 2 k. Parts of the depth have fewer additions each, and one more to add it up: never more in
// all. The missing pair of the low-rank term is below 2^-30 of it. That holds while absmax values of neighbouring chunks
// of a row lie within 2^60 of each other; beyond, sums may overflow or vanish. Chunks of zeros have absmax 0: their codes
// are taken for that of zero, and the unit stays.
#pragma once
#include "kernels/cuda/nf4_parts.cuh"
#include "kernels/cuda/tma.cuh"

namespace peftops::cuda {

constexpr int kGroup = 128, kWgmmaThreads = 3 * kGroup, kConsumers = 2 * kGroup;
constexpr int kWgmmaOuts = 128;   // rows of W a block of threads: as many as threads that know their scales
constexpr int kRowBytes = 128;    // of a row of x in a stage
constexpr int kCodeBytes = kChunk / 2;
constexpr int kRankStep = 16;     // ranks a stage: they come in four kinds of 16 bits

template <int Rows> struct WgmmaStage {
  uint4 x[Rows][kRowBytes / 16];             // 16-byte units of eight rows are permuted: unit ^ row % 8
  uint4 codes[kWgmmaOuts][kCodeBytes / 16];
  float2 scale[kWgmmaOuts];                  // of the sums so far, and the chunk's absmax
};

template <class T, int Rows> struct WgmmaMemory {   // from a multiple of 1024 bytes on
  static constexpr int kRing = Rows == 64 ? 8 : Rows == 128 ? 6 : 4;
  union {
    WgmmaStage<Rows> stage[kRing];
    float sums[Rows][kWgmmaOuts + 4];   // afterwards
  };
  PairTable<T> pairs;
  float map[256];
  uint64_t full[kRing], empty[kRing];

  __device__ Mbarrier is_full(int at) { return {shared_address(&full[at])}; }
  __device__ Mbarrier is_empty(int at) { return {shared_address(&empty[at])}; }
};

// Goes around the ring. Parity: of the phase of this round.
template <int Stages> struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++stage == Stages) stage = 0, parity ^= 1;
  }
};

struct Chunks { int begin, end; };   // of the depth, for this block of threads

// v in bf16 numbers, each the upper half of a word: whole + rest + last == v. An infinity or a NaN has only the first
// part, and `finite` is to stand for it beside small parts of the other operand: see tf32.cuh.
struct Bf16Parts {
  uint32_t whole, finite, rest, last;

  __device__ explicit Bf16Parts(float v) {
    constexpr uint32_t kUpper = 0xffff0000;
    const bool is_finite = fabsf(v) < __int_as_float(0x7f800000);
    const uint32_t cut = __float_as_uint(is_finite ? v : v + v) & kUpper;
    const float left = is_finite ? v - __uint_as_float(cut) : 0.f;
    whole = cut, finite = is_finite ? cut : 0, rest = __float_as_uint(left) & kUpper;
    last = __float_as_uint(left - __uint_as_float(rest));
  }
};
__device__ inline uint32_t pair_of(uint32_t low, uint32_t high) { return __byte_perm(low, high, 0x7632); }

// The scales of this thread's row of W: what is in memory of some chunks, on its way.
struct ScaleReader {
  static constexpr int kEach = 4;   // chunks at a time, so that their latencies overlap
  struct Held { float scale[kEach]; uint32_t code[kEach]; };
  const Nf4Weight& w;
  const float* map;
  int log_block, end;
  int64_t flat;   // of the row
  float offset = offset_of(w), unit = 1.f;

  __device__ Held load(int chunk) const {
    Held held;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t block = (flat + int64_t(chunk + i < end ? chunk + i : chunk) * kChunk) >> log_block;
      held.scale[i] = w.absmax ? w.absmax[block] : w.absmax_scale[uint64_t(block) / kAbsmaxBlock];
      held.code[i] = w.absmax ? 0 : w.absmax_code[block];
    }
    return held;
  }
  __device__ float absmax(const Held& held, int i) const {
    return w.absmax ? held.scale[i] : __fadd_rn(__fmul_rn(map[held.code[i]], held.scale[i]), offset);
  }
  // In the order of chunks.
  __device__ float2 next(float absmax) {
    if (absmax == 0.f) return make_float2(1.f, 0.f);
    const float factor = __fdiv_rn(unit, absmax);
    unit = absmax;
    return make_float2(factor, absmax);
  }
};

// The work of the first warpgroup. Ranks: of the low-rank term, 0 where another part of the depth has it.
template <class T, int Rows>
__device__ void fill_stages(const Nf4Linear& a, int log_block, int64_t first_row, int64_t first_out, Chunks chunks,
                            int64_t ranks, const CUtensorMap* x, const CUtensorMap* codes, WgmmaMemory<T, Rows>& memory) {
  const int64_t out = first_out + threadIdx.x;   // in place of rows that do not exist it has the last row
  const int64_t row = out < a.weight.rows ? out : a.weight.rows - 1;
  ScaleReader scales{a.weight, memory.map, log_block, chunks.end, row * a.weight.cols};
  const bool first_lane = threadIdx.x % kWarp == 0;
  Ring<WgmmaMemory<T, Rows>::kRing> ring;
  typename ScaleReader::Held next;
  if (chunks.begin < chunks.end) next = scales.load(chunks.begin);
#pragma unroll 1
  for (int chunk = chunks.begin; chunk < chunks.end; chunk += ScaleReader::kEach) {
    const typename ScaleReader::Held now = next;
    if (chunk + ScaleReader::kEach < chunks.end) next = scales.load(chunk + ScaleReader::kEach);
    float absmax[ScaleReader::kEach];
    float2 scale[ScaleReader::kEach];
#pragma unroll
    for (int i = 0; i < ScaleReader::kEach; ++i) absmax[i] = scales.absmax(now, i);
#pragma unroll
    for (int i = 0; i < ScaleReader::kEach; ++i) scale[i] = scales.next(absmax[i]);
#pragma unroll
    for (int i = 0; i < ScaleReader::kEach; ++i) {
      if (chunk + i >= chunks.end) break;
      WgmmaStage<Rows>& to = memory.stage[ring.stage];
      const Mbarrier full = memory.is_full(ring.stage);
      memory.is_empty(ring.stage).wait(~ring.parity & 1);   // the first time around they are
      to.scale[threadIdx.x] = scale[i];
      __syncwarp();
      if (threadIdx.x == 0) {
        expect(full, Rows * kRowBytes + kWgmmaOuts * kCodeBytes);
        bring_box(shared_address(to.x), x, (chunk + i) * kChunk, int(first_row), full);
        bring_box(shared_address(to.codes), codes, (chunk + i) * kCodeBytes, int(first_out), full);
      } else if (first_lane) {
        full.arrive();
      }
      ring.next();
    }
  }
  const float factor = __fmul_rn(a.scaling, kCodeFactor<T>);   // as all sums have it
#pragma unroll 1
  for (int64_t first = 0; first < ranks; first += kRankStep) {
    memory.is_empty(ring.stage).wait(~ring.parity & 1);
#pragma unroll 1
    for (int e = threadIdx.x; e < 2 * Rows; e += kGroup) {   // eight ranks of a row, which are a unit of each kind
      const int at = e / 2, half = e % 2;
      const int64_t begin = first + 8 * half;
      uint32_t kind[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float v[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int64_t j = begin + 2 * i + k;
          v[k] = first_row + at < a.m && j < ranks ? __fmul_rn(factor, a.u[(first_row + at) * ranks + j]) : 0.f;
        }
        const Bf16Parts low(v[0]), high(v[1]);
        kind[0][i] = pair_of(low.whole, high.whole), kind[1][i] = pair_of(low.finite, high.finite);
        kind[2][i] = pair_of(low.rest, high.rest), kind[3][i] = pair_of(low.last, high.last);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k)
        memory.stage[ring.stage].x[at][(2 * k + half) ^ (at % 8)] =
            make_uint4(kind[k][0], kind[k][1], kind[k][2], kind[k][3]);
    }
    fence_proxy();
    __syncwarp();
    if (first_lane) memory.is_full(ring.stage).arrive();
    ring.next();
  }
}

// The fragments of a chunk of rows g and g + 8 of a warp. All four lanes of a row read the same: lane t takes byte t of
// each word, which are the columns of A that it has to have. `factor` and `unit`: of the sums, for either row.
template <int Rows>
__device__ void decode_chunk(const WgmmaStage<Rows>& from, const PairColumn& pairs, int first, uint32_t (&frag)[4][4],
                             float (&factor)[2], float (&unit)[2]) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + 8 * half + g;
    const float2 scale = from.scale[row];
    const uint4 low = from.codes[row][0], high = from.codes[row][1];
    const bool zeros = scale.y == 0.f;
    factor[half] = scale.x;
    unit[half] = zeros ? unit[half] : scale.y;
    constexpr uint32_t kZeros = 0x77777777;
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) frag[i / 2][half + i % 2 * 2] = pairs(zeros ? kZeros : words[i], t);
  }
}

// sum += lora_B u^T for 16 ranks from `first` on.
template <int Rows>
__device__ void add_ranks(float (&sum)[Rows / 2], const Nf4Linear& a, int64_t first_out, int64_t first, Mbarrier is_full,
                          uint32_t parity, uint64_t u) {
  using Product = Wgmma<__nv_bfloat16, Rows>;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  uint32_t whole[1][4], finite[1][4], rest[1][4], last[1][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = first_out + i % 2 * 8 + g, j = first + i / 2 * 8 + 2 * t;
    float v[2];
#pragma unroll
    for (int k = 0; k < 2; ++k)
      v[k] = row < a.weight.rows && j + k < a.r ? element(a.b, a.b_dtype, row * a.r + j + k) : 0.f;
    const Bf16Parts low(v[0]), high(v[1]);
    whole[0][i] = pair_of(low.whole, high.whole), finite[0][i] = pair_of(low.finite, high.finite);
    rest[0][i] = pair_of(low.rest, high.rest), last[0][i] = pair_of(low.last, high.last);
  }
  is_full.wait(parity);
  hold(sum), hold(whole), hold(finite);
  fence_wgmma();
  Product::multiply(sum, whole[0], u);       // a kind of u is 16 columns on: 2 in the address
  Product::multiply(sum, finite[0], u + 4);
  Product::multiply(sum, finite[0], u + 6);
  commit_wgmma();
  wait_for_wgmma();
  hold(sum), hold(rest), hold(last);
  if (a.b_dtype == DType::bf16) return;      // whole
  fence_wgmma();
  Product::multiply(sum, rest[0], u + 2);
  Product::multiply(sum, rest[0], u + 4);
  Product::multiply(sum, rest[0], u + 6);
  Product::multiply(sum, last[0], u + 2);
  Product::multiply(sum, last[0], u + 4);
  commit_wgmma();
  wait_for_wgmma();
  hold(sum);
}

// Parts: of the depth; with more than one, their sums go to [parts, m, n].
template <class T, int Rows>
__device__ void multiply_by_wgmma(const Nf4Linear& a, int log_block, float* parts, const CUtensorMap* x,
                                  const CUtensorMap* codes, WgmmaMemory<T, Rows>& memory) {
  using Memory = WgmmaMemory<T, Rows>;
  const int64_t first_row = int64_t(blockIdx.x) * Rows, first_out = int64_t(blockIdx.y) * kWgmmaOuts, n = a.weight.rows;
  const int all = int(a.weight.cols / kChunk), each = int(ceil_div(all, gridDim.z)), begin = int(blockIdx.z) * each;
  const Chunks chunks{begin, begin + each < all ? begin + each : all};
  const int64_t ranks = blockIdx.z == gridDim.z - 1 ? a.r : 0;
  let_next_begin();
  if (threadIdx.x == 0) {
    for (int at = 0; at < Memory::kRing; ++at)
      memory.is_full(at).init(kGroup / kWarp), memory.is_empty(at).init(kConsumers / kWarp);
    fence_proxy();
  }
  memory.pairs.template fill<kWgmmaThreads>();
  if (threadIdx.x < 256) memory.map[threadIdx.x] = dynamic_map.at[threadIdx.x];
  __syncthreads();
  wait_for_inputs();
  if (threadIdx.x < kGroup) {
    give_registers<56>();
    return fill_stages<T, Rows>(a, log_block, first_row, first_out, chunks, ranks, x, codes, memory);
  }
  take_registers<224>();
  const int thread = threadIdx.x - kGroup, lane = thread % kWarp, warp = thread / kWarp, g = lane / 4, t = lane % 4;
  PairColumn pairs(memory.pairs);
  pairs.is_filled();
  float sum[Rows / 2] = {}, unit[2] = {1.f, 1.f};   // rows g and g + 8 take turns in twos
  Ring<Memory::kRing> ring;
  int before = -1;   // the stage that is multiplied still
  const auto done = [&] {
    if (before >= 0 && lane == 0) memory.is_empty(before).arrive();
    before = ring.stage;
  };
#pragma unroll 2
  for (int chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    WgmmaStage<Rows>& from = memory.stage[ring.stage];
    memory.is_full(ring.stage).wait(ring.parity);
    uint32_t frag[4][4];
    float factor[2];
    decode_chunk<Rows>(from, pairs, 16 * warp, frag, factor, unit);
    wait_for_wgmma();
    hold(sum);
    done();
#pragma unroll
    for (int i = 0; i < Rows / 2; ++i) sum[i] = __fmul_rn(sum[i], factor[i / 2 % 2]);
    hold(sum), hold(frag);
    fence_wgmma();
    const uint64_t columns = swizzled_panel(shared_address(from.x));
#pragma unroll
    for (int i = 0; i < 4; ++i) Wgmma<T, Rows>::multiply(sum, frag[i], columns + 2 * i);
    commit_wgmma();
    ring.next();
  }
  wait_for_wgmma();
  hold(sum);
#pragma unroll
  for (int i = 0; i < Rows / 2; ++i) sum[i] = __fmul_rn(sum[i], unit[i / 2 % 2]);
#pragma unroll 1
  for (int64_t first = 0; first < ranks; first += kRankStep) {
    done();
    add_ranks<Rows>(sum, a, first_out + 16 * warp, first, memory.is_full(ring.stage), ring.parity,
                    swizzled_panel(shared_address(memory.stage[ring.stage].x)));
    ring.next();
  }
  if (gridDim.z > 1) {
    float* const to = parts + int64_t(blockIdx.z) * a.m * n;
#pragma unroll
    for (int i = 0; i < Rows / 2; ++i) {
      const int64_t row = first_row + i / 4 * 8 + 2 * t + i % 2, out = first_out + 16 * warp + g + i / 2 % 2 * 8;
      if (row < a.m && out < n) to[row * n + out] = sum[i];
    }
    return;
  }
  const auto meet = [] { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); };   // those who multiply
  meet();
#pragma unroll
  for (int i = 0; i < Rows / 2; ++i)
    memory.sums[i / 4 * 8 + 2 * t + i % 2][16 * warp + g + i / 2 % 2 * 8] = sum[i];
  meet();
#pragma unroll 1
  for (int e = thread; e < Rows * kWgmmaOuts / 8; e += kConsumers) {
    const int at = e / (kWgmmaOuts / 8), of = e % (kWgmmaOuts / 8) * 8;
    if (first_row + at >= a.m) break;
    if (first_out + of >= n) continue;
    float eight[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) eight[i] = memory.sums[at][of + i];
    store_results<T>(a, first_row + at, first_out + of, eight);
  }
}

}  // namespace peftops::cuda
