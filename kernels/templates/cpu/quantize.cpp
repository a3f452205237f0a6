{% include "common.h" %}
// Gradients [N][S][C] (NHWC, float32): importance of rows and channels, and stochastic rounding to bit planes.
//
//     q = floor((v - center) inverse + u) + level, with the groups of reference.make_groups

enum Kind { NORM, RANGE, UNIFORM };

// Smallest and largest value of 64 interleaved lanes.
struct Extremes {
  alignas(64) float low[WORD], high[WORD];
  Extremes() {
    std::fill(low, low + WORD, std::numeric_limits<float>::infinity());
    std::fill(high, high + WORD, -std::numeric_limits<float>::infinity());
  }
  float least() const {
    float x = low[0];
    for (int i = 1; i < WORD; ++i) x = nan_min(x, low[i]);
    return x;
  }
  float greatest() const {
    float x = high[0];
    for (int i = 1; i < WORD; ++i) x = nan_max(x, high[i]);
    return x;
  }
};

// Include v * factor, 64 or fewer values.
INLINE void extend(float* low, float* high, const float* v, const float* factor, i64 count) {
  if (count >= WORD) {
    for (int i = 0; i < WORD; ++i) {
      const float x = v[i] * factor[i];
      low[i] = nan_min(low[i], x);
      high[i] = nan_max(high[i], x);
    }
    return;
  }
  for (i64 i = 0; i < count; ++i) {
    const float x = v[i] * factor[i];
    low[i] = nan_min(low[i], x);
    high[i] = nan_max(high[i], x);
  }
}

struct Group {
  float center, inverse, level, scale;
};

INLINE Group make_group(float low, float high, i64 bits, bool grid) {
  const float top = float((1 << bits) - 1), lo = low < 0 ? low : 0.0f, hi = high > 0 ? high : 0.0f;
  if (!(high - low < std::numeric_limits<float>::infinity()))
    return {0, 0, 0, std::numeric_limits<float>::quiet_NaN()};
  const bool both = lo < 0 && hi > 0;
  float center = 0, level = 0, scale;
  if (!grid || (bits == 1 && both)) {
    center = low + 0.0f;  // -0 becomes +0
    scale = (high + 0.0f - center) / top;
  } else {
    const float spread = hi - lo;
    if (spread > 0) level = std::floor((0.0f - lo) / spread * top + 0.5f);
    if (both) level = std::min(std::max(level, 1.0f), top - 1);
    const float left = level > 0 ? (0.0f - lo) / level : 0.0f, right = level < top ? hi / (top - level) : 0.0f;
    scale = left > right ? left : right;
  }
  if (!(scale >= std::numeric_limits<float>::min())) return {center, 0, 0, 0};
  return {center, 1 / scale, level, scale};
}

// Parameters of 64 neighbouring elements.
struct Lanes64 {
  alignas(64) float center[WORD], inverse[WORD], level[WORD];
  alignas(64) u32 offset[WORD];  // of the element in NHWC order, relative to its pixel
};

// Sums over the elements of 64 groups: values in steps, and codes.
struct Sums64 {
  alignas(64) float steps[WORD];
  alignas(64) i32 codes[WORD];
};

// Codes of 64 elements as bytes; a NaN has code 0. SUM: adds the values in steps to `steps`.
template <bool SUM>
INLINE void quantize64(const float* v, const float* factor, const Lanes64& lanes, u32 index, Keys keys, float top,
                       u8* codes, float* __restrict steps) {
  alignas(64) i32 wide[WORD];
  for (int i = 0; i < WORD; ++i) {
    const float noise = uniform(index + lanes.offset[i], keys);
    const float step = (v[i] * factor[i] - lanes.center[i]) * lanes.inverse[i];
    float code = std::floor(step + noise) + lanes.level[i];
    code = code > 0 ? code : 0.0f;
    code = code < top ? code : top;
    wide[i] = i32(code);
    if (SUM) steps[i] += step;
  }
  for (int i = 0; i < WORD; ++i) codes[i] = u8(wide[i]);
}

// 64 values, or fewer followed by zeros in `padded`.
INLINE const float* block64(const float* v, i64 count, float* padded) {
  if (count >= WORD) return v;
  std::memset(padded, 0, WORD * sizeof(float));
  std::memcpy(padded, v, count * sizeof(float));
  return padded;
}

// -- importance ----------------------------------------------------------------------------------------------

EXPORT i64 row_importance(const float* g, i64 rows, i64 size, i64 kind, float* importance, i64 threads) {
  static const std::vector<float> ones(WORD, 1.0f);
  parallel_for(rows, useful_threads(rows * size, threads), [&](i64 n) {
    const float* v = g + n * size;
    if (kind == NORM) {
      importance[n] = std::sqrt(lane_sum(size, [&](i64 i) { return v[i] * v[i]; }));
      return;
    }
    Extremes e;
    for (i64 i = 0; i < size; i += WORD) extend(e.low, e.high, v + i, ones.data(), size - i);
    importance[n] = e.greatest() - e.least();
  });
  return OK;
}

// The kept rows of a gradient, [used][S][C]; compact: g holds no others.
struct Kept {
  const float *g, *row_scale;
  const i32* rows;
  i64 used, inner, channels;
  bool compact;
  i64 positions() const { return used * inner; }
  // Of a position: its place in the whole gradient, which its noise is drawn for, and its values.
  i64 place(i64 m) const { return (rows[m / inner] * inner + m % inner) * channels; }
  const float* pixel(i64 m) const { return g + (compact ? m * channels : place(m)); }
  float factor(i64 m) const { return row_scale ? row_scale[m / inner] : 1.0f; }
};

// Per channel, over the kept rows: L2 norm, its squares lane-summed along positions.
static void channel_norms(const Kept& kept, i64 first, float* importance) {
  const i64 count = std::min<i64>(WORD, kept.channels - first);
  std::vector<float> lane(LANES * WORD);
  for (i64 m = 0; m < kept.positions(); ++m) {
    const float *v = kept.pixel(m) + first, factor = kept.factor(m);
    float* to = &lane[m % LANES * WORD];
    for (i64 i = 0; i < count; ++i) {
      const float x = v[i] * factor;
      to[i] += x * x;
    }
  }
  for (int half = LANES / 2; half >= 1; half /= 2)
    for (int i = 0; i < half * WORD; ++i) lane[i] += lane[half * WORD + i];
  for (i64 i = 0; i < count; ++i) importance[first + i] = std::sqrt(lane[i]);
}

// Least and greatest value of 64 channels over the kept rows begin <= m < end.
static void channel_extremes(const Kept& kept, i64 first, i64 begin, i64 end, Extremes& e) {
  const i64 count = std::min<i64>(WORD, kept.channels - first);
  alignas(64) float factor[WORD];
  for (i64 m = begin; m < end; ++m) {
    if (m == begin || m % kept.inner == 0) std::fill(factor, factor + WORD, kept.factor(m));
    extend(e.low, e.high, kept.pixel(m) + first, factor, count);
  }
}

// samples: rows of the whole gradient, where g holds them; a compact one has no bound to check indices against.
static Kept keep_rows(const float* g, i64 samples, i64 inner, i64 channels, bool compact, const i32* rows, i64 count,
                      const float* row_scale) {
  const i64 bound = compact ? std::numeric_limits<i32>::max() : samples;
  return {g, row_scale, rows, used_count(rows, count, bound), inner, channels, compact};
}

// Least and greatest value of every channel: pieces of the positions in parallel, then merged (any order is exact).
static void all_extremes(const Kept& kept, i64 threads, float* low, float* high) {
  const i64 blocks = ceil_div(kept.channels, WORD), positions = kept.positions();
  const i64 parts = useful_threads(positions * kept.channels, threads);
  std::vector<Extremes> found(parts * blocks);
  parallel_for(parts, parts, [&](i64 part) {
    for (i64 b = 0; b < blocks; ++b)
      channel_extremes(kept, b * WORD, positions * part / parts, positions * (part + 1) / parts,
                       found[part * blocks + b]);
  });
  for (i64 c = 0; c < kept.channels; ++c) {
    low[c] = found[c / WORD].low[c % WORD];
    high[c] = found[c / WORD].high[c % WORD];
    for (i64 part = 1; part < parts; ++part) {
      low[c] = nan_min(low[c], found[part * blocks + c / WORD].low[c % WORD]);
      high[c] = nan_max(high[c], found[part * blocks + c / WORD].high[c % WORD]);
    }
  }
}

EXPORT i64 channel_importance(const float* g, i64 samples, i64 inner, i64 channels, const i32* rows, i64 row_count,
                              const float* row_scale, i64 kind, float* importance, i64 threads) {
  const Kept kept = keep_rows(g, samples, inner, channels, false, rows, row_count, row_scale);
  if (kept.used < 0) return BAD_INDEX;
  if (kind == UNIFORM || kept.positions() == 0) {
    std::fill(importance, importance + channels, 1.0f);
    return OK;
  }
  threads = useful_threads(kept.positions() * channels, threads);
  if (kind == NORM) {
    parallel_for(ceil_div(channels, WORD), threads, [&](i64 b) { channel_norms(kept, b * WORD, importance); });
    return OK;
  }
  std::vector<float> low(channels), high(channels);
  all_extremes(kept, threads, low.data(), high.data());
  for (i64 c = 0; c < channels; ++c) importance[c] = high[c] - low[c];
  return OK;
}

// -- grad_input: one group per kept row ----------------------------------------------------------------------

struct RowQuantizer {
  const float *g, *channel_scale;  // channel_scale: alpha, or null
  i64 inner, channels, bits, words;
  bool grid;
  Keys keys;
  std::vector<float> factor;  // alpha, or ones; padded to whole words

  void prepare() {
    words = ceil_div(channels, WORD);
    factor.assign(words * WORD, 1.0f);
    if (channel_scale) std::copy(channel_scale, channel_scale + channels, factor.begin());
  }

  Group measure(const float* row) const {
    Extremes e;
    for (i64 s = 0; s < inner; ++s)
      for (i64 c = 0; c < channels; c += WORD)
        extend(e.low, e.high, row + s * channels + c, &factor[c], channels - c);
    return make_group(e.least(), e.greatest(), bits, grid);
  }

  // planes of one row, [bits] at distance plane_stride, each [inner][words]; place: of the row in the whole gradient
  void run(const float* row, Group group, i64 place, u64* planes, i64 plane_stride) const {
    const float top = float((1 << bits) - 1);
    Lanes64 lanes;
    std::fill(lanes.center, lanes.center + WORD, group.center);
    std::fill(lanes.inverse, lanes.inverse + WORD, group.inverse);
    std::fill(lanes.level, lanes.level + WORD, group.level);
    for (int i = 0; i < WORD; ++i) lanes.offset[i] = u32(i);
    for (i64 s = 0; s < inner; ++s)
      for (i64 w = 0; w < words; ++w) {
        alignas(64) float padded[WORD];
        alignas(64) u8 codes[WORD];
        const i64 count = channels - w * WORD, begin = s * channels + w * WORD;
        const u64 used = tail_mask(count);
        quantize64<false>(block64(row + begin, count, padded), &factor[w * WORD], lanes,
                          u32(place * inner * channels + begin), keys, top, codes, nullptr);
        for (int p = 0; p < bits; ++p) planes[p * plane_stride + s * words + w] = plane_of_bytes(codes, p) & used;
      }
  }
};

// extremes: [2][samples], or null, as everywhere below
EXPORT i64 quantize_rows(const float* g, i64 samples, i64 inner, i64 channels, i64 compact, const float* channel_scale,
                         const i32* rows, i64 row_count, const float* row_scale, i64 k0, i64 k1, i64 bits, i64 grid,
                         const float* extremes, u64* planes, float* scale, float* zero, i64 threads) {
  const i64 used = keep_rows(g, samples, inner, channels, compact, rows, row_count, row_scale).used;
  if (used < 0) return BAD_INDEX;
  RowQuantizer quantizer{g, channel_scale, inner, channels, bits, 0, bool(grid), {u32(k0), u32(k1)}, {}};
  quantizer.prepare();
  const i64 row_words = inner * quantizer.words, plane_stride = row_count * row_words;
  parallel_for(row_count, useful_threads(row_count * inner * channels, threads), [&](i64 k) {
    scale[k] = zero[k] = 0;
    if (k < used && row_words) {
      const i64 n = compact ? k : rows[k];
      const float* row = g + n * inner * channels;
      const Group group = extremes ? make_group(extremes[n], extremes[samples + n], bits, grid) : quantizer.measure(row);
      quantizer.run(row, group, rows[k], planes + k * row_words, plane_stride);
      const float factor = row_scale ? row_scale[k] : 1.0f;
      scale[k] = group.scale * factor;
      zero[k] = group.center * factor - scale[k] * group.level;
    } else
      for (int p = 0; p < bits; ++p) {
        u64* row = planes + p * plane_stride + k * row_words;
        std::fill(row, row + row_words, 0);
      }
  });
  return OK;
}

// -- grad_weight: one group per output channel ---------------------------------------------------------------

struct ChannelQuantizer {
  Kept kept;
  const i32* chosen;  // kept channels, or null for all
  i64 used, bits;     // channels that have a group
  bool grid;
  Keys keys;
  std::vector<Lanes64> blocks;  // of 64 channels
  Sums64* sums;                 // [words][blocks], of one word of positions each

  i64 channel(i64 c) const { return chosen ? chosen[c] : c; }

  void prepare(i64 threads, const float* extremes, float* scale) {
    std::vector<float> found(extremes ? 0 : 2 * kept.channels);
    if (!extremes) all_extremes(kept, threads, found.data(), found.data() + kept.channels);
    const float *low = extremes ? extremes : found.data(), *high = low + kept.channels;
    blocks.resize(ceil_div(used, WORD));
    std::memset(static_cast<void*>(blocks.data()), 0, blocks.size() * sizeof(Lanes64));
    for (i64 c = 0; c < used; ++c) {
      const Group group = make_group(low[channel(c)], high[channel(c)], bits, grid);
      Lanes64& block = blocks[c / WORD];
      block.center[c % WORD] = group.center;
      block.inverse[c % WORD] = group.inverse;
      block.level[c % WORD] = group.level;
      block.offset[c % WORD] = u32(channel(c));
      scale[c] = group.scale;
    }
  }

  // The values of one block of channels at one position; channels past the last are 0.
  const float* values(const float* pixel, i64 block, float* padded) const {
    const i64 first = block * WORD, count = std::min<i64>(WORD, used - first);
    if (!chosen) return block64(pixel + first, count, padded);
    std::memset(padded, 0, WORD * sizeof(float));
    for (i64 i = 0; i < count; ++i) padded[i] = pixel[chosen[first + i]];
    return padded;
  }

  // Bits of 64 positions x 64 channels: words of channels first, then transposed to words of positions.
  void run(i64 word, i64 block, u64 (*planes)[WORD]) const {
    const Lanes64& lanes = blocks[block];
    alignas(64) float factor[WORD];
    const i64 first = word * WORD, count = std::min<i64>(WORD, kept.positions() - first);
    const float top = float((1 << bits) - 1);
    const u64 used_channels = tail_mask(used - block * WORD);
    Sums64* sum = sums + word * i64(blocks.size()) + block;
    if (grid) std::fill(sum->steps, sum->steps + WORD, 0.0f);
    for (i64 i = 0; i < count; ++i) {
      const i64 m = first + i;
      if (i == 0 || m % kept.inner == 0) std::fill(factor, factor + WORD, kept.factor(m));
      alignas(64) float padded[WORD];
      alignas(64) u8 codes[WORD];
      const float* pixel = kept.pixel(m);
      const float* v = values(pixel, block, padded);
      if (grid) quantize64<true>(v, factor, lanes, u32(kept.place(m)), keys, top, codes, sum->steps);
      else quantize64<false>(v, factor, lanes, u32(kept.place(m)), keys, top, codes, nullptr);
      for (int p = 0; p < bits; ++p) planes[p][i] = plane_of_bytes(codes, p) & used_channels;
    }
    for (int p = 0; p < bits; ++p) {
      std::fill(planes[p] + std::max<i64>(count, 0), planes[p] + WORD, 0);
      transpose64(planes[p]);
    }
    for (int c = 0; grid && c < WORD; ++c) {
      sum->codes[c] = 0;
      for (int p = 0; p < bits; ++p) sum->codes[c] += i32(__builtin_popcountll(planes[p][c])) << p;
    }
  }

  // zero: reference.exact_zero_point of every group of the block, or its center
  void zero_points(i64 block, const float* scale, float* zero) const {
    double steps[WORD] = {};
    i64 codes[WORD] = {};
    for (i64 word = 0; grid && word < ceil_div(kept.positions(), WORD); ++word) {
      const Sums64& sum = sums[word * i64(blocks.size()) + block];
      for (int i = 0; i < WORD; ++i) steps[i] += double(sum.steps[i]), codes[i] += sum.codes[i];
    }
    for (i64 i = 0; i < std::min<i64>(WORD, used - block * WORD); ++i) {
      const double rest = steps[i] - double(codes[i]), count = double(kept.positions());
      zero[i] = grid ? float(double(blocks[block].center[i]) + double(scale[i]) * (rest / count))
                     : blocks[block].center[i];
    }
  }
};

// lanes [bits][ceil(channels/8)][W][8], of `width` channels; the words of unused rows and channels are clear.
EXPORT i64 quantize_channels(const float* g, i64 samples, i64 inner, i64 channels, i64 compact, const i32* rows,
                             i64 row_count, const float* row_scale, const i32* chosen, i64 width, const float* channel_scale, i64 k0,
                             i64 k1, i64 bits, i64 grid, const float* extremes, u64* out, float* scale, float* zero, i64 threads) {
  static thread_local Buffer sums;
  ChannelQuantizer quantizer{keep_rows(g, samples, inner, channels, compact, rows, row_count, row_scale), chosen, width,
                             bits, bool(grid), {u32(k0), u32(k1)}, {}, nullptr};
  if (chosen) quantizer.used = used_count(chosen, width, channels);
  if (quantizer.kept.used < 0 || quantizer.used < 0) return BAD_INDEX;
  std::fill(scale, scale + width, 0.0f);
  std::fill(zero, zero + width, 0.0f);
  const i64 words = ceil_div(row_count * inner, WORD), tiles = ceil_div(width, LANE_TILE);
  if (quantizer.kept.positions() == 0 || quantizer.used == 0) {
    std::fill(out, out + bits * tiles * words * LANE_TILE, 0);
    return OK;
  }
  quantizer.prepare(threads, extremes, scale);
  quantizer.sums = sums.get<Sums64>(grid ? words * i64(quantizer.blocks.size()) : 0);
  const i64 blocks = ceil_div(width, WORD);
  parallel_for(words, useful_threads(row_count * inner * width, threads), [&](i64 word) {
    alignas(64) u64 planes[8][WORD];
    for (i64 block = 0; block < blocks; ++block) {
      const bool filled = block < i64(quantizer.blocks.size());
      if (filled) quantizer.run(word, block, planes);
      else std::memset(planes, 0, sizeof planes);
      for (int p = 0; p < bits; ++p)
        for (i64 t = block * (WORD / LANE_TILE); t < std::min(tiles, (block + 1) * (WORD / LANE_TILE)); ++t)
          std::memcpy(out + ((p * tiles + t) * words + word) * LANE_TILE,
                      planes[p] + t % (WORD / LANE_TILE) * LANE_TILE, LANE_TILE * sizeof(u64));
    }
  });
  for (i64 block = 0; block < i64(quantizer.blocks.size()); ++block)
    quantizer.zero_points(block, scale + block * WORD, zero + block * WORD);
  if (channel_scale)
    for (i64 c = 0; c < quantizer.used; ++c) scale[c] *= channel_scale[c], zero[c] *= channel_scale[c];
  return OK;
}
