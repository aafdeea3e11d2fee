// cuTensorMapEncodeTiled, and how a launcher reaches it: through the runtime, so that it need not link the driver.
#include "tensor_map.h"

#include "runtime.h"

using namespace sim;

namespace {

constexpr int kSuccess = 0, kInvalidValue = 1, kNotSupported = 801;

int refuse(const std::string& why) { return runtime().fail(kInvalidValue, "cuTensorMapEncodeTiled: " + why); }

// The rules are those of CUDA's driver interface.
int encode_tiled(void* map, int type, u32 rank, void* address, const u64* size, const u64* stride, const u32* box,
                 const u32* step, int interleave, int swizzle, int, int fill) {
  static const u8 bytes_of[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};   // by CUtensorMapDataType
  if (type < 0 || type >= int(sizeof bytes_of)) return refuse("type " + std::to_string(type));
  if (interleave || fill) return refuse("interleaved layouts and NaN as filling are not supported");
  if (rank < 1 || rank > 5) return refuse("a rank of " + std::to_string(rank));
  if (swizzle < 0 || swizzle > 3) return refuse("swizzle " + std::to_string(swizzle));
  TensorMap t{};
  t.magic = TensorMap::kMagic, t.address = reinterpret_cast<u64>(address);
  t.rank = u8(rank), t.bytes = bytes_of[type], t.swizzle = u8(swizzle);
  if (t.address % 16) return refuse("the address is no multiple of 16");
  for (u32 d = 0; d < rank; ++d) {
    if (!size[d] || size[d] > 1ull << 32) return refuse("size " + std::to_string(size[d]));
    if (!box[d] || box[d] > 256) return refuse("a box of " + std::to_string(box[d]));
    if (step[d] != 1) return refuse("strides of elements are not supported");
    t.size[d] = u32(size[d]), t.box[d] = box[d];
    if (d + 1 < rank) t.stride[d] = stride[d];
    if (d + 1 < rank && (stride[d] % 16 || stride[d] >= 1ull << 40)) return refuse("stride " + std::to_string(stride[d]));
  }
  const u32 row = t.box[0] * t.bytes;
  if (row % 16) return refuse("rows of a box of " + std::to_string(row) + " bytes");
  if (swizzle && row > 16u << swizzle) return refuse("rows of " + std::to_string(row) + " bytes, wider than the swizzle");
  std::memset(map, 0, 128);
  std::memcpy(map, &t, sizeof t);
  return kSuccess;
}

}  // namespace

extern "C" {

int sim_tensor_map(void* map, int type, u32 rank, void* address, const u64* size, const u64* stride, const u32* box,
                   const u32* step, int swizzle) {
  return encode_tiled(map, type, rank, address, size, stride, box, step, 0, swizzle, 0, 0);
}

int cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long, int* found) {
  const bool known = std::string(name) == "cuTensorMapEncodeTiled";
  if (found) *found = known ? 0 : 1;
  *function = known ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  return known ? kSuccess : runtime().fail(kNotSupported, std::string("no driver entry point ") + name);
}
int cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long flags, int* found) {
  return cudaGetDriverEntryPointByVersion(name, function, 12000, flags, found);
}

}  // extern "C"
