{% include "common.h" %}
// A pointwise program (program.py) over NHWC operands to float32 values, and on the way the least and greatest
// value of every row and of every channel, which quantizing them needs first.
//
// program: {{ text }}

{% include "program.h" %}

// low and high of `count` values, or of all 64
template <bool WHOLE>
INLINE void extend(float* __restrict low, float* __restrict high, const float* __restrict v, i64 count) {
  for (i64 i = 0; i < (WHOLE ? WORD : count); ++i) {
    low[i] = nan_min(low[i], v[i]);
    high[i] = nan_max(high[i], v[i]);
  }
}

struct Gradient {
  Operands o;
  i64 batch, inner, channels;
  const float* scale;  // of channels, for the extremes of rows; null: ones
  float* values;

  template <bool WHOLE>
  void block(const Pixel& at, i64 c, i64 count, float* row, float* channel) const {
    float* v = values + at.index * channels + c;
    before_pool<WHOLE>(o, at, channels, c, count, v);
    if (!row) return;
    const i64 padded = ceil_div(channels, WORD) * WORD;
    extend<WHOLE>(channel + c, channel + padded + c, v, count);
    if (!scale) {
      extend<WHOLE>(row, row + WORD, v, count);
      return;
    }
    alignas(64) float scaled[WORD];
    for (i64 i = 0; i < (WHOLE ? WORD : count); ++i) scaled[i] = v[i] * scale[c + i];
    extend<WHOLE>(row, row + WORD, scaled, count);
  }

  // Pixels begin <= p < end of row n. row: [2][64] lanes, channel: [2][padded channels], or both null.
  void run(i64 n, i64 begin, i64 end, float* row, float* channel) const {
    for (i64 p = begin; p < end; ++p)
      for (i64 c = 0; c < channels; c += WORD) {
        const Pixel at{p, n, p - n * inner};
        const i64 count = std::min<i64>(WORD, channels - c);
        if (count == WORD) block<true>(at, c, count, row, channel);
        else block<false>(at, c, count, row, channel);
      }
  }
};

static void clear(float* extremes, i64 count) {
  std::fill(extremes, extremes + count, std::numeric_limits<float>::infinity());
  std::fill(extremes + count, extremes + 2 * count, -std::numeric_limits<float>::infinity());
}

// to[0] and to[stride]: least and greatest, including `count` lanes
static void merge(float* to, i64 stride, const float* lanes, i64 count, i64 distance) {
  for (i64 i = 0; i < count; ++i) {
    to[0] = nan_min(to[0], lanes[i]);
    to[stride] = nan_max(to[stride], lanes[distance + i]);
  }
}

// values [batch][inner][channels]; row_extremes [2][batch] of values * scale and channel_extremes [2][channels] of
// values, or both null. Minimum and maximum are exact in any order, so pieces of pixels are independent.
EXPORT i64 fused_gradient({{ pointers }}i64 batch, i64 inner, i64 channels,
                          const float* scale, float* values, float* row_extremes, float* channel_extremes, i64 threads) {
  const Gradient gradient{ {{ operand_values }}, batch, inner, channels, scale, values};
  const i64 pixels = batch * inner, parts = useful_threads(pixels * channels, threads);
  const i64 padded = ceil_div(channels, WORD) * WORD;
  const bool measured = row_extremes != nullptr;
  std::vector<float> rows(measured ? parts * 2 * batch : 0), columns(measured ? parts * 2 * padded : 0);
  parallel_for(parts, parts, [&](i64 part) {
    const i64 begin = pixels * part / parts, end = pixels * (part + 1) / parts;
    float *row = measured ? rows.data() + part * 2 * batch : nullptr;
    float *column = measured ? columns.data() + part * 2 * padded : nullptr;
    if (measured) clear(row, batch), clear(column, padded);
    for (i64 from = begin; from < end;) {
      const i64 n = from / inner, to = std::min(end, (n + 1) * inner);
      alignas(64) float lanes[2 * WORD];
      if (measured) clear(lanes, WORD);
      gradient.run(n, from, to, measured ? lanes : nullptr, column);
      if (measured) merge(row + n, batch, lanes, WORD, WORD);
      from = to;
    }
  });
  if (!measured) return OK;
  clear(row_extremes, batch), clear(channel_extremes, channels);
  for (i64 part = 0; part < parts; ++part) {
    for (i64 n = 0; n < batch; ++n) merge(row_extremes + n, batch, &rows[part * 2 * batch + n], 1, batch);
    for (i64 c = 0; c < channels; ++c) merge(channel_extremes + c, channels, &columns[part * 2 * padded + c], 1, padded);
  }
  // -0 becomes +0, so that the sign of a zero does not depend on the order of the comparisons.
  for (i64 i = 0; i < 2 * batch; ++i) row_extremes[i] += 0.0f;
  for (i64 i = 0; i < 2 * channels; ++i) channel_extremes[i] += 0.0f;
  return OK;
}
