// SampleCase: the columns of one call of `sample`, one request a row, and a sorted reference in double precision.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>

#include "ops/cpu/isa.h"
#include "ops/philox.h"
#include "owned_tensor.h"

namespace hybrid::test {

struct Adjustment {
  int32_t id;
  float add = 0.0f;
  int32_t flags = 0;
};

struct Request {
  std::vector<float> logits;
  float temperature = 1.0f, top_p = 1.0f, min_p = 0.0f, repetition_penalty = 1.0f;
  int32_t top_k = 0;
  int64_t seed = 1;
  int32_t position = 0, num_logprobs = -1;
  std::vector<Adjustment> adjustments = {};
};

struct Sampled {
  int32_t token, rank;
  std::vector<float> logprobs;
  std::vector<int32_t> logprob_ids;
};

// Every output starts as a value that the kernel must not leave behind. width: of logprobs; 0: not asked for.
inline std::vector<Sampled> sample_all(const cpu::Kernels& isa, const std::vector<Request>& requests,
                                       int64_t width = 0) {
  const auto rows = static_cast<int64_t>(requests.size()), vocab = static_cast<int64_t>(requests[0].logits.size());
  std::vector<float> logits, temperature, top_p, min_p, penalty;
  std::vector<int32_t> top_k, positions, num_logprobs, starts;
  // As a batch has them: an id, the bits of what is added, flags; behind something that is nobody's.
  std::vector<int32_t> entries(6, std::numeric_limits<int32_t>::min());
  std::vector<int64_t> seeds;
  const auto num_entries = [&] { return static_cast<int32_t>(entries.size() / 3); };
  starts.push_back(num_entries());
  for (const Request& r : requests) {
    logits.insert(logits.end(), r.logits.begin(), r.logits.end());
    temperature.push_back(r.temperature), top_p.push_back(r.top_p), min_p.push_back(r.min_p);
    penalty.push_back(r.repetition_penalty), top_k.push_back(r.top_k), seeds.push_back(r.seed);
    positions.push_back(r.position), num_logprobs.push_back(r.num_logprobs);
    for (const Adjustment& a : r.adjustments)
      entries.insert(entries.end(), {a.id, std::bit_cast<int32_t>(a.add), a.flags});
    starts.push_back(num_entries());
  }
  OwnedTensor<int32_t> tokens({rows}, -77), ranks({rows}, -77), logprob_ids({rows, std::max<int64_t>(1, width)}, -77);
  OwnedTensor<float> logprobs({rows, std::max<int64_t>(1, width)}, NAN);
  const auto column = [](auto& v) {
    return view_of(v.data(), dtype_of<std::decay_t<decltype(v[0])>>(), {static_cast<int64_t>(v.size())});
  };
  Sample a;
  a.tokens = tokens.view;
  if (width > 0) a.logprobs = logprobs.view, a.logprob_ids = logprob_ids.view, a.ranks = ranks.view;
  a.logits = view_of(logits.data(), DType::f32, {rows, vocab});
  a.temperature = column(temperature), a.top_p = column(top_p), a.min_p = column(min_p);
  a.repetition_penalty = column(penalty), a.top_k = column(top_k), a.seeds = column(seeds);
  a.positions = column(positions), a.num_logprobs = column(num_logprobs), a.adjust_start = column(starts);
  a.adjust_ids = view_of(entries.data(), DType::i32, {num_entries()});
  a.adjust_add = view_of(entries.data() + 1, DType::f32, {num_entries()});
  a.adjust_flags = view_of(entries.data() + 2, DType::i32, {num_entries()});
  for (TensorView* t : {&a.adjust_ids, &a.adjust_add, &a.adjust_flags}) t->strides[0] = 3;
  a.stream = nullptr;
  isa.sample(a);
  std::vector<Sampled> result;
  for (int64_t r = 0; r < rows; ++r) {
    result.push_back({tokens[r], ranks[r], {}, {}});
    for (int64_t i = 0; i < width; ++i) {
      result.back().logprobs.push_back(logprobs[r * width + i]);
      result.back().logprob_ids.push_back(logprob_ids[r * width + i]);
    }
  }
  return result;
}

// The logits after adjustments; ids that are not allowed are missing.
inline std::map<int32_t, double> adjusted(const Request& r) {
  std::map<int32_t, double> all, allowed;
  for (size_t i = 0; i < r.logits.size(); ++i) all[static_cast<int32_t>(i)] = r.logits[i];
  for (const Adjustment& a : r.adjustments) {
    double& x = all[a.id];
    if (a.flags & 1) x = x > 0 ? x / r.repetition_penalty : x * r.repetition_penalty;
    x += a.add;
    if (a.flags & 2) allowed[a.id] = 0;
  }
  for (auto& [id, x] : allowed) x = all[id];
  return allowed.empty() ? all : allowed;
}

// Tokens that may be picked with their probabilities, by sorting: temperature, then top-k, then top-p, then min-p.
inline std::map<int32_t, double> distribution(const Request& r) {
  std::vector<std::pair<double, int32_t>> sorted;
  for (const auto& [id, x] : adjusted(r))
    sorted.push_back({-x / r.temperature, id});  // ascending: likely first, then low ids
  std::sort(sorted.begin(), sorted.end());
  if (r.top_k > 0 && r.top_k < static_cast<int32_t>(sorted.size())) sorted.resize(static_cast<size_t>(r.top_k));
  double total = 0, reached = 0;
  for (const auto& [x, id] : sorted) total += std::exp(sorted[0].first - x);
  size_t kept = 0;
  while (kept < sorted.size() && (kept == 0 || r.top_p >= 1 || reached < double(r.top_p) * total))
    reached += std::exp(sorted[0].first - sorted[kept++].first);
  sorted.resize(kept);
  std::map<int32_t, double> result;
  for (const auto& [x, id] : sorted)
    if (const double p = std::exp(sorted[0].first - x); p >= double(r.min_p)) result[id] = p;
  double sum = 0;
  for (const auto& [id, p] : result) sum += p;
  for (auto& [id, p] : result) p /= sum;
  return result;
}

// What the kernel should draw: the same noise, added in double precision. `margin`: by how much the winner wins.
inline int32_t expected_draw(const Request& r, double* margin) {
  double best = -INFINITY, second = -INFINITY;
  int32_t winner = -1;
  for (const auto& [id, p] : distribution(r)) {
    const double score =
        std::log(p) + double(gumbel_of_token(static_cast<uint64_t>(r.seed), static_cast<uint32_t>(r.position),
                                             static_cast<uint32_t>(id)));
    if (score > best)
      second = best, best = score, winner = id;
    else
      second = std::max(second, score);
  }
  *margin = best - second;
  return winner;
}

}  // namespace hybrid::test
