{% include "common.h" %}
// Integer products and bit planes back to float32: s float(acc) + z float(sum), without fused multiply-add.

// kept[n] = k where rows[k] = n, else -1
static std::vector<i64> positions_of(const i32* rows, i64 used, i64 size) {
  std::vector<i64> kept(size, -1);
  for (i64 k = 0; k < used; ++k) kept[rows[k]] = k;
  return kept;
}

// out [samples][inner][channels]: masked values of kept rows, zero for the others; compact: [row_count][inner][channels].
EXPORT i64 dequantize_grad_input(const i32* acc, const i32* weight_sum, const float* scale, const float* zero,
                                 const i32* rows, i64 row_count, const u64* mask, i64 samples, i64 inner, i64 channels,
                                 i64 compact, float* out, i64 threads) {
  const i64 used = used_count(rows, row_count, samples), outputs = compact ? row_count : samples;
  if (used < 0) return BAD_INDEX;
  const std::vector<i64> kept = positions_of(rows, used, samples);
  const i64 words = ceil_div(channels, WORD), size = inner * channels;
  parallel_for(outputs * inner, useful_threads(outputs * size, threads), [&](i64 p) {
    const i64 k = compact ? (p / inner < used ? p / inner : -1) : kept[p / inner], s = p % inner;
    float* to = out + p * channels;
    if (k < 0) {
      std::memset(to, 0, channels * sizeof(float));
      return;
    }
    const i32 *a = acc + k * size + s * channels, *sum = weight_sum + s * channels;
    for (i64 w = 0; w < words; ++w) {
      alignas(64) u32 set[WORD];
      expand64(mask[(rows[k] * inner + s) * words + w], set);
      const i64 c = w * WORD, count = std::min<i64>(WORD, channels - c);
      auto value = [&](i64 i) {
        const float x = scale[k] * float(a[c + i]) + zero[k] * float(sum[c + i]);
        return bits_float(float_bits(x) & set[i]);
      };
      if (count == WORD)
        for (int i = 0; i < WORD; ++i) to[c + i] = value(i);
      else
        for (i64 i = 0; i < count; ++i) to[c + i] = value(i);
    }
  });
  return OK;
}

// out [out_channels][size]: values of kept channels, zero for the others; channels null: all of them.
EXPORT i64 dequantize_grad_weight(const i32* acc, const i32* code_sum, const float* scale, const float* zero,
                                  const i32* channels, i64 width, i64 out_channels, i64 size, float* out,
                                  i64 threads) {
  std::vector<i64> kept(out_channels);
  for (i64 c = 0; c < out_channels; ++c) kept[c] = c;
  if (channels) {
    const i64 used = used_count(channels, width, out_channels);
    if (used < 0) return BAD_INDEX;
    kept = positions_of(channels, used, out_channels);
  }
  parallel_for(out_channels, useful_threads(out_channels * size, threads), [&](i64 o) {
    float* to = out + o * size;
    const i64 k = kept[o];
    if (k < 0) {
      std::memset(to, 0, size * sizeof(float));
      return;
    }
    const float s = scale[k], z = zero[k];
    for (i64 i = 0; i < size; ++i) to[i] = s * float(acc[k * size + i]) + z * float(code_sum[i]);
  });
  return OK;
}

// planes [bits][row_count][inner][words] -> out [samples][inner][channels], zero for rows not kept.
EXPORT i64 dequantize_rows(const u64* planes, i64 bits, const float* scale, const float* zero, const i32* rows,
                           i64 row_count, i64 samples, i64 inner, i64 channels, float* out, i64 threads) {
  const i64 used = used_count(rows, row_count, samples);
  if (used < 0) return BAD_INDEX;
  const std::vector<i64> kept = positions_of(rows, used, samples);
  const i64 words = ceil_div(channels, WORD), plane_stride = row_count * inner * words;
  parallel_for(samples * inner, useful_threads(samples * inner * channels, threads), [&](i64 p) {
    const i64 k = kept[p / inner];
    float* to = out + p * channels;
    if (k < 0) {
      std::memset(to, 0, channels * sizeof(float));
      return;
    }
    for (i64 w = 0; w < words; ++w) {
      alignas(64) u32 codes[WORD] = {};
      alignas(64) float value[WORD];
      for (int q = 0; q < bits; ++q) {
        alignas(64) u32 set[WORD];
        expand64(planes[q * plane_stride + (k * inner + p % inner) * words + w], set);
        for (int i = 0; i < WORD; ++i) codes[i] |= set[i] & (u32(1) << q);
      }
      for (int i = 0; i < WORD; ++i) value[i] = scale[k] * float(i32(codes[i])) + zero[k];
      std::memcpy(to + w * WORD, value, std::min<i64>(WORD, channels - w * WORD) * sizeof(float));
    }
  });
  return OK;
}
