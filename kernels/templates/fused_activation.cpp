{% include "common.h" %}
// A pointwise program (program.py) over NHWC operands, max-pooled or not, straight to bits: where nobody else reads
// the activation it is never written. Two passes, because the threshold is the mean of all values.
//
// program: {{ text }}

struct Geometry {
{% for field in geometry %}
  i64 {{ field }};
{% endfor %}
};

{% include "program.h" %}
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

  // reference.activation_threshold of the result, which is kept in `values` unless null.
  float mean(float* values, i64 threads) const {
    const i64 size = pixels() * g.channels;
    std::vector<float> sums(ceil_div(size, BLOCK));
    parallel_for(i64(sums.size()), useful_threads(size, threads), [&](i64 b) {
      alignas(64) float scratch[BLOCK];
      const i64 begin = b * BLOCK, end = std::min(size, begin + BLOCK);
      float* block = values ? values + begin : scratch;
      fill(begin, end, block);
      sums[b] = lane_sum(end - begin, [&](i64 i) { return block[i]; });
    });
    double total = 0;
    for (float sum : sums) total += sum;
    return size ? float(total / double(size)) : 0.0f;
  }

  template <bool SIGN>
  void pack(float threshold, float* values, bool filled, u64* bits, u64* mask, u64* below, i64 threads) const {
    const i64 words = ceil_div(g.channels, WORD);
    const float limit = 2 * (threshold < 0.5f ? 0.5f : threshold);
    parallel_for(pixels(), useful_threads(pixels() * g.channels, threads), [&](i64 p) {
      for (i64 w = 0; w < words; ++w) {
        alignas(64) float v[WORD];
        const i64 c = w * WORD, count = std::min<i64>(WORD, g.channels - c);
        if (count < WORD) std::fill(v, v + WORD, 0.0f);
        const float* value = v;
        if (filled && count == WORD) value = values + p * g.channels + c;
        else if (filled) std::memcpy(v, values + p * g.channels + c, count * sizeof(float));
        else evaluate(Place(p, g), c, count, v);
        if (values && !filled) std::memcpy(values + p * g.channels + c, v, count * sizeof(float));
        const u64 used = tail_mask(count);
        bits[p * words + w] = used & (SIGN ? compare64<NOT_LESS>(value, 0) : compare64<GREATER>(value, threshold));
        mask[p * words + w] = used & (SIGN ? compare64<ABS_LESS_EQUAL>(value, 1)
                                           : compare64<GREATER>(value, 0) & compare64<LESS_EQUAL>(value, limit));
        if (below) below[p * words + w] = used & compare64<LESS_EQUAL>(value, 0);
      }
    });
  }
};

// operands: pointers in order; values and below may be null; threshold is written unless `sign`.
EXPORT i64 fused_activation({{ pointers }}const Geometry* geometry, i64 sign,
                            float* threshold, u64* bits, u64* mask, float* values, u64* below, i64 threads) {
  const Activation activation{ {{ operand_values }}, *geometry};
  if (sign) activation.pack<true>(0, values, false, bits, mask, below, threads);
  else {
    *threshold = activation.mean(values, threads);
    activation.pack<false>(*threshold, values, values != nullptr, bits, mask, below, threads);
  }
  return OK;
}
