{% include "common.h" %}
{% include "tile.h" %}
{% include "weight_gradient.h" %}
{% include "grad_weight_columns.h" %}
// grad_weight_product: the contraction runs over positions m = (kept row, oh, ow), 64 to a word.
//
//     acc[c_o, c_i, tap] = sum over m of q[c_o, m] code(x[c_i, pixel of m under the tap])
//         threshold: |q & x|            sign: 2 |q & x| - |q & inside|      (|.| weighted by 2**plane)
//
// Phase 1 (grad_weight_columns.h) lays out, for every tap, the bits of x along m: panels [tap][C_i/16][W][16]; bits of
// positions whose pixel is outside the image, or whose row is unused, are clear, and `inside` [tap][W] says which those
// are. Output rows of a useful width are moved as a whole (row_bits.h); else every position has its pixel looked up. On small
// images a tap has many of these: where the CPU extracts bits quickly, such a tap is made dense. Positions outside are
// then left out of x and of the lanes, and the product shrinks with them.
// Where the micro-kernel counts wider blocks than a panel, the panels are then laid out as it wants them.
// Phase 2 is an and-popcount matrix product. Positions are processed in pieces, so that one piece of a panel stays
// in L1 (a wider block: in L2) while all bit planes pass, and memory is bounded; pieces add up in acc. After the last
// piece the 8 output channels of a unit may be finished while they are in cache (grad_weight): dequantized, and through
// the binarization.
// Where one piece is all, their acc is then memory of the thread, which never leaves its cache, and the products, which
// read little from memory, fetch what finishing needs from there.

constexpr i64 PIECE = 128;  // words of positions: 16 KB of a panel, 32 or 64 KB of a block of tile_tables.h

struct GradWeight : PositionColumns {
  const u64* lanes;
  i64 bits, total_words;  // planes; W
  i32* inside_counts;     // [C_o, padded][tap_blocks * WIDTH]

  i64 tiles() const { return ceil_div(g.out_channels, TILE); }

  // The lanes of one plane and 8 channels at the positions that a tap has inside, one after the other.
  static void compress_lanes(const u64* from, const std::vector<Compression>& compress, u64* to) {
    auto write = [&](Lanes word) { std::memcpy(to, &word, sizeof word), to += LANE_TILE; };
    Lanes pending{};
    i64 used = 0;  // bits of it
    for (const Compression& word : compress) {
      const Lanes lanes = word(load_lanes(from));
      from += LANE_TILE;
      pending |= lanes << used;
      used += word.count;
      if (used < WORD) continue;
      write(pending);
      used -= WORD;
      pending = used ? lanes >> (word.count - used) : Lanes{};
    }
    if (used) write(pending);
  }

  LaneTile lane_tile(i64 tile, i64 first) const {
    return {lanes + (tile * total_words + first) * LANE_TILE, tiles() * total_words};
  }

  // The lanes that a dense tap needs, [bits][words][8].
  LaneTile dense_lanes(i64 tap, const LaneTile& all, i64 words, Buffer& memory) const {
    u64* own = memory.get<u64>(bits * words * LANE_TILE);
    for (i64 plane = 0; plane < bits; ++plane)
      compress_lanes(all.base + plane * all.plane_stride * LANE_TILE, dense[tap], own + plane * words * LANE_TILE);
    return {own, words};
  }

  ReadyRows<And, LaneTile> ready_rows(const LaneTile& rows, i64 words, Buffer& memory) const {
    const Run run{0, 0, words};
    return ReadyRows<And, LaneTile>::of(rows, int(bits), &run, 1, memory);
  }

  // |q & inside| of 8 output channels under all taps.
  void count_inside(const ReadyRows<And, LaneTile>& rows, i64 tile, i64 words) const {
    const Run run{0, 0, words};
    i32* to = inside_counts + tile * TILE * tap_blocks * WIDTH;
    for (i64 j = 0; j < tap_blocks; ++j)
      count_tile(rows, &run, 1, laid_inside + j * words * WIDTH, [&](int r, int p, Columns sum) {
        store_columns(to + (r * tap_blocks + j) * WIDTH + p * PANEL, sum);
      });
  }

  // Phase 2 for one tap, 8 output channels and WIDTH input channels; acc of these output channels.
  template <bool SIGN>
  inline __attribute__((always_inline)) void multiply(const ReadyRows<And, LaneTile>& rows, i64 tap, i64 tile, i64 block,
                                                      i64 first, i64 words, i32* acc) const {
    const Run run{0, 0, filled[tap]};
    const i64 used_columns = std::min<i64>(WIDTH, g.in_channels - block * WIDTH), row_size = taps * g.in_channels;
    const int used_rows = int(std::min<i64>(TILE, g.out_channels - tile * TILE));
    i32* to = acc + tap * g.in_channels + block * WIDTH;
    const i32* counted = inside_counts + tile * TILE * tap_blocks * WIDTH + tap;
    const bool whole = used_columns == WIDTH && used_rows == TILE;
    i32 spare[TILE * WIDTH];
    if (!whole) std::memset(spare, 0, sizeof spare);
    if (!whole && first) copy(to, row_size, used_rows, used_columns, spare, WIDTH);
    i32* const target = whole ? to : spare;
    const i64 stride = whole ? row_size : WIDTH;
    for (int r = 0; r < TILE; ++r) __builtin_prefetch(target + r * stride, 1);
    auto store = [&](int r, int p, Columns sum) {
      if (SIGN) sum += sum - u32(counted[r * tap_blocks * WIDTH]);
      if (first) sum += load_columns(target + r * stride + p * PANEL);
      store_columns(target + r * stride + p * PANEL, sum);
    };
    count_tile(rows, &run, 1, laid + (tap * blocks + block) * words * WIDTH, store);
    if (!whole) copy(spare, WIDTH, used_rows, used_columns, to, row_size);
  }

  static void copy(const i32* from, i64 from_stride, i64 rows, i64 columns, i32* to, i64 to_stride) {
    for (i64 r = 0; r < rows; ++r) std::memcpy(to + r * to_stride, from + r * from_stride, columns * sizeof(i32));
  }

  // The product with q = 1: of one tap and 16 input channels.
  void sum_codes(i64 tap, i64 panel, i64 first, i64 words, bool sign, i32* code_sum) const {
    const u64 *bits_of = column(tap, panel, words), *valid = inside + tap / PANEL * words * PANEL + tap % PANEL;
    u64 counts[PANEL] = {}, products = 0;
    for (i64 k = 0; k < words; ++k) products += __builtin_popcountll(valid[k * PANEL]);
    for (i64 k = 0; k < filled[tap]; ++k) {
      for (int c = 0; c < PANEL; ++c) counts[c] += __builtin_popcountll(bits_of[k * PANEL + c]);
    }
    for (i64 c = panel * PANEL; c < std::min(g.in_channels, (panel + 1) * PANEL); ++c) {
      const i64 count = i64(counts[c % PANEL]);
      i32& to = code_sum[tap * g.in_channels + c];
      to = (first ? to : 0) + i32(sign ? 2 * count - i64(products) : count);
    }
  }

  // finish(tile, acc) is called when the sums of its 8 output channels are complete, and finish.expect(tile, part, parts)
  // between its products before. acc of all, or null where they are complete after this piece and needed by finish only.
  template <bool SIGN, class Finish>
  void multiply_all(i64 first, i64 words, i32* acc, i32* code_sum, i64 threads, Finish finish) const {
    parallel_for(taps * panels, threads,
                 [&](i64 unit) { sum_codes(unit / panels, unit % panels, first, words, SIGN, code_sum); });
    // A unit keeps the lanes of 8 channels in L2 and passes the blocks of all taps.
    const i64 size = TILE * taps * g.in_channels;
    parallel_for(tiles(), threads, [&](i64 tile) {
      static thread_local Buffer own, own_lanes, own_rows, dense_rows;
      i32* sums = acc ? acc + tile * size : own.get<i32>(size);
      const bool last = (first + words) * WORD >= positions();
      const LaneTile lanes_of_all = lane_tile(tile, first);
      const auto all = ready_rows(lanes_of_all, words, own_rows);
      if (SIGN) count_inside(all, tile, words);
      for (i64 tap = 0; tap < taps; ++tap) {
        const bool some = !dense[tap].empty();
        const LaneTile lanes_of_some = some ? dense_lanes(tap, lanes_of_all, words, own_lanes) : lanes_of_all;
        const auto rows = some ? ready_rows(lanes_of_some, filled[tap], dense_rows) : all;
        for (i64 block = 0; block < blocks; ++block) {
          multiply<SIGN>(rows, tap, tile, block, first, words, sums);
          if (last) finish.expect(tile, tap * blocks + block, taps * blocks);
        }
      }
      if (last) finish(tile, sums);
    });
  }

  template <class Finish>
  void run(bool sign, i32* acc, i32* code_sum, i64 threads, Finish finish) {
    static thread_local Buffer buffer, laid_buffer, counts_buffer;
    const i64 words = ceil_div(positions(), WORD);  // words of unused rows hold no code
    const i64 piece = std::min(PIECE, words);
    u64* memory = buffer.get<u64>((taps * panels + tap_panels) * piece * PANEL);
    inside_counts = counts_buffer.get<i32>(tiles() * TILE * tap_blocks * WIDTH);
    for (i64 first = 0; first < words; first += piece) {
      const i64 count = std::min(piece, words - first);
      make_columns(first, count, memory, laid_buffer, useful_threads(taps * count * g.words * WORD, threads));
      const i64 useful = useful_threads(count * g.out_channels * taps * panels, threads);
      if (sign) multiply_all<true>(first, count, acc, code_sum, useful, finish);
      else multiply_all<false>(first, count, acc, code_sum, useful, finish);
    }
  }
};

static GradWeight make_product(const u64* lanes, i64 bits, const u64* x, const i32* kept, i64 kept_count,
                               const Geometry* geometry) {
  GradWeight product{};
  product.g = *geometry;
  product.lanes = lanes;
  product.x = x;
  product.kept = kept;
  product.bits = bits;
  product.used = used_count(kept, kept_count, product.g.batch);
  product.total_words = ceil_div(kept_count * product.g.out_h * product.g.out_w, WORD);
  product.taps = product.g.kernel_h * product.g.kernel_w;
  product.panels = ceil_div(product.g.in_channels, PANEL);
  product.tap_panels = ceil_div(product.taps, PANEL);
  product.blocks = ceil_div(product.g.in_channels, WIDTH);
  product.tap_blocks = ceil_div(product.taps, WIDTH);
  return product;
}

struct NothingMore {
  void operator()(i64, const i32*) const {}
  void expect(i64, i64, i64) const {}
};

// Dequantizes 8 output channels, s acc + z code_sum, and passes them through the binarization.
struct FinishGradient {
  const WeightGradient& through;
  const i32* code_sum;
  const float *scale, *zero;
  i64 out_channels;
  float* grad;

  i64 size() const { return through.taps * through.channels; }
  i64 begin(i64 tile) const { return std::min(out_channels, tile * TILE); }

  void operator()(i64 tile, const i32* acc) const {
    static thread_local Buffer values;
    float* grad_hat = values.get<float>(size());
    for (i64 o = begin(tile); o < begin(tile + 1); ++o, acc += size()) {
      const float s = scale[o], z = zero[o];
      for (i64 i = 0; i < size(); ++i) grad_hat[i] = s * float(acc[i]) + z * float(code_sum[i]);
      through.channel(o, grad_hat, grad);
    }
  }

  // One of `parts` parts of the weight and its gradient into the cache. Not inlined, GCC takes it for empty.
  inline __attribute__((always_inline)) void expect(i64 tile, i64 part, i64 parts) const {
    constexpr i64 LINE = 64 / sizeof(float);
    const i64 first = begin(tile) * size(), lines = ceil_div(begin(tile + 1) * size() - first, LINE);
    for (i64 line = lines * part / parts; line < lines * (part + 1) / parts; ++line) {
      __builtin_prefetch(through.weight + first + line * LINE, 0);
      __builtin_prefetch(grad + first + line * LINE, 1);
    }
  }
};

// acc int32 [C_o][taps][C_i], code_sum int32 [taps][C_i]; x rows [batch][IH][IW][CW].
EXPORT i64 grad_weight_product(const u64* lanes, i64 bits, const u64* x, const i32* kept, i64 kept_count,
                               const Geometry* geometry, i64 sign, i32* acc, i32* code_sum, i64 threads) {
  GradWeight product = make_product(lanes, bits, x, kept, kept_count, geometry);
  if (product.used < 0) return BAD_INDEX;
  if (product.positions() == 0) {
    std::fill(acc, acc + product.g.out_channels * product.taps * product.g.in_channels, 0);
    std::fill(code_sum, code_sum + product.taps * product.g.in_channels, 0);
    return OK;
  }
  product.run(sign, acc, code_sum, threads, NothingMore{});
  return OK;
}

// The product, s acc + z code_sum, and the gradient of the stored weight, of 8 output channels at a time.
// scale, zero [C_o]; weight and grad as in weight_gradient.
EXPORT i64 grad_weight(const u64* lanes, i64 bits, const u64* x, const i32* kept, i64 kept_count,
                       const Geometry* geometry, i64 sign, const float* scale, const float* zero, const float* weight,
                       const float* weight_scale, i64 by_tap, i64 xnor, float* grad, i64 threads) {
  GradWeight product = make_product(lanes, bits, x, kept, kept_count, geometry);
  if (product.used < 0) return BAD_INDEX;
  const Geometry& g = product.g;
  const i64 size = product.taps * g.in_channels;
  const bool at_once = product.positions() <= PIECE * WORD;
  static thread_local Buffer sums;
  i32* code_sum = sums.get<i32>(size * (1 + (at_once ? TILE : g.out_channels)));
  i32* acc = code_sum + size;
  const WeightGradient through{weight, weight_scale, g.in_channels, product.taps, bool(by_tap), bool(xnor)};
  const FinishGradient finish{through, code_sum, scale, zero, g.out_channels, grad};
  if (product.positions()) {
    product.run(sign, at_once ? nullptr : acc, code_sum, threads, finish);
    return OK;
  }
  std::memset(code_sum, 0, size * (1 + TILE) * sizeof(i32));
  for (i64 tile = 0; tile < product.tiles(); ++tile) finish(tile, acc);
  return OK;
}
