// The bytes of a tensor, from its first element to its last.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstddef>
#include <cstdint>

inline size_t extent_of(AtenTensorHandle tensor) {
  int64_t elements = 0, dims = 0, extent = 1, *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;
  aoti_torch_get_numel(tensor, &elements);
  aoti_torch_get_dtype(tensor, &dtype);
  aoti_torch_get_dim(tensor, &dims);
  aoti_torch_get_sizes(tensor, &sizes);
  aoti_torch_get_strides(tensor, &strides);
  for (int64_t i = 0; i < dims; ++i) extent += (sizes[i] - 1) * strides[i];
  return size_t(elements ? extent : 0) * aoti_torch_dtype_element_size(dtype);
}
