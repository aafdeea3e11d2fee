// What the two programs of this folder say to each other. PEFTOPS_ARM_KERNELS, a list kernel(name, Args) that __init__.py
// reads off the contracts, numbers the kernels.
#pragma once
#include <cstdint>

struct Call {
  int32_t kernel;
  int32_t ranges;      // that many of them follow
  uint64_t args;       // address in the caller
  int64_t begin, end;
};

// Bytes in the caller's memory that a kernel may read, and write if so.
struct Range {
  uint64_t at, bytes, written;
};
