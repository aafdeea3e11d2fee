// The shape of every CPU kernel.
//
// The work comes in units, independent of one another and of about the same size. kernel(args, begin,
// end, scratch) does the units [begin, end), in kScratchBytes that no other thread uses meanwhile, and
// returns how many units there are: kernel(args, 0, 0, nullptr) only asks.
#pragma once
#include <cstdint>

namespace peftops::cpu {

template <class Args> using Kernel = int64_t(const Args&, int64_t begin, int64_t end, void* scratch);

constexpr int64_t kScratchBytes = 640 << 10;   // most of a core's L2; product.h fills it

}  // namespace peftops::cpu
