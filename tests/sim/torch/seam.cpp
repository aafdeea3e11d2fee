// Lets the CUDA bindings run on CPU tensors, unmodified: the linker sends a few of their calls of torch through here
// (-Wl,--wrap), and each tells the simulator what the kernels may touch.
//
// A binding begins with a device guard: what was allowed before is forgotten. Every pointer that it then takes from a
// tensor allows the bytes from that tensor's first element to its last and no more, for reading only if it asked for a constant pointer.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "extent.h"

extern "C" {

void sim_allow(const void*, size_t bytes, int read_only);
void sim_forbid_all();

AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle, const void**);
AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle, void**);

static void allow(AtenTensorHandle tensor, const void* p, bool read_only) { sim_allow(p, extent_of(tensor), read_only); }

AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** p) {
  const AOTITorchError error = __real_torch_get_const_data_ptr(tensor, p);
  if (!error) allow(tensor, *p, true);
  return error;
}
AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** p) {
  const AOTITorchError error = __real_torch_get_mutable_data_ptr(tensor, p);
  if (!error) allow(tensor, *p, false);
  return error;
}

// New memory holds what was freed last, perhaps the right result of a call before: what a kernel leaves unwritten must
// show, as NaN or as 255.
AOTITorchError __real_aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                                               AtenTensorHandle*);
AOTITorchError __wrap_aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                               int32_t device_type, int32_t device_index, AtenTensorHandle* tensor) {
  const AOTITorchError error =
      __real_aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, tensor);
  if (error) return error;
  void* p = nullptr;
  int64_t elements = 0;
  aoti_torch_get_numel(*tensor, &elements);
  if (elements && !__real_torch_get_mutable_data_ptr(*tensor, &p))
    memset(p, 0xff, size_t(elements) * aoti_torch_dtype_element_size(dtype));
  return error;
}

AOTITorchError __wrap_aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  sim_forbid_all();
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError __wrap_aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

// A stream that is not the default one, so that a launcher which forgets to pass it on is found out.
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = reinterpret_cast<void*>(0x5eed);
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"
