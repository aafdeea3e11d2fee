// What the two halves of the parser share.
#pragma once
#include <cctype>

#include "ptx.h"

namespace sim {

std::string trim(const std::string&);
std::vector<std::string> words(const std::string&);
std::vector<std::string> split(const std::string&, char at);   // not within brackets
u64 immediate(const std::string& text, Type);
u32 number(const std::string&);
size_t matching_brace(const std::string&, size_t open);

inline bool starts(const std::string& s, size_t at, const char* what) {
  return s.compare(at, std::strlen(what), what) == 0;
}
inline bool in_name(char c) { return std::isalnum(u8(c)) || c == '_' || c == '$' || c == '%'; }
inline u32 round_up(u32 n, u32 to) { return (n + to - 1) / to * to; }

// ".align 4 .b8 name[64]": a variable, a parameter or a register declaration without its space.
struct Declaration {
  Type type = Type::None;
  u32 align = 0, count = 1;
  bool array = false;
  std::string name;
  u32 bytes() const { return size_of(type) * count; }
};
Declaration declaration(const std::string&);

// Shared variables of the module get their place when a function uses them; bytes 0: dynamic shared memory.
struct SharedVariable { u32 bytes, align; };

void parse_body(Function&, const std::string& body, const Module&, const std::map<std::string, SharedVariable>&);

}  // namespace sim
