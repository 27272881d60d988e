// Sampling against its CPU twin: the same tokens for the same logits, seeds and positions.
#include <algorithm>
#include <functional>
#include <set>

#include "gpu_test.h"

namespace hybrid::test {
namespace {

struct Entry {
  int32_t id;
  float add;
  int32_t flags;
};

struct Request {
  float temperature = 1.0f, top_p = 1.0f, min_p = 0.0f, penalty = 1.0f;
  int32_t top_k = 0, num_logprobs = -1;
  std::vector<Entry> entries = {};
};

// The columns of one call, on both devices.
class Case {
 public:
  Case(const std::vector<Request>& requests, int64_t vocab, int64_t width, std::mt19937& rng)
      : rows(static_cast<int64_t>(requests.size())),
        width_(width),
        logits({rows, vocab}),
        logprobs({rows, std::max<int64_t>(1, width)}),
        temperature({rows}),
        top_p({rows}),
        min_p({rows}),
        penalty({rows}),
        add({3 * entries_of(requests)}),
        tokens({rows}),
        logprob_ids({rows, std::max<int64_t>(1, width)}),
        ranks({rows}),
        top_k({rows}),
        positions({rows}),
        num_logprobs({rows}),
        start({rows + 1}),
        ids({3 * entries_of(requests)}),
        flags({3 * entries_of(requests)}),
        seeds({rows}) {
    ids.poison(), add.poison(), flags.poison();  // entries are as far apart as in a batch
    size_t next = 0;
    for (size_t r = 0; r < requests.size(); ++r) {
      const Request& q = requests[r];
      temperature.host()[r] = q.temperature, top_p.host()[r] = q.top_p, min_p.host()[r] = q.min_p;
      penalty.host()[r] = q.penalty, top_k.host()[r] = q.top_k, num_logprobs.host()[r] = q.num_logprobs;
      positions.host()[r] = static_cast<int32_t>(rng() % 100000);
      seeds.host()[r] = static_cast<int64_t>((uint64_t{rng()} << 32) | rng());
      for (const Entry& e : q.entries) {
        ids.host()[3 * next] = e.id, add.host()[3 * next] = e.add, flags.host()[3 * next] = e.flags;
        ++next;
      }
      start.host()[r + 1] = static_cast<int32_t>(next);
    }
    tokens.poison(), ranks.poison(), logprobs.poison(), logprob_ids.poison();
  }

  void upload() {
    logits.upload(), temperature.upload(), top_p.upload(), min_p.upload(), penalty.upload(), add.upload();
    top_k.upload(), positions.upload(), num_logprobs.upload(), start.upload(), ids.upload(), flags.upload();
    seeds.upload();
  }
  Sample args(Device device) {
    Sample a{};
    a.tokens = tokens.on(device);
    if (width_ > 0)
      a.logprobs = logprobs.on(device), a.logprob_ids = logprob_ids.on(device), a.ranks = ranks.on(device);
    a.logits = logits.on(device), a.temperature = temperature.on(device), a.top_p = top_p.on(device);
    a.min_p = min_p.on(device), a.repetition_penalty = penalty.on(device), a.top_k = top_k.on(device);
    a.seeds = seeds.on(device), a.positions = positions.on(device), a.num_logprobs = num_logprobs.on(device);
    a.adjust_start = start.on(device), a.adjust_ids = ids.on(device), a.adjust_add = add.on(device);
    a.adjust_flags = flags.on(device);
    for (TensorView* t : {&a.adjust_ids, &a.adjust_add, &a.adjust_flags}) t->shape[0] /= 3, t->strides[0] = 3;
    return a;
  }
  // Rows whose tokens differ.
  int64_t run_both() {
    upload();
    for (Device device : {Device::cuda, Device::cpu}) sample(args(device));
    const std::vector<int32_t> got = tokens.download();
    int64_t different = 0;
    for (size_t r = 0; r < got.size(); ++r) different += got[r] != tokens.host()[r];
    return different;
  }

  int64_t rows;

 private:
  static int64_t entries_of(const std::vector<Request>& requests) {
    int64_t n = 0;
    for (const Request& r : requests) n += static_cast<int64_t>(r.entries.size());
    return n;
  }
  int64_t width_;

 public:
  Twin<float> logits, logprobs, temperature, top_p, min_p, penalty, add;
  Twin<int32_t> tokens, logprob_ids, ranks, top_k, positions, num_logprobs, start, ids, flags;
  Twin<int64_t> seeds;
};

class GpuSample : public ::testing::Test {
 protected:
  std::mt19937 rng{31};

  // Peaked as a language model's are, or flat as of random weights.
  void fill(Twin<float>& logits, float scale, bool peaked) {
    std::normal_distribution<float> normal(0.0f, scale);
    for (float& x : logits.host()) x = normal(rng);
    if (!peaked) return;
    const auto vocab = static_cast<size_t>(logits.on(Device::cpu).shape[1]);
    for (size_t r = 0; r < logits.host().size() / vocab; ++r)
      for (int i = 0; i < 20; ++i) logits.host()[r * vocab + rng() % vocab] += 6.0f * scale;
  }
};

TEST_F(GpuSample, picks_the_largest_logit_and_the_lowest_id_of_a_tie) {
  for (int64_t vocab : {1, 31, 1000, 50257, 151936}) {
    Case c(std::vector<Request>(37, Request{.temperature = 0.0f}), vocab, 0, rng);
    for (float& x : c.logits.host()) x = static_cast<float>(rng() % 40) - 20.0f;
    EXPECT_EQ(c.run_both(), 0) << "vocabulary " << vocab;
  }
}

TEST_F(GpuSample, draws_the_tokens_that_its_cpu_twin_draws) {
  const std::vector<Request> kinds = {{.temperature = 1.0f},
                                      {.temperature = 0.7f, .top_k = 50},
                                      {.temperature = 0.8f, .top_p = 0.9f, .top_k = 50},
                                      {.temperature = 1.0f, .top_p = 0.95f},
                                      {.temperature = 1.3f, .min_p = 0.05f},
                                      {.temperature = 2.0f, .top_p = 0.5f, .min_p = 0.02f, .top_k = 20000},
                                      {.temperature = 0.3f, .top_k = 1},
                                      {.temperature = 0.9f, .top_p = 0.8f, .top_k = 1000},
                                      {.temperature = 1.5f, .top_p = 0.99f, .top_k = 1025},
                                      {.temperature = 1e-6f, .top_p = 0.1f}};
  for (int64_t vocab : {7, 1000, 50257, 128256, 151936})
    for (bool peaked : {true, false})
      for (float scale : {0.02f, 3.0f}) {
        std::vector<Request> requests;
        for (int i = 0; i < (vocab > 10000 ? 64 : 512); ++i)
          requests.push_back(kinds[static_cast<size_t>(i) % kinds.size()]);
        Case c(requests, vocab, 0, rng);
        fill(c.logits, scale, peaked);
        // A sum of probabilities rounded otherwise may move top-p's end by a token: one row in a thousand, no more.
        EXPECT_LE(c.run_both(), 1 + c.rows / 1000)
            << "vocabulary " << vocab << " peaked " << peaked << " scale " << scale;
      }
}

TEST_F(GpuSample, follows_its_cpu_twin_through_ties_infinities_and_not_a_numbers) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (int64_t vocab : {5, 3000, 50000}) {
    std::vector<Request> requests;
    for (int i = 0; i < 48; ++i)
      requests.push_back(
          {.temperature = i % 4 == 0 ? 0.0f : 1.0f, .top_p = i % 3 == 0 ? 0.9f : 1.0f, .top_k = i % 2 == 0 ? 3 : 0});
    Case c(requests, vocab, 0, rng);
    for (size_t i = 0; i < c.logits.host().size(); ++i) {
      const size_t kind = i / static_cast<size_t>(vocab) % 6;
      float& x = c.logits.host()[i];
      x = static_cast<float>(rng() % 3);                   // ties everywhere
      if (kind == 1) x = 1.5f;                             // one value
      if (kind == 2) x = -infinity;                        // nothing to pick
      if (kind == 3 && rng() % 2 == 0) x = std::nanf("");  // counts as -inf
      if (kind == 4) x = rng() % 50 == 0 ? x : -infinity;  // a few candidates
      if (kind == 5 && i % static_cast<size_t>(vocab) == 2) x = infinity;
    }
    EXPECT_EQ(c.run_both(), 0) << "vocabulary " << vocab;
  }
}

TEST_F(GpuSample, applies_penalties_additions_and_allowed_sets_as_its_cpu_twin) {
  for (int64_t vocab : {40, 5000, 151936}) {
    std::vector<Request> requests;
    for (int i = 0; i < 60; ++i) {
      Request r{.temperature = i % 3 == 0 ? 0.0f : 0.9f,
                .top_p = i % 4 == 0 ? 0.9f : 1.0f,
                .penalty = 1.3f,
                .top_k = i % 5 == 0 ? 10 : 0};
      const int count = i % 7 == 0 ? 0 : static_cast<int>(1 + rng() % 300);
      for (int e = 0; e < count; ++e)
        r.entries.push_back({static_cast<int32_t>(rng() % static_cast<uint64_t>(vocab)),
                             static_cast<float>(rng() % 9) - 4.0f,
                             static_cast<int32_t>(rng() % 2 + (i % 2 == 0 ? 2 * (rng() % 2) : 0))});
      if (i % 3 != 1)  // else in any order, ids repeated
        std::sort(r.entries.begin(), r.entries.end(), [](const Entry& a, const Entry& b) { return a.id < b.id; });
      if (i % 3 == 0)
        r.entries.erase(std::unique(r.entries.begin(), r.entries.end(),
                                    [](const Entry& a, const Entry& b) { return a.id == b.id; }),
                        r.entries.end());
      requests.push_back(r);
    }
    Case c(requests, vocab, 0, rng);
    fill(c.logits, 2.0f, true);
    EXPECT_LE(c.run_both(), 1) << "vocabulary " << vocab;
  }
}

TEST_F(GpuSample, reports_the_log_probabilities_and_ranks_of_its_cpu_twin) {
  for (int64_t vocab : {9, 3000, 151936})
    for (float scale : {0.01f, 3.0f}) {
      constexpr int64_t width = 21;
      std::vector<Request> requests;
      for (int i = 0; i < 40; ++i) {
        Request r{
            .temperature = i % 2 == 0 ? 0.0f : 1.0f, .penalty = 1.2f, .num_logprobs = static_cast<int32_t>(i % 22) - 1};
        if (i % 3 == 0) r.entries = {{3, -1.0f, 1}, {5, 2.0f, 0}, {3, 0.5f, 1}};
        requests.push_back(r);
      }
      Case c(requests, vocab, width, rng);
      fill(c.logits, scale, true);
      ASSERT_EQ(c.run_both(), 0) << "vocabulary " << vocab << " scale " << scale;
      expect_close(c.logprobs, 1e-5f, 1e-5f, "logprobs");
      EXPECT_EQ(c.logprob_ids.download(), c.logprob_ids.host());
      EXPECT_EQ(c.ranks.download(), c.ranks.host());
    }
}

TEST_F(GpuSample, gives_a_row_the_same_token_alone_and_in_every_run) {
  constexpr int64_t vocab = 151936;
  std::vector<Request> requests(33, Request{.temperature = 1.0f, .top_p = 0.9f});
  for (size_t i = 0; i < requests.size(); i += 2) requests[i].top_k = 40;
  Case c(requests, vocab, 0, rng);
  fill(c.logits, 1.0f, false);
  c.upload();
  sample(c.args(Device::cuda));
  const std::vector<int32_t> together = c.tokens.download();
  for (int again = 0; again < 5; ++again) {
    c.tokens.poison();
    sample(c.args(Device::cuda));
    ASSERT_EQ(c.tokens.download(), together) << "run " << again;
  }
  for (int64_t row : {0, 7, 32}) {
    Sample alone = c.args(Device::cuda);
    const auto from = [row](TensorView& t, int64_t size) {
      t.data = static_cast<char*>(t.data) + row * t.strides[0] * item_size(t.dtype);
      t.shape[0] = size;
    };
    for (TensorView* t : {&alone.tokens, &alone.logits, &alone.temperature, &alone.top_p, &alone.min_p,
                          &alone.repetition_penalty, &alone.top_k, &alone.seeds, &alone.positions, &alone.num_logprobs})
      from(*t, 1);
    from(alone.adjust_start, 2);
    c.tokens.poison();
    sample(alone);
    EXPECT_EQ(c.tokens.download()[static_cast<size_t>(row)], together[static_cast<size_t>(row)]);
  }
}

// Vocabularies that no split makes even: the likely tokens are the first and the last ones.
TEST_F(GpuSample, finds_candidates_at_both_ends_of_a_vocabulary) {
  for (int64_t vocab : {33, 1001, 2051, 50257, 50258, 151935, 500'003}) {
    Case c(std::vector<Request>(12, Request{.temperature = 1.0f, .top_p = 0.99f, .top_k = 4, .num_logprobs = 4}), vocab,
           5, rng);
    fill(c.logits, 1.0f, false);
    for (size_t r = 0; r < static_cast<size_t>(c.rows); ++r)
      for (int64_t id : {int64_t{0}, int64_t{1}, vocab - 2, vocab - 1})
        c.logits.host()[r * static_cast<size_t>(vocab) + static_cast<size_t>(id)] += 20.0f;
    EXPECT_EQ(c.run_both(), 0) << "vocabulary " << vocab;
    EXPECT_EQ(c.logprob_ids.download(), c.logprob_ids.host()) << "vocabulary " << vocab;
  }
}

// More than the shared memory of eight blocks holds.
TEST_F(GpuSample, draws_as_its_cpu_twin_from_a_vocabulary_that_one_block_takes) {
  constexpr int64_t vocab = 500'003;
  std::vector<Request> requests;
  for (int i = 0; i < 24; ++i) {
    Request r{.temperature = i % 4 == 0 ? 0.0f : 0.8f,
              .top_p = i % 2 == 0 ? 0.9f : 1.0f,
              .penalty = 1.2f,
              .top_k = i % 3 == 0 ? 50 : 0,
              .num_logprobs = i % 5 - 1};
    if (i % 6 == 0) r.entries = {{7, 1.0f, 1}, {400000, 9.0f, 3}, {499999, 9.0f, 2}};
    requests.push_back(r);
  }
  Case c(requests, vocab, 5, rng);
  fill(c.logits, 2.0f, true);
  EXPECT_EQ(c.run_both(), 0);
  expect_close(c.logprobs, 1e-5f, 1e-5f, "logprobs");
  EXPECT_EQ(c.logprob_ids.download(), c.logprob_ids.host());
  EXPECT_EQ(c.ranks.download(), c.ranks.host());
}

// As the engine runs it: one graph for up to so many rows, the ones without a sequence padded, columns of adjustments
// as long as they may become. Only adjust_start says what of them is used: the rest is poisoned.
TEST_F(GpuSample, replays_a_graph_with_padded_rows_and_other_parameters) {
  constexpr int64_t vocab = 32003, rows = 16, capacity = 5000;
  cudaStream_t stream = nullptr;
  cuda::check(cudaStreamCreate(&stream));
  std::vector<Request> blank(rows, Request{.temperature = 0.0f});
  blank[0].entries.resize(capacity, Entry{INT32_MIN, std::nanf(""), -1});
  Case c(blank, vocab, 4, rng);
  for (int32_t& s : c.start.host()) s = 0;
  c.upload();
  Sample a = c.args(Device::cuda);
  a.stream = stream;
  sample(a);
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  sample(a);
  cuda::check(cudaStreamEndCapture(stream, &graph));
  cuda::check(cudaGraphInstantiate(&executable, graph, 0));
  for (int used : {16, 3, 1, 11}) {
    fill(c.logits, 2.0f, used % 2 == 1);
    int32_t next = 0;
    for (size_t r = 0; r < static_cast<size_t>(rows); ++r) {
      const bool live = static_cast<int>(r) < used;
      c.temperature.host()[r] = live && r % 4 != 0 ? 0.8f : 0.0f;
      c.top_p.host()[r] = live && r % 2 == 0 ? 0.9f : 1.0f;
      c.top_k.host()[r] = live && r % 3 == 0 ? 40 : 0;
      c.penalty.host()[r] = live ? 1.1f : 1.0f;
      c.num_logprobs.host()[r] = live ? static_cast<int32_t>(r % 5) - 1 : -1;
      c.positions.host()[r] = static_cast<int32_t>(rng() % 1000);
      for (int e = 0; live && e < static_cast<int>(r % 3) * 100; ++e, ++next) {
        c.ids.host()[static_cast<size_t>(3 * next)] = 7 * e + static_cast<int32_t>(r);
        c.add.host()[static_cast<size_t>(3 * next)] = -0.5f;
        c.flags.host()[static_cast<size_t>(3 * next)] = e % 2;
      }
      c.start.host()[r + 1] = next;
    }
    c.upload();
    c.tokens.poison(), c.ranks.poison(), c.logprobs.poison(), c.logprob_ids.poison();
    cuda::check(cudaGraphLaunch(executable, stream));
    cuda::check(cudaStreamSynchronize(stream));
    Sample host = c.args(Device::cpu);
    for (TensorView* t : {&host.adjust_ids, &host.adjust_add, &host.adjust_flags}) t->shape[0] = next;
    sample(host);
    EXPECT_EQ(c.tokens.download(), c.tokens.host()) << used << " rows in use";
    expect_close(c.logprobs, 1e-5f, 1e-5f, "logprobs");
    EXPECT_EQ(c.logprob_ids.download(), c.logprob_ids.host());
    EXPECT_EQ(c.ranks.download(), c.ranks.host());
  }
  cuda::check(cudaGraphExecDestroy(executable));
  cuda::check(cudaGraphDestroy(graph));
  cuda::check(cudaStreamDestroy(stream));
}

}  // namespace
}  // namespace hybrid::test
