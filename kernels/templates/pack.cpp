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

// Block sums in float32, added up in float64: the mean of n values.
EXPORT i64 activation_threshold(const float* x, i64 n, float* mean, i64 threads) {
  std::vector<float> sums(ceil_div(n, BLOCK));
  parallel_for(i64(sums.size()), useful_threads(n, threads), [&](i64 b) {
    const float* block = x + b * BLOCK;
    sums[b] = lane_sum(std::min(BLOCK, n - b * BLOCK), [&](i64 i) { return block[i]; });
  });
  double total = 0;
  for (float sum : sums) total += sum;
  *mean = n ? float(total / double(n)) : 0.0f;
  return OK;
}

template <bool SIGN>
static void pack_pixels(const float* x, i64 pixels, i64 channels, float threshold, u64* bits, u64* mask, i64 threads) {
  const i64 words = ceil_div(channels, WORD);
  const float limit = 2 * (threshold < 0.5f ? 0.5f : threshold);
  parallel_for(pixels, useful_threads(pixels * channels, threads), [&](i64 p) {
    for_words(x + p * channels, channels, [&](i64 w, const float* v) {
      const u64 used = tail_mask(channels - w * WORD);
      const u64 larger = SIGN ? compare64<NOT_LESS>(v, 0) : compare64<GREATER>(v, threshold);
      const u64 inside =
          SIGN ? compare64<ABS_LESS_EQUAL>(v, 1) : compare64<GREATER>(v, 0) & compare64<LESS_EQUAL>(v, limit);
      bits[p * words + w] = larger & used;
      mask[p * words + w] = inside & used;
    });
  });
}

// threshold: null for the sign code
EXPORT i64 pack_activation(const float* x, i64 pixels, i64 channels, const float* threshold, u64* bits, u64* mask,
                           i64 threads) {
  if (threshold) pack_pixels<false>(x, pixels, channels, *threshold, bits, mask, threads);
  else pack_pixels<true>(x, pixels, channels, 0, bits, mask, threads);
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
