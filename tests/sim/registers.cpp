// Registers: which an instruction reads and writes, how many are alive, and which belong to a wgmma meanwhile.
#include <algorithm>

#include "machine.h"

namespace sim {
namespace {

// Calls f(slot, written) for each register of the operands. A sum that wgmma adds to is both.
template <class F> void each_register(const Inst& i, F f) {
  for (size_t k = 0; k < i.operands.size(); ++k) {
    const Operand& o = i.operands[k];
    const bool written = k == 0 && i.counted != Class::Store && (o.kind == Operand::Register || o.kind == Operand::Vector) &&
                         i.operands.size() > 1;
    if (o.kind == Operand::Register || o.kind == Operand::Address) f(o.slot, written);
    for (int slot : o.parts)
      if (slot >= 0) f(slot, written);
  }
}

bool sums_up(const Inst& i) { return i.counted == Class::Wgmma; }

}  // namespace

// The registers of 32 bits that are alive before each instruction, as far as PTX tells: ptxas may need more.
void count_alive(Function& f) {
  const size_t n = f.code.size();
  std::vector<u8> size(size_t(f.slots), 0);
  for (size_t s = 0; s < size.size(); ++s) size[s] = u8(std::max(f.width[s] / 32, 1u));
  for (const auto& c : f.constants) size[size_t(c.first)] = 0;
  for (const auto& s : f.special) size[size_t(s.second)] = 0;
  std::vector<std::vector<bool>> alive(n + 1, std::vector<bool>(size.size()));
  const auto join = [](std::vector<bool>& into, const std::vector<bool>& from) {
    for (size_t s = 0; s < into.size(); ++s)
      if (from[s]) into[s] = true;
  };
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t k = n; k-- > 0;) {
      const Inst& i = f.code[k];
      std::vector<bool> now(size.size());
      if (i.flow == Flow::Branch) join(now, alive[i.target]);
      for (u32 target : i.table) join(now, alive[target]);
      if ((i.flow != Flow::Branch && i.flow != Flow::Exit && i.flow != Flow::Table) || i.guard >= 0) join(now, alive[k + 1]);
      if (i.guard < 0)
        each_register(i, [&](int slot, bool written) {
          if (written) now[size_t(slot)] = false;
        });
      each_register(i, [&](int slot, bool written) {
        if (!written || sums_up(i)) now[size_t(slot)] = true;
      });
      if (now != alive[k]) alive[k] = std::move(now), changed = true;
    }
  }
  for (size_t k = 0; k < n; ++k) {
    f.code[k].alive = 0;
    for (size_t s = 0; s < size.size(); ++s) f.code[k].alive += alive[k][s] ? size[s] : 0;
  }
}

void check_registers(Warp& w, const Inst& i) {
  if (w.registers && i.alive > w.registers)
    fail(w, i, std::to_string(i.alive) + " registers are in use where setmaxnreg leaves " + std::to_string(w.registers));
  if (sums_up(i) || w.changed.empty()) return;
  each_register(i, [&](int slot, bool written) {
    const auto it = w.in_flight.empty() ? w.in_flight.end() : w.in_flight.find(slot);
    if (it != w.in_flight.end() && (it->second.sums || written))
      fail(w, i, std::string(it->second.sums ? "an accumulator" : "an operand") +
                     " of a wgmma is touched before wgmma.wait_group");
    if (written) w.changed[size_t(slot)] = w.epoch;
  });
}

}  // namespace sim
