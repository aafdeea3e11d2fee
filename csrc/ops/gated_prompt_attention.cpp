#include <algorithm>

#include "kernels/gated_prompt_attention.h"
#include "ops/bind.h"

namespace peftops::ops {
namespace {

// Heads and rows may have any strides, as in transformers' [B, H, S, d] views of [B, S, H, d]; the elements of a row
// are contiguous.
bool has_whole_rows(const Tensor& t) { return t.size(-1) <= 1 || t.stride(-1) == 1; }
Tensor with_whole_rows(const Tensor& t) { return has_whole_rows(t) ? t : torch::stable::contiguous(t); }

Strides strides_of(const Tensor& t) {   // of the last four dims; a first that is missing or 1 is not walked
  return {t.dim() == 4 && t.size(0) > 1 ? t.stride(0) : 0, t.stride(-3), t.stride(-2)};
}

// The operands that both directions share, kept alive while a kernel reads them.
struct Operands {
  Tensor query, key, value;
  GatedPrompt in;

  Operands(const char* op, const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& gate,
           double scale) {
    PEFTOPS_CHECK(query_.dim() == 4, op, ": query must have shape [batch, heads, rows, d], not ",
                    shape_of(query_));
    for (const Tensor* prompt : {&key_, &value_})
      PEFTOPS_CHECK(prompt->dim() == 3 || prompt->dim() == 4, op, ": a prompt must have shape [kv_heads, tokens, d]"
                      " or [batch, kv_heads, tokens, d], not ", shape_of(*prompt));
    query = with_whole_rows(query_), key = with_whole_rows(key_), value = with_whole_rows(value_);
    in.query = query.const_data_ptr(), in.key = key.const_data_ptr(), in.value = value.const_data_ptr();
    in.query_at = strides_of(query), in.key_at = strides_of(key), in.value_at = strides_of(value);
    in.batch = query.size(0), in.heads = query.size(1), in.rows = query.size(2), in.d = query.size(3);
    in.prompts = key.dim() == 4 ? key.size(0) : 1, in.kv_heads = key.size(-3), in.tokens = key.size(-2);
    in.dv = value.size(-1);
    PEFTOPS_CHECK(in.prompts == 1 || in.prompts == in.batch, op, ": there must be one prompt, or one for each of ",
                    in.batch, " samples, not ", in.prompts);
    PEFTOPS_CHECK(in.kv_heads > 0 && in.heads % in.kv_heads == 0, op, ": ", in.kv_heads,
                    " prompt heads do not divide ", in.heads, " query heads");
    PEFTOPS_CHECK(in.tokens > 0, op, ": a prompt needs at least one token");
    for (const int64_t d : {in.d, in.dv})
      PEFTOPS_CHECK(d > 0 && d <= kMaxPromptHeadDim, op, ": a head must have 1 to ", kMaxPromptHeadDim,
                      " dims, not ", d);
    PEFTOPS_CHECK(key.size(-1) == in.d && value.dim() == key.dim() && value.size(0) == key.size(0) &&
                    value.size(-3) == in.kv_heads && value.size(-2) == in.tokens,
                    op, ": prompt_key ", shape_of(key), " and prompt_value ", shape_of(value), " do not fit together or"
                    " query ", shape_of(query));
    check_shape(op, "gate", gate, {in.heads});
    in.gate = floats_of(op, "gate", gate), in.gate_stride = gate.stride(0);
    in.scale = float(scale);
    in.dtype = dtype_of(op, "query", query), in.prompt_dtype = dtype_of(op, "prompt_key", key);
    PEFTOPS_CHECK(value.scalar_type() == key.scalar_type(), op, ": prompt_key and prompt_value must have one dtype");
  }

  void check_output(const char* op, const char* name, const Tensor& t) const {
    check_shape(op, name, t, {in.batch, in.heads, in.rows, in.dv});
    PEFTOPS_CHECK(t.scalar_type() == query.scalar_type(), op, ": query and ", name, " must have one dtype");
  }
  int64_t work() const { return in.batch * in.heads * in.rows * in.tokens * (in.d + in.dv); }
};

// Fresh memory, heads and rows in the order of t's.
Tensor empty_rows_like(const Tensor& t) {
  Tensor result = torch::stable::empty_like(t);
  prefer_huge_pages(result.mutable_data_ptr(), result.numel() * int64_t(result.element_size()));
  return result;
}

void add(const Operands& o, const Tensor& out, Tensor& y) {
  if (out.numel() == 0) return;
  run(PEFTOPS_PICK(gated_prompt_add),
      GatedPromptAdd{o.in, out.const_data_ptr(), y.mutable_data_ptr(), strides_of(out), strides_of(y)}, o.work());
}

// y = out + gate * attention to the prompt
Tensor add_prompt(const Tensor& out_, const Tensor& query, const Tensor& key, const Tensor& value,
                  const Tensor& gate, double scale) {
  constexpr const char* kOp = "add_gated_prompt";
  const OnDevice device(kOp, {{"query", query}, {"prompt_key", key}, {"prompt_value", value}, {"gate", gate},
                              {"out", out_}});
  const Operands o(kOp, query, key, value, gate, scale);
  o.check_output(kOp, "out", out_);
  const Tensor out = with_whole_rows(out_);
  Tensor y = empty_rows_like(out);
  add(o, out, y);
  return y;
}

void add_prompt_inplace(Tensor out, const Tensor& query, const Tensor& key, const Tensor& value,
                        const Tensor& gate, double scale) {
  constexpr const char* kOp = "add_gated_prompt";
  const OnDevice device(kOp, {{"query", query}, {"prompt_key", key}, {"prompt_value", value}, {"gate", gate},
                              {"out", out}});
  const Operands o(kOp, query, key, value, gate, scale);
  o.check_output(kOp, "out", out);
  PEFTOPS_CHECK(has_whole_rows(out), kOp, ": the last dim of out must be contiguous");
  add(o, out, out);
}

constexpr const char* kBackward = "add_gated_prompt backward";

// The gradients of prompt_key, prompt_value and gate; the query's goes to dquery, if there is one.
std::tuple<Tensor, Tensor, Tensor> gradients(const Operands& o, const Tensor& g_, const Tensor& gate, Tensor* dquery,
                                             bool add) {
  const GatedPrompt& in = o.in;
  o.check_output(kBackward, "g", g_);
  const Tensor g = with_whole_rows(g_);
  Tensor dkey = empty(o.key, o.key.sizes().data(), o.key.dim(), o.key.scalar_type());
  Tensor dvalue = empty(o.value, o.value.sizes().data(), o.value.dim(), o.value.scalar_type());
  Tensor dgate = empty(gate, {in.heads}, ScalarType::Float);
  if (in.prompts == 0) return {dkey, dvalue, torch::stable::zero_(dgate)};   // one each for no samples

  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const auto padded = [&](int64_t d) { return ceil_div(d, kPromptPad) * kPromptPad; };
  const int64_t queries = in.batch / in.prompts * in.rows * (in.heads / in.kv_heads);
  const int64_t blocks = ceil_div(queries, kQueriesPerToken * std::max<int64_t>(8, in.tokens));
  const int64_t stride = in.tokens * (padded(in.d) + padded(in.dv)) + in.heads / in.kv_heads;
  Tensor partial = empty(gate, {in.prompts * in.kv_heads * blocks, stride}, ScalarType::Float);
  run(PEFTOPS_PICK(gated_prompt_backward),
      GatedPromptBackward{in, g.const_data_ptr(), dquery ? dquery->mutable_data_ptr() : nullptr, add,
                          partial.mutable_data_ptr<float>(), strides_of(g), dquery ? strides_of(*dquery) : Strides{},
                          blocks, stride},
      3 * o.work());
  run(PEFTOPS_PICK(gated_prompt_reduce),
      GatedPromptReduce{partial.const_data_ptr<float>(), dkey.mutable_data_ptr(), dvalue.mutable_data_ptr(),
                        dgate.mutable_data_ptr<float>(), blocks, stride, in.heads, in.d, in.dv, in.prompts, in.kv_heads,
                        in.tokens, in.prompt_dtype},
      partial.numel());
  return {dkey, dvalue, dgate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& g, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& gate, double scale,
    bool need_query) {
  const OnDevice device(kBackward, {{"query", query}, {"prompt_key", key}, {"prompt_value", value}, {"gate", gate},
                                    {"g", g}});
  const Operands o(kBackward, query, key, value, gate, scale);
  Tensor dquery = need_query ? empty_rows_like(o.query) : empty(query, {0}, query.scalar_type());
  auto [dkey, dvalue, dgate] = gradients(o, g, gate, need_query ? &dquery : nullptr, false);
  return {dquery, dkey, dvalue, dgate};
}

// The query's gradient is added to what dquery holds.
std::tuple<Tensor, Tensor, Tensor> backward_add(
    Tensor dquery, const Tensor& g, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& gate,
    double scale) {
  const OnDevice device(kBackward, {{"query", query}, {"prompt_key", key}, {"prompt_value", value}, {"gate", gate},
                                    {"g", g}, {"dquery", dquery}});
  const Operands o(kBackward, query, key, value, gate, scale);
  check_shape(kBackward, "dquery", dquery, {o.in.batch, o.in.heads, o.in.rows, o.in.d});
  PEFTOPS_CHECK(dquery.scalar_type() == query.scalar_type(), kBackward, ": query and dquery must have one dtype");
  PEFTOPS_CHECK(has_whole_rows(dquery), kBackward, ": the last dim of dquery must be contiguous");
  return gradients(o, g, gate, &dquery, true);
}

}  // namespace

PEFTOPS_IMPLEMENTATIONS(m) {
  m.impl("gated_prompt_add", TORCH_BOX(&add_prompt));
  m.impl("gated_prompt_add_", TORCH_BOX(&add_prompt_inplace));
  m.impl("gated_prompt_backward", TORCH_BOX(&backward));
  m.impl("gated_prompt_backward_", TORCH_BOX(&backward_add));
}

}  // namespace peftops::ops
