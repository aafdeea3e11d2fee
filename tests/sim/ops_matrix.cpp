// ldmatrix, stmatrix, mma.sync and cp.async.
#include <algorithm>
#include <type_traits>

#include "ops.h"

namespace sim {
namespace {

u32 shared_offset(u64 address) { return u32(space_of(address) == Space::Shared ? address & ~kWindowMask : address); }
int part(const Operand& o, int k) { return o.kind == Operand::Vector ? o.parts[k] : o.slot; }

// Up to four 8x8 matrices of 16-bit elements: lanes 8q to 8q + 7 hold the addresses of the rows of matrix q, and lane l
// receives the elements (l / 4, 2 (l % 4)) and the next; with .trans those of the transposed matrix.
void load_matrix(Warp& w, const Inst& i, u32) {
  const u64* base = w.at(i, 1);
  const int count = i.operands[0].kind == Operand::Vector ? int(i.operands[0].parts.size()) : 1;
  for (int q = 0; q < count; ++q) {
    u16 matrix[8][8];
    u64 address[kLanes];
    for (int r = 0; r < 8; ++r) {
      const int lane = 8 * q + r;
      address[r] = shared_offset(base[lane] + u64(i.operands[1].offset));
      std::memcpy(matrix[r], reach(w, i, lane, Space::Shared, address[r], 16, Access::Read), 16);
    }
    count_waves(i, 0xff, address, 16);
    u64* d = w.slot(part(i.operands[0], q));
    for (int l = 0; l < kLanes; ++l) {
      const int r = l / 4, c = 2 * (l % 4);
      const u16 first = i.flag ? matrix[c][r] : matrix[r][c], second = i.flag ? matrix[c + 1][r] : matrix[r][c + 1];
      d[l] = u64(first) | u64(second) << 16;
    }
  }
}

// The way back: lane l has the elements (l / 4, 2 (l % 4)) and the next of each matrix, or of the transposed one.
void store_matrix(Warp& w, const Inst& i, u32) {
  const u64* base = w.at(i, 0);
  const int count = i.operands[1].kind == Operand::Vector ? int(i.operands[1].parts.size()) : 1;
  for (int q = 0; q < count; ++q) {
    u16 matrix[8][8];
    const u64* v = w.slot(part(i.operands[1], q));
    for (int l = 0; l < kLanes; ++l)
      for (int e = 0; e < 2; ++e) {
        const int r = l / 4, c = 2 * (l % 4) + e;
        (i.flag ? matrix[c][r] : matrix[r][c]) = u16(v[l] >> 16 * e);
      }
    u64 address[kLanes];
    for (int r = 0; r < 8; ++r) {
      address[r] = shared_offset(base[8 * q + r] + u64(i.operands[0].offset));
      std::memcpy(reach(w, i, 8 * q + r, Space::Shared, address[r], 16, Access::Write), matrix[r], 16);
    }
    count_waves(i, 0xff, address, 16);
  }
}

// An element of a tf32 operand: a register, whose low bits do not count.
struct Tf32 {
  static float get(u64 v) { return as<float>(u32(v) & ~0x1fffu); }
};

// D [16, 8] = A [16, K] B [K, 8] + C, K = 8 or 16. With g = lane / 4 and t = lane % 4, register n of a lane holds
//   A: rows g (n even) or g + 8 (n odd), columns 2t and 2t + 1, plus 8 for n >= 2
//   B: rows 2t and 2t + 1, plus 8 n; column g
//   C, D in fp32: row g (n < 2) or g + 8, column 2t + n % 2; in fp16 two columns share a register
// A register holds one tf32 element alone: column or row t, plus 4.
template <class T, bool HalfSum> void multiply_matrices(Warp& w, const Inst& i, u32) {
  const Operand &D = i.operands[0], &A = i.operands[1], &B = i.operands[2], &C = i.operands[3];
  const bool perturb = w.block.launch.device.options.perturb;
  double a[16][16], b[16][8];
  float sum[16][8];
  constexpr int kElements = std::is_same_v<T, Tf32> ? 1 : 2;   // of a register
  const auto get = [](u64 v, int e) { return double(T::get(kElements == 1 ? v : v >> 16 * e & 0xffff)); };
  for (int n = 0; n < i.k / (2 * kElements); ++n) {
    const u64* r = w.slot(part(A, n));
    for (int l = 0; l < kLanes; ++l)
      for (int e = 0; e < kElements; ++e)
        a[l / 4 + 8 * (n % 2)][kElements * (l % 4 + 4 * (n / 2)) + e] = get(r[l], e);
  }
  for (int n = 0; n < i.k / (4 * kElements); ++n) {
    const u64* r = w.slot(part(B, n));
    for (int l = 0; l < kLanes; ++l)
      for (int e = 0; e < kElements; ++e) b[kElements * (l % 4 + 4 * n) + e][l / 4] = get(r[l], e);
  }
  constexpr int kSums = HalfSum ? 2 : 4;
  const auto place = [&](int n, int l) {
    return HalfSum ? &sum[l / 4 + 8 * n][2 * (l % 4)] : &sum[l / 4 + 8 * (n / 2)][2 * (l % 4) + n % 2];
  };
  for (int n = 0; n < kSums; ++n) {
    const u64* r = w.slot(part(C, n));
    for (int l = 0; l < kLanes; ++l) {
      float* at = place(n, l);
      if (HalfSum) at[0] = half_to_float(u16(r[l])), at[1] = half_to_float(u16(r[l] >> 16));
      else at[0] = as<float>(u32(r[l]));
    }
  }
  for (int row = 0; row < 16; ++row) {
    double total[8];
    for (int c = 0; c < 8; ++c) total[c] = sum[row][c];
    for (int k = 0; k < i.k; ++k)
      for (int c = 0; c < 8; ++c) total[c] += a[row][k] * b[k][c];
    for (int c = 0; c < 8; ++c) {
      sum[row][c] = float(total[c]);
      // Tensor cores cut bits off instead of rounding: one unit in the last place towards zero.
      if (perturb && std::isnormal(sum[row][c]) && double(sum[row][c]) != total[c])
        sum[row][c] = std::nextafter(sum[row][c], 0.f);
    }
  }
  for (int n = 0; n < kSums; ++n) {
    u64* r = w.slot(part(D, n));
    for (int l = 0; l < kLanes; ++l) {
      const float* at = place(n, l);
      r[l] = HalfSum ? u64(half_of(at[0])) | u64(half_of(at[1])) << 16 : as<u32>(at[0]);
    }
  }
}

// cp.async [shared], [global], size {, source bytes or ignore predicate}. Nothing lands before it is waited for;
// until then the target counts as written, and reading it is an error.
void copy(Warp& w, const Inst& i, u32 lanes) {
  const u64 *to = w.at(i, 0), *from = w.at(i, 1);
  const u32 size = u32(w.at(i, 2)[0]);
  u64 target[kLanes], source[kLanes];
  u32 reading = 0;
  each(lanes, [&](int l) {
    target[l] = shared_offset(to[l] + u64(i.operands[0].offset));
    source[l] = from[l] + u64(i.operands[1].offset);
    u32 bytes = size;
    if (i.operands.size() > 3) {
      const Operand& o = i.operands[3];
      bytes = o.kind == Operand::Predicate ? (w.predicate(o) >> l & 1 ? 0 : size) : u32(w.slot(o.slot)[l]);
      if (bytes > size) fail(w, i, "cp.async: more source bytes than it copies");
    }
    reach(w, i, l, Space::Shared, target[l], size, Access::Write);
    for (u32 k = 0; k < size; ++k) w.block.shadow[target[l] + k].flight = Copying;
    if (bytes) {
      if (source[l] % size) fail(w, i, "misaligned: cp.async of " + std::to_string(size) + " bytes");
      if (bytes == size) reach(w, i, l, Space::Global, source[l], size, Access::Read);
      else
        for (u32 k = 0; k < bytes; ++k) reach(w, i, l, Space::Global, source[l] + k, 1, Access::Read);
      reading |= 1u << l;
    }
    w.copies[l].open.push_back({u32(target[l]), source[l], u8(bytes), u8(size), w.copies[l].committed, w.copies[l].begun++});
  });
  if (reading) count_sectors(w, i, reading, source, size, false);
  count_waves(i, lanes, target, size);
}
void commit(Warp& w, const Inst&, u32 lanes) { each(lanes, [&](int l) { ++w.copies[l].committed; }); }
void wait_group(Warp& w, const Inst& i, u32 lanes) {
  const u32 open = u32(w.at(i, 0)[0]);
  each(lanes, [&](int l) { land(w, i, l, w.copies[l].committed - std::min(open, w.copies[l].committed)); });
}
void wait_all(Warp& w, const Inst& i, u32 lanes) { each(lanes, [&](int l) { land(w, i, l, ~0u); }); }

}  // namespace

void land(Warp& w, const Inst& i, int lane, u32 end, u32 agent) {
  auto& open = w.copies[lane].open;
  size_t landed = 0;
  for (; landed < open.size() && (agent ? open[landed].serial : open[landed].group) < end; ++landed) {
    const Copy& c = open[landed];
    for (u32 k = 0; k < c.size; ++k) w.block.shadow[c.to + k].flight = Landed;
    u8* p = w.block.shared.data() + c.to;
    if (agent) end_write(w.block, agent, c.to, c.size);
    else reach(w, i, lane, Space::Shared, c.to, c.size, Access::Write);
    std::memcpy(p, reinterpret_cast<const void*>(c.from), c.bytes);
    std::memset(p + c.bytes, 0, c.size - c.bytes);
  }
  open.erase(open.begin(), open.begin() + i64(landed));
}

Handler decode_matrix(Inst& i, Modifiers& m) {
  if (m.op == "ldmatrix") {
    m.take("sync"), m.take("aligned");
    if (!m.take("m8n8")) return nullptr;
    m.take("x1"), m.take("x2"), m.take("x4");
    i.flag = m.take("trans");
    i.flow = Flow::Converge, i.counted = Class::Ldmatrix;
    return load_matrix;
  }
  if (m.op == "stmatrix") {
    m.take("sync"), m.take("aligned");
    if (!m.take("m8n8")) return nullptr;
    m.take("x1"), m.take("x2"), m.take("x4");
    i.flag = m.take("trans");
    i.flow = Flow::Converge, i.counted = Class::Ldmatrix;
    return store_matrix;
  }
  if (m.op == "mma") {
    m.take("sync"), m.take("aligned"), m.take("row"), m.take("col");
    i.k = m.take("m16n8k16") ? 16 : m.take("m16n8k8") ? 8 : 0;
    if (!i.k) return nullptr;
    i.flow = Flow::Converge, i.counted = Class::Mma;
    if (i.type == Type::F16) return i.type2 == Type::F16 ? multiply_matrices<Half<>, true> : nullptr;
    if (i.type != Type::F32) return nullptr;
    return i.type2 == Type::F16                ? multiply_matrices<Half<>, false>
           : i.type2 == Type::BF16             ? multiply_matrices<Bfloat<>, false>
           : i.type2 == Type::TF32 && i.k == 8 ? multiply_matrices<Tf32, false>
                                               : nullptr;
  }
  return nullptr;
}

Handler decode_async(Inst& i, Modifiers& m) {
  if (m.op != "cp" || !m.take("async")) return nullptr;
  if (m.take("commit_group")) return commit;
  if (m.take("wait_group")) return wait_group;
  if (m.take("wait_all")) return wait_all;
  for (const char* hint : {"ca", "cg", "L2::64B", "L2::128B", "L2::256B", "global"}) m.take(hint);
  i.counted = Class::AsyncCopy;
  return copy;
}

}  // namespace sim
