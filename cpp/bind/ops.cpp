// The Python module _kernels: one function per op, arguments in the order of the struct's fields.
#include "ops/ops.h"

#include <pybind11/pybind11.h>

#include "bind/tensor_caster.h"
#include "ops/cpu/isa.h"
#include "ops/cpu/thread_pool.h"

namespace hybrid::bind {

namespace {

// Lets other Python threads run while a kernel does. The exception of a bad argument passes through.
template <class Args>
void without_gil(void (*op)(const Args&), const Args& args) {
  struct Released {
    PyThreadState* state = PyEval_SaveThread();
    ~Released() { PyEval_RestoreThread(state); }
  } released;
  op(args);
}

void bind_settings(py::module_& m) {
  m.def("has_cuda", &cuda::is_built);
  m.def("cuda_architectures", [] { return HYBRID_CUDA_ARCHITECTURES; });
  m.def("isa", [] { return cpu::kernels().name; });
  m.def("set_num_threads", &cpu::set_num_threads, py::arg("n"));
  m.def("num_threads", &cpu::num_threads);
  m.def("set_batch_invariant", &set_batch_invariant, py::arg("on"));
  m.def(
      "packed_size",
      [](int64_t n, int64_t k) {
        require(n >= 0 && k >= 0, "packed_size: n is ", n, " and k is ", k, ", neither may be negative");
        return packed_size(n, k);
      },
      py::arg("n"), py::arg("k"));
}

void bind_layers(py::module_& m) {
  m.def(
      "pack_weight",
      [](const Output& out, const Input& weight) { without_gil<PackWeight>(pack_weight, {out.view, weight.view}); },
      py::arg("out"), py::arg("weight"));
  m.def(
      "embedding",
      [](const Output& out, const Input& ids, const Input& table, const Input& picked, int64_t vocab) {
        without_gil<Embedding>(embedding, {out.view, ids.view, table.view, picked.view, vocab, stream_of(out)});
      },
      py::arg("out"), py::arg("ids"), py::arg("table"), py::arg("picked"), py::arg("vocab"));
  m.def(
      "linear",
      [](const Output& out, const Input& x, const Input& weight, const Input& bias, int64_t n, int64_t k) {
        without_gil<Linear>(linear, {out.view, x.view, weight.view, bias.view, n, k, stream_of(out)});
      },
      py::arg("out"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("n"), py::arg("k"));
  m.def(
      "linear_silu_mul",
      [](const Output& out, const Input& x, const Input& weight, const Input& bias, const Output& gate_up, int64_t k) {
        without_gil<LinearSiluMul>(linear_silu_mul,
                                   {out.view, x.view, weight.view, bias.view, gate_up.view, k, stream_of(out)});
      },
      py::arg("out"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("gate_up"), py::arg("k"));
  m.def(
      "rms_norm",
      [](const Output& out, const Input& x, const Input& weight, const Output& residual, float eps,
         bool begins_residual) {
        without_gil<RmsNorm>(rms_norm,
                             {out.view, x.view, weight.view, residual.view, {}, eps, begins_residual, stream_of(out)});
      },
      py::arg("out"), py::arg("x"), py::arg("weight"), py::arg("residual"), py::arg("eps"), py::arg("begins_residual"));
  m.def(
      "norm_linear",
      [](const Output& out, const Input& x, const Input& weight, const Input& residual, const Output& sum,
         const Output& normed, const Input& product_weight, const Input& bias, const Output& gate_up, int64_t n,
         int64_t k, float eps, bool begins_residual) {
        without_gil<NormLinear>(
            norm_linear, {out.view, x.view, weight.view, residual.view, sum.view, normed.view, product_weight.view,
                          bias.view, gate_up.view, n, k, eps, begins_residual, stream_of(out)});
      },
      py::arg("out"), py::arg("x"), py::arg("weight"), py::arg("residual"), py::arg("sum"), py::arg("normed"),
      py::arg("product_weight"), py::arg("bias"), py::arg("gate_up"), py::arg("n"), py::arg("k"), py::arg("eps"),
      py::arg("begins_residual"));
  m.def(
      "silu_mul",
      [](const Output& out, const Input& x) { without_gil<SiluMul>(silu_mul, {out.view, x.view, stream_of(out)}); },
      py::arg("out"), py::arg("x"));
}

void bind_cache(py::module_& m) {
  m.def(
      "rotate_and_store",
      [](const Output& q, const Output& k_cache, const Output& v_cache, const Input& k, const Input& v,
         const Input& cos_sin, const Input& positions, const Input& slots, const Input& q_weight, const Input& k_weight,
         float eps, float k_scale, float v_scale) {
        without_gil<RotateAndStore>(rotate_and_store,
                                    {q.view, k_cache.view, v_cache.view, k.view, v.view, cos_sin.view, positions.view,
                                     slots.view, q_weight.view, k_weight.view, eps, stream_of(q), k_scale, v_scale});
      },
      py::arg("q"), py::arg("k_cache"), py::arg("v_cache"), py::arg("k"), py::arg("v"), py::arg("cos_sin"),
      py::arg("positions"), py::arg("slots"), py::arg("q_weight"), py::arg("k_weight"), py::arg("eps"),
      py::arg("k_scale"), py::arg("v_scale"));
  m.def("decode_plan_size", &decode_plan_size, py::arg("max_decodes"));
  m.def(
      "plan_decode",
      [](const Output& plan, const Input& query_start, const Input& seq_lens, const Input& kv_start,
         const Input& num_decodes, int64_t max_decodes, int64_t heads, int64_t kv_heads, int64_t head_dim,
         const Input& prefix_start, const Input& prefix_lens, const Input& num_prefixes, int64_t block_size) {
        without_gil<PlanDecode>(
            plan_decode,
            {plan.view, query_start.view, seq_lens.view, kv_start.view, num_decodes.view, max_decodes, heads, kv_heads,
             head_dim, prefix_start.view, prefix_lens.view, num_prefixes.view, block_size, stream_of(plan)});
      },
      py::arg("plan"), py::arg("query_start"), py::arg("seq_lens"), py::arg("kv_start"), py::arg("num_decodes"),
      py::arg("max_decodes"), py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("prefix_start"),
      py::arg("prefix_lens"), py::arg("num_prefixes"), py::arg("block_size"));
  m.def(
      "paged_attention",
      [](const Output& out, const Input& q, const Input& k_cache, const Input& v_cache, const Input& query_start,
         const Input& seq_lens, const Input& kv_start, const Input& kv_blocks, const Input& num_decodes,
         int64_t max_decodes, int64_t max_prompts, int64_t max_query_len, float scale, const Input& plan,
         bool shares_prefixes, float k_scale, float v_scale) {
        without_gil<PagedAttention>(
            paged_attention, {out.view, q.view, k_cache.view, v_cache.view, query_start.view, seq_lens.view,
                              kv_start.view, kv_blocks.view, num_decodes.view, max_decodes, max_prompts, max_query_len,
                              scale, plan.view, shares_prefixes, stream_of(out), k_scale, v_scale});
      },
      py::arg("out"), py::arg("q"), py::arg("k_cache"), py::arg("v_cache"), py::arg("query_start"), py::arg("seq_lens"),
      py::arg("kv_start"), py::arg("kv_blocks"), py::arg("num_decodes"), py::arg("max_decodes"), py::arg("max_prompts"),
      py::arg("max_query_len"), py::arg("scale"), py::arg("plan"), py::arg("shares_prefixes"), py::arg("k_scale"),
      py::arg("v_scale"));
  m.def(
      "copy_blocks",
      [](const Output& cache, const Input& src, const Input& dst) {
        without_gil<CopyBlocks>(copy_blocks, {cache.view, src.view, dst.view, stream_of(cache)});
      },
      py::arg("cache"), py::arg("src"), py::arg("dst"));
  m.def(
      "swap_blocks",
      [](const Output& dst_cache, const Input& src_cache, const Input& dst, const Input& src) {
        const Stream stream = stream_of(dst_cache.view.device == hybrid::Device::cpu ? src_cache : dst_cache);
        without_gil<SwapBlocks>(swap_blocks, {dst_cache.view, src_cache.view, dst.view, src.view, stream});
      },
      py::arg("dst_cache"), py::arg("src_cache"), py::arg("dst"), py::arg("src"));
}

void bind_sample(py::module_& m) {
  m.def(
      "sample",
      [](const Output& tokens, const Output& logprobs, const Output& logprob_ids, const Output& ranks,
         const Output& logits, const Input& temperature, const Input& top_p, const Input& min_p,
         const Input& repetition_penalty, const Input& top_k, const Input& seeds, const Input& positions,
         const Input& num_logprobs, const Input& adjust_start, const Input& adjust_ids, const Input& adjust_add,
         const Input& adjust_flags) {
        without_gil<Sample>(sample, {tokens.view, logprobs.view, logprob_ids.view, ranks.view, logits.view,
                                     temperature.view, top_p.view, min_p.view, repetition_penalty.view, top_k.view,
                                     seeds.view, positions.view, num_logprobs.view, adjust_start.view, adjust_ids.view,
                                     adjust_add.view, adjust_flags.view, stream_of(tokens)});
      },
      py::arg("tokens"), py::arg("logprobs"), py::arg("logprob_ids"), py::arg("ranks"), py::arg("logits"),
      py::arg("temperature"), py::arg("top_p"), py::arg("min_p"), py::arg("repetition_penalty"), py::arg("top_k"),
      py::arg("seeds"), py::arg("positions"), py::arg("num_logprobs"), py::arg("adjust_start"), py::arg("adjust_ids"),
      py::arg("adjust_add"), py::arg("adjust_flags"));
}

}  // namespace

}  // namespace hybrid::bind

PYBIND11_MODULE(_kernels, m) {
  m.doc() = "The ops of hybrid-serve on DLPack tensors";
  hybrid::bind::bind_settings(m);
  hybrid::bind::bind_layers(m);
  hybrid::bind::bind_cache(m);
  hybrid::bind::bind_sample(m);
}
