// The outer half of the parser: a module's variables and the headers of its functions.
#include "parse.h"

#include <algorithm>
#include <cstdlib>

namespace sim {

Type type_of(const std::string& s) {
  static const std::map<std::string, Type> types = {
      {"pred", Type::Pred}, {"b8", Type::B8},   {"u8", Type::U8},   {"s8", Type::S8},         {"b16", Type::B16},
      {"u16", Type::U16},   {"s16", Type::S16}, {"f16", Type::F16}, {"bf16", Type::BF16},     {"b32", Type::B32},
      {"u32", Type::U32},   {"s32", Type::S32}, {"f32", Type::F32}, {"tf32", Type::TF32},     {"f16x2", Type::F16x2},
      {"b64", Type::B64},   {"u64", Type::U64}, {"s64", Type::S64}, {"bf16x2", Type::BF16x2}, {"f64", Type::F64},
      {"b128", Type::B128}};
  const auto it = types.find(s);
  return it == types.end() ? Type::None : it->second;
}

std::string trim(const std::string& s) {
  size_t a = 0, b = s.size();
  while (a < b && std::isspace(u8(s[a]))) ++a;
  while (b > a && std::isspace(u8(s[b - 1]))) --b;
  return s.substr(a, b - a);
}

std::vector<std::string> words(const std::string& s) {
  std::vector<std::string> result;
  std::string word;
  for (char c : s + " ") {
    if (!std::isspace(u8(c))) word += c;
    else if (!word.empty()) result.push_back(std::move(word)), word.clear();
  }
  return result;
}

std::vector<std::string> split(const std::string& s, char at) {
  std::vector<std::string> result;
  std::string part;
  int depth = 0;
  for (char c : s) {
    depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
    if (c == at && depth == 0) result.push_back(trim(part)), part.clear();
    else part += c;
  }
  part = trim(part);
  if (!part.empty() || !result.empty()) result.push_back(part);
  return result;
}

u32 number(const std::string& s) {
  char* end;
  const unsigned long v = std::strtoul(s.c_str(), &end, 0);
  if (end == s.c_str()) throw Error("a number was expected, not '" + s + "'");
  return u32(v);
}

u64 immediate(const std::string& text, Type type) {
  std::string t = text;
  const bool negative = t[0] == '-';
  if (negative || t[0] == '+') t.erase(0, 1);
  if (t.size() > 2 && t[0] == '0' && (t[1] == 'f' || t[1] == 'F')) {   // 0f3F800000
    const u64 bits = std::strtoull(t.c_str() + 2, nullptr, 16);
    return negative ? bits ^ 0x80000000u : bits;
  }
  const bool bits64 = t.size() > 2 && t[0] == '0' && (t[1] == 'd' || t[1] == 'D');
  const bool hex = t.size() > 1 && t[0] == '0' && (t[1] == 'x' || t[1] == 'X');
  if (bits64 || (!hex && t.find_first_of(".eE") != std::string::npos)) {
    double v = bits64 ? as<double>(u64(std::strtoull(t.c_str() + 2, nullptr, 16))) : std::strtod(t.c_str(), nullptr);
    if (negative) v = -v;
    return type == Type::F32 ? as<u32>(float(v)) : as<u64>(v);
  }
  const u64 v = std::strtoull(t.c_str(), nullptr, 0);
  return negative ? 0 - v : v;
}

size_t matching_brace(const std::string& s, size_t open) {
  int depth = 0;
  for (size_t i = open; i < s.size(); ++i) {
    depth += (s[i] == '{') - (s[i] == '}');
    if (depth == 0) return i;
  }
  throw Error("a brace is never closed");
}

Declaration declaration(const std::string& text) {
  Declaration d;
  const auto w = words(text);
  std::string name;
  for (size_t i = 0; i < w.size(); ++i) {
    if (w[i] == ".align") {
      const u32 align = number(w.at(++i));
      if (d.type == Type::None) d.align = std::max(d.align, align);   // what follows .ptr is no property of ours
    } else if (w[i] == ".param" || w[i] == ".ptr" || w[i] == ".global" || w[i] == ".const" || w[i] == ".shared" ||
               w[i] == ".visible" || w[i] == ".weak" || w[i] == ".extern" || w[i] == ".reg" || w[i] == ".local" ||
               w[i] == ".generic") {
      continue;
    } else if (w[i][0] == '.') {
      if (d.type != Type::None || (d.type = type_of(w[i].substr(1))) == Type::None)
        throw Error("unknown declaration: " + text);
    } else {
      name += w[i] + (w[i].back() == ',' ? " " : "");
    }
  }
  const size_t bracket = name.find('[');
  if (bracket != std::string::npos) {
    d.array = true;
    d.count = name[bracket + 1] == ']' ? 0 : number(name.substr(bracket + 1));
    name.erase(bracket);
  }
  d.name = trim(name);
  if (d.type == Type::None) throw Error("a declaration without a type: " + text);
  d.align = std::max(d.align, size_of(d.type));
  return d;
}

namespace {

std::string without_comments(const std::string& s) {
  std::string r;
  for (size_t i = 0; i < s.size() && s[i];) {
    if (starts(s, i, "//")) while (i < s.size() && s[i] != '\n') ++i;
    else if (starts(s, i, "/*")) i = s.find("*/", i) + 2;
    else r += s[i++];
  }
  return r;
}

void parse_entry(Module& m, const std::string& header, const std::string& body, const std::string& target,
                 const std::map<std::string, SharedVariable>& shared) {
  auto f = std::make_unique<Function>();
  f->target = target;
  const size_t open = header.find('('), name = header.find(".entry") + 6;
  f->name = trim(header.substr(name, std::min(open, header.size()) - name));
  if (open != std::string::npos) {
    const size_t close = header.find(')', open);
    for (const auto& text : split(header.substr(open + 1, close - open - 1), ',')) {
      if (text.empty()) continue;
      const Declaration d = declaration(text);
      f->param_bytes = round_up(f->param_bytes, d.align);
      f->params.push_back({d.name, d.bytes(), f->param_bytes});
      f->param_bytes += d.bytes();
    }
    const size_t limit = header.find(".maxntid", close);
    if (limit != std::string::npos) {
      f->max_threads = 1;
      std::string rest = header.substr(limit + 8);
      rest = rest.substr(0, rest.find('.'));
      for (const auto& n : split(trim(rest), ',')) f->max_threads *= number(n);
    }
    const size_t blocks = header.find(".minnctapersm", close);
    if (blocks != std::string::npos) f->min_blocks = number(header.substr(blocks + 13));
  }
  parse_body(*f, body, m, shared);
  m.functions[f->name] = std::move(f);
}

void parse_variable(Module& m, const std::string& statement, std::map<std::string, SharedVariable>& shared) {
  const size_t equals = statement.find('=');
  const std::string head = statement.substr(0, equals);
  const Declaration d = declaration(head);
  if (head.find(".shared") != std::string::npos) {
    shared[d.name] = {d.bytes(), d.align};
    return;
  }
  constexpr u32 kAlign = 256;
  auto memory = std::make_unique<u8[]>(d.bytes() + kAlign);
  u8* data = memory.get() + (kAlign - reinterpret_cast<u64>(memory.get()) % kAlign);
  std::memset(data, 0, d.bytes());
  if (equals != std::string::npos) {
    std::string values = trim(statement.substr(equals + 1));
    if (values[0] == '{') values = values.substr(1, values.rfind('}') - 1);
    u32 offset = 0;
    for (const auto& text : split(values, ',')) {
      if (text.empty() || offset >= d.bytes() || std::isalpha(u8(text[0])))
        throw Error("unknown initialiser in: " + statement.substr(0, 80));
      const u64 v = immediate(text, d.type);
      std::memcpy(data + offset, &v, size_of(d.type));
      offset += size_of(d.type);
    }
  }
  m.variables[d.name] = {data, d.bytes(), head.find(".const") != std::string::npos};
  m.storage.push_back(std::move(memory));
}

}  // namespace

std::unique_ptr<Module> parse(const std::string& ptx) {
  auto m = std::make_unique<Module>();
  m->text = ptx;
  const std::string t = without_comments(ptx);
  std::map<std::string, SharedVariable> shared;
  std::string target;
  for (size_t i = 0; i < t.size();) {
    if (std::isspace(u8(t[i])) || t[i] == ';') { ++i; continue; }
    if (starts(t, i, ".version") || starts(t, i, ".address_size") || starts(t, i, ".file") || starts(t, i, ".loc") ||
        starts(t, i, ".target")) {
      const size_t end = std::min(t.find('\n', i), t.size());
      if (starts(t, i, ".target")) target = trim(t.substr(i + 7, end - i - 7));
      i = end;
      continue;
    }
    if (starts(t, i, ".section")) { i = matching_brace(t, t.find('{', i)) + 1; continue; }   // debug information
    const size_t semicolon = std::min(t.find(';', i), t.size()), brace = std::min(t.find('{', i), t.size());
    const std::string header = t.substr(i, std::min(semicolon, brace) - i);
    if (header.find(".func") != std::string::npos)
      throw Error("functions are not supported, only kernels: " + trim(header));
    if (header.find(".entry") != std::string::npos) {
      const size_t end = matching_brace(t, brace);
      parse_entry(*m, header, t.substr(brace + 1, end - brace - 1), target, shared);
      i = end + 1;
    } else {
      parse_variable(*m, t.substr(i, semicolon - i), shared);
      i = semicolon + 1;
    }
  }
  return m;
}

}  // namespace sim
