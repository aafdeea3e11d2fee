// The inner half of the parser: a kernel's body, from text to decoded instructions.
//
// Inline assembly opens scopes of its own, `{ .reg .b16 low, high; .. }`, so names are looked up from the
// innermost scope outwards. A name becomes a slot of the register file, a constant too.
#include <algorithm>

#include "parse.h"

namespace sim {
namespace {

struct Scope {
  std::map<std::string, int> registers, predicates;
  std::map<std::string, u32> labels;
  std::map<std::string, std::vector<std::string>> tables;   // .branchtargets
  std::map<std::string, u64> symbols;                       // address of a local or shared variable
  int parent;
};
struct Fixup { size_t instruction; int scope; };

class Body {
 public:
  Body(Function& f, const Module& m, const std::map<std::string, SharedVariable>& shared)
      : f_(f), module_(m), module_shared_(shared) {
    scopes_.push_back({{}, {}, {}, {}, {}, -1});
  }

  void parse(const std::string& text) {
    for (size_t i = 0, counted = 0; i < text.size();) {
      const char c = text[i];
      for (; counted < i; ++counted) ptx_line_ += text[counted] == '\n';
      if (std::isspace(u8(c)) || c == ';') ++i;
      else if (c == '{') open_scope(), ++i;
      else if (c == '}') current_ = scopes_[current_].parent, ++i;
      else if (starts(text, i, ".loc") && std::isspace(u8(text[i + 4]))) i = location(text, i);
      else if (is_label(text, i)) i = label(text, i);
      else i = statement(text, i);
    }
    finish();
  }

 private:
  Function& f_;
  const Module& module_;
  const std::map<std::string, SharedVariable>& module_shared_;
  std::vector<Scope> scopes_;
  int current_ = 0, line_ = 0, ptx_line_ = 0;
  std::vector<Fixup> branches_;
  std::map<u64, int> constants_;
  u32 dynamic_align_ = 16;
  std::vector<size_t> dynamic_;   // constants that count from where dynamic shared memory begins

  void open_scope() {
    scopes_.push_back({{}, {}, {}, {}, {}, current_});
    current_ = int(scopes_.size()) - 1;
  }

  size_t location(const std::string& text, size_t i) {
    const size_t end = std::min(text.find('\n', i), text.size());
    const auto w = words(text.substr(i, end - i));
    if (w.size() > 2) line_ = int(number(w[2]));
    return end;
  }

  static bool is_label(const std::string& text, size_t i) {
    while (i < text.size() && in_name(text[i])) ++i;
    return i + 1 < text.size() && text[i] == ':' && text[i + 1] != ':';
  }
  size_t label(const std::string& text, size_t i) {
    const size_t colon = text.find(':', i);
    const std::string name = text.substr(i, colon - i);
    size_t next = colon + 1;
    while (next < text.size() && std::isspace(u8(text[next]))) ++next;
    if (starts(text, next, ".branchtargets")) {
      const size_t end = text.find(';', next);
      scopes_[current_].tables[name] = split(text.substr(next + 14, end - next - 14), ',');
      return end + 1;
    }
    scopes_[current_].labels[name] = u32(f_.code.size());
    return colon + 1;
  }

  size_t statement(const std::string& text, size_t i) {
    const size_t end = text.find(';', i);
    if (end == std::string::npos) throw Error("a statement without an end: " + text.substr(i, 60));
    std::string s = trim(text.substr(i, end - i));
    std::replace_if(s.begin(), s.end(), [](char c) { return c == '\n' || c == '\t'; }, ' ');
    if (starts(s, 0, ".pragma")) return end + 1;
    if (s[0] == '.') declare(s);
    else instruction(s);
    return end + 1;
  }

  int new_slot(u32 bits) {
    f_.width.push_back(bits);
    return f_.slots++;
  }
  int constant(u64 value) {
    const auto it = constants_.find(value);
    if (it != constants_.end()) return it->second;
    const int slot = new_slot(64);
    f_.constants.push_back({slot, value});
    return constants_[value] = slot;
  }

  void declare(std::string s) {
    for (const char* space : {".reg", ".shared", ".local"})   // ".reg.b16" is ".reg .b16"
      if (starts(s, 0, space) && s[std::strlen(space)] == '.') s.insert(std::strlen(space), " ");
    const Declaration d = declaration(s);
    if (starts(s, 0, ".reg")) return declare_registers(d);
    if (starts(s, 0, ".shared")) return place_shared(scopes_[current_], d.name, d.bytes(), d.align);
    if (!starts(s, 0, ".local")) throw Error("unknown declaration: " + s);
    f_.local_bytes = round_up(f_.local_bytes, d.align);
    scopes_[current_].symbols[d.name] = f_.local_bytes;
    f_.local_bytes += d.bytes();
  }
  void declare_registers(const Declaration& d) {
    const auto add = [&](const std::string& name) {
      if (d.type == Type::Pred) scopes_[current_].predicates[name] = f_.predicates++;
      else scopes_[current_].registers[name] = new_slot(8 * size_of(d.type));
    };
    for (const auto& name : split(d.name, ',')) {
      const size_t range = name.find('<');   // %r<20> is %r0 to %r19
      if (range == std::string::npos) add(name);
      else
        for (u32 k = 0, n = number(name.substr(range + 1)); k < n; ++k) add(name.substr(0, range) + std::to_string(k));
    }
  }
  void place_shared(Scope& scope, const std::string& name, u32 bytes, u32 align) {
    f_.static_shared = round_up(f_.static_shared, align);
    scope.symbols[name] = f_.static_shared;
    f_.static_shared += bytes;
  }

  bool find_register(const std::string& name, Operand& o) const {
    for (int s = current_; s >= 0; s = scopes_[s].parent) {
      const auto r = scopes_[s].registers.find(name);
      if (r != scopes_[s].registers.end()) return o.kind = Operand::Register, o.slot = r->second, true;
      const auto p = scopes_[s].predicates.find(name);
      if (p != scopes_[s].predicates.end()) return o.kind = Operand::Predicate, o.slot = p->second, true;
    }
    return false;
  }

  // A variable's address, plus `add`, as a constant.
  bool find_symbol(const std::string& name, u64 add, Operand& o) {
    o.kind = Operand::Register;
    for (int s = current_; s >= 0; s = scopes_[s].parent) {
      const auto it = scopes_[s].symbols.find(name);
      if (it != scopes_[s].symbols.end()) return o.slot = constant(it->second + add), true;
    }
    for (const Param& p : f_.params)
      if (p.name == name) return o.slot = constant(p.offset + add), true;
    const auto variable = module_.variables.find(name);
    if (variable != module_.variables.end())
      return o.slot = constant(reinterpret_cast<u64>(variable->second.data) + add), true;
    const auto shared = module_shared_.find(name);
    if (shared == module_shared_.end()) return false;
    if (shared->second.bytes) {
      place_shared(scopes_[0], name, shared->second.bytes, shared->second.align);
      return find_symbol(name, add, o);
    }
    o.slot = new_slot(64);
    dynamic_align_ = std::max(dynamic_align_, shared->second.align);
    dynamic_.push_back(f_.constants.size());
    f_.constants.push_back({o.slot, add});
    return true;
  }

  Operand operand(const std::string& text, Type type) {
    Operand o;
    const std::string t = trim(text);
    if (t.empty() || t == "_") return o;
    if (t[0] == '{') {
      o.kind = Operand::Vector;
      for (const auto& part : split(t.substr(1, t.rfind('}') - 1), ',')) o.parts.push_back(operand(part, type).slot);
      return o;
    }
    if (t[0] == '[') {
      const auto pieces = split(t.substr(1, t.rfind(']') - 1), ',');   // a tensor map has coordinates beside it
      if (pieces.size() > 2) throw Error("unknown address: " + t);
      const std::string inside = pieces.at(0);
      const size_t sign = inside.find_first_of("+-", 1);
      o = operand(inside.substr(0, sign), Type::U64);
      if (o.kind != Operand::Register) throw Error("unknown address: " + t);
      o.kind = Operand::Address;
      if (sign != std::string::npos)
        o.offset = i64(immediate(trim(inside.substr(sign + (inside[sign] == '+'))), Type::S64));
      if (pieces.size() > 1) o.parts = operand(pieces[1], Type::S32).parts;
      return o;
    }
    if (t[0] == '!') {
      o = operand(t.substr(1), type);
      o.negated = true;
      return o;
    }
    const size_t bar = t.find('|');
    if (bar != std::string::npos) {
      o = operand(t.substr(0, bar), type);
      o.second = operand(t.substr(bar + 1), Type::Pred).slot;
      return o;
    }
    if (find_register(t, o)) return o;
    if (std::isdigit(u8(t[0])) || ((t[0] == '-' || t[0] == '+') && t.size() > 1)) {
      if (type == Type::Pred) {
        o.kind = Operand::Predicate, o.slot = f_.predicates++;
        f_.truths.push_back({o.slot, immediate(t, type) != 0});
      } else {
        o.kind = Operand::Register, o.slot = constant(immediate(t, type));
      }
      return o;
    }
    if (t == "WARP_SZ") return o.kind = Operand::Register, o.slot = constant(kLanes), o;
    if (t[0] == '%') return special(t);
    const size_t plus = t.find('+');
    if (find_symbol(trim(t.substr(0, plus)),
                    plus == std::string::npos ? 0 : immediate(trim(t.substr(plus + 1)), Type::S64), o))
      return o;
    o.kind = Operand::Label, o.slot = -1, o.name = t;
    return o;
  }
  Operand special(const std::string& name) {
    Operand o;
    o.kind = Operand::Register;
    const auto it = f_.special.find(name);
    o.slot = it != f_.special.end() ? it->second : (f_.special[name] = new_slot(64));
    return o;
  }

  void instruction(std::string s) {
    Inst i;
    i.text = s;
    i.line = line_;
    i.ptx_line = ptx_line_;
    if (s[0] == '@') {
      const size_t space = s.find(' ');
      i.guard_negated = s[1] == '!';
      Operand o;
      if (!find_register(s.substr(1 + i.guard_negated, space - 1 - i.guard_negated), o) || o.kind != Operand::Predicate)
        throw Error("unknown guard: " + s);
      i.guard = o.slot;
      s = trim(s.substr(space));
    }
    const size_t end = std::min(s.find_first_of(" {[("), s.size());
    Modifiers m;
    decode_suffixes(i, m, s.substr(0, end));
    Type type = m.op == "cvt" ? i.type2 : i.type;   // of immediates
    if (type == Type::Pred && m.op != "mov") type = Type::U32;   // the membermask of a vote, the number of a barrier
    for (const auto& text : split(s.substr(end), ',')) i.operands.push_back(operand(text, type));

    using Decode = Handler (*)(Inst&, Modifiers&);
    for (Decode decode : {decode_arithmetic, decode_bits, decode_memory, decode_bulk, decode_mbarrier, decode_async,
                          decode_atomic, decode_warp, decode_matrix, decode_wgmma, decode_control})
      if (!i.run) i.run = decode(i, m);
    if (!i.run) i.run = decode_convert(i, m, f_);
    if (!i.run || !m.list.empty())
      throw Error("unsupported instruction: " + i.text + (i.run ? " (modifier ." + m.list[0] + ")" : ""));
    for (const Operand& o : i.operands)
      if (o.kind == Operand::Label && i.flow != Flow::Branch && i.flow != Flow::Table)
        throw Error("unknown name '" + o.name + "' in: " + i.text);
    if (i.flow == Flow::Branch || i.flow == Flow::Table) branches_.push_back({f_.code.size(), current_});
    f_.shifts_registers |= m.op == "setmaxnreg";
    f_.wgmma |= i.counted == Class::Wgmma;
    f_.roles |= m.op == "mbarrier" || m.op == "wgmma" || starts(i.text, 0, "fence.proxy") || (i.counted == Class::Barrier && !i.variant && i.operands.size() > 1);
    f_.code.push_back(std::move(i));
  }

  static void decode_suffixes(Inst& i, Modifiers& m, const std::string& op) {
    static const std::map<std::string, Space> spaces = {
        {"global", Space::Global}, {"shared", Space::Shared}, {"shared::cta", Space::Shared},
        {"shared::cluster", Space::Shared},
        {"local", Space::Local},   {"param", Space::Param},   {"const", Space::Const}};
    size_t at = op.find('.');
    m.op = op.substr(0, at);
    while (at < op.size()) {
      const size_t next = std::min(op.find('.', at + 1), op.size());
      const std::string suffix = op.substr(at + 1, next - at - 1);
      const Type type = type_of(suffix);
      const auto space = spaces.find(suffix);
      if (type != Type::None) {
        if (i.type == Type::None) i.type = type;
        else if (i.type2 == Type::None) i.type2 = type;
      } else if (space != spaces.end() && i.space == Space::Generic) {
        i.space = space->second;
      } else {
        m.list.push_back(suffix);
      }
      at = next;
    }
  }

  u32 target(const std::string& name, int scope) const {
    for (; scope >= 0; scope = scopes_[scope].parent) {
      const auto it = scopes_[scope].labels.find(name);
      if (it != scopes_[scope].labels.end()) return it->second;
    }
    throw Error("unknown label " + name + " in " + f_.name);
  }

  void finish() {
    for (const Fixup& b : branches_) {
      Inst& i = f_.code[b.instruction];
      const std::string& name = i.operands.back().name;
      if (i.flow == Flow::Branch) { i.target = target(name, b.scope); continue; }
      for (int s = b.scope; s >= 0 && i.table.empty(); s = scopes_[s].parent) {
        const auto it = scopes_[s].tables.find(name);
        if (it != scopes_[s].tables.end())
          for (const auto& label : it->second) i.table.push_back(target(label, b.scope));
      }
      if (i.table.empty()) throw Error("unknown table of branch targets " + name + " in " + f_.name);
    }
    if (!dynamic_.empty()) f_.static_shared = round_up(f_.static_shared, dynamic_align_);
    for (size_t c : dynamic_) f_.constants[c].second += f_.static_shared;
    f_.local_bytes = round_up(f_.local_bytes, 16);
    f_.covered.resize(size_t(ptx_line_) + 1);
  }
};

}  // namespace

void parse_body(Function& f, const std::string& body, const Module& m,
                const std::map<std::string, SharedVariable>& shared) {
  Body(f, m, shared).parse(body);
  if (f.shifts_registers) count_alive(f);
}

}  // namespace sim
