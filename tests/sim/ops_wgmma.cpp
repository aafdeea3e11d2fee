// wgmma: four warps multiply 64 rows of A, from registers or shared memory, with B from shared memory.
//
// A warp computes its own 16 rows when it comes by; warps of a group must come by alike (in_step). What hardware does
// meanwhile is kept as an account: until wait_group the accumulators and the registers of A are nobody else's, and the
// bytes of shared memory that it reads must not be written. A wait speaks for the warp that waits.
#include <algorithm>

#include "ops.h"

namespace sim {
namespace {

constexpr u32 kChunk = 16;   // bytes of a row of a core matrix
constexpr int kRows = 16;    // of a warp

int part(const Operand& o, int k) { return o.kind == Operand::Vector ? o.parts[size_t(k)] : o.slot; }

struct Tf32 {
  static float get(u64 v) { return as<float>(u32(v) & ~0x1fffu); }
  static constexpr u32 kBytes = 4;
};
struct F16 {
  static float get(u64 v) { return half_to_float(u16(v)); }
  static constexpr u32 kBytes = 2;
};
struct Bf16 {
  static float get(u64 v) { return bfloat_to_float(u16(v)); }
  static constexpr u32 kBytes = 2;
};

// Where a matrix lies: start, the two strides, and how addresses are permuted (none, or over 128, 64, 32 bytes).
struct Layout {
  u32 start, leading, stride, swizzle;

  explicit Layout(u64 descriptor)
      : start(u32(descriptor & 0x3fff) * kChunk), leading(u32(descriptor >> 16 & 0x3fff) * kChunk),
        stride(u32(descriptor >> 32 & 0x3fff) * kChunk), swizzle(u32(descriptor >> 62)) {}

  u32 permuted(u32 address) const {
    const u32 bits = swizzle == 0 ? 0 : swizzle == 1 ? 7 : swizzle == 2 ? 3 : 1;
    return address ^ (address >> 3 & bits << 4);
  }
  u32 atom() const { return swizzle == 0 ? 1 : swizzle == 1 ? 8 : swizzle == 2 ? 4 : 2; }   // chunks in a row of it
  // The chunk with row `r` (of M or N), and the kk-th 16 bytes of K.
  u32 by_k(u32 r, u32 kk) const {
    return permuted(start + r % 8 * atom() * kChunk + r / 8 * stride + kk * (swizzle ? kChunk : leading));
  }
  // Transposed: the chunk with the u-th 16 bytes of M or N, and row `k` of K.
  u32 by_n(u32 u, u32 k) const {
    const u32 a = atom();
    return permuted(start + (swizzle ? u % a * kChunk + u / a * leading + k % 8 * a * kChunk + k / 8 * stride
                                     : u * stride + k % 8 * kChunk + k / 8 * leading));
  }
};

// Reads [rows, K] from shared memory into `to`, row after row, from row `first` on.
template <class T> void read_matrix(Warp& w, const Inst& i, u64 descriptor, bool transposed, u32 first, u32 rows,
                                    double* to) {
  const Layout at(descriptor);
  if (descriptor >> 49 & 7) fail(w, i, "a descriptor with a base offset is not supported");
  constexpr u32 per = kChunk / T::kBytes, k = 2 * per;
  const auto chunk = [&](u32 address, auto put) {
    const u8* p = begin_read(w, i, kSeveral, address, kChunk);
    w.readings.push_back({w.committed, address, kChunk});
    for (u32 e = 0; e < per; ++e) {
      u64 v = 0;
      std::memcpy(&v, p + e * T::kBytes, T::kBytes);
      put(e, double(T::get(v)));
    }
  };
  if (transposed)
    for (u32 u = 0; u < rows / per; ++u)
      for (u32 row = 0; row < k; ++row)
        chunk(at.by_n(first / per + u, row), [&](u32 e, double v) { to[(u * per + e) * k + row] = v; });
  else
    for (u32 r = 0; r < rows; ++r)
      for (u32 kk = 0; kk < 2; ++kk)
        chunk(at.by_k(first + r, kk), [&](u32 e, double v) { to[r * k + kk * per + e] = v; });
}

// A of a warp from registers, as in mma.sync: register n has rows g (n even) or g + 8, and the second half of K for n >= 2.
template <class T> void read_registers(Warp& w, const Operand& A, double* to) {
  constexpr int per = 4 / int(T::kBytes), k = 32 / int(T::kBytes);
  for (int n = 0; n < 4; ++n) {
    const u64* r = w.slot(part(A, n));
    for (int l = 0; l < kLanes; ++l)
      for (int e = 0; e < per; ++e)
        to[(l / 4 + 8 * (n % 2)) * k + per * (l % 4 + 4 * (n / 2)) + e] = T::get(r[l] >> 8 * int(T::kBytes) * e);
  }
}

void uniform(Warp& w, const Inst& i, const u64* value, const char* what) {
  if (std::any_of(value, value + kLanes, [&](u64 v) { return v != value[0]; }))
    fail(w, i, std::string("lanes of a warp differ in ") + what);
}

// No other instruction may have changed the register since wgmma.fence, nor another wgmma be at it.
void claim(Warp& w, const Inst& i, int slot, bool sums) {
  if (w.changed[size_t(slot)] == w.epoch) fail(w, i, "a register was written, and no wgmma.fence came since");
  const auto it = w.in_flight.find(slot);
  if (it != w.in_flight.end() && it->second.sums != sums)
    fail(w, i, "a register is an accumulator of one wgmma and an operand of another");
  w.in_flight[slot] = {w.committed, sums};
}

// operands: D, A, descriptor of B, scale-d, signs of A and B {, transposed A}{, transposed B}. i.k: columns of D
template <class T, bool HalfSum> void multiply(Warp& w, const Inst& i, u32) {
  if (w.id / 4 * 4 + 4 > int(w.block.warps.size())) fail(w, i, "wgmma needs four warps of a group");
  const Operand &D = i.operands[0], &A = i.operands[1];
  const bool registers = A.kind == Operand::Vector, perturb = w.block.launch.device.options.perturb;
  const auto immediate = [&](size_t at) { return at < i.operands.size() ? i64(w.at(i, int(at))[0]) : 0; };
  const bool transposed_a = !registers && immediate(6), transposed_b = immediate(registers ? 6 : 7);
  const u64* b_descriptor = w.at(i, 2);
  uniform(w, i, b_descriptor, "the descriptor of B");
  if (!registers) uniform(w, i, w.at(i, 1), "the descriptor of A");
  u32 adds = kAllLanes;
  if (i.operands[3].kind == Operand::Predicate) adds = w.predicate(i.operands[3]);
  else if (!w.at(i, 3)[0]) adds = 0;
  if (adds && ~adds) fail(w, i, "lanes of a warp differ in scale-d");
  in_step(w, i, {u32(&i - w.function.code.data()), registers ? 0 : w.at(i, 1)[0], b_descriptor[0], adds});

  constexpr int k = 32 / int(T::kBytes);
  const int n = i.k, sums = HalfSum ? n / 4 : n / 2;
  double a[kRows * 16], b[256 * 16], total[256];
  for (int s = 0; s < sums; ++s) claim(w, i, part(D, s), true);
  if (registers) {
    for (int r = 0; r < 4; ++r) claim(w, i, part(A, r), false);
    read_registers<T>(w, A, a);
  } else {
    read_matrix<T>(w, i, w.at(i, 1)[0], transposed_a, u32(w.id % 4 * kRows), kRows, a);
  }
  read_matrix<T>(w, i, b_descriptor[0], transposed_b, 0, u32(n), b);
  const double sign = double(immediate(4) * immediate(5));
  double columns[16 * 256];   // B by K, so that the inner loop runs over columns
  for (int c = 0; c < n; ++c)
    for (int e = 0; e < k; ++e) columns[e * n + c] = sign * b[c * k + e];
  for (int row = 0; row < kRows; ++row) {
    const int g = row % 8, half = row / 8;
    const auto place = [&](int c) {   // the accumulator with column c: its register and its lane
      return w.slot(part(D, HalfSum ? c / 8 * 2 + half : c / 8 * 4 + half * 2 + c % 2)) + g * 4 + c % 8 / 2;
    };
    for (int c = 0; c < n; ++c) {
      const u64 v = *place(c);
      total[c] = !adds ? 0 : HalfSum ? half_to_float(u16(v >> 16 * (c % 2))) : double(as<float>(u32(v)));
    }
    for (int e = 0; e < k; ++e) {
      const double x = a[row * k + e];
      const double* from = columns + e * n;
      for (int c = 0; c < n; ++c) total[c] += x * from[c];
    }
    for (int c = 0; c < n; ++c) {
      float v = float(total[c]);
      if (perturb && std::isnormal(v) && double(v) != total[c]) v = std::nextafter(v, 0.f);
      u64* to = place(c);
      if (HalfSum) *to = (*to & ~(0xffffull << 16 * (c % 2))) | u64(half_of(v)) << 16 * (c % 2);
      else *to = as<u32>(v);
    }
  }
}

void step(Warp& w, const Inst& i) { in_step(w, i, {u32(&i - w.function.code.data()), 0, 0, 0}); }
void fence(Warp& w, const Inst& i, u32) { step(w, i), ++w.epoch; }
void commit(Warp& w, const Inst& i, u32) { step(w, i), ++w.committed; }
void wait(Warp& w, const Inst& i, u32) {
  step(w, i);
  const u32 open = u32(w.at(i, 0)[0]), end = w.committed - std::min(open, w.committed);
  for (auto it = w.in_flight.begin(); it != w.in_flight.end();)
    it = it->second.group < end ? w.in_flight.erase(it) : std::next(it);
  const auto rest = std::partition(w.readings.begin(), w.readings.end(), [&](const Reading& r) {
    if (r.group < end) end_read(w, kSeveral, r.offset, r.bytes);
    return r.group >= end;
  });
  w.readings.erase(rest, w.readings.end());
  meet(w);   // so that one lane's arrival speaks for these reads
}

}  // namespace

void in_step(Warp& w, const Inst& i, Group::Step s) {
  auto& steps = w.block.groups[size_t(w.id / 4)].steps;
  const u32 n = w.steps++;
  if (n == steps.size()) return steps.push_back(s);
  const Group::Step& first = steps[n];
  if (s.pc != first.pc || s.a != first.a || s.b != first.b || s.flags != first.flags)
    fail(w, i, "warps of a group do not do the same; another warp came by: " + w.function.code[first.pc].text);
}

// What is left when all warps have gone.
void end_of_block(Block& b) {
  const auto last = [&](const Warp& w) -> const Inst& { return w.function.code.back(); };
  for (auto& w : b.warps) {
    const auto& steps = b.groups[size_t(w->id / 4)].steps;
    if (w->steps != steps.size())
      fail(*w, last(*w), "warps of a group do not do the same; others came by: " + w->function.code[steps[w->steps].pc].text);
    if (!w->readings.empty() || !w->in_flight.empty()) fail(*w, last(*w), "the kernel ends before its last wgmma");
    if (!w->stores.empty()) fail(*w, last(*w), "the kernel ends before its bulk stores have read shared memory");
  }
  for (const Delivery& d : b.deliveries)
    fail(*d.warp, *d.inst, "the kernel ends before what it began: nobody waits for the mbarrier at " +
                               std::to_string(d.mbarrier));
  for (const auto& [offset, m] : b.mbarriers)
    if (m.bytes)
      fail(*b.warps[0], last(*b.warps[0]), std::string(m.bytes < 0 ? "more" : "fewer") +
           " bytes were delivered than expected: " + state_of(m, offset));
}

Handler decode_wgmma(Inst& i, Modifiers& m) {
  if (m.op != "wgmma") return nullptr;
  m.take("sync"), m.take("aligned");
  i.counted = Class::Wgmma, i.flow = Flow::Converge;
  if (m.take("fence")) return fence;
  if (m.take("commit_group")) return commit;
  if (m.take("wait_group")) return wait;
  if (!m.take("mma_async")) return nullptr;
  const Type type = i.type2;
  const std::string k = type == Type::TF32 ? "k8" : "k16";
  for (i.k = 8; i.k <= 256; i.k += 8)
    if (m.take(("m64n" + std::to_string(i.k) + k).c_str())) break;
  const size_t sums = size_t(i.type == Type::F16 ? i.k / 4 : i.k / 2);
  if (i.k > 256 || i.operands.size() < 6 || i.operands[0].kind != Operand::Vector || i.operands[0].parts.size() != sums)
    return nullptr;
  if (i.operands[1].kind == Operand::Vector && i.operands[1].parts.size() != 4) return nullptr;
  if (i.type == Type::F16) return type == Type::F16 ? multiply<F16, true> : nullptr;
  if (i.type != Type::F32) return nullptr;
  return type == Type::F16    ? multiply<F16, false>
         : type == Type::BF16 ? multiply<Bf16, false>
         : type == Type::TF32 ? multiply<Tf32, false>
                              : nullptr;
}

}  // namespace sim
