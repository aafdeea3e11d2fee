// Zero-init gated attention (LLaMA-Adapter, arXiv:2303.16199): the contract between the kernels and everyone
// above them. An attention over K prompt tokens, with a softmax of its own, is added to an attention output:
//
//   gated_prompt_add       p[j] = softmax over j of scale * q . key[j]
//                          y    = out + gate[head] * sum over j of p[j] value[j]
//
// for each query q [d] with its rows of out and y [dv]. Prompts are not masked and not rotated. A head whose
// gate is 0 gets `out` itself, bit for bit. With g the gradient of y, t[j] = g . value[j], mean = sum of p[j] t[j]:
//
//   gated_prompt_backward  e[j]      = scale * gate[head] * p[j] * (t[j] - mean)
//                          dquery    = sum over j of e[j] key[j]
//                          dkey[j]   = sum of e[j] q                     over the queries that see this prompt
//                          dvalue[j] = sum of gate[head] * p[j] * g      over the same
//                          dgate[h]  = sum of mean                       over the queries of the head
//   gated_prompt_reduce    adds up the last three; the units of backward write partial sums of them
//
// p is computed again in the backward pass; nothing of the size S x K is ever in memory. All sums are fp32, in
// an order that depends on the shapes alone.
#pragma once
#include "kernels/cpu/kernel.h"
#ifdef PEFTOPS_CUDA
#include "kernels/cuda/kernel.h"
#endif
#include "kernels/dtype.h"

namespace peftops {

// Where the rows of a [batch, heads, rows, d] tensor lie, in elements; a row itself is contiguous.
struct Strides { int64_t batch, head, row; };

// Queries and prompts. Each of the kv_heads prompt heads serves heads / kv_heads query heads, neighbours;
// each of the `prompts` prompts serves the whole batch (prompts = 1) or one sample (prompts = batch).
struct GatedPrompt {
  const void* query;      // [batch, heads, rows, d] of dtype
  const void* key;        // [prompts, kv_heads, tokens, d] of prompt_dtype
  const void* value;      // [prompts, kv_heads, tokens, dv] of prompt_dtype
  const float* gate;      // [heads], or one for all if gate_stride is 0
  Strides query_at, key_at, value_at;
  int64_t gate_stride;
  int64_t batch, heads, rows, d, dv;
  int64_t prompts, kv_heads, tokens;
  float scale;
  DType dtype;            // of query, out, y, g and dquery
  DType prompt_dtype;
};

struct GatedPromptAdd {
  GatedPrompt in;
  const void* out;        // [batch, heads, rows, dv]
  void* y;                // the same; may be `out`
  Strides out_at, y_at;
};

// The queries that see one prompt head are cut into `blocks`, and each leaves its share of the gradients in
// `partial`, in fp32: dkey [tokens][padded d], dvalue [tokens][padded dv], dgate [heads / kv_heads]. Padded means
// to a multiple of kPromptPad.
struct GatedPromptBackward {
  GatedPrompt in;
  const void* g;          // [batch, heads, rows, dv]
  void* dquery;           // [batch, heads, rows, d], or null if it is not needed
  bool add_to_dquery;     // contains the attention's own gradient already
  float* partial;         // [prompts, kv_heads, blocks][partial_stride]
  Strides g_at, dquery_at;
  int64_t blocks, partial_stride;
};

struct GatedPromptReduce {
  const float* partial;   // [prompts, kv_heads, blocks][partial_stride]
  void* dkey;             // [prompts, kv_heads, tokens, d] of dtype, contiguous
  void* dvalue;           // [prompts, kv_heads, tokens, dv]
  float* dgate;           // [heads]
  int64_t blocks, partial_stride;
  int64_t heads, d, dv, prompts, kv_heads, tokens;
  DType dtype;
};

constexpr int64_t kPromptPad = 16;            // floats; a multiple of every vector width
constexpr int64_t kMaxPromptHeadDim = 1024;   // a tile of queries of this width still fits the scratch
constexpr int64_t kQueriesPerToken = 32;      // in a block, of 8 tokens at least: `partial` is 1/16 of query at most

PEFTOPS_CPU_KERNELS(
  Kernel<GatedPromptAdd> gated_prompt_add;
  Kernel<GatedPromptBackward> gated_prompt_backward;
  Kernel<GatedPromptReduce> gated_prompt_reduce;
)

#ifdef PEFTOPS_CUDA
namespace cuda {
Kernel<GatedPromptAdd> gated_prompt_add;
Kernel<GatedPromptBackward> gated_prompt_backward;
Kernel<GatedPromptReduce> gated_prompt_reduce;
}
#endif

}  // namespace peftops
