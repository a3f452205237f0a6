// Sums in float64 over the positions of [count][channels], in the order of reference._blocked_sum.
constexpr i64 ROW_BLOCK = {{ row_block }};
constexpr i64 PIECE = 16;  // positions of all channels one after the other, so that memory is read as it lies

// total += v and weighted += v * x for `count` channels, or all 64.
template <bool WHOLE, class V, class X>
INLINE void add_products(i64 count, V v, X x, double* __restrict total, double* __restrict weighted) {
  for (i64 i = 0; i < (WHOLE ? WORD : count); ++i) {
    const double value = v(i);
    total[i] += value;
    weighted[i] += value * x(i);
  }
}

// finish(c, sum v, sum v * x) for every channel. Source::add<WHOLE>(source, begin, end, c, count, total, weighted) adds
// those of positions begin <= m < end and of `count` channels from c on.
template <class Source, class Finish>
static void product_sums(const Source& source, i64 count, i64 channels, i64 threads, Finish finish) {
  const i64 blocks = ceil_div(count, ROW_BLOCK), padded = ceil_div(channels, WORD) * WORD;
  std::vector<double> sums(blocks * padded * 2);
  parallel_for(blocks, useful_threads(count * channels, threads), [&](i64 b) {
    const i64 end = std::min(count, (b + 1) * ROW_BLOCK);
    for (i64 m = b * ROW_BLOCK; m < end; m += PIECE)
      for (i64 c = 0; c < channels; c += WORD) {
        double *total = &sums[b * padded * 2 + c], *weighted = total + padded;
        const i64 to = std::min(end, m + PIECE), width = std::min<i64>(WORD, channels - c);
        if (width == WORD) Source::template add<true>(source, m, to, c, width, total, weighted);
        else Source::template add<false>(source, m, to, c, width, total, weighted);
      }
  });
  for (i64 c = 0; c < channels; ++c) {
    double first = 0, second = 0;
    for (i64 b = 0; b < blocks; ++b) first += sums[b * padded * 2 + c], second += sums[b * padded * 2 + padded + c];
    finish(c, first, second);
  }
}
