// A pipeline in small: out^T [128, 32] = W [128, k] x^T. A producer brings tiles of x into a ring of stages, by TMA or by
// cp.async; two warpgroups multiply, with W in registers. test_pipeline.py runs it in the interpreter, and breaks it: by
// the numbers of Plan, and by the lines of PTX that a comment `// name` marks.
#include <cstdint>

struct Plan {
  int tiles;                            // of 64 columns of k
  int stages;                           // that have memory and mbarriers
  int producer_ring, consumer_ring;     // stages each of them goes around
  int full, empty, bytes;               // arrivals and bytes that a phase expects
};
struct alignas(64) Map { char opaque[128]; };

namespace {

constexpr int kRows = 32, kTile = 64, kStageBytes = kRows * kTile * 2;

__device__ uint32_t shared(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
__device__ void init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0]; // release" ::"r"(barrier) : "memory");
}
__device__ void fence() { asm volatile("fence.proxy.async; // fence" ::: "memory"); }
enum For { kFull, kEmpty };
template <For What> __device__ void wait(uint32_t barrier, uint32_t phase) {
  for (uint32_t over = 0; !over;)
    asm volatile(
        "{.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2; // wait %3\nselp.u32 %0, 1, 0, p;}"
        : "=r"(over) : "r"(barrier), "r"(phase), "n"(int(What)) : "memory");
}

// Goes around a ring; the phase flips at its end.
struct Place {
  uint32_t stage = 0, phase;
  __device__ explicit Place(uint32_t first) : phase(first) {}
  __device__ void next(int ring) {
    if (++stage == uint32_t(ring)) {
      stage = 0;
      asm volatile("xor.b32 %0, %0, 1; // flip" : "+r"(phase));
    }
  }
};

__device__ void multiply(float (&d)[16], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
      "%14, %15}, {%16, %17, %18, %19}, %20, 1, 1, 1, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Of two warpgroups: rows 64 * group .. of W.
template <bool Fenced> __device__ void consume(float* out, const uint32_t* w, uint32_t tiles, uint32_t full, uint32_t empty,
                                               const Plan& p) {
  const int thread = threadIdx.x - 128, lane = thread % 32, row = thread / 32 * 16 + lane / 4, pitch = p.tiles * kTile / 2;
  const uint32_t* from = w + row * pitch + lane % 4;
  float d[16] = {};
  Place at(0);
  for (int tile = 0; tile < p.tiles; ++tile, from += kTile / 2) {
    uint32_t a[4][4];
    for (int k = 0; k < 4; ++k)
      for (int r = 0; r < 4; ++r) a[k][r] = from[8 * k + r % 2 * 8 * pitch + r / 2 * 4];
    wait<kFull>(full + 8 * at.stage, at.phase);
    if (Fenced) fence();
    const uint32_t start = tiles + at.stage * kStageBytes;
    const uint64_t b = uint64_t(start >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
    asm volatile("wgmma.fence.sync.aligned; // fence" ::: "memory");
    for (int k = 0; k < 4; ++k) multiply(d, a[k], b + 2 * k);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0; // products" ::: "memory");
    if (lane == 0) arrive(empty + 8 * at.stage);
    at.next(p.consumer_ring);
  }
  for (int i = 0; i < 16; ++i)
    out[(row + i / 2 % 2 * 8) * kRows + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}

struct Shared {
  uint32_t tiles, full, empty;
  __device__ Shared(void* memory, const Plan& p, bool by_tma) {   // the tiles from a multiple of 1024 on, then the mbarriers
    tiles = shared(memory), full = tiles + p.stages * kStageBytes, empty = full + 8 * p.stages;
    if (threadIdx.x == 0) {
      for (int s = 0; s < p.stages; ++s) init(full + 8 * s, p.full), init(empty + 8 * s, p.empty);
      if (by_tma) fence();
    }
    __syncthreads();   // started
  }
};

extern __shared__ __align__(1024) uint4 memory[];

}  // namespace

extern "C" __global__ void __launch_bounds__(384, 1)
    by_tma(float* out, const uint32_t* w, const __grid_constant__ Map map, const Plan p) {
  const Shared s(memory, p, true);
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x) return;
    Place at(1);   // all stages are empty
    for (int tile = 0; tile < p.tiles; ++tile) {
      wait<kEmpty>(s.empty + 8 * at.stage, at.phase);
      const uint32_t barrier = s.full + 8 * at.stage, to = s.tiles + at.stage * kStageBytes;
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1; // expect" ::"r"(barrier), "r"(p.bytes) : "memory");
      asm volatile(
          "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4]; // copy"
          ::"r"(to), "l"(&map), "r"(tile * kTile), "r"(0), "r"(barrier) : "memory");
      at.next(p.producer_ring);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume<false>(out, w, s.tiles, s.full, s.empty, p);
  }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    by_threads(float* out, const uint32_t* w, const uint4* x, const Plan p) {
  const Shared s(memory, p, false);
  if (threadIdx.x < 128) {
    Place at(1);
    const int thread = threadIdx.x, chunk = thread % 8;
    for (int tile = 0; tile < p.tiles; ++tile) {
      wait<kEmpty>(s.empty + 8 * at.stage, at.phase);
      for (int half = 0; half < 2; ++half) {
        const int row = thread / 8 + half * kRows / 2;
        const uint32_t to = s.tiles + at.stage * kStageBytes + row * 128 + (chunk ^ row % 8) * 16;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16; // copy" ::"r"(to), "l"(x + (row * p.tiles + tile) * 8 + chunk)
                     : "memory");
      }
      asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0]; // expect" ::"r"(s.full + 8 * at.stage) : "memory");
      at.next(p.producer_ring);
    }
  } else {
    consume<true>(out, w, s.tiles, s.full, s.empty, p);
  }
}
