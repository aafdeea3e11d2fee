// Compiled once for each of the builds of cpu/kernel.h.
//
// A block has sixteen different results. They are computed and rounded once, and each element is then one look-up of
// its code. Limit: writing the result; the packed weight is an eighth (fp32) or a quarter (16 bit) of it.
#include "kernels/nf4_dequantize.h"
#include "kernels/cpu/nf4_decode.h"

namespace peftops::cpu::PEFTOPS_ISA {
namespace {

constexpr int64_t kPerUnit = 4 * kMaxBlock;   // elements: whole blocks of every size
constexpr int64_t kStreamed = 16 << 20;       // bytes of a result too large for any cache: write past them

// The results of one block, and the look-up of kAtOnce codes among them.
template <class T, class = void> struct BlockValues {
  static constexpr int64_t kAtOnce = kLanes;
  struct Products {
    float at[16];
    explicit Products(float absmax) {
      for (int i = 0; i < 16; i += kLanes) store(at + i, load(kNf4Code + i) * set(absmax));
    }
  } products;
  Table16 table;   // of the products; without vector look-ups it reads them where they lie

  explicit BlockValues(float absmax) : products(absmax), table(products.at) {}
  template <bool kStream> void put(const uint8_t* packed, T* out) const {
    const Vec v = table(unpack_codes(packed));
    kStream ? stream(out, v) : store(out, v);
  }
};

#if defined(__AVX512F__)
// 16-bit results need no conversion after the look-up: vpermw finds them as they are to be stored.
template <class T> struct BlockValues<T, typename TwoBytes<T>::type> {
  static constexpr int64_t kAtOnce = 2 * kLanes;
  Int table;   // twice: vpermw reads five bits, a code has four

  explicit BlockValues(float absmax) {
    T v[2 * kLanes];
    const Vec product = load(kNf4Code) * set(absmax);
    store(v, product), store(v + kLanes, product);
    table = load_int(v);
  }
  template <bool kStream> void put(const uint8_t* packed, T* out) const {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)), high = _mm_srli_epi16(low, 4);
    const __m256i codes = _mm256_set_m128i(_mm_unpackhi_epi8(high, low), _mm_unpacklo_epi8(high, low));
    const Int v = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), table);
    kStream ? _mm512_stream_si512(reinterpret_cast<__m512i*>(out), v) : store_int(out, v);
  }
};
#endif

// Whole blocks, the first at out[0]; a block is a multiple of every kAtOnce.
template <bool kStream, class T> void decode_blocks(const Nf4Weight& w, int64_t block, int64_t blocks, T* out) {
  using Values = BlockValues<T>;
  float absmax[kPerUnit / kMinBlock];
  decode_absmax(w, block, blocks, absmax);
  const uint8_t* packed = w.packed + block * w.block_size / 2;
  for (int64_t b = 0; b < blocks; ++b) {
    const Values values(absmax[b]);
    for (int64_t i = 0; i < w.block_size; i += Values::kAtOnce, packed += Values::kAtOnce / 2, out += Values::kAtOnce)
      values.template put<kStream>(packed, out);
  }
}

template <class T> void dequantize(const Nf4Weight& w, int64_t first, int64_t last, T* out) {
  const bool streamed = w.rows * w.cols * int64_t(sizeof(T)) >= kStreamed && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  for (int64_t at = first; at < last; at += kPerUnit) {
    const int64_t n = at_most(kPerUnit, last - at), blocks = n / w.block_size, whole = blocks * w.block_size;
    if (streamed) decode_blocks<true>(w, at / w.block_size, blocks, out + at);
    else decode_blocks<false>(w, at / w.block_size, blocks, out + at);
    if (whole < n) decode_run(w, at + whole, n - whole, out + at + whole);   // the weight's last block
  }
  if (streamed) stream_end();
}

}  // namespace

int64_t nf4_dequantize(const Nf4Dequantize& a, int64_t begin, int64_t end, void*) {
  const Nf4Weight& w = a.weight;
  const int64_t n = w.rows * w.cols, first = begin * kPerUnit, last = at_most(end * kPerUnit, n);
  with_type(a.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    dequantize(w, first, last, static_cast<T*>(a.out));
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
