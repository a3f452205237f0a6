{% include "common.h" %}
// The gradient of max-pooling the values of a pointwise program (program.py), which are computed again: their maxima,
// by the number of its tap for every window, say where the gradient goes. NHWC.
//
// program: {{ text }}

struct Geometry {
{% for field in geometry %}
  i64 {{ field }};
{% endfor %}
};

{% include "program.h" %}

struct Pool {
  Operands o;
  Geometry g;

  // body(tap, its pixel in the image) for the taps of a window inside the image, in row-major order.
  template <class Body>
  INLINE void for_taps(const Geometry& g, i64 oh, i64 ow, Body body) {
    const i64 h = oh * g.stride_h - g.padding_h, w = ow * g.stride_w - g.padding_w;
    for (i64 th = std::max<i64>(0, -h); th < std::min(g.kernel_h, g.in_h - h); ++th)
      for (i64 tw = std::max<i64>(0, -w); tw < std::min(g.kernel_w, g.in_w - w); ++tw)
        body(i32(th * g.kernel_w + tw), (h + th) * g.in_w + w + tw);
  }

  // The first maximum of a window, by the number of its tap, of `count` channels from c on (all 64 where WHOLE).
  template <bool WHOLE>
  INLINE void argmax(const Pool& p, i64 n, i64 oh, i64 ow, i64 c, i64 count, i32* __restrict tap) {
    alignas(64) float best[WORD];
    const i64 image = n * p.g.in_h * p.g.in_w;
    bool first = true;
    for_taps(p.g, oh, ow, [&](i32 t, i64 position) {
      const i64 end = WHOLE ? WORD : count;
      const Pixel at{image + position, n, position};
      if (first) {
        before_pool<WHOLE>(p.o, at, p.g.channels, c, count, best);
        for (i64 i = 0; i < end; ++i) tap[i] = t;
        first = false;
        return;
      }
      alignas(64) float v[WORD];
      before_pool<WHOLE>(p.o, at, p.g.channels, c, count, v);
      for (i64 i = 0; i < end; ++i) {
        const bool larger = !(v[i] <= best[i]) & !(best[i] != best[i] && v[i] == v[i]);
        best[i] = larger ? v[i] : best[i];
        tap[i] = larger ? t : tap[i];
      }
    });
  }

  template <bool WHOLE>
  INLINE void scatter(const Geometry& g, const float* grad_output, i64 oh, i64 ow, i64 count, const i32* __restrict tap,
                      float* grad) {
    for_taps(g, oh, ow, [&](i32 t, i64 position) {
      float* __restrict to = grad + position * g.channels;
      for (i64 i = 0; i < (WHOLE ? WORD : count); ++i) to[i] += tap[i] == t ? grad_output[i] : 0.0f;
    });
  }

  template <bool WHOLE>
  INLINE void window(const Pool& p, const float* grad_output, i64 n, i64 oh, i64 ow, i64 c, i64 count, float* grad) {
    alignas(64) i32 tap[WORD];
    argmax<WHOLE>(p, n, oh, ow, c, count, tap);
    scatter<WHOLE>(p.g, grad_output, oh, ow, count, tap, grad);
  }

  void sample(i64 n, const float* grad_output, float* grad) const {
    std::memset(grad, 0, g.in_h * g.in_w * g.channels * sizeof(float));
    for (i64 oh = 0; oh < g.out_h; ++oh)
      for (i64 ow = 0; ow < g.out_w; ++ow)
        for (i64 c = 0; c < g.channels; c += WORD) {
          const i64 count = std::min<i64>(WORD, g.channels - c);
          const float* from = grad_output + (oh * g.out_w + ow) * g.channels + c;
          if (count == WORD) window<true>(*this, from, n, oh, ow, c, count, grad + c);
          else window<false>(*this, from, n, oh, ow, c, count, grad + c);
        }
  }
};

// operands: pointers in order, to values before the pool. grad_output [batch][OH][OW][C], grad [batch][IH][IW][C].
EXPORT i64 max_pool_gradient({{ pointers }}const float* grad_output,
                             const Geometry* geometry, float* grad, i64 threads) {
  const Pool pool{ {{ operand_values }}, *geometry};
  const i64 in_size = pool.g.in_h * pool.g.in_w * pool.g.channels, out_size = pool.g.out_h * pool.g.out_w * pool.g.channels;
  parallel_for(pool.g.batch, useful_threads(pool.g.batch * in_size, threads),
               [&](i64 n) { pool.sample(n, grad_output + n * out_size, grad + n * in_size); });
  return OK;
}
