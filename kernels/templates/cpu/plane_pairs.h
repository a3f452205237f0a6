// Rows with one plane, by tables: two rows share a table, in the lower and upper half of its bytes. There are 256 such
// tables, and they are constant.

constexpr int PAIRS = TILE / 2;
constexpr i64 PLANE_WORD = PAIRS * GROUPS * sizeof(uint16_t);  // bytes of a tile's word made ready
constexpr int BYTE_LIMIT = 3;      // words whose counts fit into bytes
constexpr i64 PAIR_LIMIT = 1020;   // into 16 bits

// Tables of all pairs of four elements: a in the lower half of an entry, b in the upper.
template <class Op>
struct PairTables {
  alignas(64) u8 entries[256 * TABLE];
  PairTables() {
    auto count = [](int row, int column) { return __builtin_popcount(Op::apply(row, column) & 15); };
    for (int pair = 0; pair < 256; ++pair)
      for (int i = 0; i < TABLE; ++i) entries[pair * TABLE + i] = u8(count(pair & 15, i) + 16 * count(pair >> 4, i));
  }
};
template <class Op>
static const PairTables<Op> PAIR_TABLES;

// Where the tables of a word begin, [PAIRS][GROUPS].
INLINE void write_plane(const u64* words, u8* to) {
  constexpr u64 LOW = 0x0f0f0f0f0f0f0f0fu;
  for (int r = 0; r < TILE; r += 2, to += GROUPS * sizeof(uint16_t)) {
    const u64 a = words[r], b = words[r + 1];
    const __m128i even = _mm_cvtsi64_si128(i64((a & LOW) | (b & LOW) << 4));
    const __m128i odd = _mm_cvtsi64_si128(i64((a >> 4 & LOW) | (b & ~LOW)));
    const __m256i offsets = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(even, odd)), 4);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), offsets);
  }
}

// Bytes whose lower half counts one row and the upper half another: at most 15 before they are taken.
struct PairSums {
  Bytes all, high;  // all = low + 16 high, modulo 2**8
  void take(Bytes x) { all += x, high += high_nibbles(x); }
  Bytes low() const { return all - (Bytes(Halves(high) << 4) & 0xf0); }
};

// One word: 16 look-ups a pair, three or two before they are taken.
INLINE void count_word(const u8* tables, const u8* ready, const u8* column, PairSums* counts) {
  auto entry = [&](int pair, int group, Bytes index) {
    uint16_t offset;
    std::memcpy(&offset, ready + (pair * GROUPS + group) * sizeof offset, sizeof offset);
    return look_up(lanes_of(tables + offset), index);
  };
#pragma GCC unroll 2
  for (int byte = 0; byte < 6; byte += 3) {
    const Bytes x = load_bytes(column + byte * WIDTH), y = load_bytes(column + (byte + 1) * WIDTH);
    const Bytes z = load_bytes(column + (byte + 2) * WIDTH);
    const Bytes i0 = low_nibbles(x), i1 = high_nibbles(x), i2 = low_nibbles(y);
    const Bytes i3 = high_nibbles(y), i4 = low_nibbles(z), i5 = high_nibbles(z);
#pragma GCC unroll 4
    for (int pair = 0; pair < PAIRS; ++pair) {
      const int g = 2 * byte;
      counts[pair].take(entry(pair, g, i0) + entry(pair, g + 1, i1) + entry(pair, g + 2, i2));
      counts[pair].take(entry(pair, g + 3, i3) + entry(pair, g + 4, i4) + entry(pair, g + 5, i5));
    }
  }
#pragma GCC unroll 2
  for (int byte = 6; byte < BYTES; ++byte) {
    const Bytes x = load_bytes(column + byte * WIDTH), low = low_nibbles(x), high = high_nibbles(x);
#pragma GCC unroll 4
    for (int pair = 0; pair < PAIRS; ++pair)
      counts[pair].take(entry(pair, 2 * byte, low) + entry(pair, 2 * byte + 1, high));
  }
}

// A tile with one plane.
template <class Op>
static __attribute__((noinline)) void count_plane(const u8* ready, const Run* runs, int run_count, const u64* block,
                                                  Columns (*sums)[PANELS]) {
  PairSums counts[PAIRS] = {};
  ByteSums rows[TILE] = {};
  i64 in_bytes = 0, in_halves = 0;
  bool fresh = true;
  auto flush_bytes = [&]() {
#pragma GCC unroll 4
    for (int pair = 0; pair < PAIRS; ++pair) {
      rows[2 * pair].add(counts[pair].low()), rows[2 * pair + 1].add(counts[pair].high);
      counts[pair] = PairSums{};
    }
    in_bytes = 0;
  };
  auto flush_halves = [&]() {
    for (int r = 0; r < TILE; ++r) rows[r].add_to(sums[r], fresh), rows[r] = ByteSums{};
    in_halves = 0, fresh = false;
  };
  for (const Run* run = runs; run != runs + run_count; ++run) {
    const u8* column = reinterpret_cast<const u8*>(block + run->b * WIDTH);
    for (i64 k = 0; k < run->length; ++k, column += BYTES * WIDTH, ready += PLANE_WORD) {
      count_word(PAIR_TABLES<Op>.entries, ready, column, counts);
      if (++in_bytes == BYTE_LIMIT) flush_bytes();
      if (++in_halves == PAIR_LIMIT) flush_bytes(), flush_halves();
    }
  }
  flush_bytes();
  flush_halves();
}
