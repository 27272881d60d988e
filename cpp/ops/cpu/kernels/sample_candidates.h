// Candidates: logits that may be picked, in ascending order of token id, and the filters that thin them out.
//
// Nothing is sorted: top-k and top-p are a search for the threshold, by bisection over the ordered bits of a float, of
// "how many (or how much probability) is at least t". A question touches only blocks whose largest logit reaches t,
// hence a few of a vocabulary's thousand. Filters compare the unscaled logits: a temperature keeps their order, and
// dividing would round different ones together.
#pragma once

#include "ops/cpu/vec.h"

namespace hybrid::cpu::HYBRID_ISA {

constexpr int64_t candidate_block = 64;

struct Candidates {
  int64_t size;
  const float* logits;   // no NaN, no +inf once cleaned
  const int32_t* ids;    // null: logit i is token i
  float* block_largest;  // of each 64 logits
  float largest;

  int32_t id(int64_t i) const { return ids != nullptr ? ids[i] : static_cast<int32_t>(i); }
};

// Order-preserving map of floats to integers, and back.
inline uint32_t key_of(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
inline float float_of(uint32_t key) {
  return std::bit_cast<float>((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

// Fills block_largest and largest, taking NaN for -inf. True if something is not finite, for clean() to look at.
inline bool find_largest(Candidates& c) {
  F32 odd(0.0f);
  c.largest = minus_infinity;
  for (int64_t i = 0; i < c.size; i += candidate_block) {
    const int64_t end = std::min(c.size, i + candidate_block);
    F32 top(minus_infinity);
    int64_t j = i;
    for (; j + F32::width <= end; j += F32::width) {
      const F32 x = F32::load(c.logits + j);
      top = max(x, top);
      odd = odd + (x - x);
    }
    float largest = top.largest();
    for (; j < end; ++j) {
      const float x = c.logits[j];
      largest = x > largest ? x : largest;
      odd = odd + F32(x - x);
    }
    c.block_largest[i / candidate_block] = largest;
    c.largest = std::max(c.largest, largest);
  }
  return std::isnan(odd.sum());
}

// NaN becomes -inf, +inf the largest float.
inline void clean(float* logits, int64_t size) {
  const float low = minus_infinity, high = std::numeric_limits<float>::max();
  for (int64_t i = 0; i < size; ++i) logits[i] = std::isnan(logits[i]) ? low : std::min(logits[i], high);
}

// How many logits are >= t; with weights, the sum of theirs.
inline double at_least(const Candidates& c, float t, const float* weights) {
  double total = 0;
  const F32 limit(t), one(1.0f);
  for (int64_t i = 0; i < c.size; i += candidate_block) {
    if (c.block_largest[i / candidate_block] < t) continue;
    const int64_t end = std::min(c.size, i + candidate_block);
    F32 sum(0.0f);
    int64_t j = i;
    for (; j + F32::width <= end; j += F32::width)
      sum = sum + unless_below(F32::load(c.logits + j), limit, weights != nullptr ? F32::load(weights + j) : one);
    total += static_cast<double>(sum.sum());
    for (; j < end; ++j)
      if (c.logits[j] >= t) total += weights != nullptr ? static_cast<double>(weights[j]) : 1.0;
  }
  return total;
}

// Keep logits > value, and the first `ties` of those equal to it.
struct Cut {
  float value;
  int64_t ties;
};

// The smallest set of largest logits (ties: lowest ids) whose count, or sum of weights, reaches `target` > 0. All of
// them must reach it.
inline Cut find_cut(const Candidates& c, const float* weights, double target) {
  uint32_t low = key_of(minus_infinity), high = key_of(c.largest) + 1;
  double above = 0;  // at_least(float_of(high))
  for (float reach = 1.0f; std::isfinite(c.largest - reach); reach *= 2.0f) {
    const float t = c.largest - reach;
    const double reached = at_least(c, t, weights);
    if (reached >= target) {
      low = key_of(t);
      break;
    }
    if (key_of(t) < high) high = key_of(t), above = reached;
  }
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    const double reached = at_least(c, float_of(middle), weights);
    if (reached >= target)
      low = middle;
    else
      high = middle, above = reached;
  }
  const float value = float_of(low);
  if (weights == nullptr) return {value, static_cast<int64_t>(target - above)};
  float weight = 0.0f;  // that all ties have
  for (int64_t i = 0; i < c.size && weight == 0.0f; ++i)
    if (c.logits[i] == value) weight = weights[i];
  const double ties = weight > 0.0f ? std::ceil((target - above) / static_cast<double>(weight)) : 1.0;
  return {value, std::max<int64_t>(1, static_cast<int64_t>(std::min(ties, static_cast<double>(c.size))))};
}

// Memory for `size` candidates.
struct CandidateBuffers {
  float *logits, *weights, *block_largest;
  int32_t* ids;
};

// The candidates that the cut keeps, moved to `to` (which may be where they are).
inline Candidates keep(const Candidates& c, Cut cut, const CandidateBuffers& to) {
  int64_t size = 0;
  for (int64_t i = 0; i < c.size; i += candidate_block) {
    if (c.block_largest[i / candidate_block] < cut.value) continue;
    for (int64_t j = i; j < std::min(c.size, i + candidate_block); ++j) {
      const float x = c.logits[j];
      if (!(x > cut.value || (x == cut.value && cut.ties-- > 0))) continue;
      to.ids[size] = c.id(j);
      to.logits[size++] = x;
    }
  }
  Candidates kept{size, to.logits, to.ids, to.block_largest, c.largest};
  find_largest(kept);
  return kept;
}

inline Candidates keep_top_k(const Candidates& c, int64_t k, const CandidateBuffers& buffers) {
  if (k <= 0 || k >= c.size) return c;
  return keep(c, find_cut(c, nullptr, static_cast<double>(k)), buffers);
}

inline Candidates keep_top_p(const Candidates& c, float p, float inverse_temperature, const CandidateBuffers& buffers) {
  if (!(p < 1.0f) || c.size == 1) return c;
  const F32 largest(c.largest), scale(inverse_temperature);
  for (int64_t i = 0; i < c.size; i += F32::width) {
    const int n = static_cast<int>(std::min<int64_t>(F32::width, c.size - i));
    exp((F32::load(c.logits + i, n) - largest) * scale).store(buffers.weights + i, n);
  }
  const double total = at_least(c, minus_infinity, buffers.weights);
  const double target = static_cast<double>(std::max(p, std::numeric_limits<float>::min())) * total;
  return keep(c, find_cut(c, buffers.weights, target), buffers);
}

// Probability >= min_p times the largest.
inline Candidates keep_min_p(const Candidates& c, float min_p, float temperature, const CandidateBuffers& buffers) {
  if (!(min_p > 0.0f)) return c;
  const double value = static_cast<double>(c.largest) +
                       static_cast<double>(temperature) * std::log(std::min(1.0, static_cast<double>(min_p)));
  return keep(c, {static_cast<float>(value), c.size}, buffers);
}

// Index of the first largest; 0 if none is a number.
inline int64_t first_largest(const Candidates& c) {
  for (int64_t i = 0; i < c.size; i += candidate_block) {
    if (c.block_largest[i / candidate_block] != c.largest) continue;
    for (int64_t j = i; j < std::min(c.size, i + candidate_block); ++j)
      if (c.logits[j] == c.largest) return j;
  }
  return 0;
}

}  // namespace hybrid::cpu::HYBRID_ISA
