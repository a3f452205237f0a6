{% include "common.h" %}
// Activations (NHWC, float32) to bits and back. Rows: [pixels][ceil(C / 64)] words, tail bits clear.

// body(word index, 64 floats) for every word of one pixel; channels past the last are 0.
template <class Body>
INLINE void for_words(const float* pixel, i64 channels, Body body) {
  i64 c = 0;
  for (; c + WORD <= channels; c += WORD) body(c / WORD, pixel + c);
  if (c < channels) {
    float padded[WORD] = {};
    std::copy(pixel + c, pixel + channels, padded);
    body(c / WORD, padded);
  }
}

{% include "threshold.h" %}

// Means of `groups` groups of `size` values, one after the other: block sums in float32, added up in float64.
EXPORT i64 activation_threshold(const float* x, i64 groups, i64 size, float* mean, float* probe, i64 threads) {
  const i64 blocks = ceil_div(size, BLOCK);
  std::vector<float> sums(groups * blocks);
  parallel_for(groups * blocks, useful_threads(groups * size, threads), [&](i64 i) {
    const i64 begin = i % blocks * BLOCK;
    const float* block = x + i / blocks * size + begin;
    sums[i] = lane_sum(std::min(BLOCK, size - begin), [&](i64 e) { return block[e]; });
  });
  for (i64 n = 0; n < groups; ++n) mean[n] = mean_of_blocks(sums.data() + n * blocks, blocks, size);
  *probe = probe_of(mean, groups);
  return OK;
}

template <class Code>
static void pack_pixels(const float* x, i64 first, i64 pixels, i64 channels, const Code& code, u64* bits, u64* mask,
                        i64 threads) {
  const i64 words = ceil_div(channels, WORD);
  parallel_for(pixels, useful_threads(pixels * channels, threads), [&](i64 i) {
    const i64 p = first + i;
    for_words(x + p * channels, channels, [&](i64 w, const float* v) {
      const u64 used = tail_mask(channels - w * WORD);
      const Words made = code.words(v, w * WORD);
      bits[p * words + w] = made.larger & used;
      mask[p * words + w] = made.inside & used;
    });
  });
}

// threshold: null for the sign code, one of every channel (`by_channel`), or one of each of `groups` groups of samples
EXPORT i64 pack_activation(const float* x, i64 pixels, i64 channels, const float* threshold, i64 by_channel, i64 groups,
                           u64* bits, u64* mask, i64 threads) {
  if (!threshold) pack_pixels(x, 0, pixels, channels, BySign{}, bits, mask, threads);
  else if (by_channel) pack_pixels(x, 0, pixels, channels, ByChannel(threshold, channels), bits, mask, threads);
  else if (groups == 1) pack_pixels(x, 0, pixels, channels, ByMean{threshold[0]}, bits, mask, threads);
  else {
    const i64 inner = groups ? pixels / groups : 0;
    parallel_for(groups, useful_threads(pixels * channels, threads), [&](i64 n) {
      pack_pixels(x, n * inner, inner, channels, ByMean{threshold[n]}, bits, mask, 1);
    });
  }
  return OK;
}

// Bits to the code values: a clear bit is -1 (sign) or 0, a set bit 1.
EXPORT i64 unpack_activation(const u64* bits, i64 pixels, i64 channels, i64 sign, float* x, i64 threads) {
  const i64 words = ceil_div(channels, WORD);
  const u32 one = float_bits(1.0f), clear = sign ? float_bits(-1.0f) : 0;
  parallel_for(pixels, useful_threads(pixels * channels, threads), [&](i64 p) {
    for (i64 w = 0; w < words; ++w) {
      alignas(64) u32 set[WORD], value[WORD];
      expand64(bits[p * words + w], set);
      for (int i = 0; i < WORD; ++i) value[i] = (set[i] & one) | (~set[i] & clear);
      std::memcpy(x + p * channels + w * WORD, value, std::min<i64>(WORD, channels - w * WORD) * sizeof(float));
    }
  });
  return OK;
}

template <class Element>
static void mask_pixels(const Element* g, const u64* mask, i64 pixels, i64 channels, Element* out, i64 threads) {
  const i64 words = ceil_div(channels, WORD);
  parallel_for(pixels, useful_threads(pixels * channels, threads), [&](i64 p) {
    for (i64 w = 0; w < words; ++w) {
      alignas(64) u32 set[WORD];
      expand64(mask[p * words + w], set);
      const i64 begin = p * channels + w * WORD, count = std::min<i64>(WORD, channels - w * WORD);
      const Element* from = g + begin;
      Element* to = out + begin;
      if (count == WORD)
        for (int i = 0; i < WORD; ++i) to[i] = Element(i32(set[i])) & from[i];
      else
        for (i64 i = 0; i < count; ++i) to[i] = Element(i32(set[i])) & from[i];
    }
  });
}

// g or +0 by the mask bits; works on the bytes of any 2, 4 or 8 byte floating type.
EXPORT i64 apply_mask(const void* g, i64 bytes, const u64* mask, i64 pixels, i64 channels, void* out, i64 threads) {
  if (bytes == 2) mask_pixels((const uint16_t*)g, mask, pixels, channels, (uint16_t*)out, threads);
  else if (bytes == 4) mask_pixels((const u32*)g, mask, pixels, channels, (u32*)out, threads);
  else mask_pixels((const u64*)g, mask, pixels, channels, (u64*)out, threads);
  return OK;
}

// out [row_count][bytes]: rows of x [samples][bytes], zero where the index is negative.
EXPORT i64 gather_rows(const char* x, i64 samples, i64 bytes, const i32* rows, i64 row_count, char* out, i64 threads) {
  if (std::any_of(rows, rows + row_count, [=](i32 row) { return row >= samples; })) return BAD_INDEX;
  parallel_for(row_count, useful_threads(row_count * bytes, threads), [=](i64 k) {
    if (rows[k] < 0) std::memset(out + k * bytes, 0, bytes);
    else std::memcpy(out + k * bytes, x + rows[k] * bytes, bytes);
  });
  return OK;
}
