{% include "common.h" %}
{% include "tile.h" %}
// grad_weight_product: the contraction runs over positions m = (kept row, oh, ow), 64 to a word.
//
//     acc[c_o, c_i, tap] = sum over m of q[c_o, m] code(x[c_i, pixel of m under the tap])
//         threshold: |q & x|            sign: 2 |q & x| - |q & inside|      (|.| weighted by 2**plane)
//
// Phase 1 lays out, for every tap, the bits of x along m: panels [tap][C_i/16][W][16]; bits of positions whose
// pixel is outside the image, or whose row is unused, are clear, and `inside` [tap][W] says which those are.
// Phase 2 is an and-popcount matrix product. Positions are processed in pieces, so that the panels stay in cache
// and memory is bounded; pieces add up in acc.

struct Geometry {
{% for field in geometry %}
  i64 {{ field }};
{% endfor %}
};

constexpr i64 PANEL_BYTES = i64(4) << 20;  // memory for the panels of one piece
constexpr i64 MIN_PIECE = 64;              // words; shorter pieces add up acc too often
constexpr i64 CACHED_WORDS = 128;          // words of a panel that stay in L1 while all bit planes pass

struct GradWeight {
  Geometry g;
  const u64 *lanes, *x;
  const i32* kept;
  i64 bits, used;    // planes; valid entries of kept
  i64 total_words;   // W
  i64 taps, panels, piece;
  u64 *columns, *inside;

  i64 positions() const { return used * g.out_h * g.out_w; }
  i64 columns_of(i64 tap, i64 panel, i64 words) const { return (tap * panels + panel) * words * PANEL; }

  // Pixels of 64 positions under one tap: source[i] points to the words of the pixel, or to zeros.
  u64 find_pixels(i64 word, i64 tap, const u64* zeros, const u64** source) const {
    const i64 th = tap / g.kernel_w, tw = tap % g.kernel_w, m = word * WORD;
    i64 ow = m % g.out_w, oh = m / g.out_w % g.out_h, k = m / g.out_w / g.out_h;
    u64 valid = 0;
    for (int i = 0; i < WORD; ++i) {
      source[i] = zeros;
      if (k < used) {
        const i64 h = oh * g.stride_h - g.padding_h + th, w = ow * g.stride_w - g.padding_w + tw;
        if (h >= 0 && h < g.in_h && w >= 0 && w < g.in_w) {
          source[i] = x + ((kept[k] * g.in_h + h) * g.in_w + w) * g.words;
          valid |= u64(1) << i;
        }
        if (++ow == g.out_w) {
          ow = 0;
          if (++oh == g.out_h) oh = 0, ++k;
        }
      }
    }
    return valid;
  }

  // Phase 1 for one tap and one word of positions; `word` counts from `first`, the start of the piece.
  void gather(i64 tap, i64 word, i64 first, i64 words, const u64* zeros) const {
    const u64* source[WORD];
    alignas(64) u64 block[WORD];
    inside[tap * words + word] = find_pixels(first + word, tap, zeros, source);
    for (i64 cw = 0; cw < g.words; ++cw) {
      for (int i = 0; i < WORD; ++i) block[i] = source[i][cw];
      transpose64(block);
      for (int j = 0; j < WORD / PANEL; ++j) {
        const i64 panel = cw * (WORD / PANEL) + j;
        if (panel >= panels) break;
        std::memcpy(columns + columns_of(tap, panel, words) + word * PANEL, block + j * PANEL, PANEL * sizeof(u64));
      }
    }
  }

  // |q & inside| of 8 output channels under one tap.
  void count_inside(i64 tap, i64 tile, i64 first, i64 words, i32* sum) const {
    const u64* mask = inside + tap * words;
    std::fill(sum, sum + LANE_TILE, 0);
    for (i64 p = 0; p < bits; ++p) {
      const u64* q = lane_words(p, tile, first);
      i64 plane[LANE_TILE] = {};
      for (i64 k = 0; k < words; ++k)
        for (int r = 0; r < LANE_TILE; ++r) plane[r] += __builtin_popcountll(q[k * LANE_TILE + r] & mask[k]);
      for (int r = 0; r < LANE_TILE; ++r) sum[r] += i32(plane[r] << p);
    }
  }

  const u64* lane_words(i64 plane, i64 tile, i64 first) const {
    return lanes + ((plane * ceil_div(g.out_channels, LANE_TILE) + tile) * total_words + first) * LANE_TILE;
  }

  // Phase 2 for one tap, 8 output channels and 16 input channels.
  template <bool SIGN>
  void multiply(i64 tap, i64 tile, i64 panel, i64 first, i64 words, const i32* inside_counts, i32* acc) const {
    Half total[TILE][2] = {};
    const LaneTile from{lane_words(0, tile, first), ceil_div(g.out_channels, LANE_TILE) * total_words};
    for (i64 k = 0; k < words; k += CACHED_WORDS) {
      const Run run{k, k, std::min(CACHED_WORDS, words - k)};
      count_tile<And>(from, int(bits), &run, 1, columns + columns_of(tap, panel, words),
                      [&](int r, Half low, Half high) { total[r][0] += low, total[r][1] += high; });
    }
    const i64 columns_left = g.in_channels - panel * PANEL;
    const int rows = int(std::min<i64>(TILE, g.out_channels - tile * TILE));
    for (int r = 0; r < rows; ++r) {
      Half low = total[r][0], high = total[r][1];
      if (SIGN) low += low - u32(inside_counts[r]), high += high - u32(inside_counts[r]);
      i32* to = acc + ((tile * TILE + r) * taps + tap) * g.in_channels + panel * PANEL;
      if (first) {
        Half before[2];
        load_counts(to, columns_left, before);
        low += before[0], high += before[1];
      }
      store_counts(to, columns_left, low, high);
    }
  }

  static void load_counts(const i32* from, i64 columns, Half* to) {
    i32 all[PANEL] = {};
    for (i64 c = 0; c < std::min<i64>(columns, PANEL); ++c) all[c] = from[c];
    std::memcpy(to, all, sizeof all);
  }

  // The product with q = 1: of one tap and 16 input channels.
  void sum_codes(i64 tap, i64 panel, i64 first, i64 words, bool sign, i32* code_sum) const {
    const u64* column = columns + columns_of(tap, panel, words);
    i32 counts[PANEL] = {}, valid = 0;
    for (i64 k = 0; k < words; ++k) {
      valid += i32(__builtin_popcountll(inside[tap * words + k]));
      for (int c = 0; c < PANEL; ++c) counts[c] += i32(__builtin_popcountll(column[k * PANEL + c]));
    }
    for (i64 c = panel * PANEL; c < std::min(g.in_channels, (panel + 1) * PANEL); ++c) {
      const i32 count = counts[c % PANEL];
      i32& to = code_sum[tap * g.in_channels + c];
      to = (first ? to : 0) + (sign ? 2 * count - valid : count);
    }
  }

  template <bool SIGN>
  void multiply_all(i64 first, i64 words, i32* acc, i32* code_sum, i64 threads) const {
    const i64 tiles = ceil_div(g.out_channels, TILE);
    // A unit keeps 8 lanes of one channel tile in L2 and passes the panels of one tap; sums of codes ride along.
    parallel_for(tiles * taps, threads, [&](i64 unit) {
      const i64 tile = unit / taps, tap = unit % taps;
      i32 inside_counts[LANE_TILE] = {};
      if (SIGN) count_inside(tap, tile, first, words, inside_counts);
      for (i64 panel = 0; panel < panels; ++panel) {
        multiply<SIGN>(tap, tile, panel, first, words, inside_counts, acc);
        if (tile == 0) sum_codes(tap, panel, first, words, SIGN, code_sum);
      }
    });
  }

  void run(bool sign, i32* acc, i32* code_sum, i64 threads) {
    static thread_local Buffer buffer;
    const i64 words = ceil_div(positions(), WORD);  // words of unused rows hold no code
    piece = std::max(MIN_PIECE, PANEL_BYTES / i64(taps * panels * PANEL * sizeof(u64)));
    piece = std::min(piece, words);
    columns = buffer.get<u64>(taps * (panels * PANEL + 1) * piece);
    inside = columns + taps * panels * PANEL * piece;
    const std::vector<u64> zeros(g.words);
    for (i64 first = 0; first < words; first += piece) {
      const i64 count = std::min(piece, words - first);
      parallel_for(taps * count, useful_threads(taps * count * g.words * WORD, threads),
                   [&](i64 unit) { gather(unit / count, unit % count, first, count, zeros.data()); });
      const i64 useful = useful_threads(count * g.out_channels * taps * panels, threads);
      if (sign) multiply_all<true>(first, count, acc, code_sum, useful);
      else multiply_all<false>(first, count, acc, code_sum, useful);
    }
  }
};

// acc int32 [C_o][taps][C_i], code_sum int32 [taps][C_i]; x rows [batch][IH][IW][CW].
EXPORT i64 grad_weight_product(const u64* lanes, i64 bits, const u64* x, const i32* kept, i64 kept_count,
                               const Geometry* geometry, i64 sign, i32* acc, i32* code_sum, i64 threads) {
  GradWeight product{};
  product.g = *geometry;
  product.lanes = lanes;
  product.x = x;
  product.kept = kept;
  product.bits = bits;
  product.used = used_count(kept, kept_count, product.g.batch);
  if (product.used < 0) return BAD_INDEX;
  product.total_words = ceil_div(kept_count * product.g.out_h * product.g.out_w, WORD);
  product.taps = product.g.kernel_h * product.g.kernel_w;
  product.panels = ceil_div(product.g.in_channels, PANEL);
  if (product.positions() == 0) {
    std::fill(acc, acc + product.g.out_channels * product.taps * product.g.in_channels, 0);
    std::fill(code_sum, code_sum + product.taps * product.g.in_channels, 0);
    return OK;
  }
  product.run(sign, acc, code_sum, threads);
  return OK;
}
