// Thresholds of activations, and what 64 values become by them (reference.activation_bits, activation_mask).

// Mean of n values from the float32 sums of their blocks, which are added up in float64.
INLINE float mean_of_blocks(const float* sums, i64 blocks, i64 n) {
  double total = 0;
  for (i64 b = 0; b < blocks; ++b) total += sums[b];
  return n ? float(total / double(n)) : 0.0f;
}

// 0, or NaN where a threshold is not finite: NaN or infinite values are about to become bits.
INLINE float probe_of(const float* thresholds, i64 count) {
  float probe = 0;
  for (i64 i = 0; i < count; ++i) probe += thresholds[i] * 0.0f;
  return probe;
}

// Greatest value whose gradient passes.
INLINE float limit_of(float threshold) { return 2 * (threshold < 0.5f ? 0.5f : threshold); }

struct Words {
  u64 larger, inside;
};

struct BySign {
  Words words(const float* v, i64) const { return {compare64<NOT_LESS>(v, 0.0f), compare64<ABS_LESS_EQUAL>(v, 1.0f)}; }
};

// One threshold for all.
struct ByMean {
  float threshold;
  Words words(const float* v, i64) const {
    return {compare64<GREATER>(v, threshold), compare64<GREATER>(v, 0.0f) & compare64<LESS_EQUAL>(v, limit_of(threshold))};
  }
};

// One for every channel. A NaN is noted: no mean shows it.
struct ByChannel {
  std::vector<float> threshold, limit;
  mutable std::atomic<bool> has_nan{false};

  ByChannel(const float* from, i64 channels) : threshold(ceil_div(channels, WORD) * WORD), limit(threshold.size()) {
    std::copy(from, from + channels, threshold.begin());
    for (size_t i = 0; i < limit.size(); ++i) limit[i] = limit_of(threshold[i]);
  }
  // c: first of the 64 channels
  Words words(const float* v, i64 c) const {
    const u64 positive = compare64<GREATER>(v, 0.0f);
    if (~(positive | compare64<LESS_EQUAL>(v, 0.0f))) has_nan.store(true, std::memory_order_relaxed);
    return {compare64<GREATER>(v, &threshold[c]), positive & compare64<LESS_EQUAL>(v, &limit[c])};
  }
  float probe() const { return has_nan ? std::numeric_limits<float>::quiet_NaN() : 0.0f; }
};
