// The gradient through W_hat = alpha sign(W), one output channel at a time (reference.weight_gradient).

// One output channel, [C_i][taps] to [taps][C_i] (TO_TAPS) or back; 8 channels at a time, so that both stay in L1.
template <bool TO_TAPS>
static void reorder(const float* __restrict from, i64 channels, i64 taps, float* __restrict to) {
  constexpr int SIDE = 8;
  typedef float Eight __attribute__((vector_size(4 * SIDE)));
  typedef i32 Lanes __attribute__((vector_size(4 * SIDE)));
  for (i64 c = 0; c < channels; c += SIDE) {
    i64 t = 0;
    for (; c + SIDE <= channels && t + SIDE <= taps; t += SIDE) {
      Eight block[SIDE];
      for (int i = 0; i < SIDE; ++i)
        std::memcpy(&block[i], from + (TO_TAPS ? (c + i) * taps + t : (t + i) * channels + c), sizeof(Eight));
      transpose_vectors<Eight, Lanes, SIDE>(block);
      for (int i = 0; i < SIDE; ++i)
        std::memcpy(to + (TO_TAPS ? (t + i) * channels + c : (c + i) * taps + t), &block[i], sizeof(Eight));
    }
    for (; t < taps; ++t)
      for (i64 i = c; i < std::min(channels, c + SIDE); ++i) {
        if (TO_TAPS) to[t * channels + i] = from[i * taps + t];
        else to[i * taps + t] = from[t * channels + i];
      }
  }
}

// The values of one output channel in NHWC order, in `scratch` unless they already are.
static const float* nhwc_channel(const float* from, i64 channels, i64 taps, bool by_tap, Buffer& scratch) {
  if (by_tap) return from;
  float* to = scratch.get<float>(channels * taps);
  reorder<true>(from, channels, taps, to);
  return to;
}

INLINE float times_sign(float g, float w) { return w < 0 ? -g : g; }

// alpha [|W| <= 1] grad_hat, plus sign(W) mean(grad_hat sign(W)) for xnor, of n values
template <bool XNOR>
static void channel_gradient(const float* __restrict grad_hat, const float* __restrict w, i64 n, float scale,
                             float* __restrict grad) {
  float mean = 0;
  if (XNOR) mean = lane_sum(n, [&](i64 i) { return times_sign(grad_hat[i], w[i]); }) / float(n);
  for (i64 i = 0; i < n; ++i) {
    const float scaled = scale * grad_hat[i], passed = std::fabs(w[i]) <= 1 ? scaled : 0.0f;
    grad[i] = XNOR ? passed + times_sign(mean, w[i]) : passed;
  }
}

// grad of the weight from grad_hat, [taps][C_i] of a channel; weight and grad in the same order, NHWC (`by_tap`) or
// [C_o][C_i][taps].
struct WeightGradient {
  const float *weight, *scale;
  i64 channels, taps;
  bool by_tap, xnor;

  void channel(i64 o, const float* grad_hat, float* grad) const {
    static thread_local Buffer scratch, result;
    const i64 size = channels * taps;
    const float* w = nhwc_channel(weight + o * size, channels, taps, by_tap, scratch);
    float* to = by_tap ? grad + o * size : result.get<float>(size);
    if (xnor) channel_gradient<true>(grad_hat, w, size, scale[o], to);
    else channel_gradient<false>(grad_hat, w, size, scale[o], to);
    if (!by_tap) reorder<false>(to, channels, taps, grad + o * size);
  }
};
