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
  const Vec a = Vec{} + 0.999f, b = Vec{} + 0.001f;
  Vec s0 = a, s1 = a + 1, s2 = a + 2, s3 = a + 3, s4 = a + 4, s5 = a + 5, s6 = a + 6, s7 = a + 7, s8 = a + 8, s9 = a + 9;
  for (long r = 0; r < rounds; ++r) {   // ten chains: a latency of four or five, two a cycle
    s0 = s0 * a + b, s1 = s1 * a + b, s2 = s2 * a + b, s3 = s3 * a + b, s4 = s4 * a + b;
    s5 = s5 * a + b, s6 = s6 * a + b, s7 = s7 * a + b, s8 = s8 * a + b, s9 = s9 * a + b;
  }
  return (s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7 + s8 + s9)[0];
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
  return 2.0 * 10 * (kBytes / 4) * kRounds * threads / seconds;
}
