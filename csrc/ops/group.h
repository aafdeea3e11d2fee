// A group-quantised weight as an argument of the operators: packed codes, scales, zeros, and two numbers.
#pragma once
#include "kernels/group.h"
#include "ops/bind.h"

namespace peftops::ops {

// Of a weight with `cols` columns.
inline void check_groups(const char* op, int64_t cols, int64_t bits, int64_t group) {
  PEFTOPS_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, op, ": bits must be 2, 3, 4 or 8, not ", bits);
  PEFTOPS_CHECK(group >= kMinGroup && group <= kMaxGroup && (group & (group - 1)) == 0, op,
                  ": group_size must be a power of two from ", kMinGroup, " to ", kMaxGroup, ", not ", group);
  PEFTOPS_CHECK(cols % group == 0, op, ": in_features must be a multiple of group_size ", group, ", but is ", cols);
}

// Keeps contiguous versions of the tensors alive while a kernel reads them.
struct GroupParts {
  Tensor packed, scales, zeros;
  GroupWeight weight;

  GroupParts(const char* op, const Tensor& packed_, const Tensor& scales_, const Tensor& zeros_, int64_t bits,
             int64_t group)
      : packed(as_contiguous(packed_)), scales(as_contiguous(scales_)), zeros(as_contiguous(zeros_)) {
    PEFTOPS_CHECK(scales.dim() == 2, op, ": scales must have shape [out, groups], not ", shape_of(scales));
    const int64_t rows = scales.size(0), groups = scales.size(1), cols = groups * group;
    check_groups(op, cols, bits, group);
    check_shape(op, "zeros", zeros, {rows, groups});
    check_shape(op, "packed", packed, {rows, cols / 8 * bits});
    PEFTOPS_CHECK(packed.scalar_type() == ScalarType::Byte, op, ": packed must be uint8");
    weight = {packed.const_data_ptr<uint8_t>(), floats_of(op, "scales", scales), floats_of(op, "zeros", zeros),
              rows, cols, group, bits};
  }
};

}  // namespace peftops::ops
