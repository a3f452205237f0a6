{% include "common.h" %}
// Between the products: masks as bits, exact BatchNorm statistics of integers, the gradient of max-pooling. NHWC.

struct Geometry {
{% for field in geometry %}
  i64 {{ field }};
{% endfor %}
};

// bool [pixels][channels] -> rows of words, tail bits clear
EXPORT i64 pack_bool(const u8* mask, i64 pixels, i64 channels, u64* words, i64 threads) {
  const i64 count = ceil_div(channels, WORD);
  parallel_for(pixels, useful_threads(pixels * channels, threads), [&](i64 p) {
    for (i64 w = 0; w < count; ++w) {
      alignas(64) u8 padded[WORD] = {};
      const i64 used = std::min<i64>(WORD, channels - w * WORD);
      std::memcpy(padded, mask + p * channels + w * WORD, used);
      words[p * count + w] = plane_of_bytes(padded, 0);
    }
  });
  return OK;
}

EXPORT i64 unpack_bool(const u64* words, i64 pixels, i64 channels, u8* mask, i64 threads) {
  const i64 count = ceil_div(channels, WORD);
  parallel_for(pixels, useful_threads(pixels * channels, threads), [&](i64 p) {
    for (i64 w = 0; w < count; ++w) {
      alignas(64) u32 set[WORD];
      alignas(64) u8 bytes[WORD];
      expand64(words[p * count + w], set);
      for (int i = 0; i < WORD; ++i) bytes[i] = u8(set[i] & 1);
      std::memcpy(mask + p * channels + w * WORD, bytes, std::min<i64>(WORD, channels - w * WORD));
    }
  });
  return OK;
}

// -- moments -------------------------------------------------------------------------------------------------

// Sums of v and v * v over rows begin <= m < end of 64 or fewer channels; v * v is added in 32 bits for as many rows
// as fit, given |v| <= largest.
template <class Element>
static void add_moments(const Element* acc, i64 begin, i64 end, i64 channels, i64 first, i64 largest, i64* sums,
                        i64* squares) {
  const i64 square = std::max<i64>(1, largest * largest), used = std::min<i64>(WORD, channels - first);
  const i64 piece = square > 0xffffffffll ? 0 : std::min<i64>(0xffffffffll / square, 0x7fffffffll / std::max<i64>(1, largest));
  if (piece == 0) {
    for (i64 m = begin; m < end; ++m)
      for (i64 i = 0; i < used; ++i) {
        const i64 v = acc[m * channels + first + i];
        sums[i] += v, squares[i] += v * v;
      }
    return;
  }
  for (i64 from = begin; from < end; from += piece) {
    alignas(64) i32 sum[WORD] = {};
    alignas(64) u32 square_sum[WORD] = {};
    const i64 to = std::min(end, from + piece);
    if (used == WORD) {
      for (i64 m = from; m < to; ++m) {
        const Element* v = acc + m * channels + first;
        for (int i = 0; i < WORD; ++i) sum[i] += v[i], square_sum[i] += u32(i32(v[i]) * i32(v[i]));
      }
    } else
      for (i64 m = from; m < to; ++m) {
        const Element* v = acc + m * channels + first;
        for (i64 i = 0; i < used; ++i) sum[i] += v[i], square_sum[i] += u32(i32(v[i]) * i32(v[i]));
      }
    for (i64 i = 0; i < used; ++i) sums[i] += sum[i], squares[i] += square_sum[i];
  }
}

template <class Element>
static void moments(const Element* acc, i64 count, i64 channels, i64 largest, const float* scale, const float* bias,
                    float* var, float* mean, i64 threads) {
  const i64 blocks = ceil_div(channels, WORD), parts = useful_threads(count * channels, threads);
  std::vector<i64> sums(parts * blocks * WORD), squares(parts * blocks * WORD);
  parallel_for(parts, parts, [&](i64 part) {
    // Pieces of rows small enough to stay in cache while the blocks of channels pass.
    const i64 begin = count * part / parts, end = count * (part + 1) / parts, rows = std::max<i64>(1, SMALL / channels);
    for (i64 from = begin; from < end; from += rows)
      for (i64 b = 0; b < blocks; ++b)
        add_moments(acc, from, std::min(end, from + rows), channels, b * WORD, largest,
                    &sums[(part * blocks + b) * WORD], &squares[(part * blocks + b) * WORD]);
  });
  for (i64 c = 0; c < channels; ++c) {
    i64 sum = 0, square = 0;
    for (i64 part = 0; part < parts; ++part)
      sum += sums[part * blocks * WORD + c], square += squares[part * blocks * WORD + c];
    const double first = double(sum) / double(count), second = double(square) / double(count), alpha = scale[c];
    double center = alpha * first;
    if (bias) center = center + double(bias[c]);
    const double spread = second - first * first;
    mean[c] = float(center);
    var[c] = float(alpha * alpha * (spread < 0 ? 0.0 : spread));
  }
}

// acc [count][channels], int16 where `narrow`, else int32; |acc| <= largest. bias may be null.
EXPORT i64 channel_moments(const void* acc, i64 narrow, i64 count, i64 channels, i64 largest, const float* scale,
                           const float* bias, float* var, float* mean, i64 threads) {
  if (narrow) moments((const i16*)acc, count, channels, largest, scale, bias, var, mean, threads);
  else moments((const i32*)acc, count, channels, largest, scale, bias, var, mean, threads);
  return OK;
}

// Sums of g and g * x of up to 64 channels over rows begin <= m < end, in float64.
template <bool WHOLE, class G, class X>
INLINE void add_products(const G* g, const X* x, i64 begin, i64 end, i64 channels, i64 count, double* __restrict total,
                         double* __restrict weighted) {
  for (i64 m = begin; m < end; ++m) {
    const G* v = g + m * channels;
    const X* a = x + m * channels;
    for (i64 i = 0; i < (WHOLE ? WORD : count); ++i) {
      const double first = load(v[i]);
      total[i] += first;
      weighted[i] += first * double(load(a[i]));
    }
  }
}

// finish(c, sum g, sum g * x) for every channel of [count][channels]; the order is that of reference._blocked_sum.
template <class G, class X, class Finish>
static void product_sums(const G* g, const X* x, i64 count, i64 channels, i64 threads, Finish finish) {
  constexpr i64 ROW_BLOCK = {{ row_block }};
  const i64 blocks = ceil_div(count, ROW_BLOCK), padded = ceil_div(channels, WORD) * WORD;
  std::vector<double> sums(blocks * padded * 2);
  parallel_for(blocks, useful_threads(count * channels, threads), [&](i64 b) {
    const i64 begin = b * ROW_BLOCK, end = std::min(count, begin + ROW_BLOCK);
    for (i64 c = 0; c < channels; c += WORD) {
      double *first = &sums[b * padded * 2 + c], *second = first + padded;
      if (c + WORD <= channels) add_products<true>(g + c, x + c, begin, end, channels, WORD, first, second);
      else add_products<false>(g + c, x + c, begin, end, channels, channels - c, first, second);
    }
  });
  for (i64 c = 0; c < channels; ++c) {
    double first = 0, second = 0;
    for (i64 b = 0; b < blocks; ++b) first += sums[b * padded * 2 + c], second += sums[b * padded * 2 + padded + c];
    finish(c, first, second);
  }
}

// g and acc [count][channels], acc int16 where `narrow`, else int32; total = sum g,
// moment = alpha sum g acc + (bias - center) sum g; bias may be null.
EXPORT i64 gradient_moments(const float* g, const void* acc, i64 narrow, i64 count, i64 channels, const float* scale,
                            const float* bias, const float* center, float* total, float* moment, i64 threads) {
  auto finish = [&](i64 c, double first, double second) {
    const double shift = bias ? double(bias[c]) - double(center[c]) : -double(center[c]);
    total[c] = float(first);
    moment[c] = float(double(scale[c]) * second + shift * first);
  };
  if (narrow) product_sums(g, (const i16*)acc, count, channels, threads, finish);
  else product_sums(g, (const i32*)acc, count, channels, threads, finish);
  return OK;
}

// x [count][channels], bfloat16 where `half`, else float32
EXPORT i64 float_gradient_moments(const float* g, const void* x, i64 half, i64 count, i64 channels,
                                  const float* center, float* total, float* moment, i64 threads) {
  auto finish = [&](i64 c, double first, double second) {
    total[c] = float(first);
    moment[c] = float(second + -double(center[c]) * first);
  };
  if (half) product_sums(g, (const bf16*)x, count, channels, threads, finish);
  else product_sums(g, (const float*)x, count, channels, threads, finish);
  return OK;
}

EXPORT i64 float_moments(const void* x, i64 half, i64 count, i64 channels, float* var, float* mean, i64 threads) {
  auto finish = [&](i64 c, double first, double second) {
    const double center = first / double(count), spread = second / double(count) - center * center;
    mean[c] = float(center);
    var[c] = float(spread < 0 ? 0.0 : spread);
  };
  if (half) product_sums((const bf16*)x, (const bf16*)x, count, channels, threads, finish);
  else product_sums((const float*)x, (const float*)x, count, channels, threads, finish);
  return OK;
}

// -- max-pooling ---------------------------------------------------------------------------------------------

struct Pool {
  Geometry g;

  // body(tap, offset of its pixel) for the taps of a window inside the image, in row-major order.
  template <class Body>
  INLINE void for_taps(const Geometry& g, i64 oh, i64 ow, Body body) {
    const i64 h = oh * g.stride_h - g.padding_h, w = ow * g.stride_w - g.padding_w;
    for (i64 th = std::max<i64>(0, -h); th < std::min(g.kernel_h, g.in_h - h); ++th)
      for (i64 tw = std::max<i64>(0, -w); tw < std::min(g.kernel_w, g.in_w - w); ++tw)
        body(i32(th * g.kernel_w + tw), ((h + th) * g.in_w + w + tw) * g.channels);
  }

  // The first maximum of a window, by the number of its tap, of `count` channels (all 64 where WHOLE).
  template <bool WHOLE>
  INLINE void argmax(const Geometry& g, const float* x, i64 oh, i64 ow, i64 count, i32* __restrict tap) {
    alignas(64) float best[WORD];
    bool first = true;
    for_taps(g, oh, ow, [&](i32 t, i64 offset) {
      const float* __restrict v = x + offset;
      const i64 end = WHOLE ? WORD : count;
      if (first) {
        for (i64 i = 0; i < end; ++i) best[i] = v[i], tap[i] = t;
        first = false;
        return;
      }
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
    for_taps(g, oh, ow, [&](i32 t, i64 offset) {
      float* __restrict to = grad + offset;
      for (i64 i = 0; i < (WHOLE ? WORD : count); ++i) to[i] += tap[i] == t ? grad_output[i] : 0.0f;
    });
  }

  template <bool WHOLE>
  INLINE void window(const Geometry& g, const float* grad_output, const float* x, i64 oh, i64 ow, i64 count, float* grad) {
    alignas(64) i32 tap[WORD];
    argmax<WHOLE>(g, x, oh, ow, count, tap);
    scatter<WHOLE>(g, grad_output, oh, ow, count, tap, grad);
  }

  void sample(const float* grad_output, const float* x, float* grad) const {
    std::memset(grad, 0, g.in_h * g.in_w * g.channels * sizeof(float));
    for (i64 oh = 0; oh < g.out_h; ++oh)
      for (i64 ow = 0; ow < g.out_w; ++ow)
        for (i64 c = 0; c < g.channels; c += WORD) {
          const i64 count = std::min<i64>(WORD, g.channels - c);
          const float* from = grad_output + (oh * g.out_w + ow) * g.channels + c;
          if (count == WORD) window<true>(g, from, x + c, oh, ow, count, grad + c);
          else window<false>(g, from, x + c, oh, ow, count, grad + c);
        }
  }
};

// grad_output [batch][OH][OW][C], x and grad [batch][IH][IW][C]
EXPORT i64 max_pool_gradient(const float* grad_output, const float* x, const Geometry* geometry, float* grad,
                             i64 threads) {
  const Pool pool{*geometry};
  const i64 in_size = pool.g.in_h * pool.g.in_w * pool.g.channels, out_size = pool.g.out_h * pool.g.out_w * pool.g.channels;
  parallel_for(pool.g.batch, useful_threads(pool.g.batch * in_size, threads),
               [&](i64 n) { pool.sample(grad_output + n * out_size, x + n * in_size, grad + n * in_size); });
  return OK;
}
