// Phase 1 of grad_weight_product.cpp: the bits of x along positions, for every tap.

struct Geometry {
{% for field in geometry %}
  i64 {{ field }};
{% endfor %}
};

{% include "row_bits.h" %}

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

struct PositionColumns {
  Geometry g;
  const u64* x;
  const i32* kept;
  i64 used;                      // valid entries of kept
  i64 taps, panels, tap_panels;  // panels of 16 channels, and of 16 taps
  i64 blocks, tap_blocks;        // the same of WIDTH
  u64 *columns, *inside;         // [tap][panels][words][16]; [tap_panels][words][16], a column is a tap
  const u64 *laid, *laid_inside;  // the same as blocks: [tap][blocks][words][WIDTH]; [tap_blocks][words][WIDTH]
  std::vector<i64> filled;        // by tap: words of its columns that hold positions
  std::vector<std::vector<Compression>> dense;  // by tap: of every word of lanes; empty where the tap is not dense

  i64 positions() const { return used * g.out_h * g.out_w; }
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

  // All of phase 1 for `words` words of positions. `memory` keeps panels, `laid_memory` blocks.
  void make_columns(i64 first, i64 words, u64* memory, Buffer& laid_memory, i64 threads) {
    columns = memory;
    inside = columns + taps * panels * words * PANEL;
    find_inside(first, words);
    choose_dense(words);
    if (RowBits::useful(g)) move_rows(first, words, threads);
    else move_pixels(first, words, threads);
    lay_out(words, laid_memory, threads);
  }
};
