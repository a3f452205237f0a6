// Eight rows x 32 or 64 columns without a vector popcount: four elements of a column are an index into a table of 16
// bytes, and one shuffle looks it up for all columns. A table is made of four elements of a row, with all their planes:
//
//     table[i] = sum over elements e < 4 and planes p of 2**p (bit p of row element e  op  bit e of i)
//
// so that four planes cost as much as one. An entry is at most 4 * 15; bytes take four of them before they are
// widened. A single plane is counted in other ways (plane_*.h). Blocks are [k][8 bytes of a word][WIDTH]; byte 2 i is
// column i, byte 2 i + 1 column i + WIDTH / 2, so that a vector of 16-bit sums holds neighbours.

#if defined(__AVX512BW__)
constexpr int WIDTH = 64, AT_ONCE = 8;  // rows whose sums are in registers
#else
constexpr int WIDTH = 32, AT_ONCE = 4;
#endif
constexpr int PANELS = WIDTH / PANEL, BYTES = WORD / 8;
constexpr int GROUPS = WORD / 4, TABLE = 16, QUAD = 4 * TABLE;  // tables of a word, bytes of one, of four neighbours
constexpr i64 CODE_LIMIT = 64;  // words whose counts fit into 16 bits

typedef u8 Bytes __attribute__((vector_size(WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(WIDTH)));

INLINE Bytes load_bytes(const void* from) {
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return bytes;
}

INLINE void store_bytes(void* to, Bytes bytes) { std::memcpy(to, &bytes, sizeof bytes); }

// What AVX2 and AVX-512 do under different names, in every 128-bit lane.
#if defined(__AVX512BW__)
INLINE Bytes look_up(Bytes table, Bytes index) { return Bytes(_mm512_shuffle_epi8(__m512i(table), __m512i(index))); }
INLINE Bytes lanes_of(const void* from) {
  return Bytes(_mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(from))));
}
template <class V>
INLINE V mix_low(V a, V b) {
  return V(sizeof(a[0]) == 1 ? _mm512_unpacklo_epi8(__m512i(a), __m512i(b)) : _mm512_unpacklo_epi16(__m512i(a), __m512i(b)));
}
template <class V>
INLINE V mix_high(V a, V b) {
  return V(sizeof(a[0]) == 1 ? _mm512_unpackhi_epi8(__m512i(a), __m512i(b)) : _mm512_unpackhi_epi16(__m512i(a), __m512i(b)));
}

// Adds value to the elements whose bit is set.
INLINE Bytes add_where(Bytes x, u64 bits, u8 value) {
  return Bytes(_mm512_mask_add_epi8(__m512i(x), bits, __m512i(x), _mm512_set1_epi8(char(value))));
}
#else
INLINE Bytes look_up(Bytes table, Bytes index) { return Bytes(_mm256_shuffle_epi8(__m256i(table), __m256i(index))); }
INLINE Bytes lanes_of(const void* from) {
  return Bytes(_mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(from))));
}
template <class V>
INLINE V mix_low(V a, V b) {
  return V(sizeof(a[0]) == 1 ? _mm256_unpacklo_epi8(__m256i(a), __m256i(b)) : _mm256_unpacklo_epi16(__m256i(a), __m256i(b)));
}
template <class V>
INLINE V mix_high(V a, V b) {
  return V(sizeof(a[0]) == 1 ? _mm256_unpackhi_epi8(__m256i(a), __m256i(b)) : _mm256_unpackhi_epi16(__m256i(a), __m256i(b)));
}

INLINE Bytes add_where(Bytes x, u32 bits, u8 value) {
  const __m256i bit = _mm256_set1_epi64x(i64(0x8040201008040201u));
  const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(int(bits)), byte), bit);
  return x + (Bytes(_mm256_cmpeq_epi8(spread, bit)) & value);
}
#endif

INLINE Bytes low_nibbles(Bytes x) { return x & 15; }
INLINE Bytes high_nibbles(Bytes x) { return Bytes(Halves(x) >> 4) & 15; }

// An operand of look_up: index(i, lane) for byte i of every 128-bit lane.
struct Indices {
  alignas(64) u8 bytes[WIDTH];
  template <class Index>
  constexpr explicit Indices(Index index) : bytes{} {
    for (int i = 0; i < WIDTH; ++i) bytes[i] = u8(index(i % 16, i / 16));
  }
};

// Sums of bytes: all = even bytes + 256 odd bytes, modulo 2**16.
struct ByteSums {
  Halves all, odd;

  void add(Bytes x) { all += Halves(x), odd += Halves(x) >> 8; }

  // Sums of a row: set where fresh, else added to.
  void add_to(Columns* sums, bool fresh) const {
    typedef uint16_t Narrow __attribute__((vector_size(2 * PANEL)));
    Narrow narrow[PANELS];
    const Halves even = all - (odd << 8);
    std::memcpy(narrow, &even, sizeof even);
    std::memcpy(narrow + PANELS / 2, &odd, sizeof odd);
    for (int p = 0; p < PANELS; ++p) {
      const Columns counts = __builtin_convertvector(narrow[p], Columns);
      sums[p] = fresh ? counts : sums[p] + counts;
    }
  }
};

#if defined(__AVX512BW__)
{% include "plane_carry_save.h" %}
#else
{% include "plane_pairs.h" %}
#endif

// -- rows ----------------------------------------------------------------------------------------------------

// Neighbours in 32 bits, (z0, o0, z1, o1), to all their sums: z0 + z1, o0 + z1, z0 + o1, o0 + o1.
INLINE Bytes sums_of_two(Bytes x) {
  static constexpr Indices FIRST([](int i, int) { return i / 4 * 4 + i % 2; });
  static constexpr Indices SECOND([](int i, int) { return i / 4 * 4 + 2 + i % 4 / 2; });
  return look_up(x, load_bytes(FIRST.bytes)) + look_up(x, load_bytes(SECOND.bytes));
}

// Tables of two groups of four elements, at the places 0 and 8 of a lane, for even and odd lanes.
INLINE Bytes sums_of_four(Bytes x) {
  static constexpr Indices LOW([](int i, int lane) { return lane % 2 * 8 + i % 4; });
  static constexpr Indices HIGH([](int i, int lane) { return lane % 2 * 8 + 4 + i / 4; });
  return look_up(x, load_bytes(LOW.bytes)) + look_up(x, load_bytes(HIGH.bytes));
}

// The four tables of 16 elements: lane LANE of `low` has sums of two for elements 0 to 7, of `high` for 8 to 15.
template <int LANE>
INLINE void write_quad(Bytes low, Bytes high, u8* to) {
#if defined(__AVX512BW__)
  store_bytes(to, sums_of_four(Bytes(_mm512_shuffle_i32x4(__m512i(low), __m512i(high), LANE * 0x55))));
#else
  constexpr int BOTH = LANE ? 0xee : 0x44;
  store_bytes(to, sums_of_four(Bytes(_mm256_permute4x64_epi64(__m256i(low), BOTH))));
  store_bytes(to + WIDTH, sums_of_four(Bytes(_mm256_permute4x64_epi64(__m256i(high), BOTH))));
#endif
}

// Tables of WIDTH elements from their codes, which have all planes up to `largest`.
template <class Op, int... LANE>
INLINE void write_tables(Bytes codes, u8 largest, u8* to, std::integer_sequence<int, LANE...>) {
  const Bytes zero = Op::apply(codes, Bytes{}), one = Op::apply(codes, Bytes{} + largest);
  const Bytes low = sums_of_two(mix_low(zero, one)), high = sums_of_two(mix_high(zero, one));
  (write_quad<LANE>(low, high, to + LANE * AT_ONCE * QUAD), ...);
}

// One plane: [words][PLANE_WORD]. More: tables [groups of 4 planes][TILE / AT_ONCE][words][4][AT_ONCE][4][16], the group
// with the most significant planes first.
template <class Op, class Rows>
struct ReadyRows {
  const u8* data;
  int planes;
  i64 words;

  i64 group_size() const { return words * TILE * GROUPS * TABLE; }
  int groups() const { return (planes + 3) / 4; }

  static ReadyRows of(const Rows& rows, int planes, const Run* runs, int run_count, Buffer& memory) {
    ReadyRows ready{nullptr, planes, 0};
    for (const Run* run = runs; run != runs + run_count; ++run) ready.words += run->length;
    u8* data = memory.get<u8>(planes == 1 ? ready.words * PLANE_WORD : ready.groups() * ready.group_size());
    ready.data = data;
    i64 done = 0;
    for (const Run* run = runs; run != runs + run_count; ++run)
      for (i64 k = 0; k < run->length; ++k, ++done)
        if (planes == 1) write_one(rows, *run, k, data + done * PLANE_WORD);
        else ready.write_codes(rows, *run, k, data, done);
    return ready;
  }

  INLINE void write_one(const Rows& rows, const Run& run, i64 k, u8* to) {
    u64 words[TILE];
    for (int r = 0; r < TILE; ++r) words[r] = Rows::word(rows, r, rows.start(0, run) + k);
    write_plane(words, to);
  }

  void write_codes(const Rows& rows, const Run& run, i64 k, u8* data, i64 done) const {
    for (int group = 0; group < groups(); ++group) {
      const int first = 4 * (groups() - 1 - group), count = std::min(4, planes - first);
      for (int r = 0; r < TILE; ++r) {
        const i64 block = r / AT_ONCE * words + done;
        u8* to = data + group * group_size() + (block * 4 * AT_ONCE + r % AT_ONCE) * QUAD;
        for (int part = 0; part < WORD / WIDTH; ++part, to += WIDTH / 16 * AT_ONCE * QUAD) {
          Bytes codes{};
          for (int p = 0; p < count; ++p)
            codes = add_where(codes, Rows::word(rows, r, rows.start(first + p, run) + k) >> (part * WIDTH % WORD), u8(1 << p));
          write_tables<Op>(codes, u8((1 << count) - 1), to, std::make_integer_sequence<int, WIDTH / 16>());
        }
      }
    }
  }
};

// -- columns -------------------------------------------------------------------------------------------------

void lay_out_columns(const u64* panels, i64 count, i64 panel_words, i64 words, u64* block) {
  static const u64 zeros[PANEL] = {};
  static constexpr Indices INTERLEAVED([](int i, int) { return i / 2 + i % 2 * BYTES; });
  u8* to = reinterpret_cast<u8*>(block);
  for (i64 k = 0; k < words; ++k) {
    const u64* panel[PANELS];
    for (int p = 0; p < PANELS; ++p) panel[p] = p < count ? panels + (p * panel_words + k) * PANEL : zeros;
    auto column = [&](int c) { return panel[c / PANEL][c % PANEL]; };
    Halves x[8], y[8];  // eight rows of every lane, each with the bytes of two columns; transposed in three steps
#pragma GCC unroll 8
    for (int u = 0; u < 8; ++u) {
      u64 words_of[WIDTH / 8];
      for (int lane = 0; lane < WIDTH / 16; ++lane)
        words_of[2 * lane] = column(8 * lane + u), words_of[2 * lane + 1] = column(8 * lane + u + WIDTH / 2);
      x[u] = Halves(look_up(load_bytes(words_of), load_bytes(INTERLEAVED.bytes)));
    }
    for (int step = 0; step < 3; ++step) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) y[2 * u] = mix_low(x[u], x[u + 4]), y[2 * u + 1] = mix_high(x[u], x[u + 4]);
      std::copy(y, y + 8, x);
    }
    for (int byte = 0; byte < BYTES; ++byte, to += WIDTH) store_bytes(to, Bytes(x[byte]));
  }
}

// -- counting ------------------------------------------------------------------------------------------------

// Rows of a tile with up to four planes, AT_ONCE of them.
static __attribute__((noinline)) void count_codes(const u8* table, const Run* runs, int run_count, const u64* block,
                                                  Columns (*sums)[PANELS], bool fresh) {
  ByteSums counts[AT_ONCE] = {};
  i64 pending = 0;
  auto flush = [&]() {
#pragma GCC unroll 8
    for (int r = 0; r < AT_ONCE; ++r) counts[r].add_to(sums[r], fresh), counts[r] = ByteSums{};
    pending = 0, fresh = false;
  };
  for (const Run* run = runs; run != runs + run_count; ++run) {
    const u8* column = reinterpret_cast<const u8*>(block + run->b * WIDTH);
    for (i64 left = run->length; left;) {
      const i64 now = std::min(left, CODE_LIMIT - pending);
      pending += now, left -= now;
      for (i64 quad = 0; quad < now * 4; ++quad, column += 2 * WIDTH, table += AT_ONCE * QUAD) {
        const Bytes x = load_bytes(column), y = load_bytes(column + WIDTH);
        const Bytes i0 = low_nibbles(x), i1 = high_nibbles(x), i2 = low_nibbles(y), i3 = high_nibbles(y);
#pragma GCC unroll 8
        for (int r = 0; r < AT_ONCE; ++r) {
          const u8* t = table + r * QUAD;
          counts[r].add((look_up(lanes_of(t), i0) + look_up(lanes_of(t + TABLE), i1)) +
                        (look_up(lanes_of(t + 2 * TABLE), i2) + look_up(lanes_of(t + 3 * TABLE), i3)));
        }
      }
      if (pending == CODE_LIMIT) flush();
    }
  }
  flush();
}

template <class Op, class Rows, class Store>
INLINE void count_tile(const ReadyRows<Op, Rows>& ready, const Run* runs, int run_count, const u64* block, Store store) {
  Columns sums[TILE][PANELS];
  if (ready.planes == 1) count_plane<Op>(ready.data, runs, run_count, block, sums);
  for (int group = 0; ready.planes > 1 && group < ready.groups(); ++group) {
    for (int r = 0; group && r < TILE; ++r)
      for (Columns& panel : sums[r]) panel <<= 4;
    for (int r = 0; r < TILE; r += AT_ONCE)
      count_codes(ready.data + group * ready.group_size() + r * ready.words * GROUPS * TABLE, runs, run_count, block,
                  sums + r, group == 0);
  }
  for (int r = 0; r < TILE; ++r)
    for (int p = 0; p < PANELS; ++p) store(r, p, sums[r][p]);
}
