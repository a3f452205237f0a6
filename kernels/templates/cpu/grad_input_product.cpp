{% include "common.h" %}
{% include "tile.h" %}
{% include "conv_product.h" %}

// out int32 [N][IH][IW][channels], weight_sum int32 [IH][IW][channels]. contraction: channels per tap.
EXPORT i64 grad_input_product(const u64* words, i64 planes, const u64* weights, const Geometry* geometry,
                              i64 contraction, i32* out, i32* weight_sum, i64 threads) {
  Product product = make_product(words, planes, weights, geometry, false);
  product.prepare(true, contraction, weight_sum, threads);
  run<false>(product, out, threads);
  return OK;
}
