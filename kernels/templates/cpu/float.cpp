{% include "common.h" %}
// Between the products: masks as bits, BatchNorm statistics. NHWC.

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

{% include "product_sums.h" %}

// Sums of x and x * x.
template <class X>
struct Squares {
  const X* x;
  i64 channels;

  template <bool WHOLE>
  INLINE void add(const Squares& s, i64 begin, i64 end, i64 c, i64 count, double* first, double* second) {
    for (i64 m = begin; m < end; ++m) {
      const X* v = s.x + m * s.channels + c;
      auto value = [&](i64 i) { return double(load(v[i])); };
      add_products<WHOLE>(count, value, value, first, second);
    }
  }
};

EXPORT i64 float_moments(const void* x, i64 half, i64 count, i64 channels, float* var, float* mean, i64 threads) {
  auto finish = [&](i64 c, double first, double second) {
    const double center = first / double(count), spread = second / double(count) - center * center;
    mean[c] = float(center);
    var[c] = float(spread < 0 ? 0.0 : spread);
  };
  if (half) product_sums(Squares<bf16>{(const bf16*)x, channels}, count, channels, threads, finish);
  else product_sums(Squares<float>{(const float*)x, channels}, count, channels, threads, finish);
  return OK;
}
