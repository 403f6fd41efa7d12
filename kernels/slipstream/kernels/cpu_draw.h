// From logits to a token, one row at a time, without sorting a vocabulary. `draw.py` says what is
// computed, and this is how it is done in few passes by one thread.

#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "cpu_team.h"
#include "cpu_vector.h"

namespace {

constexpr int64_t kSpan = 256;  // of the vocabulary: summed as one before the draw looks inside
constexpr int kBucketShift = 18;  // weights of one bucket share the exponent and 5 bits behind it
constexpr int64_t kBuckets = 1 << (31 - kBucketShift);  // weights have no sign

// Mirrored in `program.py`, field by field.
struct Draw {
  int64_t row, top_k;
  double point, top_p;
  float temperature, min_p;
  int64_t token;  // found
  float top;      // found: the largest logit, no number if one of the row is none
};
static_assert(sizeof(Draw) == 56, "as `program.py` has it");

// Of one thread, as long as it lives: fresh pages would cost more than what is done in them.
struct Weights {
  std::vector<float> of, candidates;
  std::vector<double> sums;  // of buckets, then of spans
};

inline int64_t bucket(float weight) {
  uint32_t bits;
  std::memcpy(&bits, &weight, 4);
  return bits >> kBucketShift;
}

inline float largest(const float* x, int64_t count) {
  vec top = splat(-INFINITY);
  ivec broken{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const vec value = load(x + i);
    top = value > top ? value : top;
    broken |= value != value;
  }
  float result = maximum(top);
  bool bad = false;
  for (int lane = 0; lane < kLanes; lane++) bad |= broken[lane] != 0;
  for (; i < count; i++) {
    result = std::max(result, x[i]);
    bad |= x[i] != x[i];
  }
  return bad ? NAN : result;
}

// exp((x - top) / temperature); 0 where the power is below -87.
inline void weigh(const float* x, int64_t count, float top, float temperature, float* out) {
  const auto weight = [&](vec value) {
    const vec power = (value - top) / temperature;
    return power < -87.0f ? vec{} : exp(power);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, weight(load(x + i)));
  vec rest = splat(-INFINITY);
  for (int64_t lane = 0; i + lane < count; lane++) rest[lane] = x[i + lane];
  rest = weight(rest);
  for (int64_t lane = 0; i + lane < count; lane++) out[i + lane] = rest[lane];
}

// The largest weight such that those which are no smaller come to `enough(total)`; each counts `of(weight)`,
// and the total is that of all which are at least `least`. Of buckets by size only one is sorted.
template <typename Of, typename Enough>
float cutoff(Weights& weights, float least, Of&& of, Enough&& enough) {
  weights.sums.assign(kBuckets, 0.0);
  for (float weight : weights.of)
    if (weight >= least) weights.sums[bucket(weight)] += of(weight);
  double total = 0.0, above = 0.0;
  for (double sum : weights.sums) total += sum;
  const double amount = enough(total);
  for (int64_t b = kBuckets - 1; b >= 0; b--) {
    if (weights.sums[b] == 0.0) continue;
    if (above + weights.sums[b] < amount) {
      above += weights.sums[b];
      continue;
    }
    weights.candidates.clear();
    for (float weight : weights.of)
      if (weight >= least && bucket(weight) == b) weights.candidates.push_back(weight);
    std::sort(weights.candidates.begin(), weights.candidates.end(), std::greater<float>());
    for (float weight : weights.candidates)
      if ((above += of(weight)) >= amount) return weight;
    return weights.candidates.back();  // summed in another order they may fall short
  }
  return least;
}

// The first token at which the running sum passes `point`'s share of the total.
inline int64_t invert(Weights& weights, float least, double point) {
  const std::vector<float>& of = weights.of;
  const int64_t count = int64_t(of.size());
  weights.sums.clear();
  double total = 0.0;
  for (int64_t first = 0; first < count; first += kSpan) {
    double span = 0.0;
    const int64_t end = std::min(first + kSpan, count);
#pragma omp simd reduction(+ : span)
    for (int64_t i = first; i < end; i++) span += of[i] >= least ? of[i] : 0.0f;
    weights.sums.push_back(total += span);
  }
  const double target = std::min(point * total, std::nextafter(total, 0.0));
  const int64_t span =
      std::upper_bound(weights.sums.begin(), weights.sums.end(), target) - weights.sums.begin();
  double running = span ? weights.sums[span - 1] : 0.0;
  int64_t token = span * kSpan;
  for (int64_t i = token; i < std::min((span + 1) * kSpan, count); i++) {
    if (of[i] < least || of[i] == 0.0f) continue;
    token = i;
    if ((running += of[i]) > target) break;  // none: rounding; then the span's last
  }
  return token;
}

inline void draw(const float* row, int64_t vocab, Draw& draw, Weights& weights) {
  draw.top = largest(row, vocab);
  draw.token = 0;
  if (!std::isfinite(draw.top)) return;
  if (draw.temperature == 0.0f) {
    draw.token = std::find(row, row + vocab, draw.top) - row;
    return;
  }
  weights.of.resize(vocab);
  weigh(row, vocab, draw.top, draw.temperature, weights.of.data());
  float least = draw.min_p;  // of the largest, which is 1
  if (draw.top_k > 0 && draw.top_k < vocab)
    least = cutoff(weights, least, [](float) { return 1.0; },
                   [&](double) { return double(draw.top_k); });
  if (draw.top_p < 1.0)
    least = cutoff(weights, least, [](float weight) { return double(weight); },
                   [&](double total) { return draw.top_p * total; });
  draw.token = invert(weights, least, draw.point);
}

// A row is one chunk.
class Draws final : public Work {
 public:
  Draws(const float* logits, int64_t vocab, Draw* draws, int64_t count)
      : logits_(logits), vocab_(vocab), draws_(draws), count_(count) {}

  int64_t chunks(int64_t) const override { return count_; }
  void run(int64_t, int64_t chunk, int) const override {
    static thread_local Weights weights;
    Draw& one = draws_[chunk];
    draw(logits_ + one.row * vocab_, vocab_, one, weights);
  }

 private:
  const float* logits_;
  int64_t vocab_;
  Draw* draws_;
  int64_t count_;
};

}  // namespace
