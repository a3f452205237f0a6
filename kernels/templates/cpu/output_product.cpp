{% include "common.h" %}
{% include "tile.h" %}
{% include "conv_product.h" %}

// out [N][OH][OW][channels], int16 where `narrow`, else int32. contraction: channels per tap.
EXPORT i64 output_product(const u64* words, const u64* weights, const Geometry* geometry, i64 sign, i64 contraction,
                          i64 narrow, void* out, i64 threads) {
  Product product = make_product(words, 1, weights, geometry, sign);
  product.prepare(false, contraction, nullptr, threads);
  if (narrow && sign) run<true>(product, static_cast<i16*>(out), threads);
  else if (narrow) run<false>(product, static_cast<i16*>(out), threads);
  else if (sign) run<true>(product, static_cast<i32*>(out), threads);
  else run<false>(product, static_cast<i32*>(out), threads);
  return OK;
}
