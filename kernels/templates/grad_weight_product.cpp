{% include "common.h" %}
{% include "tile.h" %}
{% include "weight_gradient.h" %}
// grad_weight_product: the contraction runs over positions m = (kept row, oh, ow), 64 to a word.
//
//     acc[c_o, c_i, tap] = sum over m of q[c_o, m] code(x[c_i, pixel of m under the tap])
//         threshold: |q & x|            sign: 2 |q & x| - |q & inside|      (|.| weighted by 2**plane)
//
// Phase 1 lays out, for every tap, the bits of x along m: panels [tap][C_i/16][W][16]; bits of positions whose
// pixel is outside the image, or whose row is unused, are clear, and `inside` [tap][W] says which those are. Output rows
// of a useful width are moved as a whole (row_bits.h); else every position has its pixel looked up. On small
// images a tap has many of these: where the CPU extracts bits quickly, such a tap is made dense. Positions outside are
// then left out of x and of the lanes, and the product shrinks with them.
// Where the micro-kernel counts wider blocks than a panel, the panels are then laid out as it wants them.
// Phase 2 is an and-popcount matrix product. Positions are processed in pieces, so that one piece of a panel stays
// in L1 (a wider block: in L2) while all bit planes pass, and memory is bounded; pieces add up in acc. After the last
// piece the 8 output channels of a unit may be finished while they are in cache (grad_weight): dequantized, and through
// the binarization.
// Where one piece is all, their acc is then memory of the thread, which never leaves its cache, and the products, which
// read little from memory, fetch what finishing needs from there.

struct Geometry {
{% for field in geometry %}
  i64 {{ field }};
{% endfor %}
};

{% include "row_bits.h" %}

constexpr i64 PIECE = 128;  // words of positions: 16 KB of a panel, 32 or 64 KB of a block of tile_tables.h
constexpr i64 DENSE_COST = 1;  // of a word made dense, in products of a word with a block (measured with AVX-512)

// Moves the bits under a mask to the low end, in order, in six steps of shifts (Hacker's Delight, compress).
struct Compression {
  static constexpr int STEPS = 6;
  u64 mask, moved[STEPS];
  i64 count;  // bits under the mask

  explicit Compression(u64 bits) : mask(bits), count(__builtin_popcountll(bits)) {
    u64 holes = ~bits << 1;  // below a bit, counted in unary and step by step in binary
    for (int i = 0; i < STEPS; ++i) {
      u64 odd = holes;
      for (int shift = 1; shift < WORD; shift *= 2) odd ^= odd << shift;
      moved[i] = odd & bits;
      bits = (bits ^ moved[i]) | (moved[i] >> (1 << i));
      holes &= ~odd;
    }
  }

  Lanes operator()(Lanes x) const {
    x &= mask;
    for (int i = 0; i < STEPS; ++i) {
      const Lanes moving = x & moved[i];
      x = (x ^ moving) | (moving >> (1 << i));
    }
    return x;
  }
};

struct GradWeight {
  Geometry g;
  const u64 *lanes, *x;
  const i32* kept;
  i64 bits, used;   // planes; valid entries of kept
  i64 total_words;  // W
  i64 taps, panels, tap_panels;  // panels of 16 channels, and of 16 taps
  i64 blocks, tap_blocks;        // the same of WIDTH
  u64 *columns, *inside;  // [tap][panels][words][16]; [tap_panels][words][16], a column is a tap
  const u64 *laid, *laid_inside;  // the same as blocks: [tap][blocks][words][WIDTH]; [tap_blocks][words][WIDTH]
  i32* inside_counts;             // [C_o, padded][tap_blocks * WIDTH]
  std::vector<i64> filled;  // by tap: words of its columns that hold positions
  std::vector<std::vector<Compression>> dense;  // by tap: of every word of lanes; empty where the tap is not dense

  i64 positions() const { return used * g.out_h * g.out_w; }
  i64 tiles() const { return ceil_div(g.out_channels, TILE); }
  u64* column(i64 tap, i64 panel, i64 words) const { return columns + (tap * panels + panel) * words * PANEL; }

  // Where 64 positions are in x: words of the pixel under the first tap (possibly counted the image), and for every
  // tap row and column which positions have it inside.
  struct Pixels {
    i64 offset[WORD];
    std::vector<u64> rows, columns;
  };

  void locate(i64 word, Pixels& pixels) const {
    const i64 m = word * WORD;
    i64 ow = m % g.out_w, oh = m / g.out_w % g.out_h, k = m / g.out_w / g.out_h;
    pixels.rows.assign(g.kernel_h, 0);
    pixels.columns.assign(g.kernel_w, 0);
    for (int i = 0; i < WORD; ++i) {
      pixels.offset[i] = 0;
      if (k >= used) continue;
      const i64 h = oh * g.stride_h - g.padding_h, w = ow * g.stride_w - g.padding_w;
      pixels.offset[i] = ((kept[k] * g.in_h + h) * g.in_w + w) * g.words;
      for (i64 t = 0; t < g.kernel_h; ++t) pixels.rows[t] |= u64(h + t >= 0 && h + t < g.in_h) << i;
      for (i64 t = 0; t < g.kernel_w; ++t) pixels.columns[t] |= u64(w + t >= 0 && w + t < g.in_w) << i;
      if (++ow == g.out_w) {
        ow = 0;
        if (++oh == g.out_h) oh = 0, ++k;
      }
    }
  }

  u64 inside_of(i64 tap, i64 word, i64 words) const {
    return inside[(tap / PANEL * words + word) * PANEL + tap % PANEL];
  }

  // Which positions every tap has inside.
  void find_inside(i64 first, i64 words) const {
    const RowBits rows{g, first * WORD, std::min(positions(), (first + words) * WORD)};
    if (RowBits::useful(g))
      for (i64 panel = 0; panel < tap_panels; ++panel) rows.inside(panel * PANEL, inside + panel * words * PANEL);
    else
      for (i64 word = 0; word < words; ++word) locate_inside(word, first, words);
  }

  void locate_inside(i64 word, i64 first, i64 words) const {
    Pixels pixels;
    locate(first + word, pixels);
    for (i64 tap = 0; tap < tap_panels * PANEL; ++tap) {
      const u64 valid = tap < taps ? pixels.rows[tap / g.kernel_w] & pixels.columns[tap % g.kernel_w] : 0;
      inside[(tap / PANEL * words + word) * PANEL + tap % PANEL] = valid;
    }
  }

  // Decide which taps are made dense, those where it saves more than it costs, and how many words each has then.
  void choose_dense(i64 words) {
    dense.assign(taps, {});
    filled.assign(taps, words);
    for (i64 tap = 0; tap < taps; ++tap) {
      i64 count = 0;
      for (i64 word = 0; word < words; ++word) count += __builtin_popcountll(inside_of(tap, word, words));
      if ((words - ceil_div(count, WORD)) * blocks <= words * DENSE_COST) continue;
      for (i64 word = 0; word < words; ++word) dense[tap].emplace_back(inside_of(tap, word, words));
      filled[tap] = ceil_div(count, WORD);
    }
  }

  // Phase 1 of a dense tap.
  void make_dense(i64 tap, i64 first, i64 words, const u64* zeros) const {
    const i64 shift = (tap / g.kernel_w * g.in_w + tap % g.kernel_w) * g.words;
    const u64* source[WORD];
    i64 pending = 0, done = 0;
    Pixels pixels;
    for (i64 word = 0; word < words; ++word) {
      locate(first + word, pixels);
      for (u64 valid = inside_of(tap, word, words); valid; valid &= valid - 1) {
        source[pending++] = x + (pixels.offset[__builtin_ctzll(valid)] + shift);
        if (pending == WORD) store_column(source, tap, done++, words), pending = 0;
      }
    }
    if (pending) {
      std::fill(source + pending, source + WORD, zeros);
      store_column(source, tap, done, words);
    }
  }

  // The lanes of one plane and 8 channels at the positions that a tap has inside, one after the other.
  static void compress_lanes(const u64* from, const std::vector<Compression>& compress, u64* to) {
    auto write = [&](Lanes word) { std::memcpy(to, &word, sizeof word), to += LANE_TILE; };
    Lanes pending{};
    i64 used = 0;  // bits of it
    for (const Compression& word : compress) {
      Lanes lanes;
      std::memcpy(&lanes, from, sizeof lanes);
      from += LANE_TILE;
      lanes = word(lanes);
      pending |= lanes << used;
      used += word.count;
      if (used < WORD) continue;
      write(pending);
      used -= WORD;
      pending = used ? lanes >> (word.count - used) : Lanes{};
    }
    if (used) write(pending);
  }

  // Phase 1 where output rows are moved as a whole.
  void move_rows(i64 first, i64 words, i64 threads) const {
    static thread_local Buffer memory;
    const RowBits rows{g, first * WORD, std::min(positions(), (first + words) * WORD)};
    u64* strings = memory.get<u64>(rows.size());
    parallel_for(rows.count(), threads, [&](i64 row) { rows.make(x, kept, row, strings); });
    parallel_for(taps * panels, threads, [&](i64 unit) {
      const i64 tap = unit / panels, panel = unit % panels;
      rows.column(strings, tap, panel, !dense[tap].empty(), column(tap, panel, words));
    });
  }

  // Phase 1 where the pixel of every position is looked up.
  void move_pixels(i64 first, i64 words, i64 threads) const {
    const std::vector<u64> zeros(g.words);
    parallel_for(words, threads, [&](i64 word) { gather(word, first, words, zeros.data()); });
    parallel_for(taps, threads, [&](i64 tap) {
      if (!dense[tap].empty()) make_dense(tap, first, words, zeros.data());
    });
  }

  // Phase 1 of the other taps for one word of positions; `word` counts from `first`, the start of the piece.
  void gather(i64 word, i64 first, i64 words, const u64* zeros) const {
    Pixels pixels;
    locate(first + word, pixels);
    for (i64 tap = 0; tap < taps; ++tap) {
      if (!dense[tap].empty()) continue;
      const i64 shift = (tap / g.kernel_w * g.in_w + tap % g.kernel_w) * g.words;
      const u64 valid = inside_of(tap, word, words);
      const u64* source[WORD];
      for (int i = 0; i < WORD; ++i) source[i] = valid >> i & 1 ? x + (pixels.offset[i] + shift) : zeros;
      store_column(source, tap, word, words);
    }
  }

  // Word `word` of all columns of a tap: 64 pixels, transposed.
  void store_column(const u64* const* source, i64 tap, i64 word, i64 words) const {
    alignas(64) u64 block[WORD];
    for (i64 cw = 0; cw < g.words; ++cw) {
      for (int i = 0; i < WORD; ++i) block[i] = source[i][cw];
      transpose64(block);
      for (int j = 0; j < WORD / PANEL; ++j) {
        const i64 panel = cw * (WORD / PANEL) + j;
        if (panel >= panels) break;
        std::memcpy(column(tap, panel, words) + word * PANEL, block + j * PANEL, PANEL * sizeof(u64));
      }
    }
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

  // Phase 1 for micro-kernels with wider blocks.
  void lay_out(i64 words, Buffer& memory, i64 threads) {
    if constexpr (WIDTH == PANEL) {
      laid = columns, laid_inside = inside;
    } else {
      constexpr i64 GROUP = WIDTH / PANEL;
      u64* to = memory.get<u64>((taps * blocks + tap_blocks) * words * WIDTH);
      parallel_for(taps * blocks, threads, [&](i64 unit) {
        const i64 tap = unit / blocks, first = unit % blocks * GROUP;
        lay_out_columns(column(tap, first, words), std::min(GROUP, panels - first), words, filled[tap],
                        to + unit * words * WIDTH);
      });
      u64* inside_to = to + taps * blocks * words * WIDTH;
      for (i64 j = 0; j < tap_blocks; ++j)
        lay_out_columns(inside + j * GROUP * words * PANEL, std::min(GROUP, tap_panels - j * GROUP), words, words,
                        inside_to + j * words * WIDTH);
      laid = to, laid_inside = inside_to;
    }
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
    columns = buffer.get<u64>((taps * panels + tap_panels) * piece * PANEL);
    inside = columns + taps * panels * piece * PANEL;
    inside_counts = counts_buffer.get<i32>(tiles() * TILE * tap_blocks * WIDTH);
    for (i64 first = 0; first < words; first += piece) {
      const i64 count = std::min(piece, words - first);
      const i64 gathering = useful_threads(taps * count * g.words * WORD, threads);
      find_inside(first, count);
      choose_dense(count);
      if (RowBits::useful(g)) move_rows(first, count, gathering);
      else move_pixels(first, count, gathering);
      lay_out(count, laid_buffer, gathering);
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
