// Compiled once per ISA into namespace peftops::cpu::{scalar,avx2,avx512,avx512bf16}; see CMakeLists.txt.
// Limit: writing the result. The packed weight is an eighth (fp32) or a quarter (16 bit) of it.
#include "kernels/nf4_dequantize.h"
#include "kernels/cpu/nf4_decode.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

constexpr int64_t kPerUnit = 4 * kMaxBlock;   // elements: whole blocks of every size

}  // namespace

int64_t nf4_dequantize(const Nf4Dequantize& a, int64_t begin, int64_t end, void*) {
  const Nf4Weight& w = a.weight;
  const int64_t n = w.rows * w.cols, first = begin * kPerUnit, last = at_most(end * kPerUnit, n);
  with_type(a.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (first < last) decode_run(w, first, last - first, static_cast<T*>(a.out) + first);
  });
  return ceil_div(n, kPerUnit);
}

int64_t nf4_absmax(const Nf4Absmax& a, int64_t begin, int64_t end, void*) {
  Nf4Weight w = {};
  w.absmax_code = a.code, w.absmax_scale = a.scale, w.absmax_offset = a.offset;
  const int64_t first = begin * kPerUnit, last = at_most(end * kPerUnit, a.blocks);
  if (first < last) decode_absmax(w, first, last - first, a.absmax + first);
  return ceil_div(a.blocks, kPerUnit);
}

}  // namespace peftops::cpu::PEFTOPS_ISA
