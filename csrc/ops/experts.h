// The rows of experts, and a stack of dense weights, as arguments of the operators.
#pragma once
#include "kernels/experts_linear.h"
#include "ops/bind.h"

namespace peftops::ops {

// The end of each expert's rows. The CPU reads it here; CUDA's kernels read it on the device.
class Offsets {
 public:
  const int64_t* at;
  int64_t experts;

  Offsets(const char* op, const Tensor& offsets, [[maybe_unused]] int64_t rows)
      : experts(offsets.numel()), kept_(as_contiguous(offsets)) {
    PEFTOPS_CHECK(offsets.dim() == 1 && experts > 0, op, ": offsets must have one dim, [experts], not shape ",
                    shape_of(offsets));
    at = integers_of<int64_t>(op, "offsets", kept_);
#ifndef PEFTOPS_CUDA
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t before = e ? at[e - 1] : 0;
      PEFTOPS_CHECK(at[e] >= before, op, ": offsets must not decrease, but offsets[", e, "] is ", at[e], " after ", before);
      PEFTOPS_CHECK(at[e] <= rows, op, ": offsets must not exceed the ", rows, " rows, but offsets[", e, "] is ", at[e]);
    }
#endif
  }
  // The rows of one expert, in a stack with `n` rows in all.
  int64_t share_of(const char* op, const char* name, int64_t n) const {
    PEFTOPS_CHECK(n % experts == 0, op, ": ", name, " has ", n, " rows, which is no multiple of the ", experts, " experts");
    return n / experts;
  }
  // Zeros the rows that belong to no expert.
  void clear_rest(Tensor& result) const {
#ifdef PEFTOPS_CUDA
    fill_with_zeros(result);
#else
    const int64_t rows = rows_of(result), bytes = result.size(-1) * int64_t(result.element_size()), end = at[experts - 1];
    if (rows > end && bytes)
      std::memset(static_cast<char*>(result.mutable_data_ptr()) + end * bytes, 0, size_t((rows - end) * bytes));
#endif
  }
  template <class Args> Experts<Args> of(const Args& all) const { return {all, at, experts}; }

 private:
  Tensor kept_;
};

// A stack [experts, n, k] of matrices that are contiguous, or transposes of contiguous ones.
struct DenseParts {
  Tensor kept;
  DenseWeight weight;

  DenseParts(const char* op, const Tensor& w, const Tensor& like, int64_t experts) : kept(w) {
    PEFTOPS_CHECK(w.dim() == 3 && w.size(0) == experts, op, ": weight must have shape [", experts,
                    ", out, in], not ", shape_of(w));
    PEFTOPS_CHECK(w.scalar_type() == like.scalar_type(), op, ": weight must be ",
                    torch::headeronly::toString(like.scalar_type()), " like x, not ",
                    torch::headeronly::toString(w.scalar_type()));
    const bool transposed = !w.is_contiguous() && w.stride(1) == 1 && w.stride(2) == w.size(1) &&
                            (experts == 1 || w.stride(0) == w.size(1) * w.size(2));
    if (!transposed) kept = as_contiguous(w);
    weight = {kept.const_data_ptr(), w.size(1), w.size(2), transposed};
  }
};

}  // namespace peftops::ops
