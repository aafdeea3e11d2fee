// The list of all operators of the package, and the module peftops._C. kernels/<stem>.h says what an operator computes;
// its implementation is in ops/<stem>.cpp. They are private: the public functions, with gradients and fakes, are in
// peftops/ops/<stem>.py.
#include <pybind11/pybind11.h>

#include "kernels/multi_lora_linear.h"
#include "ops/bind.h"

// Five arguments that are one weight: packed uint8; absmax float32, or uint8 with its scale and offset.
#define NF4_WEIGHT "Tensor packed, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset, int block_size"
// And five that are a group-quantised one: packed uint8 [out, in * bits / 8]; scales and zeros float32 [out, groups].
#define GROUP_WEIGHT "Tensor packed, Tensor scales, Tensor zeros, int bits, int group_size"
// And two that are an MXFP4 one: blocks uint8 [out, in / 2], scales uint8 [out, in / 32].
#define MXFP4_WEIGHT "Tensor blocks, Tensor scales"
#define GATED_PROMPT "Tensor query, Tensor prompt_key, Tensor prompt_value, Tensor gate, float scale"

// Four arguments that are the adapters of one layer, by slot; their factors lie in the pages of a storage.
#define LORA_SLOTS "Tensor handles, Tensor pages, Tensor where, Tensor scaling"

// Stacks are flat: weights [experts * out, in] (except dense ones), bias [experts * out], lora_B [experts * out, r],
// lora_A [experts * r, in]. offsets is int64.
#define EXPERTS_FORWARD "Tensor offsets, Tensor? bias, Tensor? u, Tensor? lora_B, float scaling"
#define EXPERTS_BACKWARD "Tensor offsets, Tensor? v, Tensor? lora_A"

STABLE_TORCH_LIBRARY(peftops, m) {
  m.def("nf4_quantize(Tensor weight, int block_size) -> (Tensor packed, Tensor absmax)");
  m.def("nf4_quantize_absmax(Tensor absmax, Tensor offset) -> (Tensor code, Tensor scale)");
  m.def("nf4_absmax(Tensor absmax, Tensor absmax_scale, Tensor absmax_offset) -> Tensor");
  m.def("nf4_dequantize(" NF4_WEIGHT ", int rows, int cols, ScalarType dtype) -> Tensor");
  m.def("nf4_linear(Tensor x, " NF4_WEIGHT ", int out_features, int in_features, Tensor? bias, Tensor? u,"
        " Tensor? lora_B, float scaling, bool int8=False) -> Tensor");
  m.def("nf4_linear_backward(Tensor g, " NF4_WEIGHT ", int in_features, Tensor? v, Tensor? lora_A,"
        " float dropout_p, Tensor? seed) -> Tensor");
  m.def("lora_shrink(Tensor x, Tensor factor, bool by_rank, float scale, float dropout_p, Tensor? seed) -> Tensor");
  m.def("lora_expand_(Tensor(a!) y, Tensor u, Tensor factor, bool by_rank, float scale, float dropout_p,"
        " Tensor? seed) -> ()");
  m.def("lora_gradient(Tensor u, Tensor x, ScalarType dtype, bool by_rank, float scale, float dropout_p,"
        " Tensor? seed) -> Tensor");
  m.def("group_quantize(Tensor weight, int bits, int group_size, bool symmetric, int narrower)"
        " -> (Tensor packed, Tensor scales, Tensor zeros)");
  m.def("group_dequantize(" GROUP_WEIGHT ", ScalarType dtype) -> Tensor");
  m.def("group_linear(Tensor x, " GROUP_WEIGHT ", Tensor? bias, Tensor? u, Tensor? lora_B, float scaling, bool int8=False)"
        " -> Tensor");
  m.def("group_linear_backward(Tensor g, " GROUP_WEIGHT ", Tensor? v, Tensor? lora_A) -> Tensor");
  m.def("mxfp4_quantize(Tensor weight) -> (Tensor blocks, Tensor scales)");
  m.def("mxfp4_dequantize(" MXFP4_WEIGHT ", ScalarType dtype) -> Tensor");
  m.def("mxfp4_linear(Tensor x, " MXFP4_WEIGHT ", Tensor? bias, Tensor? u, Tensor? lora_B, float scaling,"
        " bool int8=False) -> Tensor");
  m.def("mxfp4_linear_backward(Tensor g, " MXFP4_WEIGHT ", Tensor? v, Tensor? lora_A, float dropout_p, Tensor? seed)"
        " -> Tensor");
  m.def("qalora_shrink(Tensor x, Tensor lora_A, int group_size) -> (Tensor pooled, Tensor u)");
  m.def("qalora_merge(Tensor scales, Tensor zeros, Tensor lora_A, Tensor lora_B, float factor) -> Tensor");
  m.def("gated_prompt_add(Tensor out, " GATED_PROMPT ") -> Tensor");
  m.def("gated_prompt_add_(Tensor(a!) out, " GATED_PROMPT ") -> ()");
  m.def("gated_prompt_backward(Tensor g, " GATED_PROMPT ", bool need_query)"
        " -> (Tensor dquery, Tensor dprompt_key, Tensor dprompt_value, Tensor dgate)");
  m.def("gated_prompt_backward_(Tensor(a!) dquery, Tensor g, " GATED_PROMPT ")"
        " -> (Tensor dprompt_key, Tensor dprompt_value, Tensor dgate)");
  m.def("paged_attention(Tensor query, Tensor key_pages, Tensor value_pages, Tensor block_table, Tensor lengths,"
        " float scale, int window) -> Tensor");
  m.def("adamw8bit_(Tensor(a!)[] parameters, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq,"
        " Tensor(d!)[] exp_avg_absmax, Tensor(e!)[] exp_avg_sq_absmax, int block_size, int step, float lr, float beta1,"
        " float beta2, float eps, float weight_decay) -> ()");
  m.def("multi_lora_add_(Tensor(a!) y, Tensor x, Tensor index, Tensor storage, " LORA_SLOTS ", bool transposed,"
        " int max_rank) -> Tensor");
  m.def("multi_lora_gradient(Tensor u, Tensor x, Tensor index, Tensor wanted, " LORA_SLOTS ", bool by_rank,"
        " int total) -> Tensor");
  m.def("experts_nf4(Tensor x, " NF4_WEIGHT ", int out_features, int in_features, " EXPERTS_FORWARD ", bool int8=False)"
        " -> Tensor");
  m.def("experts_nf4_backward(Tensor g, " NF4_WEIGHT ", int in_features, " EXPERTS_BACKWARD ") -> Tensor");
  m.def("experts_group(Tensor x, " GROUP_WEIGHT ", " EXPERTS_FORWARD ", bool int8=False) -> Tensor");
  m.def("experts_group_backward(Tensor g, " GROUP_WEIGHT ", " EXPERTS_BACKWARD ") -> Tensor");
  m.def("experts_mxfp4(Tensor x, " MXFP4_WEIGHT ", " EXPERTS_FORWARD ", bool int8=False) -> Tensor");
  m.def("experts_mxfp4_backward(Tensor g, " MXFP4_WEIGHT ", " EXPERTS_BACKWARD ") -> Tensor");
  m.def("experts_dense(Tensor x, Tensor weight, " EXPERTS_FORWARD ") -> Tensor");
  m.def("experts_dense_backward(Tensor g, Tensor weight, " EXPERTS_BACKWARD ") -> Tensor");
  m.def("experts_shrink(Tensor x, Tensor factor, Tensor offsets, bool by_rank, float scale) -> Tensor");
  m.def("experts_gradient(Tensor u, Tensor x, Tensor offsets, ScalarType dtype, bool by_rank, float scale) -> Tensor");
}

#undef EXPERTS_BACKWARD
#undef EXPERTS_FORWARD
#undef LORA_SLOTS
#undef GATED_PROMPT
#undef NF4_WEIGHT
#undef GROUP_WEIGHT
#undef MXFP4_WEIGHT

namespace py = pybind11;
using namespace peftops::cpu;

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of peftops: registers torch.ops.peftops, tells how it was built, and controls the CPU ISA.";

  m.def("isa", [] { return isa_name(isa()); }, "The instruction set in use, one of isas().");
  m.def("isas", [] {
    py::list names;
    for (Isa each : kIsas) names.append(isa_name(each));
    return py::tuple(names);
  }, "The instruction sets that this build has kernels for, from the narrowest to the widest.");
  m.def("best_isa", [] { return isa_name(best_isa()); }, "The best instruction set of this CPU and build.");
  m.def("isa_limit", [] { return isa_name(isa_limit()); }, "The highest instruction set allowed.");
  m.def("set_isa_limit", [](const std::string& name) {
    Isa limit;
    if (!parse_isa(name.c_str(), limit))
      throw py::value_error("isa must be one of " + isa_names() + ", not '" + name + "'");
    set_isa_limit(limit);
  }, py::arg("isa"), "Allow no instruction set above this one.");

  m.attr("lora_line") = peftops::kLoraLine;
  m.attr("lora_max_rank") = peftops::kLoraMaxRank;

  py::dict build;
  build["compiler"] = PEFTOPS_COMPILER;
  build["build_type"] = PEFTOPS_BUILD_TYPE;
  build["torch_target"] = "2.10";   // the LibTorch stable ABI that it keeps to
  build["torch_built_with"] = PEFTOPS_TORCH_VERSION;
  build["cuda"] = PEFTOPS_CUDA_VERSION[0] ? py::object(py::str(PEFTOPS_CUDA_VERSION)) : py::object(py::none());
  m.attr("build_info") = build;
}
