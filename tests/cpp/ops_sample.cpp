// The sampler against a sorted reference: sets, ties, adjustments, distributions, log-probabilities, reproducibility
// (B5 log-probabilities, B9 sampling parameters).
#include <gtest/gtest.h>

#include <numeric>
#include <set>

#include "ops/cpu/thread_pool.h"
#include "sample_case.h"

namespace hybrid::test {
namespace {

class SampleTest : public ::testing::TestWithParam<const cpu::Kernels*> {
 protected:
  const cpu::Kernels& isa() const { return *GetParam(); }
  int32_t token(const Request& r) const { return sample_all(isa(), {r})[0].token; }

  // Tokens that come out over many positions, with their counts.
  std::map<int32_t, int> draws(Request r, int n) const {
    std::vector<Request> rows(static_cast<size_t>(n), r);
    for (int i = 0; i < n; ++i) rows[static_cast<size_t>(i)].position = i;
    std::map<int32_t, int> counts;
    for (const Sampled& s : sample_all(isa(), rows)) ++counts[s.token];
    return counts;
  }
  std::set<int32_t> drawn_ids(const Request& r, int n) const {
    std::set<int32_t> ids;
    for (const auto& [id, count] : draws(r, n)) ids.insert(id);
    return ids;
  }
};

INSTANTIATE_TEST_SUITE_P(EveryIsa, SampleTest, ::testing::ValuesIn(cpu::supported_kernels()),
                         [](const auto& test) { return std::string(test.param->name); });

std::vector<float> random_logits(int64_t vocab, uint32_t seed, float scale = 3.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> logits(static_cast<size_t>(vocab));
  for (float& x : logits) x = normal(random);
  return logits;
}

TEST_P(SampleTest, GreedyPicksTheLargestAndTheLowestIdOfATie) {
  for (const int64_t vocab : {1, 5, 63, 64, 65, 1000, 49152}) {
    Request r{random_logits(vocab, 1), 0.0f};
    const auto largest = std::max_element(r.logits.begin(), r.logits.end());
    EXPECT_EQ(token(r), largest - r.logits.begin()) << vocab;
    r.logits[static_cast<size_t>(vocab / 2)] = r.logits[static_cast<size_t>(vocab - 1)] = *largest + 1;
    EXPECT_EQ(token(r), vocab / 2);
    r.temperature = 9e-6f;
    EXPECT_EQ(token(r), vocab / 2);
  }
}

TEST_P(SampleTest, NaNCountsAsMinusInfinity) {
  for (const float temperature : {0.0f, 1.0f}) {
    Request r{std::vector<float>(100, NAN), temperature};
    EXPECT_EQ(token(r), 0);
    r.logits[70] = -3.0f;
    EXPECT_EQ(token(r), 70);
    r.logits.assign(100, -INFINITY);
    EXPECT_EQ(token(r), 0);
    r.adjustments = {{40, 0.0f, 2}, {30, 0.0f, 2}};
    EXPECT_EQ(token(r), 30) << "nothing can be picked: the lowest allowed id";
    r.logits = random_logits(100, 3);
    r.logits[99] = INFINITY;
    r.adjustments.clear();
    EXPECT_EQ(token(r), 99);
    for (const int32_t k : {1, 3}) {
      r.top_k = k;
      r.top_p = 0.9f;
      EXPECT_EQ(token(r), 99);
    }
  }
}

TEST_P(SampleTest, DrawsTheTokenOfTheReferenceForRandomParameters) {
  std::mt19937 random(5);
  const auto pick = [&](auto... choices) {
    const std::array values{choices...};
    return values[random() % values.size()];
  };
  int compared = 0;
  for (int round = 0; round < 150; ++round) {
    const int64_t vocab = pick(1, 2, 7, 64, 100, 640, 1000, 5003);
    Request r{random_logits(vocab, random(), pick(0.01f, 1.0f, 4.0f))};
    if (round % 4 == 0)
      for (float& x : r.logits) x = std::round(x);  // ties
    r.temperature = pick(0.3f, 0.8f, 1.0f, 2.0f);
    r.top_k = pick(-1, 0, 1, 2, 5, 50, 700, 1 << 20);
    r.top_p = pick(1.0f, 1.0f, 0.95f, 0.5f, 0.1f, 1e-6f);
    r.min_p = pick(0.0f, 0.0f, 0.05f, 0.3f, 1.0f);
    r.repetition_penalty = pick(1.0f, 1.3f, 0.7f);
    r.seed = static_cast<int64_t>(random()) * -5000000000;
    r.position = static_cast<int32_t>(random() % 4096);
    for (int i = pick(0, 0, 3, 40); i > 0; --i)
      r.adjustments.push_back({static_cast<int32_t>(random() % static_cast<uint32_t>(vocab)),
                               pick(0.0f, 1.5f, -2.0f, -INFINITY), pick(0, 1)});
    if (round % 5 == 0)
      for (int i = 0; i < 30; ++i)
        r.adjustments.push_back({static_cast<int32_t>(random() % static_cast<uint32_t>(vocab)), 0.0f, pick(2, 3)});
    double margin = 0;
    const int32_t expected = expected_draw(r, &margin);
    if (!(margin > 1e-3)) continue;  // also where all candidates are banned
    ++compared;
    ASSERT_EQ(token(r), expected) << "round " << round << " vocab " << vocab << " temperature " << r.temperature
                                  << " top_k " << r.top_k << " top_p " << r.top_p << " min_p " << r.min_p << " margin "
                                  << margin;
  }
  EXPECT_GT(compared, 120);
}

TEST_P(SampleTest, TopKKeepsExactlyKWithTheLowestIdsOfATie) {
  Request r{std::vector<float>(300, 1.0f)};
  r.top_k = 5;
  EXPECT_EQ(drawn_ids(r, 400), (std::set<int32_t>{0, 1, 2, 3, 4}));
  r.logits[200] = r.logits[299] = 1.5f;
  r.logits[0] = 0.9f;
  EXPECT_EQ(drawn_ids(r, 400), (std::set<int32_t>{1, 2, 3, 200, 299}));
  r.logits.assign(300, -0.0f);
  r.logits[1] = r.logits[150] = 0.0f;
  EXPECT_EQ(drawn_ids(r, 400), (std::set<int32_t>{0, 1, 2, 3, 4})) << "-0 and 0 are equal";
}

TEST_P(SampleTest, TopPKeepsTheSmallestSetThatReachesP) {
  Request r{{}};
  for (const float p : {0.1f, 0.4f, 0.2f, 0.1f, 0.1f, 0.1f}) r.logits.push_back(std::log(p));
  const std::vector<std::pair<float, std::set<int32_t>>> cases = {{1e-9f, {1}},
                                                                  {0.39f, {1}},
                                                                  {0.41f, {1, 2}},
                                                                  {0.59f, {1, 2}},
                                                                  {0.65f, {0, 1, 2}},
                                                                  {0.75f, {0, 1, 2, 3}},
                                                                  {0.999f, {0, 1, 2, 3, 4, 5}},
                                                                  {1.0f, {0, 1, 2, 3, 4, 5}}};
  for (const auto& [p, expected] : cases) {
    r.top_p = p;
    EXPECT_EQ(drawn_ids(r, 500), expected) << p;
  }
  r.top_k = 3;  // first: 0.4, 0.2 and 0.1 renormalise to 0.571, 0.286, 0.143
  r.top_p = 0.6f;
  EXPECT_EQ(drawn_ids(r, 500), (std::set<int32_t>{1, 2}));
  r.top_p = 0.55f;
  EXPECT_EQ(drawn_ids(r, 500), (std::set<int32_t>{1}));
}

TEST_P(SampleTest, MinPIsRelativeToTheLargestProbabilityAfterTemperature) {
  Request r{{}};
  for (const float p : {0.5f, 0.26f, 0.24f, 0.1f}) r.logits.push_back(std::log(p));
  r.min_p = 0.5f;
  EXPECT_EQ(drawn_ids(r, 300), (std::set<int32_t>{0, 1}));
  r.temperature = 2.0f;  // square roots: 1, 0.72, 0.69, 0.45
  EXPECT_EQ(drawn_ids(r, 300), (std::set<int32_t>{0, 1, 2}));
  r.min_p = 1.0f;
  EXPECT_EQ(drawn_ids(r, 50), (std::set<int32_t>{0}));
}

// Chi-square of draws against the reference distribution. Seeds are fixed: it passes always or never.
double chi_square(const std::map<int32_t, int>& counts, const std::map<int32_t, double>& expected, int n) {
  double sum = 0;
  for (const auto& [id, p] : expected) {
    const auto found = counts.find(id);
    const double count = found == counts.end() ? 0 : found->second;
    sum += (count - p * n) * (count - p * n) / (p * n);
  }
  return sum;
}

TEST_P(SampleTest, DrawsFollowTheDistribution) {
  constexpr int n = 20000;
  Request r{{0.0f, 1.0f, 2.0f, -1.0f, 0.5f, 0.5f, 1.5f, -0.5f, 0.25f, 1.25f, -2.0f}};
  for (const auto& [temperature, top_k, top_p, min_p] : {std::tuple{1.0f, 0, 1.0f, 0.0f},
                                                         {0.7f, 0, 1.0f, 0.0f},
                                                         {1.0f, 4, 1.0f, 0.0f},
                                                         {1.3f, 0, 0.8f, 0.0f},
                                                         {1.0f, 8, 0.9f, 0.2f},
                                                         {5.0f, 0, 1.0f, 0.0f}}) {
    r.temperature = temperature, r.top_k = top_k, r.top_p = top_p, r.min_p = min_p;
    const auto expected = distribution(r);
    const auto counts = draws(r, n);
    for (const auto& [id, count] : counts) EXPECT_TRUE(expected.contains(id)) << id;
    const auto freedom = static_cast<double>(expected.size() - 1);
    EXPECT_LT(chi_square(counts, expected, n), freedom + 4 * std::sqrt(2 * freedom) + 4)
        << temperature << " " << top_k << " " << top_p;
  }
}

TEST_P(SampleTest, ConsecutiveSeedsAreIndependent) {
  constexpr int n = 8000;
  Request r{{0.0f, 0.7f, -0.4f, 1.1f}};
  std::vector<Request> rows(n, r);
  for (int i = 0; i < n; ++i) rows[static_cast<size_t>(i)].seed = i;
  const auto sampled = sample_all(isa(), rows);
  std::map<int32_t, int> singles, pairs;
  for (size_t i = 0; i < sampled.size(); ++i) {
    ++singles[sampled[i].token];
    if (i % 2 == 1) ++pairs[sampled[i - 1].token * 4 + sampled[i].token];
  }
  const auto expected = distribution(r);
  std::map<int32_t, double> expected_pairs;
  for (const auto& [a, p] : expected)
    for (const auto& [b, q] : expected) expected_pairs[a * 4 + b] = p * q;
  EXPECT_LT(chi_square(singles, expected, n), 3 + 4 * std::sqrt(6.0));
  EXPECT_LT(chi_square(pairs, expected_pairs, n / 2), 15 + 4 * std::sqrt(30.0));
}

TEST_P(SampleTest, AdjustmentsPenaliseAddBanAndAllow) {
  Request r{{1.0f, 4.0f, -2.0f, 3.0f, 3.5f}, 0.0f};
  r.repetition_penalty = 2.0f;
  r.adjustments = {{1, 0.0f, 1}};
  EXPECT_EQ(token(r), 4);
  r.adjustments = {{1, 0.0f, 1}, {4, -1.0f, 0}, {0, 2.5f, 1}};  // 2, 2.5, 3: 3 is left with 3 and id 0 with 0.5 + 2.5
  EXPECT_EQ(token(r), 0);
  r.adjustments = {{1, -INFINITY, 0}, {4, -INFINITY, 0}};
  EXPECT_EQ(token(r), 3);
  r.adjustments = {{2, 0.0f, 2}, {0, 0.0f, 2}, {0, 0.0f, 2}};
  EXPECT_EQ(token(r), 0);
  r.adjustments = {{2, 3.5f, 2}, {0, 0.0f, 3}, {1, 100.0f, 0}};
  EXPECT_EQ(token(r), 2);
  r.adjustments = {{3, -INFINITY, 2}, {2, -INFINITY, 2}};
  EXPECT_EQ(token(r), 2) << "all allowed ids are banned: the lowest of them";
}

TEST_P(SampleTest, AllowedSetMayNameEveryIdManyTimes) {
  Request r{random_logits(130, 9), 0.0f};
  for (int turn = 0; turn < 3; ++turn)
    for (int32_t id = 129; id >= 0; --id) r.adjustments.push_back({id, 0.0f, 2});
  EXPECT_EQ(token(r), std::max_element(r.logits.begin(), r.logits.end()) - r.logits.begin());
}

TEST_P(SampleTest, LogprobsAreThoseOfTheRawLogits) {
  constexpr int64_t vocab = 5000, width = 8;
  Request r{random_logits(vocab, 13)};
  r.logits[17] = r.logits[4000] = 20.0f;  // a tie at the top
  r.temperature = 1.7f, r.top_k = 900, r.repetition_penalty = 1.4f, r.num_logprobs = 5;
  r.adjustments = {{17, -INFINITY, 1}, {17, 2.0f, 0}, {4000, -25.0f, 0}, {3, 1.0f, 1}, {3, 1.0f, 1}};
  double total = 0;
  for (const float x : r.logits) total += std::exp(double(x));
  std::vector<int32_t> order(vocab);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return r.logits[size_t(a)] > r.logits[size_t(b)]; });
  Request none = r, only_sampled = r;
  none.num_logprobs = -1, only_sampled.num_logprobs = 0;
  const auto sampled = sample_all(isa(), {r, none, only_sampled}, width);
  EXPECT_EQ(sampled[0].token, sampled[1].token) << "asking for log-probabilities must not change the draw";
  EXPECT_EQ(sampled[0].token, sampled[2].token);
  for (const size_t row : {size_t{0}, size_t{2}}) {
    const float logit = r.logits[static_cast<size_t>(sampled[row].token)];
    EXPECT_EQ(sampled[row].logprob_ids[0], sampled[row].token);
    EXPECT_NEAR(sampled[row].logprobs[0], double(logit) - std::log(total), 2e-5);
    EXPECT_EQ(sampled[row].rank,
              1 + std::count_if(r.logits.begin(), r.logits.end(), [&](float x) { return x > logit; }));
  }
  for (size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(sampled[0].logprob_ids[1 + i], order[i]);
    EXPECT_NEAR(sampled[0].logprobs[1 + i], double(r.logits[static_cast<size_t>(order[i])]) - std::log(total), 2e-5);
  }
  for (size_t i = 6; i < 8; ++i) EXPECT_EQ(sampled[0].logprob_ids[i], -1);
  for (size_t i = 1; i < 8; ++i) EXPECT_EQ(sampled[2].logprob_ids[i], -1);
  for (size_t i = 0; i < 8; ++i) EXPECT_EQ(sampled[1].logprob_ids[i], -1);
}

TEST_P(SampleTest, LogprobsOfTheWholeVocabularySumToOne) {
  constexpr int64_t vocab = 49152;
  for (const float scale : {0.001f, 2.0f, 12.0f}) {
    Request r{random_logits(vocab, 21, scale)};
    r.num_logprobs = vocab;
    const Sampled s = sample_all(isa(), {r}, vocab + 1)[0];
    double sum = 0;
    std::set<int32_t> ids;
    for (int64_t i = 1; i <= vocab; ++i) {
      sum += std::exp(double(s.logprobs[static_cast<size_t>(i)]));
      ids.insert(s.logprob_ids[static_cast<size_t>(i)]);
      ASSERT_TRUE(i == 1 || s.logprobs[static_cast<size_t>(i)] <= s.logprobs[static_cast<size_t>(i - 1)]);
    }
    EXPECT_NEAR(sum, 1.0, 1e-4) << scale;
    EXPECT_EQ(ids.size(), static_cast<size_t>(vocab));
  }
}

TEST_P(SampleTest, LogprobsOfHopelessRowsAreMinusInfinityNotNaN) {
  Request r{std::vector<float>(70, NAN)};
  r.num_logprobs = 2;
  Request one = r;
  one.logits[33] = 5.0f;
  const auto sampled = sample_all(isa(), {r, one}, 3);
  EXPECT_EQ(sampled[0].token, 0);
  EXPECT_EQ(sampled[0].rank, 1);
  for (const float x : sampled[0].logprobs) EXPECT_EQ(x, -INFINITY);
  EXPECT_EQ(sampled[1].token, 33);
  EXPECT_EQ(sampled[1].logprobs, (std::vector<float>{0.0f, 0.0f, -INFINITY}));
}

TEST_P(SampleTest, OrderOfRowsAndThreadsChangeNothing) {
  std::vector<Request> requests;
  for (uint32_t i = 0; i < 24; ++i) {
    Request r{random_logits(3000, i)};
    r.temperature = i % 5 == 0 ? 0.0f : 0.9f;
    r.top_k = i % 3 == 0 ? 40 : 0;
    r.top_p = i % 2 == 0 ? 0.9f : 1.0f;
    r.seed = i * 77, r.position = static_cast<int32_t>(i), r.num_logprobs = static_cast<int32_t>(i % 4) - 1;
    requests.push_back(r);
  }
  cpu::set_num_threads(1);
  const auto first = sample_all(isa(), requests, 4);
  std::vector<Request> reversed(requests.rbegin(), requests.rend());
  cpu::set_num_threads(3);
  const auto second = sample_all(isa(), reversed, 4);
  cpu::set_num_threads(0);
  for (size_t i = 0; i < first.size(); ++i) {
    const Sampled& other = second[second.size() - 1 - i];
    EXPECT_EQ(first[i].token, other.token);
    EXPECT_EQ(first[i].rank, other.rank);
    EXPECT_EQ(first[i].logprobs, other.logprobs);
    EXPECT_EQ(first[i].logprob_ids, other.logprob_ids);
    EXPECT_EQ(first[i].token, sample_all(isa(), {requests[i]}, 0)[0].token) << "alone";
  }
}

TEST(SampleAcrossIsas, TheSameTokensAreDrawn) {
  std::vector<Request> requests;
  for (uint32_t i = 0; i < 40; ++i) {
    Request r{random_logits(2000, 100 + i, 1.0f)};
    r.top_k = i % 2 == 0 ? 0 : 100, r.top_p = i % 4 < 2 ? 1.0f : 0.8f, r.seed = i;
    requests.push_back(r);
  }
  const auto reference = sample_all(cpu::baseline_kernels, requests);
  for (const cpu::Kernels* isa : cpu::supported_kernels()) {
    const auto sampled = sample_all(*isa, requests);
    for (size_t i = 0; i < requests.size(); ++i)
      EXPECT_EQ(sampled[i].token, reference[i].token) << isa->name << " " << i;
  }
}

}  // namespace
}  // namespace hybrid::test
