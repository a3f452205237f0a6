// output_product and grad_input_product: one xor kernel over rows [planes][N][IH][IW][CW] and panels
// [channels/16][taps][CW][16] (packing.py).
//
//     out[n, position, c] = base[class][c] - factor * count
//
// A position's tap class says which taps are inside the image, per axis. A tile takes its 8 positions from one
// class, across images, so that padding costs nothing and needs no bits.

struct Geometry {
{% for field in geometry %}
  i64 {{ field }};
{% endfor %}
};

struct Member {
  i64 output, input;  // a position of the output, and that of the input under its first tap
};

// Positions of one axis that share their taps: first, first + step, ... (count of them).
struct AxisClass {
  i64 first, count;
  std::vector<Member> members;
};

struct Axis {
  i64 inputs, outputs, kernel, stride, padding;
  bool transposed;

  // The input under tap t of output o, or -1 where there is none. Transposed taps are flipped (panels_t).
  i64 input(i64 o, i64 t) const {
    if (!transposed) {
      i64 i = o * stride - padding + t;
      return i >= 0 && i < inputs ? i : -1;
    }
    i64 scaled = o + padding - (kernel - 1) + t;
    return scaled >= 0 && scaled % stride == 0 && scaled / stride < inputs ? scaled / stride : -1;
  }

  i64 tap_step() const { return transposed ? stride : 1; }

  std::vector<AxisClass> classes() const {
    std::vector<AxisClass> found;
    for (i64 o = 0; o < outputs; ++o) {
      i64 first = 0, count = 0, start = 0;
      for (i64 t = 0; t < kernel; ++t) {
        i64 i = input(o, t);
        if (i < 0) continue;
        if (!count) first = t, start = i;
        ++count;
      }
      auto same = [&](const AxisClass& c) { return c.first == first && c.count == count; };
      auto place = std::find_if(found.begin(), found.end(), same);
      if (place == found.end()) place = found.insert(found.end(), AxisClass{first, count, {}});
      place->members.push_back({o, start});
    }
    return found;
  }
};

// Positions that share their taps on both axes.
struct TapClass {
  std::vector<Member> members;  // as offsets in the memory of an image
  std::vector<Run> runs;
  std::vector<i32> base;  // per channel
  i64 first_tile;
};

// The next position of a class to compute.
struct Cursor {
  i64 image, position;
};

struct Product {
  Geometry g;
  Axis rows, columns;
  i64 planes, panels, blocks;  // bit planes of the rows; groups of 16 and of WIDTH channels
  bool sign;           // both operands +-1, else the rows' codes are 0, 1, ... 2**planes - 1
  const u64 *words, *weights;
  std::vector<AxisClass> h_classes, w_classes;
  std::vector<TapClass> classes;
  i64 tiles;

  i64 tap(i64 h, i64 w) const { return h * g.kernel_w + w; }
  i64 panel_words() const { return g.kernel_h * g.kernel_w * g.words; }

  // Runs of consecutive words: taps that are neighbours along w are merged.
  std::vector<Run> runs_of(const AxisClass& h, const AxisClass& w) const {
    std::vector<Run> runs;
    for (i64 a = 0; a < h.count; ++a)
      for (i64 b = 0; b < w.count; ++b) {
        i64 t = tap(h.first + a * rows.tap_step(), w.first + b * columns.tap_step());
        Run run{(a * g.in_w + b) * g.words, t * g.words, g.words};
        bool extends = !runs.empty() && runs.back().a + runs.back().length == run.a &&
                       runs.back().b + runs.back().length == run.b;
        if (extends) runs.back().length += run.length;
        else runs.push_back(run);
      }
    return runs;
  }

  std::vector<Member> members_of(const AxisClass& h, const AxisClass& w) const {
    std::vector<Member> members;
    for (const Member& mh : h.members)
      for (const Member& mw : w.members)
        members.push_back({(mh.output * g.out_w + mw.output) * g.channels, (mh.input * g.in_w + mw.input) * g.words});
    return members;
  }

  // popcount of the weights of every tap and channel, [taps][blocks * WIDTH]
  std::vector<i32> tap_counts() const {
    const i64 taps = g.kernel_h * g.kernel_w, width = blocks * WIDTH;
    std::vector<i32> counts(taps * width);
    for (i64 j = 0; j < panels; ++j)
      for (i64 t = 0; t < taps; ++t)
        for (i64 k = 0; k < g.words; ++k) {
          const u64* w = weights + (j * panel_words() + t * g.words + k) * PANEL;
          i32* to = &counts[t * width + j * PANEL];
          for (int c = 0; c < PANEL; ++c) to[c] += i32(__builtin_popcountll(w[c]));
        }
    return counts;
  }

  // popcount of the weights over the taps of a class, per channel
  std::vector<i32> class_counts(const TapClass& c, const std::vector<i32>& counts) const {
    const i64 width = blocks * WIDTH;
    std::vector<i32> sum(width);
    for (const Run& run : c.runs)
      for (i64 t = run.b / g.words; t < (run.b + run.length) / g.words; ++t)
        for (i64 i = 0; i < width; ++i) sum[i] += counts[t * width + i];
    return sum;
  }

  void prepare(bool transposed, i64 contraction, i32* weight_sum, i64 threads) {
    rows = {g.in_h, g.out_h, g.kernel_h, g.stride_h, g.padding_h, transposed};
    columns = {g.in_w, g.out_w, g.kernel_w, g.stride_w, g.padding_w, transposed};
    panels = ceil_div(g.channels, PANEL);
    blocks = ceil_div(g.channels, WIDTH);
    h_classes = rows.classes();
    w_classes = columns.classes();
    const std::vector<i32> counts = sign ? std::vector<i32>() : tap_counts();
    tiles = 0;
    for (const AxisClass& h : h_classes)
      for (const AxisClass& w : w_classes) {
        TapClass c{members_of(h, w), runs_of(h, w), {}, tiles};
        const i32 products = i32(contraction * h.count * w.count);
        c.base = sign ? std::vector<i32>(blocks * WIDTH, products) : class_counts(c, counts);
        if (weight_sum) fill_weight_sum(c, products, weight_sum, threads);
        if (!sign)
          for (i32& value : c.base) value *= i32((1 << planes) - 1);
        tiles += ceil_div(g.batch * i64(c.members.size()), TILE);
        classes.push_back(std::move(c));
      }
  }

  // The product with code 1 everywhere: 2 * popcount - number of products.
  void fill_weight_sum(const TapClass& c, i32 products, i32* weight_sum, i64 threads) const {
    const i64 count = i64(c.members.size());
    parallel_for(count, useful_threads(count * g.channels, threads), [&](i64 m) {
      i32* to = weight_sum + c.members[m].output;
      for (i64 i = 0; i < g.channels; ++i) to[i] = 2 * c.base[i] - products;
    });
  }

  // Words that a tile of a class counts with a block, and what else it takes, in words.
  i64 cost(const TapClass& c) const {
    constexpr i64 LEAVING = 3;
    i64 words = 0;
    for (const Run& run : c.runs) words += run.length;
    return words * planes + LEAVING;
  }

  // Where one of `parts` parts of all tiles x blocks begins, which cost the same.
  i64 boundary(i64 part, i64 parts) const {
    auto units = [&](size_t i) {
      const i64 end = i + 1 < classes.size() ? classes[i + 1].first_tile : tiles;
      return (end - classes[i].first_tile) * blocks;
    };
    i64 left = 0;
    for (size_t i = 0; i < classes.size(); ++i) left += units(i) * cost(classes[i]);
    left = left * part / parts;
    for (size_t i = 0; i < classes.size(); ++i) {
      const i64 all = units(i) * cost(classes[i]);
      if (left < all) return classes[i].first_tile * blocks + left / cost(classes[i]);
      left -= all;
    }
    return tiles * blocks;
  }

  // The first position of a tile.
  Cursor start(const TapClass& c, i64 tile) const {
    const i64 first = (tile - c.first_tile) * TILE, positions = i64(c.members.size());
    return {first / positions, first % positions};
  }

  // Rows of the next tile and where their results go; returns how many of the 8 are used. The others repeat the first.
  int locate(const TapClass& c, Cursor& at, RowPointers& from, i64* to) const {
    const i64 positions = i64(c.members.size()), in_size = g.in_h * g.in_w * g.words;
    const i64 out_size = g.out_h * g.out_w * g.channels;
    const int used = int(std::min<i64>(TILE, (g.batch - at.image) * positions - at.position));
    const u64* image = words + at.image * in_size;
    i64 out = at.image * out_size;
    for (int r = 0; r < used; ++r) {
      const Member& member = c.members[at.position];
      from.row[r] = image + member.input;
      to[r] = out + member.output;
      if (++at.position == positions) at.position = 0, ++at.image, image += in_size, out += out_size;
    }
    for (int r = used; r < TILE; ++r) from.row[r] = from.row[0], to[r] = to[0];
    return used;
  }

  // Panels side by side in blocks.
  const u64* lay_out(Buffer& memory, i64 threads) const {
    if constexpr (WIDTH == PANEL) {
      return weights;
    } else {
      constexpr i64 GROUP = WIDTH / PANEL;
      u64* laid = memory.get<u64>(blocks * panel_words() * WIDTH);
      parallel_for(blocks, useful_threads(blocks * panel_words() * WIDTH, threads), [&](i64 j) {
        lay_out_columns(weights + j * GROUP * panel_words() * PANEL, std::min(GROUP, panels - j * GROUP), panel_words(),
                        panel_words(), laid + j * panel_words() * WIDTH);
      });
      return laid;
    }
  }

  // Tiles x blocks begin .. end - 1, blocks fastest.
  template <bool SIGN, class Element>
  void compute(i64 begin, i64 end, const u64* laid, Element* out) const {
    static thread_local Buffer memory;
    Element spare[TILE * WIDTH];  // where the last block is not full
    i64 spare_rows[TILE];
    for (int r = 0; r < TILE; ++r) spare_rows[r] = r * WIDTH;
    RowPointers from;
    from.plane_stride = g.batch * g.in_h * g.in_w * g.words;
    i64 tile = begin / blocks, first = begin % blocks;
    size_t index = 0;
    while (index + 1 < classes.size() && classes[index + 1].first_tile <= tile) ++index;
    for (Cursor at = start(classes[index], tile); begin < end; ++tile, first = 0) {
      while (index + 1 < classes.size() && classes[index + 1].first_tile <= tile) ++index, at = {};
      const TapClass& c = classes[index];
      const i64 last = std::min(blocks, first + end - begin);
      i64 to[TILE];
      const int used = locate(c, at, from, to), count = int(c.runs.size());
      const auto ready = ReadyRows<Xor, RowPointers>::of(from, SIGN ? 1 : int(planes), c.runs.data(), count, memory);
      for (i64 j = first; j < last; ++j) {
        const i64 channel = j * WIDTH, left = g.channels - channel;
        Columns base[WIDTH / PANEL];
        for (int p = 0; p < WIDTH / PANEL; ++p) base[p] = load_columns(&c.base[channel + p * PANEL]);
        Element* const target = left < WIDTH ? spare : out + channel;
        const i64* const row = left < WIDTH ? spare_rows : to;
        auto store = [&](int r, int p, Columns sum) {
          store_columns(target + row[r] + p * PANEL, base[p] - (SIGN ? sum + sum : sum));
        };
        count_tile(ready, c.runs.data(), count, laid + j * panel_words() * WIDTH, store);
        for (int r = 0; left < WIDTH && r < used; ++r)
          std::memcpy(out + to[r] + channel, spare + spare_rows[r], left * sizeof(Element));
      }
      begin += last - first;
    }
  }
};

// A prepared product. out [N][OH][OW][channels].
template <bool SIGN, class Element>
static void run(Product& product, Element* out, i64 threads) {
  static thread_local Buffer memory;
  const u64* laid = product.lay_out(memory, threads);
  const i64 units = product.tiles * product.blocks;
  const i64 parts = useful_threads(units * product.panel_words() * WIDTH * product.planes, threads);
  parallel_for(parts, parts, [&](i64 part) {
    product.compute<SIGN>(product.boundary(part, parts), product.boundary(part + 1, parts), laid, out);
  });
}

static Product make_product(const u64* words, i64 planes, const u64* weights, const Geometry* geometry, bool sign) {
  Product product{};
  product.g = *geometry;
  product.planes = planes;
  product.sign = sign;
  product.words = words;
  product.weights = weights;
  return product;
}
