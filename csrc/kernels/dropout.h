// Dropout from a seed: whether an element stays depends only on (seed, row, column). So a backward pass, another device
// or another number of threads draws the same mask, and no mask is stored.
//
// Element (row, col) of the [m, k] input takes word (col >> 4) & 3 of
//   Philox4x32-10(key = seed, counter = (16 * (col >> 6) + (col & 15), row, row >> 32, 0))
// (Salmon et al., SC 2011) and stays if that word is at least p * 2^32. An element that stays is divided by 1 - p.
#pragma once
#include <cstdint>

namespace peftops {

struct Dropout {
  const int64_t* seed;   // on the device of the kernel, which reads it there: no copy to the host is needed
  double p;              // 0 <= p < 1; with 0 nothing is drawn, and seed may be null
};

constexpr uint32_t kPhiloxMultiplier[2] = {0xd2511f53u, 0xcd9e8d57u};
constexpr uint32_t kPhiloxWeyl[2] = {0x9e3779b9u, 0xbb67ae85u};   // added to the key every round
constexpr int kPhiloxRounds = 10;

}  // namespace peftops
