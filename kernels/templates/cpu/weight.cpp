{% include "common.h" %}
{% include "weight_gradient.h" %}
// Weights [C_o][taps * C_i] to panels, panels to their transpose, and the gradient through the binarization.
//
// Every sum runs in NHWC order (taps outside, channels inside). A weight stored as [C_o][C_i][taps] (`by_tap`
// false) is brought into that order one output channel at a time, in scratch memory that stays in cache.

// `next`: what is read after this channel; on its way from memory meanwhile.
static void pack_channel(const float* w, const float* next, i64 channels, i64 taps, u64* panel) {
  const i64 words = ceil_div(channels, WORD);
  for (i64 t = 0; t < taps; ++t)
    for (i64 k = 0; k < words; ++k) {
      const float* from = w + t * channels + k * WORD;
      const i64 count = channels - k * WORD;
      for (int i = 0; i < WORD; i += 16) __builtin_prefetch(next + t * channels + k * WORD + i);
      float padded[WORD];
      if (count < WORD) {
        std::memcpy(padded, from, count * sizeof(float));
        std::fill(padded + count, padded + WORD, -1.0f);
        from = padded;
      }
      panel[(t * words + k) * PANEL] = compare64<NOT_LESS>(from, 0);
    }
}

// panels [ceil(C_o/16)][taps][C_w][16] and scale[C_o] = mean |w| (xnor) or 1.
EXPORT i64 quantize_weight(const float* weight, i64 out_channels, i64 channels, i64 taps, i64 by_tap, i64 xnor,
                           u64* panels, float* scale, i64 threads) {
  const i64 size = channels * taps, panel_words = taps * ceil_div(channels, WORD) * PANEL;
  parallel_for(ceil_div(out_channels, PANEL), useful_threads(out_channels * size, threads), [&](i64 j) {
    static thread_local Buffer scratch;
    const i64 first = j * PANEL, last = std::min(out_channels, first + PANEL);
    if (last < first + PANEL) std::fill(panels + j * panel_words, panels + (j + 1) * panel_words, 0);
    for (i64 c = first; c < last; ++c) {
      const float* w = nhwc_channel(weight + c * size, channels, taps, by_tap, scratch);
      pack_channel(w, weight + (c + 1) * size, channels, taps, panels + j * panel_words + c % PANEL);
      scale[c] = xnor ? lane_sum(size, [&](i64 i) { return std::fabs(w[i]); }) / float(size) : 1.0f;
    }
  });
  return OK;
}

// panels [ceil(C_o/16)][taps][C_w][16] -> panels_t [ceil(C_i/16)][taps, flipped][Co_w][16]
EXPORT i64 transpose_weight(const u64* panels, i64 out_channels, i64 channels, i64 taps, u64* panels_t, i64 threads) {
  const i64 words = ceil_div(channels, WORD), out_words = ceil_div(out_channels, WORD);
  const i64 from_panels = ceil_div(out_channels, PANEL), to_panels = ceil_div(channels, PANEL);
  constexpr i64 PER_WORD = WORD / PANEL;
  const i64 blocks = taps * words * out_words;
  parallel_for(blocks, useful_threads(blocks * WORD * WORD, threads), [&](i64 block) {
    const i64 out_word = block % out_words, word = block / out_words % words, tap = block / out_words / words;
    alignas(64) u64 bits[WORD] = {};
    for (i64 j = 0; j < PER_WORD && out_word * PER_WORD + j < from_panels; ++j)
      std::memcpy(bits + j * PANEL, panels + (((out_word * PER_WORD + j) * taps + tap) * words + word) * PANEL,
                  PANEL * sizeof(u64));
    transpose64(bits);
    for (i64 j = 0; j < PER_WORD && word * PER_WORD + j < to_panels; ++j)
      std::memcpy(panels_t + (((word * PER_WORD + j) * taps + taps - 1 - tap) * out_words + out_word) * PANEL,
                  bits + j * PANEL, PANEL * sizeof(u64));
  });
  return OK;
}

// alpha sign(W), [C_o][taps][C_i]
EXPORT i64 unpack_weight(const u64* panels, const float* scale, i64 out_channels, i64 channels, i64 taps, float* out,
                         i64 threads) {
  const i64 words = ceil_div(channels, WORD);
  parallel_for(out_channels, useful_threads(out_channels * channels * taps, threads), [&](i64 o) {
    const u64* panel = panels + o / PANEL * taps * words * PANEL + o % PANEL;
    const u32 plus = float_bits(scale[o]), minus = float_bits(-1.0f * scale[o]);
    for (i64 t = 0; t < taps; ++t)
      for (i64 k = 0; k < words; ++k) {
        alignas(64) u32 set[WORD], value[WORD];
        expand64(panel[(t * words + k) * PANEL], set);
        for (int i = 0; i < WORD; ++i) value[i] = (set[i] & plus) | (~set[i] & minus);
        std::memcpy(out + (o * taps + t) * channels + k * WORD, value,
                    std::min<i64>(WORD, channels - k * WORD) * sizeof(float));
      }
  });
  return OK;
}

// grad_hat [C_o][taps][C_i]; weight and grad in the same order, NHWC (`by_tap`) or [C_o][C_i][taps].
EXPORT i64 weight_gradient(const float* grad_hat, const float* weight, const float* scale, i64 out_channels,
                           i64 channels, i64 taps, i64 by_tap, i64 xnor, float* grad, i64 threads) {
  const WeightGradient through{weight, scale, channels, taps, bool(by_tap), bool(xnor)};
  const i64 size = channels * taps;
  parallel_for(out_channels, useful_threads(out_channels * size, threads),
               [&](i64 o) { through.channel(o, grad_hat + o * size, grad); });
  return OK;
}
