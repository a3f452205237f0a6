{% include "common.h" %}
// A pointwise program (program.py) over NHWC operands, max-pooled or not, straight to bits: where nobody else reads
// the activation it is never written. One pass, or, where the threshold is the mean of a sample (of all), two over
// each sample, which stays in the cache.
//
// program: {{ text }}

struct Geometry {
{% for field in geometry %}
  i64 {{ field }};
{% endfor %}
};

{% include "program.h" %}
{% include "threshold.h" %}
{% if pooled %}

template <bool WHOLE>
INLINE void after_pool(const Operands& o, i64 c, i64 count, float* __restrict values) {
{% for operand in operands if operand.kind == "channel" %}
  const {{ operand.type }}* __restrict p{{ operand.index }} = o.p{{ operand.index }} + c;
{% endfor %}
  auto one = [&](i64 i) {
{% for operand in operands if operand.kind == "channel" %}
    const float x{{ operand.index }} = load(p{{ operand.index }}[i]);
{% endfor %}
    const float {{ pooled }} = values[i];
{% for line in after %}
    {{ line }}
{% endfor %}
    values[i] = {{ after_result }};
  };
  if (WHOLE)
    for (int i = 0; i < WORD; ++i) one(i);
  else
    for (i64 i = 0; i < count; ++i) one(i);
}
{% endif %}

// A pixel of the result, counted on instead of divided for.
struct Place {
  i64 pixel{{ ", n, oh, ow" if pooled }};

  Place(i64 at, const Geometry& g) : pixel(at){% if pooled %}, n(at / (g.out_h * g.out_w)), oh(at / g.out_w % g.out_h), ow(at % g.out_w){% endif %} { (void)g; }

  void next(const Geometry& g) {
    ++pixel;
{% if pooled %}
    if (++ow < g.out_w) return;
    ow = 0;
    if (++oh == g.out_h) oh = 0, ++n;
{% else %}
    (void)g;
{% endif %}
  }
};

struct Activation {
  Operands o;
  Geometry g;
  i64 pixels() const { return g.batch * g.out_h * g.out_w; }

  // `count` values of one output pixel from channel c on; all 64 are written where count is 64.
  template <bool WHOLE>
  INLINE void run(const Activation& a, const Place& at, i64 c, i64 count, float* out) {
{% if pooled %}
    const Geometry& g = a.g;
    const i64 n = at.n, h = at.oh * g.stride_h - g.padding_h, w = at.ow * g.stride_w - g.padding_w;
    bool first = true;
    for (i64 th = std::max<i64>(0, -h); th < std::min(g.kernel_h, g.in_h - h); ++th)
      for (i64 tw = std::max<i64>(0, -w); tw < std::min(g.kernel_w, g.in_w - w); ++tw) {
        const i64 input = (n * g.in_h + h + th) * g.in_w + w + tw;
        if (first) {
          before_pool<WHOLE>(a.o, {input, 0, 0}, g.channels, c, count, out);
          first = false;
          continue;
        }
        alignas(64) float next[WORD];
        before_pool<WHOLE>(a.o, {input, 0, 0}, g.channels, c, count, next);
        auto larger = [&](i64 i) { out[i] = (next[i] > out[i]) | (next[i] != next[i]) ? next[i] : out[i]; };
        if (WHOLE)
          for (int i = 0; i < WORD; ++i) larger(i);
        else
          for (i64 i = 0; i < count; ++i) larger(i);
      }
    after_pool<WHOLE>(a.o, c, count, out);
{% else %}
    before_pool<WHOLE>(a.o, {at.pixel, 0, 0}, a.g.channels, c, count, out);
{% endif %}
  }

  void evaluate(const Place& at, i64 c, i64 count, float* out) const {
    if (count == WORD) run<true>(*this, at, c, count, out);
    else run<false>(*this, at, c, count, out);
  }

  // Elements begin .. end - 1 of the result in NHWC order.
  void fill(i64 begin, i64 end, float* out) const {
    Place at(begin / g.channels, g);
    for (i64 e = begin, c = begin % g.channels; e < end;) {
      const i64 count = std::min(std::min<i64>(WORD, g.channels - c), end - e);
      evaluate(at, c, count, out + e - begin);
      e += count;
      c += count;
      if (c == g.channels) c = 0, at.next(g);
    }
  }

  // Bits of pixels first <= p < first + count. filled: their values, in order, where they are known; values: where
  // to write all of them, or null.
  template <class Code>
  void pack(i64 first, i64 count, const float* filled, float* values, const Code& code, u64* bits, u64* mask,
            u64* below, i64 threads) const {
    const i64 words = ceil_div(g.channels, WORD);
    parallel_for(count, useful_threads(count * g.channels, threads), [&](i64 i) {
      const i64 p = first + i;
      for (i64 w = 0; w < words; ++w) {
        alignas(64) float v[WORD];
        const i64 c = w * WORD, used_channels = std::min<i64>(WORD, g.channels - c);
        if (used_channels < WORD) std::fill(v, v + WORD, 0.0f);
        const float* value = v;
        if (filled && used_channels == WORD) value = filled + i * g.channels + c;
        else if (filled) std::memcpy(v, filled + i * g.channels + c, used_channels * sizeof(float));
        else evaluate(Place(p, g), c, used_channels, v);
        if (values && !filled) std::memcpy(values + p * g.channels + c, v, used_channels * sizeof(float));
        const u64 used = tail_mask(used_channels);
        const Words made = code.words(value, c);
        bits[p * words + w] = used & made.larger;
        mask[p * words + w] = used & made.inside;
        if (below) below[p * words + w] = used & compare64<LESS_EQUAL>(value, 0.0f);
      }
    });
  }

  // A group of samples with its mean as threshold, which is returned.
  float pack_group(i64 first, i64 count, float* values, u64* bits, u64* mask, u64* below, i64 threads) const {
    static thread_local Buffer scratch, block_sums;
    const i64 size = count * g.channels, blocks = ceil_div(size, BLOCK), offset = first * g.channels;
    float *filled = values ? values + offset : scratch.get<float>(size), *sums = block_sums.get<float>(blocks);
    parallel_for(blocks, useful_threads(size, threads), [&](i64 b) {
      const i64 begin = b * BLOCK, end = std::min(size, begin + BLOCK);
      fill(offset + begin, offset + end, filled + begin);
      sums[b] = lane_sum(end - begin, [&](i64 i) { return filled[begin + i]; });
    });
    const float threshold = mean_of_blocks(sums, blocks, size);
    pack(first, count, filled, nullptr, ByMean{threshold}, bits, mask, below, threads);
    return threshold;
  }
};

// operands: pointers in order; values and below may be null. threshold: of every channel, or null; then the mean of
// each of `groups` groups of samples is used, unless `sign`. probe: 0, or NaN where bits hide that a value is not finite.
EXPORT i64 fused_activation({{ pointers }}const Geometry* geometry, i64 sign, const float* threshold, i64 groups,
                            float* probe, u64* bits, u64* mask, float* values, u64* below, i64 threads) {
  const Activation activation{ {{ operand_values }}, *geometry};
  const i64 pixels = activation.pixels();
  *probe = 0;
  if (sign) activation.pack(0, pixels, nullptr, values, BySign{}, bits, mask, below, threads);
  else if (threshold) {
    const ByChannel code(threshold, activation.g.channels);
    activation.pack(0, pixels, nullptr, values, code, bits, mask, below, threads);
    *probe = code.probe();
  } else {
    const i64 inner = groups ? pixels / groups : 0, useful = useful_threads(pixels * activation.g.channels, threads);
    const bool apart = groups >= useful;  // whole groups in parallel, or each in pieces
    std::vector<float> means(groups);
    parallel_for(groups, apart ? useful : 1, [&](i64 n) {
      means[n] = activation.pack_group(n * inner, inner, values, bits, mask, below, apart ? 1 : useful);
    });
    *probe = probe_of(means.data(), groups);
  }
  return OK;
}
