// Picks one token a row; rows share nothing, so each is one piece of work for one thread.
//
//   raw logits -> log-probabilities, if asked for
//   -> repetition penalty and additions, allowed set
//   -> temperature 0 (below 1e-5): the largest
//      else top-k -> top-p -> min-p -> the largest of (logit - largest) / temperature + Gumbel noise (ops/philox.h)
//
// A NaN logit counts as -inf. If nothing can be picked (every candidate is -inf), the lowest candidate id is.
#pragma once

#include "ops/cpu/buffer.h"
#include "ops/cpu/kernels/sample_candidates.h"
#include "ops/cpu/thread_pool.h"
#include "ops/ops.h"
#include "ops/philox.h"

namespace hybrid::cpu::HYBRID_ISA {

constexpr float greedy_below = 1e-5f;  // dividing by less overflows

// noise[i] of candidates begin + i, for up to 64 of them. Plain loops over arrays: the compiler makes vectors of them.
inline void make_noise(float* noise, const Candidates& c, int64_t begin, uint64_t seed, uint32_t position) {
  if (c.ids != nullptr) {
    const int64_t count = std::min(candidate_block, c.size - begin);
    for (int64_t i = 0; i < count; ++i)
      noise[i] = gumbel_of_token(seed, position, static_cast<uint32_t>(c.ids[begin + i]));
    return;
  }
  constexpr uint32_t counters = candidate_block / 4;
  uint32_t words[4][counters];
  for (uint32_t i = 0; i < counters; ++i) {
    const PhiloxWords w = philox(static_cast<uint32_t>(begin / 4) + i, position, 0, 0, seed);
    words[0][i] = w[0];
    words[1][i] = w[1];
    words[2][i] = w[2];
    words[3][i] = w[3];
  }
  float by_word[4][counters];
  for (int j = 0; j < 4; ++j)
    for (uint32_t i = 0; i < counters; ++i) by_word[j][i] = gumbel(words[j][i]);
  for (uint32_t i = 0; i < counters; ++i)
    for (uint32_t j = 0; j < 4; ++j) noise[4 * i + j] = by_word[j][i];
}

// Index of the candidate with the largest noisy logit. At least one is above -inf.
inline int64_t draw(const Candidates& c, float inverse_temperature, uint64_t seed, uint32_t position) {
  const F32 largest(c.largest), scale(inverse_temperature);
  int64_t best = 0;
  float best_score = minus_infinity;
  for (int64_t i = 0; i < c.size; i += candidate_block) {
    float scores[candidate_block];
    make_noise(scores, c, i, seed, position);
    const int64_t count = std::min(candidate_block, c.size - i);
    F32 top(minus_infinity);
    int64_t j = 0;
    for (; j + F32::width <= count; j += F32::width) {
      const F32 score = F32::load(scores + j) + (F32::load(c.logits + i + j) - largest) * scale;
      score.store(scores + j);
      top = max(top, score);
    }
    float block_best = top.largest();
    for (; j < count; ++j) {
      scores[j] += (c.logits[i + j] - c.largest) * inverse_temperature;
      block_best = std::max(block_best, scores[j]);
    }
    if (!(block_best > best_score)) continue;
    best_score = block_best;
    for (j = 0; scores[j] != block_best;) ++j;
    best = i + j;
  }
  return best;
}

class SampleRow {
 public:
  SampleRow(const Sample& a, int64_t row)
      : a_(a),
        row_(row),
        vocab_(a.logits.shape[1]),
        logits_(a.logits.as<float>() + row * a.logits.strides[0]),
        begin_(a.adjust_start.as<const int32_t>()[row]),
        end_(a.adjust_start.as<const int32_t>()[row + 1]) {
    static thread_local Buffer buffer;
    const int64_t blocks = (vocab_ + candidate_block - 1) / candidate_block;
    float* p = buffer.floats(3 * vocab_ + 2 * blocks + (end_ - begin_));
    buffers_ = {p, p + vocab_, p + 2 * vocab_, reinterpret_cast<int32_t*>(p + 2 * vocab_ + blocks)};
    all_blocks_ = p + 3 * vocab_ + blocks;
    saved_ = all_blocks_ + blocks;
  }

  void run() {
    const bool wanted = a_.logprobs.defined() && num_logprobs() >= 0;
    double log_sum = 0;
    if (wanted) log_sum = write_top_logprobs();
    adjust();
    const int32_t token = pick();
    a_.tokens.as<int32_t>()[row_] = token;
    if (wanted) {
      restore();
      write_sampled_logprob(token, log_sum);
    } else if (a_.logprobs.defined()) {
      clear_logprobs(0);
      a_.ranks.as<int32_t>()[row_] = 0;
    }
  }

 private:
  template <class T>
  T value(const TensorView& column) const {
    return column.as<const T>()[row_];
  }
  template <class T>
  static T entry(const TensorView& column, int64_t i) {
    return column.as<const T>()[i * column.strides[0]];
  }
  int64_t num_logprobs() const { return value<int32_t>(a_.num_logprobs); }

  Candidates everything() {
    Candidates all{vocab_, logits_, nullptr, all_blocks_, 0.0f};
    if (find_largest(all)) {
      clean(logits_, vocab_);
      find_largest(all);
    }
    return all;
  }

  void adjust() {
    const float penalty = value<float>(a_.repetition_penalty);
    for (int64_t i = begin_; i < end_; ++i) {
      float& x = logits_[entry<int32_t>(a_.adjust_ids, i)];
      saved_[i - begin_] = x;
      if ((entry<int32_t>(a_.adjust_flags, i) & 1) != 0) x = x > 0.0f ? x / penalty : x * penalty;
      x += entry<float>(a_.adjust_add, i);
    }
  }
  // Undoes adjust(), last first: an id may have several entries.
  void restore() {
    for (int64_t i = end_ - 1; i >= begin_; --i) logits_[entry<int32_t>(a_.adjust_ids, i)] = saved_[i - begin_];
  }

  Candidates candidates() {
    int64_t size = 0;
    bool ascending = true;
    for (int64_t i = begin_; i < end_; ++i) {
      if ((entry<int32_t>(a_.adjust_flags, i) & 2) == 0) continue;
      const int32_t id = entry<int32_t>(a_.adjust_ids, i);
      if (size == vocab_ && (size = unique(size)) == vocab_) break;  // a row may name an id more than once
      ascending = ascending && (size == 0 || buffers_.ids[size - 1] < id);
      buffers_.ids[size++] = id;
    }
    if (size == 0) return everything();
    if (!ascending) size = unique(size);
    for (int64_t i = 0; i < size; ++i) buffers_.logits[i] = logits_[buffers_.ids[i]];
    clean(buffers_.logits, size);
    Candidates allowed{size, buffers_.logits, buffers_.ids, buffers_.block_largest, 0.0f};
    find_largest(allowed);
    return allowed;
  }
  int64_t unique(int64_t size) {
    const auto ascending = [](int32_t a, int32_t b) { return a < b; };  // a type of this instruction set's own
    std::sort(buffers_.ids, buffers_.ids + size, ascending);
    int64_t kept = 1;
    for (int64_t i = 1; i < size; ++i)
      if (buffers_.ids[i] != buffers_.ids[i - 1]) buffers_.ids[kept++] = buffers_.ids[i];
    return kept;
  }

  int32_t pick() {
    Candidates c = candidates();
    const float temperature = value<float>(a_.temperature);
    if (!(temperature >= greedy_below) || !(c.largest > minus_infinity)) return c.id(first_largest(c));
    const float inverse = 1.0f / temperature;
    c = keep_top_k(c, value<int32_t>(a_.top_k), buffers_);
    c = keep_top_p(c, value<float>(a_.top_p), inverse, buffers_);
    c = keep_min_p(c, value<float>(a_.min_p), temperature, buffers_);
    const auto seed = static_cast<uint64_t>(value<int64_t>(a_.seeds));
    return c.id(draw(c, inverse, seed, static_cast<uint32_t>(value<int32_t>(a_.positions))));
  }

  float* logprobs() const { return a_.logprobs.as<float>() + row_ * a_.logprobs.strides[0]; }
  int32_t* logprob_ids() const { return a_.logprob_ids.as<int32_t>() + row_ * a_.logprob_ids.strides[0]; }
  void clear_logprobs(int64_t from) {
    for (int64_t i = from; i < a_.logprobs.shape[1]; ++i) logprobs()[i] = 0.0f, logprob_ids()[i] = -1;
  }

  // Columns 1 .. n: the most likely tokens of the raw logits. Returns the logarithm of the sum of their exponentials.
  double write_top_logprobs() {
    const Candidates all = everything();
    const double log_sum = log_sum_of_exponentials(all);
    const int64_t n = std::min({num_logprobs(), vocab_, a_.logprobs.shape[1] - 1});
    clear_logprobs(1 + n);
    if (n == 0) return log_sum;
    const Candidates top = keep_top_k(all, n, buffers_);
    auto* order = reinterpret_cast<int32_t*>(buffers_.weights);
    for (int32_t i = 0; i < top.size; ++i) order[i] = i;
    std::sort(order, order + n, [&top](int32_t i, int32_t j) {
      return top.logits[i] != top.logits[j] ? top.logits[i] > top.logits[j] : i < j;
    });
    for (int64_t i = 0; i < n; ++i) {
      logprobs()[1 + i] = static_cast<float>(static_cast<double>(top.logits[order[i]]) - log_sum);
      logprob_ids()[1 + i] = top.id(order[i]);
    }
    return log_sum;
  }

  // 0 stands for a row without one finite logit: its log-probabilities are then -inf, not NaN.
  static double log_sum_of_exponentials(const Candidates& c) {
    if (!(c.largest > minus_infinity)) return 0.0;
    const F32 largest(c.largest);
    double total = 0;
    for (int64_t i = 0; i < c.size; i += candidate_block) {
      F32 sum(0.0f);
      for (int64_t j = i; j < std::min(c.size, i + candidate_block); j += F32::width) {
        const int n = static_cast<int>(std::min<int64_t>(F32::width, c.size - j));
        const F32 x = n == F32::width ? F32::load(c.logits + j) : load_or_minus_infinity(c.logits + j, n);
        sum = sum + exp(x - largest);
      }
      total += static_cast<double>(sum.sum());
    }
    return static_cast<double>(c.largest) + std::log(total);
  }
  static F32 load_or_minus_infinity(const float* p, int n) {
    float lanes[F32::width];
    for (int i = 0; i < F32::width; ++i) lanes[i] = i < n ? p[i] : minus_infinity;
    return F32::load(lanes);
  }

  void write_sampled_logprob(int32_t token, double log_sum) {
    const float logit = logits_[token];
    logprobs()[0] = static_cast<float>(static_cast<double>(logit) - log_sum);
    logprob_ids()[0] = token;
    const float next = std::nextafter(logit, std::numeric_limits<float>::infinity());
    a_.ranks.as<int32_t>()[row_] = 1 + static_cast<int32_t>(at_least(everything(), next, nullptr));
  }

  const Sample& a_;
  int64_t row_, vocab_;
  float* logits_;
  int64_t begin_, end_;
  CandidateBuffers buffers_;
  float *all_blocks_, *saved_;
};

inline void sample(const Sample& a) {
  pool().parallel_for(a.logits.shape[0], 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) SampleRow(a, row).run();
  });
}

}  // namespace hybrid::cpu::HYBRID_ISA
