// The columns of grad_weight_product.cpp from whole rows: through a tap, an output row sees an input row, shifted.
//
// Strings: bit j of word c is channel c of pixel phase + j * stride of an input row, [row][phase][channel], zero beyond the
// image. A column is put together from them, out_w bits for every output row; what a shift leaves free is outside.

typedef u64 Lanes __attribute__((vector_size(8 * LANE_TILE)));  // a word of eight channels

INLINE Lanes load_lanes(const u64* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

// Bits of 16 columns, one batch after the other, as words [k][16].
struct Stream {
  u64* to;
  i64 used = 0;  // bits of the next word
  Lanes low{}, high{};

  void write() {
    std::memcpy(to, &low, sizeof low);
    std::memcpy(to + LANE_TILE, &high, sizeof high);
    to += PANEL;
  }

  // `count` bits, at most 64. Those above belong to the next piece: they are lost with the word, or in `finish`.
  void append(Lanes l, Lanes h, i64 count) {
    low |= l << used, high |= h << used;
    used += count;
    if (used < WORD) return;
    write();
    used -= WORD;
    low = high = Lanes{};
    if (used) low = l >> (count - used), high = h >> (count - used);
  }

  void finish() {
    if (!used) return;
    low &= tail_mask(used), high &= tail_mask(used);
    write();
  }
};

// Positions begin .. end - 1.
struct RowBits {
  const Geometry& g;
  i64 begin, end;

  // Rows fit into a word, and there are not too many of them.
  static bool useful(const Geometry& g) {
    return g.in_w <= WORD && g.out_w <= WORD && g.out_w >= 8 && g.out_h <= WORD && g.kernel_w <= WORD && g.padding_w < WORD;
  }

  i64 first_image() const { return begin / (g.out_h * g.out_w); }
  i64 count() const { return (ceil_div(end, g.out_h * g.out_w) - first_image()) * g.in_h; }
  i64 row_size() const { return g.stride_w * g.words * WORD; }
  i64 size() const { return count() * row_size(); }

  // The strings of one input row; `row` counts from the first image.
  void make(const u64* x, const i32* kept, i64 row, u64* strings) const {
    const u64* from = x + (kept[first_image() + row / g.in_h] * g.in_h + row % g.in_h) * g.in_w * g.words;
    u64* block = strings + row * row_size();
    if (!seen(row % g.in_h, g.out_h, g.kernel_h, g.stride_h, g.padding_h)) return;
    for (i64 phase = 0; phase < g.stride_w; ++phase) {
      if (!phase_seen(phase)) {
        block += g.words * WORD;
        continue;
      }
      for (i64 cw = 0; cw < g.words; ++cw, block += WORD) {
        std::memset(block, 0, WORD * sizeof(u64));
        for (i64 w = phase, j = 0; w < g.in_w; w += g.stride_w, ++j) block[j] = from[w * g.words + cw];
        transpose64(block);
      }
    }
  }

  // Whether some output row sees an input row through some tap.
  static bool seen(i64 at, i64 size, i64 kernel, i64 stride, i64 padding) {
    for (i64 t = 0; t < kernel; ++t) {
      const i64 shifted = at + padding - t;
      if (shifted >= 0 && shifted % stride == 0 && shifted / stride < size) return true;
    }
    return false;
  }

  bool phase_seen(i64 phase) const {
    for (i64 t = 0; t < g.kernel_w; ++t)
      if ((t - g.padding_w - phase) % g.stride_w == 0) return true;
    return false;
  }

  // Bits low .. high - 1 of every output row that the positions lie in, as 16 columns. segment(oh, image, l, h) sets those
  // of a row; false leaves the row out.
  template <class Segment>
  void columns(u64* to, i64 low, i64 high, Segment segment) const {
    Stream stream{to};
    i64 row = begin / g.out_w, oh = row % g.out_h, image = row / g.out_h - first_image();
    for (; row * g.out_w < end; ++row) {
      const i64 first = std::max(low, begin - row * g.out_w), last = std::min(high, end - row * g.out_w);
      Lanes l{}, h{};
      if (first < last && segment(oh, image, l, h)) stream.append(l >> first, h >> first, last - first);
      if (++oh == g.out_h) oh = 0, ++image;
    }
    stream.finish();
  }

  // What the positions see through a tap, 16 channels; where dense, only those that see something.
  void column(const u64* strings, i64 tap, i64 panel, bool dense, u64* to) const {
    const i64 th = tap / g.kernel_w - g.padding_h, tw = tap % g.kernel_w - g.padding_w;
    const i64 phase = (tw % g.stride_w + g.stride_w) % g.stride_w, shift = (tw - phase) / g.stride_w;
    const u64* const from = strings + phase * g.words * WORD + panel * PANEL;
    const i64 low = dense ? std::max<i64>(0, ceil_div(-tw, g.stride_w)) : 0;
    const i64 high = dense ? std::clamp<i64>(ceil_div(g.in_w - tw, g.stride_w), 0, g.out_w) : g.out_w;
    const u64 used = tail_mask(high);
    columns(to, low, high, [&](i64 oh, i64 image, Lanes& l, Lanes& h) {
      const i64 ih = oh * g.stride_h + th;
      if (ih < 0 || ih >= g.in_h) return !dense;
      const u64* string = from + (image * g.in_h + ih) * row_size();
      l = load_lanes(string), h = load_lanes(string + LANE_TILE);
      if (shift < 0) l <<= -shift, h <<= -shift;
      else l >>= shift, h >>= shift;
      l &= used, h &= used;
      return true;
    });
  }

  // Which positions a tap has inside, 16 taps.
  void inside(i64 first_tap, u64* to) const {
    u64 across[PANEL] = {}, down[PANEL] = {};  // output columns and rows whose pixel is inside
    for (i64 c = 0; c < std::min<i64>(PANEL, g.kernel_h * g.kernel_w - first_tap); ++c) {
      const i64 th = (first_tap + c) / g.kernel_w - g.padding_h, tw = (first_tap + c) % g.kernel_w - g.padding_w;
      for (i64 o = 0; o < g.out_w; ++o) across[c] |= u64(o * g.stride_w + tw >= 0 && o * g.stride_w + tw < g.in_w) << o;
      for (i64 o = 0; o < g.out_h; ++o) down[c] |= u64(o * g.stride_h + th >= 0 && o * g.stride_h + th < g.in_h) << o;
    }
    const Lanes across_l = load_lanes(across), across_h = load_lanes(across + LANE_TILE);
    const Lanes down_l = load_lanes(down), down_h = load_lanes(down + LANE_TILE);
    columns(to, 0, g.out_w, [&](i64 oh, i64, Lanes& l, Lanes& h) {
      l = across_l & -(down_l >> oh & 1), h = across_h & -(down_h >> oh & 1);
      return true;
    });
  }
};
