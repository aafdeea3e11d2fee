// An NF4 weight as an argument of the operators: packed codes, absmax in one or three tensors, block size.
#pragma once
#include "kernels/nf4.h"
#include "ops/bind.h"

namespace peftops::ops {

inline int64_t blocks_of(int64_t elements, int64_t block_size) { return (elements + block_size - 1) / block_size; }

inline void check_block_size(const char* op, int64_t block_size) {
  PEFTOPS_CHECK(block_size >= kMinBlock && block_size <= kMaxBlock && (block_size & (block_size - 1)) == 0, op,
                  ": block_size must be a power of two from ", kMinBlock, " to ", kMaxBlock, ", not ", block_size);
}

inline void check_part(const char* op, const char* name, const Tensor& t, ScalarType dtype, int64_t elements) {
  PEFTOPS_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", torch::headeronly::toString(dtype),
                  ", not ", torch::headeronly::toString(t.scalar_type()));
  PEFTOPS_CHECK(t.numel() == elements, op, ": ", name, " must have ", elements, " elements, not ", t.numel());
}

// Keeps contiguous versions of the tensors alive while a kernel reads them.
struct Nf4Parts {
  Tensor packed, absmax;
  std::optional<Tensor> scale, offset;
  Nf4Weight weight;

  Nf4Parts(const char* op, const Tensor& packed_, const Tensor& absmax_, const std::optional<Tensor>& scale_,
           const std::optional<Tensor>& offset_, int64_t block_size, int64_t rows, int64_t cols)
      : packed(as_contiguous(packed_)), absmax(as_contiguous(absmax_)), scale(scale_), offset(offset_) {
    check_block_size(op, block_size);
    PEFTOPS_CHECK(rows >= 0 && cols >= 0, op, ": the weight must have shape [rows, cols], not [", rows, ", ", cols, "]");
    const int64_t blocks = blocks_of(rows * cols, block_size);
    check_part(op, "packed", packed, ScalarType::Byte, (rows * cols + 1) / 2);
    weight = {};
    weight.packed = packed.const_data_ptr<uint8_t>();
    if (scale) {
      PEFTOPS_CHECK(offset, op, ": absmax_scale and absmax_offset belong together");
      *scale = as_contiguous(*scale);
      check_part(op, "absmax", absmax, ScalarType::Byte, blocks);
      check_part(op, "absmax_scale", *scale, ScalarType::Float, blocks_of(blocks, kAbsmaxBlock));
      check_part(op, "absmax_offset", *offset, ScalarType::Float, 1);
      weight.absmax_code = absmax.const_data_ptr<uint8_t>();
      weight.absmax_scale = scale->const_data_ptr<float>();
      weight.absmax_offset = offset->const_data_ptr<float>();
    } else {
      check_part(op, "absmax", absmax, ScalarType::Float, blocks);
      weight.absmax = absmax.const_data_ptr<float>();
    }
    weight.rows = rows, weight.cols = cols, weight.block_size = block_size;
  }
};

}  // namespace peftops::ops
