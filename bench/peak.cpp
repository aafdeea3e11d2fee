// The most that this machine's cores do: multiply-adds per second, out of registers. Compiled by harness.py.
#include <chrono>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vec __attribute__((vector_size(kBytes)));

static float spin(long rounds) {
  Vec sum[12] = {}, a = {}, b = {};
  for (int i = 0; i < kBytes / 4; ++i) a[i] = 0.999f, b[i] = 0.001f;
  for (long r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (Vec& s : sum) s = s * a + b;   // twelve chains: latency 4, two a cycle, and some to spare
    asm volatile("" : "+x"(sum[0]), "+x"(sum[1]), "+x"(sum[2]), "+x"(sum[3]), "+x"(sum[4]), "+x"(sum[5]));
    asm volatile("" : "+x"(sum[6]), "+x"(sum[7]), "+x"(sum[8]), "+x"(sum[9]), "+x"(sum[10]), "+x"(sum[11]));
  }
  float total = 0;
  for (const Vec& s : sum) total += s[0];
  return total;
}

// fp32 operations per second with `threads` threads, two per multiply-add.
extern "C" double peak(int threads) {
  constexpr long kRounds = 20000000;
  std::vector<std::thread> pool;
  const auto begin = std::chrono::steady_clock::now();
  volatile float sink = 0;
  for (int i = 0; i < threads; ++i) pool.emplace_back([&] { sink = sink + spin(kRounds); });
  for (std::thread& t : pool) t.join();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return 2.0 * 12 * (kBytes / 4) * kRounds * threads / seconds;
}
