{% include "common.h" %}
// The two sums of BatchNorm's backward over the values v of a pointwise program (program.py), which are never written:
// sum v and sum v * x for every channel, x being the first operand. NHWC.
//
// program: {{ text }}

{% include "program.h" %}
{% include "product_sums.h" %}

INLINE double wide(i32 x) { return double(x); }
template <class X>
INLINE double wide(X x) { return double(load(x)); }

struct Gradient {
  Operands o;
  i64 inner, channels;

  template <bool WHOLE>
  INLINE void add(const Gradient& g, i64 begin, i64 end, i64 c, i64 count, double* total, double* weighted) {
    Pixel at{begin, begin / g.inner, begin % g.inner};
    for (; at.index < end; ++at.index, ++at.position) {
      if (at.position == g.inner) ++at.row, at.position = 0;
      alignas(64) float v[WORD];
      before_pool<WHOLE>(g.o, at, g.channels, c, count, v);
      const {{ operands[0].type }}* x = g.o.p0 + at.index * g.channels + c;
      add_products<WHOLE>(count, [&](i64 i) { return double(v[i]); }, [&](i64 i) { return wide(x[i]); }, total, weighted);
    }
  }
};

// operands: pointers in order. total = sum v, moment = sum v (scale x + bias - center); scale null: 1, bias null: 0.
EXPORT i64 gradient_moments({{ pointers }}i64 batch, i64 inner, i64 channels,
                            const float* scale, const float* bias, const float* center, float* total, float* moment, i64 threads) {
  const Gradient gradient{ {{ operand_values }}, inner, channels};
  product_sums(gradient, batch * inner, channels, threads, [&](i64 c, double first, double second) {
    const double shift = bias ? double(bias[c]) - double(center[c]) : -double(center[c]);
    total[c] = float(first);
    moment[c] = float((scale ? double(scale[c]) * second : second) + shift * first);
  });
  return OK;
}
