// An MXFP4 weight as an argument of the operators: blocks of codes and their scales.
#pragma once
#include "kernels/mxfp4.h"
#include "ops/bind.h"

namespace peftops::ops {

inline void check_columns(const char* op, int64_t cols) {
  PEFTOPS_CHECK(cols % kMxBlock == 0, op, ": in_features must be a multiple of ", kMxBlock, ", but is ", cols);
}

// Keeps contiguous versions of the tensors alive while a kernel reads them.
struct Mxfp4Parts {
  Tensor blocks, scales;
  Mxfp4Weight weight;

  Mxfp4Parts(const char* op, const Tensor& blocks_, const Tensor& scales_)
      : blocks(as_contiguous(blocks_)), scales(as_contiguous(scales_)) {
    PEFTOPS_CHECK(scales.dim() == 2, op, ": scales must have shape [out, in / 32], not ", shape_of(scales));
    const int64_t rows = scales.size(0), cols = scales.size(1) * kMxBlock;
    check_shape(op, "blocks", blocks, {rows, cols / 2});
    PEFTOPS_CHECK(blocks.scalar_type() == ScalarType::Byte, op, ": blocks must be uint8");
    PEFTOPS_CHECK(scales.scalar_type() == ScalarType::Byte, op, ": scales must be uint8");
    weight = {blocks.const_data_ptr<uint8_t>(), scales.const_data_ptr<uint8_t>(), rows, cols};
  }
};

}  // namespace peftops::ops
