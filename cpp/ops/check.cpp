#include "ops/check.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "common/check.h"

namespace hybrid {

namespace {

constexpr int64_t any = -1;

std::string shape_text(const int64_t* sizes, int32_t ndim) {
  std::string text = "[";
  for (int32_t i = 0; i < ndim; ++i)
    text += concat(i > 0 ? ", " : "", sizes[i] == any ? "any" : std::to_string(sizes[i]));
  return text + "]";
}

// Checks the tensors of one call; the first one seen sets the device for all.
class Call {
 public:
  explicit Call(const char* op) : op_(op) {}

  template <class... Parts>
  void need(bool condition, const Parts&... parts) const {
    if (!condition) [[unlikely]]
      throw std::invalid_argument(concat(op_, ": ", parts...));
  }

  // Defined, of this dtype and shape, on the call's device, with a contiguous last dimension.
  const Call& tensor(const char* name, const TensorView& t, DType dtype, std::initializer_list<int64_t> shape) {
    spaced(name, t, dtype, shape);
    need(t.numel() == 0 || t.shape[t.ndim - 1] == 1 || t.strides[t.ndim - 1] == 1, name,
         ": the last dimension must be contiguous, its stride is ", t.strides[t.ndim - 1]);
    return *this;
  }

  // The same, with entries that may lie apart.
  const Call& spaced(const char* name, const TensorView& t, DType dtype, std::initializer_list<int64_t> shape) {
    need(t.defined(), name, " is missing");
    need(t.dtype == dtype, name, " is ", name_of(t.dtype), ", expected ", name_of(dtype));
    bool same = t.ndim == static_cast<int32_t>(shape.size());
    for (int32_t i = 0; same && i < t.ndim; ++i) same = shape.begin()[i] == any || shape.begin()[i] == t.shape[i];
    if (!same) wrong_shape(name, t, shape);
    if (t.numel() == 0) return *this;
    need(t.data != nullptr, name, " has no data");
    if (first_ == nullptr) first_ = &t, first_name_ = name;
    need(t.device == first_->device && t.device_index == first_->device_index, name, " and ", first_name_,
         " are on different devices");
    return *this;
  }

  const Call& packed(const char* name, const TensorView& t, DType dtype, std::initializer_list<int64_t> shape) {
    tensor(name, t, dtype, shape);
    need(t.contiguous(), name, " must be contiguous");
    return *this;
  }

  void float_type(const char* name, const TensorView& t) const {
    need(t.dtype == DType::f32 || t.dtype == DType::bf16 || t.dtype == DType::f16, name, " is ", name_of(t.dtype),
         ", expected float32, bfloat16 or float16");
  }

  // Every index in [low, high). Free on a CPU; on a device nobody waits for the data to look at it.
  template <class T>
  void indices(const char* name, const TensorView& t, int64_t low, int64_t high) const {
    if (t.device != Device::cpu || t.numel() == 0) return;
    const T* values = t.as<T>();
    T smallest = values[0], largest = values[0];
    for (int64_t i = 1; i < t.numel(); ++i) {
      smallest = values[i] < smallest ? values[i] : smallest;
      largest = values[i] > largest ? values[i] : largest;
    }
    need(smallest >= low && largest < high, name, " holds ", smallest < low ? smallest : largest,
         ", expected values in [", low, ", ", high, ")");
  }

 private:
  // Apart, because its arguments cost microseconds to build.
  void wrong_shape(const char* name, const TensorView& t, std::initializer_list<int64_t> shape) const {
    need(false, name, " has shape ", shape_text(t.shape, t.ndim), ", expected ",
         shape_text(shape.begin(), static_cast<int32_t>(shape.size())));
  }

  const char* op_;
  const TensorView* first_ = nullptr;
  const char* first_name_ = "";
};

}  // namespace

void check(const Embedding& a) {
  Call call("embedding");
  call.float_type("out", a.out);
  call.tensor("out", a.out, a.out.dtype, {any, any});
  const int64_t dim = a.out.shape[1];
  call.packed("ids", a.ids, DType::i32, {a.out.shape[0]});
  call.need(a.vocab >= 0, "vocab is ", a.vocab, ", must not be negative");
  if (a.table.ndim == 1)
    call.packed("table", a.table, a.out.dtype, {packed_size(a.vocab, dim)});
  else
    call.tensor("table", a.table, a.out.dtype, {a.vocab, dim});
  if (a.picked.defined()) call.packed("picked", a.picked, DType::i32, {any});
  call.indices<int32_t>("ids", a.ids, a.picked.defined() ? -a.picked.shape[0] : 0, a.vocab);
}

void check(const PackWeight& a) {
  Call call("pack_weight");
  call.float_type("weight", a.weight);
  call.tensor("weight", a.weight, a.weight.dtype, {any, any});
  call.packed("out", a.out, a.weight.dtype, {packed_size(a.weight.shape[0], a.weight.shape[1])});
}

void check(const Linear& a) {
  Call call("linear");
  call.need(a.n > 0 && a.k > 0, "n is ", a.n, " and k is ", a.k, ", both must be positive");
  call.float_type("x", a.x);
  call.tensor("x", a.x, a.x.dtype, {any, a.k});
  call.tensor("out", a.out, a.out.dtype == DType::f32 ? DType::f32 : a.x.dtype, {a.x.shape[0], a.n});
  call.packed("weight", a.weight, a.x.dtype, {packed_size(a.n, a.k)});
  if (a.bias.defined()) call.tensor("bias", a.bias, a.x.dtype, {a.n});
}

void check(const LinearSiluMul& a) {
  Call call("linear_silu_mul");
  call.float_type("x", a.x);
  call.tensor("x", a.x, a.x.dtype, {any, a.k});
  call.tensor("out", a.out, a.x.dtype, {a.x.shape[0], any});
  const int64_t dim = a.out.shape[1];
  call.need(dim > 0 && a.k > 0, "the width of out is ", dim, " and k is ", a.k, ", both must be positive");
  call.packed("weight", a.weight, a.x.dtype, {packed_size(2 * dim, a.k)});
  if (a.bias.defined()) call.tensor("bias", a.bias, a.x.dtype, {2 * dim});
  call.packed("gate_up", a.gate_up, a.x.dtype, {a.x.shape[0], 2 * dim});
}

void check(const RmsNorm& a) {
  Call call("rms_norm");
  call.float_type("x", a.x);
  call.tensor("x", a.x, a.x.dtype, {any, any});
  call.tensor("out", a.out, a.x.dtype, {a.x.shape[0], a.x.shape[1]});
  call.tensor("weight", a.weight, a.x.dtype, {a.x.shape[1]});
  call.need(!a.begins_residual || a.residual.defined(), "begins_residual without a residual");
  call.need(!a.sum.defined() || a.residual.defined(), "sum without a residual");
  const DType sum = a.residual.dtype == DType::f32 ? DType::f32 : a.x.dtype;
  if (a.residual.defined()) call.tensor("residual", a.residual, sum, {a.x.shape[0], a.x.shape[1]});
  if (a.sum.defined()) call.tensor("sum", a.sum, sum, {a.x.shape[0], a.x.shape[1]});
}

void check(const NormLinear& a) {
  Call call("norm_linear");
  const bool gated = a.gate_up.defined();
  call.need(a.n > 0 && a.k > 0 && (!gated || a.n % 2 == 0), "n is ", a.n, " and k is ", a.k,
            ", both must be positive, and n even for gate_up");
  call.float_type("x", a.x);
  call.tensor("x", a.x, a.x.dtype, {any, a.k});
  const int64_t rows = a.x.shape[0];
  const DType sum = a.residual.dtype == DType::f32 ? DType::f32 : a.x.dtype;
  call.tensor("weight", a.weight, a.x.dtype, {a.k});
  call.tensor("residual", a.residual, sum, {rows, a.k});
  call.tensor("sum", a.sum, sum, {rows, a.k});
  call.need(a.sum.data != a.residual.data || rows == 0, "sum must not be residual");
  call.packed("normed", a.normed, a.x.dtype, {rows, a.k});
  const bool wide = a.out.dtype == DType::f32 && !gated;
  call.tensor("out", a.out, wide ? DType::f32 : a.x.dtype, {rows, gated ? a.n / 2 : a.n});
  call.packed("product_weight", a.product_weight, a.x.dtype, {packed_size(a.n, a.k)});
  if (a.bias.defined()) call.tensor("bias", a.bias, a.x.dtype, {a.n});
  if (gated) call.packed("gate_up", a.gate_up, a.x.dtype, {rows, a.n});
}

void check(const SiluMul& a) {
  Call call("silu_mul");
  call.float_type("out", a.out);
  call.tensor("out", a.out, a.out.dtype, {any, any});
  call.tensor("x", a.x, a.out.dtype, {a.out.shape[0], 2 * a.out.shape[1]});
}

namespace {

// What a cache beside q may be of.
DType cache_dtype(const TensorView& q, const TensorView& cache) {
  return cache.dtype == DType::f8 ? DType::f8 : q.dtype;
}

// A cache may be a slice of larger blocks, but within a block it is dense.
void check_cache(Call& call, const char* name, const TensorView& t, DType dtype, std::initializer_list<int64_t> shape,
                 float scale) {
  call.tensor(name, t, dtype, shape);
  call.need(scale > 0.0f && scale <= std::numeric_limits<float>::max(), name, " has a scale of ", scale,
            ", must be positive and finite");
  call.need(dtype == DType::f8 || scale == 1.0f, name, " is ", name_of(dtype), " and has a scale of ", scale,
            ", only float8_e4m3fn has one");
  if (t.numel() == 0) return;
  call.need(t.strides[2] == t.shape[3] && t.strides[1] == t.shape[2] * t.shape[3], name, " has strides ", t.strides[1],
            " and ", t.strides[2], " inside a block, expected ", t.shape[2] * t.shape[3], " and ", t.shape[3]);
}

}  // namespace

void check(const RotateAndStore& a) {
  Call call("rotate_and_store");
  call.float_type("q", a.q);
  call.tensor("q", a.q, a.q.dtype, {any, any, any});
  const int64_t rows = a.q.shape[0], dim = a.q.shape[2];
  const DType cache = cache_dtype(a.q, a.k_cache);
  check_cache(call, "k_cache", a.k_cache, cache, {any, any, any, dim}, a.k_scale);
  const int64_t blocks = a.k_cache.shape[0], kv_heads = a.k_cache.shape[1], block_size = a.k_cache.shape[2];
  check_cache(call, "v_cache", a.v_cache, cache, {blocks, kv_heads, block_size, dim}, a.v_scale);
  call.tensor("k", a.k, a.q.dtype, {rows, kv_heads, dim});
  call.tensor("v", a.v, a.q.dtype, {rows, kv_heads, dim});
  call.packed("cos_sin", a.cos_sin, DType::f32, {any, any});
  const int64_t rotary_dim = a.cos_sin.shape[1];
  call.need(rotary_dim % 2 == 0 && rotary_dim <= dim, "cos_sin has rotary_dim ", rotary_dim,
            ", expected an even number of at most dim = ", dim);
  call.packed("positions", a.positions, DType::i32, {rows});
  call.indices<int32_t>("positions", a.positions, 0, a.cos_sin.shape[0]);
  call.packed("slots", a.slots, DType::i64, {rows});
  call.indices<int64_t>("slots", a.slots, std::numeric_limits<int64_t>::min(), blocks * block_size);
  call.need(a.q_weight.defined() == a.k_weight.defined(), "q_weight and k_weight go together, one is missing");
  if (!a.q_weight.defined()) return;
  call.tensor("q_weight", a.q_weight, a.q.dtype, {dim});
  call.tensor("k_weight", a.k_weight, a.q.dtype, {dim});
}

namespace {

void check_plan(Call& call, const TensorView& plan, int64_t max_decodes) {
  call.packed("plan", plan, DType::i32, {any});
  call.need(plan.shape[0] >= decode_plan_size(max_decodes), "plan has ", plan.shape[0], " elements, ", max_decodes,
            " decodes need ", decode_plan_size(max_decodes));
}

// The ragged columns, readable on a CPU only: every query row and every position has to lie in what the call was given.
void check_sequences(const Call& call, const PagedAttention& a) {
  if (a.out.device != Device::cpu) return;
  const int32_t *query_start = a.query_start.as<int32_t>(), *seq_lens = a.seq_lens.as<int32_t>(),
                *kv_start = a.kv_start.as<int32_t>();
  const int64_t seqs = a.seq_lens.shape[0], block_size = a.k_cache.shape[2];
  const int64_t decodes = a.num_decodes.defined() ? *a.num_decodes.as<int64_t>() : 0;
  call.need(decodes >= 0 && decodes <= std::min(a.max_decodes, seqs), decodes, " of ", seqs,
            " sequences are decodes, the call allows ", a.max_decodes);
  int64_t prompts = 0;
  call.need(query_start[0] >= 0 && query_start[seqs] <= a.q.shape[0], "query_start covers rows ", query_start[0],
            " to ", query_start[seqs], ", q has ", a.q.shape[0]);
  call.need(kv_start[0] >= 0 && kv_start[seqs] <= a.kv_blocks.shape[0], "kv_start covers blocks ", kv_start[0], " to ",
            kv_start[seqs], ", kv_blocks has ", a.kv_blocks.shape[0]);
  for (int64_t s = 0; s < seqs; ++s) {
    const int64_t queries = int64_t{query_start[s + 1]} - query_start[s],
                  blocks = int64_t{kv_start[s + 1]} - kv_start[s];
    call.need(queries >= 0 && queries <= a.max_query_len && queries <= seq_lens[s], "sequence ", s, " has ", queries,
              " query rows, expected 0 to min(max_query_len = ", a.max_query_len, ", seq_len = ", seq_lens[s], ")");
    prompts += s >= decodes && queries > 0 ? 1 : 0;
    call.need(s >= decodes || queries == 1, "sequence ", s, " has ", queries, " query rows, but num_decodes is ",
              decodes);
    call.need(blocks * block_size >= seq_lens[s], "sequence ", s, " of ", seq_lens[s], " tokens has ", blocks,
              " blocks of ", block_size);
  }
  call.need(prompts <= a.max_prompts, prompts, " sequences with query rows are no decodes, the call allows ",
            a.max_prompts);
}

}  // namespace

void check(const PlanDecode& a) {
  Call call("plan_decode");
  call.need(a.max_decodes >= 0, "max_decodes is ", a.max_decodes, ", must not be negative");
  call.need(a.kv_heads > 0 && a.heads > 0 && a.heads % a.kv_heads == 0, a.heads, " query heads cannot share ",
            a.kv_heads, " key/value heads");
  call.tensor("seq_lens", a.seq_lens, DType::i32, {any});
  const int64_t seqs = a.seq_lens.shape[0];
  call.packed("query_start", a.query_start, DType::i32, {seqs + 1});
  call.packed("kv_start", a.kv_start, DType::i32, {seqs + 1});
  call.packed("num_decodes", a.num_decodes, DType::i64, {1});
  check_plan(call, a.plan, a.max_decodes);
  if (!a.num_prefixes.defined()) return;
  call.packed("num_prefixes", a.num_prefixes, DType::i64, {1});
  call.packed("prefix_start", a.prefix_start, DType::i32, {any});
  call.packed("prefix_lens", a.prefix_lens, DType::i32, {any});
  call.need(a.prefix_start.shape[0] > a.prefix_lens.shape[0], "prefix_start has ", a.prefix_start.shape[0],
            " elements, prefix_lens ", a.prefix_lens.shape[0], ", expected more of the former");
  call.need(a.block_size > 0, "block_size is ", a.block_size, ", must be positive");
}

void check(const PagedAttention& a) {
  Call call("paged_attention");
  call.float_type("q", a.q);
  call.tensor("q", a.q, a.q.dtype, {any, any, any});
  const int64_t rows = a.q.shape[0], heads = a.q.shape[1], dim = a.q.shape[2];
  call.tensor("out", a.out, a.q.dtype, {rows, heads, dim});
  call.need(dim % 8 == 0 && dim <= 256, "heads have size ", dim, ", expected a multiple of 8 up to 256");
  call.need(a.scale > 0.0f && a.scale <= std::numeric_limits<float>::max(), "scale is ", a.scale,
            ", must be positive and finite");
  const DType cache = cache_dtype(a.q, a.k_cache);
  check_cache(call, "k_cache", a.k_cache, cache, {any, any, any, dim}, a.k_scale);
  const int64_t blocks = a.k_cache.shape[0], kv_heads = a.k_cache.shape[1], block_size = a.k_cache.shape[2];
  check_cache(call, "v_cache", a.v_cache, cache, {blocks, kv_heads, block_size, dim}, a.v_scale);
  call.need(kv_heads > 0 && heads % kv_heads == 0, heads, " query heads cannot share ", kv_heads, " key/value heads");
  call.tensor("seq_lens", a.seq_lens, DType::i32, {any});
  const int64_t seqs = a.seq_lens.shape[0];
  call.packed("query_start", a.query_start, DType::i32, {seqs + 1});
  call.packed("kv_start", a.kv_start, DType::i32, {seqs + 1});
  call.packed("kv_blocks", a.kv_blocks, DType::i32, {any});
  if (a.num_decodes.defined()) call.packed("num_decodes", a.num_decodes, DType::i64, {1});
  call.need(a.max_decodes == 0 || a.num_decodes.defined(), "max_decodes is ", a.max_decodes,
            ", but num_decodes is missing");
  if (a.plan.defined()) check_plan(call, a.plan, a.max_decodes);
  call.need(a.plan.defined() || !a.shares_prefixes, "shares_prefixes is set, but plan is missing");
  call.need(a.max_prompts >= seqs - a.max_decodes, seqs, " sequences, but at most ", a.max_decodes, " decodes and ",
            a.max_prompts, " others");
  check_sequences(call, a);
  call.indices<int32_t>("kv_blocks", a.kv_blocks, 0, blocks);
}

namespace {

// Copies run at the same time: a block that is written may appear only once. Returns the written blocks, sorted.
std::vector<int64_t> written_once(const Call& call, const TensorView& dst) {
  std::vector<int64_t> written;
  for (int64_t i = 0; i < dst.shape[0]; ++i) written.push_back(dst.index_at(i));
  std::sort(written.begin(), written.end());
  const auto twice = std::adjacent_find(written.begin(), written.end());
  call.need(twice == written.end(), "block ", twice == written.end() ? -1 : *twice, " is written twice");
  return written;
}

}  // namespace

void check(const CopyBlocks& a) {
  Call call("copy_blocks");
  call.tensor("cache", a.cache, a.cache.dtype, {any, any});
  call.packed("src", a.src, DType::i32, {any});
  call.packed("dst", a.dst, DType::i32, {a.src.shape[0]});
  call.indices<int32_t>("src", a.src, 0, a.cache.shape[0]);
  call.indices<int32_t>("dst", a.dst, 0, a.cache.shape[0]);
  if (a.dst.device != Device::cpu || a.dst.numel() == 0) return;
  const std::vector<int64_t> written = written_once(call, a.dst);
  for (int64_t i = 0; i < a.src.shape[0]; ++i) {
    const int64_t block = a.src.index_at(i);
    call.need(!std::binary_search(written.begin(), written.end(), block), "block ", block, " is both read and written");
  }
}

void check(const SwapBlocks& a) {
  Call dst("swap_blocks"), src("swap_blocks"), lists("swap_blocks");  // each with a device of its own
  dst.tensor("dst_cache", a.dst_cache, a.dst_cache.dtype, {any, any});
  src.tensor("src_cache", a.src_cache, a.dst_cache.dtype, {any, a.dst_cache.shape[1]});
  lists.need(a.dst_cache.device == Device::cpu || a.src_cache.device == Device::cpu,
             "both caches are on a device, expected one of them on the host");
  lists.need(a.dst.dtype == DType::i32 || a.dst.dtype == DType::i64, "dst is ", name_of(a.dst.dtype),
             ", expected int32 or int64");
  lists.packed("dst", a.dst, a.dst.dtype, {any});
  lists.packed("src", a.src, a.dst.dtype, {a.dst.shape[0]});
  lists.need(a.dst.device == Device::cpu, "dst and src are on a device, expected them on the host");
  const auto inside = [&]<class Index>() {
    lists.indices<Index>("dst", a.dst, 0, a.dst_cache.shape[0]);
    lists.indices<Index>("src", a.src, 0, a.src_cache.shape[0]);
  };
  a.dst.dtype == DType::i32 ? inside.template operator()<int32_t>() : inside.template operator()<int64_t>();
  written_once(lists, a.dst);
}

void check(const Sample& a) {
  Call call("sample");
  call.tensor("logits", a.logits, DType::f32, {any, any});
  const int64_t rows = a.logits.shape[0], vocab = a.logits.shape[1];
  call.need(vocab > 0, "logits have no vocabulary");
  call.packed("tokens", a.tokens, DType::i32, {rows});
  for (const auto& [name, column] :
       {std::pair{"temperature", &a.temperature}, std::pair{"top_p", &a.top_p}, std::pair{"min_p", &a.min_p},
        std::pair{"repetition_penalty", &a.repetition_penalty}})
    call.packed(name, *column, DType::f32, {rows});
  for (const auto& [name, column] :
       {std::pair{"top_k", &a.top_k}, std::pair{"positions", &a.positions}, std::pair{"num_logprobs", &a.num_logprobs}})
    call.packed(name, *column, DType::i32, {rows});
  call.packed("seeds", a.seeds, DType::i64, {rows});
  call.packed("adjust_start", a.adjust_start, DType::i32, {rows + 1});
  call.spaced("adjust_ids", a.adjust_ids, DType::i32, {any});
  const int64_t entries = a.adjust_ids.shape[0], stride = a.adjust_ids.strides[0];
  call.spaced("adjust_add", a.adjust_add, DType::f32, {entries});
  call.spaced("adjust_flags", a.adjust_flags, DType::i32, {entries});
  call.need(entries < 2 || (a.adjust_add.strides[0] == stride && a.adjust_flags.strides[0] == stride && stride > 0),
            "adjust_ids, adjust_add and adjust_flags have strides ", stride, ", ", a.adjust_add.strides[0], " and ",
            a.adjust_flags.strides[0], ", expected one above 0 for all");
  call.indices<int32_t>("adjust_start", a.adjust_start, 0, entries + 1);
  if (a.adjust_start.device == Device::cpu) {
    const int32_t *start = a.adjust_start.as<int32_t>(), *ids = a.adjust_ids.as<int32_t>();
    for (int64_t r = 0; r < rows; ++r)
      call.need(start[r] <= start[r + 1], "adjust_start decreases from ", start[r], " to ", start[r + 1], " at row ",
                r);
    for (int64_t i = start[0]; i < start[rows]; ++i)  // other entries are nobody's
      call.need(ids[i * stride] >= 0 && ids[i * stride] < vocab, "adjust_ids holds ", ids[i * stride],
                ", expected values in [0, ", vocab, ")");
  }
  if (!a.logprobs.defined()) return;
  call.tensor("logprobs", a.logprobs, DType::f32, {rows, any});
  call.tensor("logprob_ids", a.logprob_ids, DType::i32, {rows, a.logprobs.shape[1]});
  call.packed("ranks", a.ranks, DType::i32, {rows});
  call.need(a.logprobs.shape[1] >= 1, "logprobs has width 0");
  call.indices<int32_t>("num_logprobs", a.num_logprobs, -1, a.logprobs.shape[1]);
}

}  // namespace hybrid
