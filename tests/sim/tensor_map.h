// A tensor map: what cuTensorMapEncodeTiled writes into its 128 bytes here. Hardware's own layout is not public.
#pragma once
#include "types.h"

namespace sim {

struct TensorMap {
  static constexpr u64 kMagic = 0x70616d726f736e74;   // "tnsormap"
  u64 magic, address;
  u64 stride[4];          // bytes, of dimension 1 and on
  u32 size[5], box[5];
  u8 rank, bytes, swizzle;   // bytes of an element; 0: none, 1: over 32, 2: 64, 3: 128 bytes

  u32 permuted(u32 at) const { return at ^ (at >> 3 & ((1u << swizzle) - 1) << 4); }
};
static_assert(sizeof(TensorMap) <= 128, "a CUtensorMap");

}  // namespace sim
