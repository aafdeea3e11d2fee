// A PTX module, decoded: what the parser makes and the scheduler runs.
#pragma once
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "types.h"

namespace sim {

struct Warp;
struct Inst;
using Handler = void (*)(Warp&, const Inst&, u32 lanes);

enum class Space : u8 { Generic, Global, Shared, Local, Param, Const };

// What the scheduler does with an instruction besides calling its handler.
enum class Flow : u8 { Next, Branch, Table, Exit, Barrier, Converge };

// What the report counts it as.
enum class Class : u8 { Other, Load, Store, Atomic, AsyncCopy, Ldmatrix, Mma, Wgmma, Barrier, Shuffle, Vote, Branch, Special };

// Every register, constant and special register is a slot of the warp's file: 32 lanes of 64 bits.
// Predicates have a file of their own, one 32-bit mask each.
struct Operand {
  enum Kind : u8 { None, Register, Predicate, Vector, Address, Label } kind = None;
  int slot = -1;
  int second = -1;          // q of `p|q`
  bool negated = false;     // !p
  i64 offset = 0;           // of an address
  std::vector<int> parts;   // slots of {a, b, ..}; -1 for _
  std::string name;         // of a label
};

struct Counters {
  u64 issued = 0, lanes = 0, divergent = 0;
  u64 sectors = 0, ideal_sectors = 0;   // 32-byte sectors of global memory
  u64 waves = 0, ideal_waves = 0;       // passes over the 32 banks of shared memory
  u64 local = 0;                        // accesses to local memory
  u64 replays = 0;                      // of loads from constant memory, for addresses beyond a warp's first
};

struct Inst {
  Handler run = nullptr;
  Flow flow = Flow::Next;
  Class counted = Class::Other;
  int guard = -1;             // predicate slot
  bool guard_negated = false;
  u32 target = 0;             // of a branch
  std::vector<u32> table;     // of brx.idx
  Type type = Type::None, type2 = Type::None;
  Space space = Space::Generic;
  u8 vector = 1;              // elements of ld/st
  u8 variant = 0;             // the handler's own: comparison, shuffle mode, atomic operation, rounding
  u8 combine = 0;             // and, or, xor of setp
  bool flag = false;          // the handler's own: .trans, .sat, .wait_all
  int k = 0;                  // of mma
  int member = -1;            // operand that names the lanes which must arrive together; -1: all
  std::vector<Operand> operands;
  std::string text;
  int line = 0;               // of the .cu file
  int ptx_line = 0;           // of the body's text
  u32 alive = 0;              // registers before it, where setmaxnreg limits them
  mutable Counters count;
};

struct Param { std::string name; u32 size, offset; };

struct Function {
  std::string name, target;
  std::vector<Param> params;
  u32 param_bytes = 0;
  std::vector<Inst> code;
  int slots = 0, predicates = 0;
  std::vector<u32> width;                          // bits of each slot
  std::vector<std::pair<int, u64>> constants;      // slot, value
  std::vector<std::pair<int, bool>> truths;        // predicate slot, value
  std::map<std::string, int> special;              // %tid.x and the like -> slot
  u32 static_shared = 0, local_bytes = 0;
  u32 max_threads = 0, min_blocks = 0;             // .maxntid, .minnctapersm; 0 if none
  bool wgmma = false, shifts_registers = false;    // has one; has setmaxnreg
  bool roles = false;                              // its warps wait for some of the others alone
  std::vector<bool> covered;                       // by line of the body's text: has a launch come by?
};

struct Variable { u8* data; u32 bytes; bool constant; };

struct Module {
  std::string text;
  std::map<std::string, std::unique_ptr<Function>> functions;
  std::map<std::string, Variable> variables;       // .global and .const
  std::vector<std::unique_ptr<u8[]>> storage;
};

void count_alive(Function&);   // registers.cpp

std::unique_ptr<Module> parse(const std::string& ptx);

// The modifiers of an opcode, less its types. A handler takes those it knows; what is left is an error, so no
// modifier is ever ignored.
struct Modifiers {
  std::string op;
  std::vector<std::string> list;

  bool take(const char* name) {
    for (size_t i = 0; i < list.size(); ++i)
      if (list[i] == name) return list.erase(list.begin() + i), true;
    return false;
  }
  int take_any(std::initializer_list<const char*> names) {   // its index, or -1
    int index = 0;
    for (const char* name : names) {
      if (take(name)) return index;
      ++index;
    }
    return -1;
  }
};

// Each file of handlers knows its own opcodes and returns null for all others.
Handler decode_arithmetic(Inst&, Modifiers&);
Handler decode_bits(Inst&, Modifiers&);
Handler decode_convert(Inst&, Modifiers&, const Function&);
Handler decode_memory(Inst&, Modifiers&);
Handler decode_async(Inst&, Modifiers&);
Handler decode_atomic(Inst&, Modifiers&);
Handler decode_warp(Inst&, Modifiers&);
Handler decode_matrix(Inst&, Modifiers&);
Handler decode_wgmma(Inst&, Modifiers&);
Handler decode_mbarrier(Inst&, Modifiers&);
Handler decode_bulk(Inst&, Modifiers&);
Handler decode_control(Inst&, Modifiers&);

}  // namespace sim
