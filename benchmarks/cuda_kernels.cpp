// How fast the CUDA kernels are beside what the device can do.
//
// Each case is captured as one CUDA graph of many launches over buffers that together are far larger than L2, replayed
// and timed with events; the median of 5 replays counts. A line gives the time of a launch, the bytes or operations
// that the case cannot do without per second, and for bytes the share of a device copy measured first (read + written).
//   bench_cuda_kernels [words that the names of the cases must contain]
#include "cuda_bench.h"

namespace hybrid::bench {
namespace {

struct Heads {
  const char* name;
  int64_t heads, kv_heads, dim;
};
constexpr Heads head_shapes[] = {
    {"llama8b", 32, 8, 128}, {"qwen0.6b", 16, 8, 128}, {"hd64", 32, 8, 64}, {"qwen0.5b", 14, 2, 64}};
constexpr int64_t block_size = 16;

// `shared`: tokens that all sequences begin with; read once, or, unless `grouped`, by each for itself.
void attention_over(DType cache_type, const std::string& name, const Heads& h, const std::vector<int32_t>& queries,
                    const std::vector<int32_t>& lens, int32_t shared, bool grouped) {
  if (!selected(name)) return;
  Memory memory;
  const int64_t seqs = static_cast<int64_t>(lens.size());
  std::vector<int32_t> query_start{0}, kv_start{0};
  double visible = 0, tokens = 0;
  for (size_t s = 0; s < lens.size(); ++s) {
    query_start.push_back(query_start.back() + queries[s]);
    kv_start.push_back(kv_start.back() + static_cast<int32_t>((lens[s] + block_size - 1) / block_size));
    const double n = queries[s];
    visible += n * (lens[s] - n) + n * (n + 1) / 2;
    tokens += lens[s];
  }
  const int64_t blocks = kv_start.back(), rows = query_start.back();
  std::vector<int32_t> table(static_cast<size_t>(blocks));
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  std::shuffle(table.begin(), table.end(), std::mt19937(2));
  for (size_t s = 1; s < lens.size(); ++s) std::copy_n(table.begin(), shared / block_size, table.begin() + kv_start[s]);
  tokens -= static_cast<double>(seqs - 1) * shared;
  const double kv_bytes = tokens * 2.0 * static_cast<double>(h.kv_heads * h.dim * item_size(cache_type));
  const bool decode = rows == seqs;
  const int64_t layers = decode ? sets_of(kv_bytes, 32) : 1;
  const TensorView cache = memory.random({blocks, layers, 2, h.kv_heads, block_size, h.dim}, cache_type);
  const TensorView q = memory.random({rows, h.heads, h.dim}), out = memory.random({rows, h.heads, h.dim});
  PagedAttention a{};
  a.out = out, a.q = q;
  a.query_start = memory.column(query_start, DType::i32), a.seq_lens = memory.column(lens, DType::i32);
  a.kv_start = memory.column(kv_start, DType::i32), a.kv_blocks = memory.column(table, DType::i32);
  a.num_decodes = memory.column(std::vector<int64_t>{decode ? seqs : 0}, DType::i64);
  a.max_decodes = decode ? seqs : 0, a.max_prompts = decode ? 0 : seqs,
  a.max_query_len = *std::max_element(queries.begin(), queries.end());
  a.scale = 1.0f / std::sqrt(static_cast<float>(h.dim)), a.stream = stream;
  a.plan = memory.take({decode_plan_size(a.max_decodes)}, DType::i32);
  PlanDecode plan{a.plan,
                  a.query_start,
                  a.seq_lens,
                  a.kv_start,
                  a.num_decodes,
                  a.max_decodes,
                  h.heads,
                  h.kv_heads,
                  h.dim,
                  {},
                  {},
                  {},
                  0,
                  stream};
  if (grouped) {
    plan.prefix_start = memory.column(std::vector<int32_t>{0, static_cast<int32_t>(seqs)}, DType::i32);
    plan.prefix_lens = memory.column(std::vector<int32_t>{shared}, DType::i32);
    plan.num_prefixes = memory.column(std::vector<int64_t>{1}, DType::i64), plan.block_size = block_size;
    a.shares_prefixes = true;
  }
  plan_decode(plan);
  const double time = time_of_launch(layers, [&](int64_t layer) {
    for (int which : {0, 1}) {
      TensorView t = cache;
      t.ndim = 4;
      t.data = cache.as<char>() + (layer * cache.strides[1] + which * cache.strides[2]) * item_size(cache_type);
      for (int i = 1; i < 4; ++i) t.shape[i] = cache.shape[i + 2], t.strides[i] = cache.strides[i + 2];
      (which == 0 ? a.k_cache : a.v_cache) = t;
    }
    paged_attention(a);
  });
  report(name, time, kv_bytes + 2.0 * 2 * static_cast<double>(out.numel()),
         4.0 * visible * static_cast<double>(h.heads * h.dim));
}

void attention(const std::string& name, const Heads& h, const std::vector<int32_t>& queries,
               const std::vector<int32_t>& lens, int32_t shared = 0, bool grouped = false) {
  attention_over(DType::bf16, name, h, queries, lens, shared, grouped);
  attention_over(DType::f8, name + " f8", h, queries, lens, shared, grouped);
}

void attention_cases() {
  std::mt19937 rng(0);
  std::vector<int32_t> mixed;
  std::lognormal_distribution<double> length(6.3, 1.0);
  for (int i = 0; i < 256; ++i) mixed.push_back(static_cast<int32_t>(std::clamp(length(rng), 16.0, 8000.0)));
  for (const Heads& h : head_shapes) {
    const std::string suffix = std::string(" ") + h.name;
    for (const auto& [batch, len] : {std::pair<int, int>{1, 1024},
                                     {1, 8192},
                                     {8, 4096},
                                     {64, 1024},
                                     {64, 4096},
                                     {256, 1024},
                                     {1, 131072},
                                     {1, 384},
                                     {32, 384},
                                     {256, 96},
                                     {256, 384}})
      attention("decode " + std::to_string(batch) + "x" + std::to_string(len) + suffix, h,
                std::vector<int32_t>(static_cast<size_t>(batch), 1),
                std::vector<int32_t>(static_cast<size_t>(batch), len));
    attention("decode 256xmixed" + suffix, h, std::vector<int32_t>(256, 1), mixed);
    for (const auto& [batch, shared] : {std::pair<int, int>{4, 1024},
                                        {8, 512},
                                        {8, 2048},
                                        {8, 8192},
                                        {32, 512},
                                        {32, 2048},
                                        {64, 2048},
                                        {256, 256},
                                        {256, 2048},
                                        {256, 8192}})
      for (bool grouped : {false, true})
        attention("prefix " + std::to_string(batch) + "x(" + std::to_string(shared) + "+96)" +
                      (grouped ? " shared" : " each") + suffix,
                  h, std::vector<int32_t>(static_cast<size_t>(batch), 1),
                  std::vector<int32_t>(static_cast<size_t>(batch), shared + 96), shared, grouped);
    for (const auto& [batch, len] : {std::pair<int, int>{1, 512}, {4, 1024}, {4, 4096}, {1, 16384}}) {
      const std::vector<int32_t> lens(static_cast<size_t>(batch), len);
      attention("prefill " + std::to_string(batch) + "x" + std::to_string(len) + suffix, h, lens, lens);
    }
  }
}

void linear_case(const std::string& shape, int64_t n, int64_t k, int64_t rows) {
  const std::string name = "linear " + shape + " rows " + std::to_string(rows);
  if (!selected(name)) return;
  Memory memory;
  const double weight_bytes = 2.0 * static_cast<double>(n * k);
  const int64_t sets = sets_of(weight_bytes), elements = packed_size(n, k);
  const TensorView weights = memory.random({sets, elements}), x = memory.random({rows, k}),
                   out = memory.random({rows, n});
  const double time = time_of_launch(sets, [&](int64_t i) {
    TensorView weight = weights;
    weight.ndim = 1, weight.shape[0] = elements, weight.strides[0] = 1;
    weight.data = weights.as<BFloat16>() + i * elements;
    linear({out, x, weight, {}, n, k, stream});
  });
  const auto r = static_cast<double>(rows);
  report(name, time, weight_bytes + 2 * r * static_cast<double>(n + k),
         2 * r * static_cast<double>(n) * static_cast<double>(k));
}

void gated_case(const std::string& shape, int64_t dim, int64_t k, int64_t rows) {
  const std::string name = "linear_silu_mul " + shape + " rows " + std::to_string(rows);
  if (!selected(name)) return;
  Memory memory;
  const double weight_bytes = 4.0 * static_cast<double>(dim * k);
  const int64_t sets = sets_of(weight_bytes), elements = packed_size(2 * dim, k);
  const TensorView weights = memory.random({sets, elements}), x = memory.random({rows, k}),
                   out = memory.random({rows, dim}), gate_up = memory.random({rows, 2 * dim});
  const double time = time_of_launch(sets, [&](int64_t i) {
    TensorView weight = weights;
    weight.ndim = 1, weight.shape[0] = elements, weight.strides[0] = 1;
    weight.data = weights.as<BFloat16>() + i * elements;
    linear_silu_mul({out, x, weight, {}, gate_up, k, stream});
  });
  const auto r = static_cast<double>(rows);
  report(name, time, weight_bytes + 2 * r * static_cast<double>(dim + k), 4 * r * static_cast<double>(dim * k));
}

void linear_cases() {
  const std::tuple<const char*, int64_t, int64_t> shapes[] = {
      {"0.5b qkv 1152x896", 1152, 896},  {"0.5b o 896x896", 896, 896},           {"0.5b gate_up 9728x896", 9728, 896},
      {"0.5b down 896x4864", 896, 4864}, {"0.5b head 151936x896", 151936, 896},  {"8b qkv 6144x4096", 6144, 4096},
      {"8b o 4096x4096", 4096, 4096},    {"8b gate_up 28672x4096", 28672, 4096}, {"8b down 4096x14336", 4096, 14336}};
  for (const auto& [name, n, k] : shapes)
    for (int64_t rows : {1, 4, 8, 16, 32, 64, 128, 256, 2048})
      if (rows < 2048 || n < 100000) linear_case(name, n, k, rows);
  for (int64_t rows : {16, 32, 64, 128, 256, 512, 1024, 1536, 2048, 4096, 8192}) {
    gated_case("0.5b 9728x896", 4864, 896, rows);
    gated_case("1b 16384x2048", 8192, 2048, rows);
    gated_case("8b 28672x4096", 14336, 4096, rows);
  }
}

void rotate_and_store_case(const Heads& h, bool normed, int64_t rows, DType cache_type = DType::bf16) {
  const std::string name = "rotate_and_store " + std::to_string(rows) + " " + h.name + (normed ? " normed" : "") +
                           (cache_type == DType::f8 ? " f8" : "");
  if (!selected(name)) return;
  Memory memory;
  const int64_t heads = h.heads + 2 * h.kv_heads, blocks = (rows + block_size - 1) / block_size;
  const double written = static_cast<double>(2 * h.heads + 2 * h.kv_heads * item_size(cache_type));
  const double bytes = static_cast<double>(rows * h.dim) * (2.0 * static_cast<double>(heads) + written);
  // Few rows are in L2, where the product left them.
  const int64_t sets =
      rows <= 128 ? std::clamp<int64_t>(static_cast<int64_t>(32e6 / bytes), 1, 64) : sets_of(bytes, 64);
  const TensorView cache = memory.random({sets, 2, blocks, h.kv_heads, block_size, h.dim}, cache_type),
                   qkv = memory.random({sets, rows, heads, h.dim}), weight = memory.random({h.dim});
  std::vector<int64_t> slots(static_cast<size_t>(rows));
  std::vector<int32_t> positions(slots.size());
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i), positions[i] = static_cast<int32_t>(i);
  const auto part = [](const TensorView& t, int64_t offset, int first_dim) {
    TensorView p = t;
    p.ndim = 0, p.data = t.as<char>() + offset * item_size(t.dtype);
    for (int d = first_dim; d < t.ndim; ++d) p.shape[p.ndim] = t.shape[d], p.strides[p.ndim] = t.strides[d], ++p.ndim;
    return p;
  };
  const auto heads_of = [&](int64_t set, int64_t first, int64_t count) {
    TensorView p = part(qkv, set * qkv.strides[0] + first * h.dim, 1);
    p.shape[1] = count;
    return p;
  };
  RotateAndStore a{};
  a.cos_sin = memory.random({rows, h.dim}, DType::f32);
  a.positions = memory.column(positions, DType::i32), a.slots = memory.column(slots, DType::i64);
  if (normed) a.q_weight = a.k_weight = weight;
  a.eps = 1e-6f, a.stream = stream;
  const double time = time_of_launch(sets, [&](int64_t set) {
    a.q = heads_of(set, 0, h.heads);
    a.k = heads_of(set, h.heads, h.kv_heads), a.v = heads_of(set, h.heads + h.kv_heads, h.kv_heads);
    a.k_cache = part(cache, set * cache.strides[0], 2);
    a.v_cache = part(cache, set * cache.strides[0] + cache.strides[1], 2);
    rotate_and_store(a);
  });
  report(name, time, bytes, 0);
}

// x holds rows of three parts: input and output of the norm, or both inputs and the output of the product. The residual
// is f32, as in the models.
void row_cases(int64_t rows, int64_t dim) {
  const std::string shape = std::to_string(rows) + " x " + std::to_string(dim);
  const double bytes = 2.0 * static_cast<double>(rows * dim);
  const int64_t sets = sets_of(4 * bytes, 64);
  const bool norms = selected("add+rms_norm " + shape), gates = selected("silu_mul " + shape);
  if (!norms && !gates) return;
  Memory memory;
  const TensorView x = memory.random({sets, rows, 3 * dim}), weight = memory.random({dim}),
                   residual = memory.random({sets, rows, dim}, DType::f32);
  const auto part = [&](const TensorView& t, int64_t i, int64_t first, int64_t size) {
    TensorView p = t;
    p.ndim = 2, p.shape[0] = rows, p.shape[1] = size, p.strides[0] = t.strides[1], p.strides[1] = 1;
    p.data = t.as<char>() + (i * t.strides[0] + first) * item_size(t.dtype);
    return p;
  };
  const auto norm = [&](int64_t i) {
    rms_norm({part(x, i, dim, dim), part(x, i, 0, dim), weight, part(residual, i, 0, dim), {}, 1e-6f, false, stream});
  };
  const auto gate = [&](int64_t i) { silu_mul({part(x, i, 2 * dim, dim), part(x, i, 0, 2 * dim), stream}); };
  if (norms) report("add+rms_norm " + shape, time_of_launch(sets, norm), 6 * bytes, 0);
  if (gates) report("silu_mul " + shape, time_of_launch(sets, gate), 3 * bytes, 0);
}

void elementwise_cases() {
  for (const int64_t rows : {1, 8, 32, 128, 512, 4096, 16384}) {
    for (const Heads& h : head_shapes)
      for (const DType cache_type : {DType::bf16, DType::f8}) rotate_and_store_case(h, false, rows, cache_type);
    rotate_and_store_case(head_shapes[1], true, rows);
    rotate_and_store_case({"1/8x128", 1, 8, 128}, false, rows);  // the cache write, nearly alone
  }
  for (const int64_t rows : {1, 8, 256, 2048, 8192})
    for (const int64_t dim : {896, 4096, 8192}) row_cases(rows, dim);
}

// Blocks in no order: copied on the device, and moved between it and pinned memory. One block of all is a plain copy.
void block_cases() {
  constexpr int64_t total = int64_t{512} << 20;
  if (!selected("copy_blocks swap_blocks to the device host KB")) return;
  Memory memory;
  void* pinned = nullptr;
  cuda::check(cudaMallocHost(&pinned, total));
  std::memset(pinned, 1, total);
  const TensorView whole = memory.random({2, total / 2});
  for (const int64_t block : {int64_t{32} << 10, int64_t{192} << 10, int64_t{2} << 20, total}) {
    TensorView device = whole, host, twice;
    device.shape[0] = total / block, device.shape[1] = device.strides[0] = block / 2;
    host = twice = device;
    host.device = Device::cpu, host.data = pinned, twice.shape[0] *= 2;
    std::vector<int32_t> from(static_cast<size_t>(total / block)), to(from.size());
    for (size_t i = 0; i < to.size(); ++i) from[i] = to[i] = static_cast<int32_t>(i);
    std::shuffle(to.begin(), to.end(), std::mt19937(3));
    TensorView src = memory.column(from, DType::i32), dst = src, above;
    src.device = dst.device = Device::cpu, src.data = from.data(), dst.data = to.data();
    const std::string size = std::to_string(block >> 10) + " KB";
    const auto measure = [&](const std::string& name, const std::function<void()>& work) {
      if (selected(name)) report(name, seconds(work), (name[0] == 'c' ? 2.0 : 1.0) * static_cast<double>(total), 0);
    };
    measure("swap_blocks to the device " + size, [&] { swap_blocks({device, host, dst, src, stream}); });
    measure("swap_blocks to the host " + size, [&] { swap_blocks({host, device, dst, src, stream}); });
    for (int32_t& block_above : to) block_above += static_cast<int32_t>(total / block);
    above = memory.column(to, DType::i32), src = memory.column(from, DType::i32);
    measure("copy_blocks " + size, [&] { copy_blocks({twice, src, above, stream}); });
  }
  cuda::check(cudaFreeHost(pinned));
}

// `peaked`: as a language model's, a few tokens stand out of a broad rest; else as of random weights.
TensorView logits_like(Memory& memory, int64_t rows, int64_t vocab, bool peaked) {
  TensorView logits = memory.random({rows, vocab}, DType::f32);
  if (!peaked) return logits;
  std::mt19937 rng(3);
  std::normal_distribution<float> rest(0.0f, 2.5f);
  std::exponential_distribution<float> gap(0.7f);
  std::vector<float> row(static_cast<size_t>(vocab));
  for (int64_t r = 0; r < std::min<int64_t>(rows, 32); ++r) {
    for (float& x : row) x = rest(rng);
    float top = 22.0f;
    for (int i = 0; i < 40; ++i, top -= gap(rng) / static_cast<float>(1 + i / 4)) row[rng() % row.size()] = top;
    for (int64_t copy = r; copy < rows; copy += 32)
      cuda::check(cudaMemcpy(logits.as<float>() + copy * vocab, row.data(), row.size() * 4, cudaMemcpyHostToDevice));
  }
  return logits;
}

void sample_cases() {
  struct Kind {
    const char* name;
    float temperature, top_p;
    int32_t top_k, num_logprobs;
  };
  for (int64_t vocab : {49152, 151936})
    for (int64_t rows : {1, 8, 32, 256})
      for (bool peaked : {true, false})
        for (const Kind& kind : {Kind{"greedy", 0.0f, 1.0f, 0, -1}, Kind{"temperature", 0.8f, 1.0f, 0, -1},
                                 Kind{"top-k 50", 0.8f, 1.0f, 50, -1}, Kind{"top-k 50 top-p 0.9", 0.8f, 0.9f, 50, -1},
                                 Kind{"top-p 0.9", 1.0f, 0.9f, 0, -1}, Kind{"logprobs 5", 0.0f, 1.0f, 0, 5}}) {
          const std::string name = "sample " + std::to_string(rows) + " x " + std::to_string(vocab) + " " + kind.name +
                                   (peaked ? "" : ", flat");
          if (!selected(name)) continue;
          Memory memory;
          const auto size = static_cast<size_t>(rows);
          const int64_t sets = sets_of(4.0 * static_cast<double>(rows * vocab), 16);
          const TensorView logits = logits_like(memory, sets * rows, vocab, peaked);
          Sample a{};
          a.tokens = memory.take({rows}, DType::i32);
          a.temperature = memory.column(std::vector<float>(size, kind.temperature), DType::f32);
          a.top_p = memory.column(std::vector<float>(size, kind.top_p), DType::f32);
          a.min_p = memory.column(std::vector<float>(size, 0.0f), DType::f32);
          a.repetition_penalty = memory.column(std::vector<float>(size, 1.0f), DType::f32);
          a.top_k = memory.column(std::vector<int32_t>(size, kind.top_k), DType::i32);
          a.seeds = memory.column(std::vector<int64_t>(size, 7), DType::i64);
          a.positions = memory.column(std::vector<int32_t>(size, 100), DType::i32);
          a.num_logprobs = memory.column(std::vector<int32_t>(size, kind.num_logprobs), DType::i32);
          if (kind.num_logprobs >= 0) {
            a.logprobs = memory.take({rows, 1 + kind.num_logprobs}, DType::f32);
            a.logprob_ids = memory.take({rows, 1 + kind.num_logprobs}, DType::i32);
            a.ranks = memory.take({rows}, DType::i32);
          }
          a.adjust_start = memory.column(std::vector<int32_t>(size + 1, 0), DType::i32);
          a.adjust_ids = memory.take({0}, DType::i32), a.adjust_flags = memory.take({0}, DType::i32);
          a.adjust_add = memory.take({0}, DType::f32), a.stream = stream;
          const double time = time_of_launch(sets, [&](int64_t i) {
            a.logits = logits;
            a.logits.shape[0] = rows;
            a.logits.data = logits.as<float>() + i * rows * vocab;
            sample(a);
          });
          report(name, time, 4.0 * static_cast<double>(rows * vocab), 0);
        }
}

}  // namespace
}  // namespace hybrid::bench

int main(int count, char** arguments) {
  using namespace hybrid::bench;
  wanted.assign(arguments + 1, arguments + count);
  begin();
  attention_cases();
  linear_cases();
  elementwise_cases();
  block_cases();
  sample_cases();
  return 0;
}
