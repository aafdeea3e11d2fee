// The element types that cross the contracts. A kernel file maps each to a storage type of its own.
#pragma once
#include <cstdint>

namespace peftops {

enum class DType : int32_t { f32, bf16, f16 };

}  // namespace peftops
