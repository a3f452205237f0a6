// Rows with one plane, by bits: carry-save adders, two ternary operations each, add up 16 bytes of a column, bit by
// bit, before anything is counted. A row's byte meets that of 64 columns as it is repeated in all bytes.

constexpr i64 PLANE_WORD = TILE * BYTES * sizeof(u32);  // bytes of a tile's word made ready
constexpr int ROWS_AT_ONCE = 4;
constexpr int CARRY_LIMIT = 31;  // sums of carries, of up to 8 each, that fit into a byte

// Every byte of a word, four times: [BYTES].
INLINE void write_plane(const u64* words, u8* to) {
  static constexpr Indices REPEATED([](int i, int lane) { return lane % 2 * 4 + i / 4; });
  const __m256i repeated = _mm256_load_si256(reinterpret_cast<const __m256i*>(REPEATED.bytes));
  for (int r = 0; r < TILE; ++r, to += BYTES * sizeof(u32))
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_shuffle_epi8(_mm256_set1_epi64x(i64(words[r])), repeated));
}

// 64 columns with a row's byte; as 32-bit elements, of which the instruction repeats one from memory.
template <class Op>
INLINE Bytes with_row(Bytes columns, const u8* row_byte) {
  typedef i32 Words __attribute__((vector_size(WIDTH)));
  i32 repeated;
  std::memcpy(&repeated, row_byte, sizeof repeated);
  return Bytes(Op::apply(Words(columns), Words(_mm512_set1_epi32(repeated))));
}

// Bits set of every byte.
INLINE Bytes bits_of_bytes(Bytes x) {
  static constexpr Indices COUNT([](int i, int) { return i % 2 + i / 2 % 2 + i / 4 % 2 + i / 8; });
  const Bytes count = load_bytes(COUNT.bytes);
  return look_up(count, low_nibbles(x)) + look_up(count, high_nibbles(x));
}

// x + y + z = sum + 2 carry, for every bit; the sum replaces x. The carry is y where y equals z, else it is x, which
// is then not the sum: taken from the sum, it needs no copy of x.
INLINE Bytes add_carry(Bytes& x, Bytes y, Bytes z) {
  constexpr int XOR = 0x96, CARRY = 0xd4;
  x = Bytes(_mm512_ternarylogic_epi64(__m512i(x), __m512i(y), __m512i(z), XOR));
  return Bytes(_mm512_ternarylogic_epi64(__m512i(y), __m512i(z), __m512i(x), CARRY));
}

// How many bits were set, by bit: ones, twos, fours and eights of them, and sixteens counted.
struct Carries {
  Bytes ones, twos, fours, eights, sixteens;

  void count(Bytes carry) { sixteens += bits_of_bytes(carry); }

  void add_to(Columns* sums, bool fresh) const {
    const Bytes upper = bits_of_bytes(fours) + bits_of_bytes(eights) * 2;
    ByteSums total{};
    total.add(sixteens);
    total.all <<= 4, total.odd <<= 4;
    total.add(bits_of_bytes(ones) + bits_of_bytes(twos) * 2 + upper * 4);
    total.add_to(sums, fresh);
  }
};

// The eight bytes of a word and a row: what they carry into the eights.
template <class Op>
INLINE Bytes add_word(const u8* row, const u8* column, Carries& sums) {
  Bytes twos[2], fours[2];
#pragma GCC unroll 4
  for (int i = 0; i < BYTES / 2; ++i) {
    const Bytes x = with_row<Op>(load_bytes(column + 2 * i * WIDTH), row + 2 * i * sizeof(u32));
    const Bytes y = with_row<Op>(load_bytes(column + (2 * i + 1) * WIDTH), row + (2 * i + 1) * sizeof(u32));
    twos[i % 2] = add_carry(sums.ones, x, y);
    if (i % 2) fours[i / 2] = add_carry(sums.twos, twos[0], twos[1]);
  }
  return add_carry(sums.fours, fours[0], fours[1]);
}

template <class Op>
INLINE void count_some_rows(const u8* row_bytes, const Run* runs, int run_count, const u64* block,
                            Columns (*sums)[PANELS], bool fresh) {
  Carries rows[ROWS_AT_ONCE] = {};
  i64 pending = 0;
  auto flush = [&]() {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS_AT_ONCE; ++r) rows[r].add_to(sums[r], fresh), rows[r] = Carries{};
    pending = 0, fresh = false;
  };
  for (const Run* run = runs; run != runs + run_count; ++run) {
    const u8* column = reinterpret_cast<const u8*>(block + run->b * WIDTH);
    for (i64 k = 0; k < run->length; k += 2) {
      const bool pair = k + 1 < run->length;
#pragma GCC unroll 4
      for (int r = 0; r < ROWS_AT_ONCE; ++r) {
        const u8* row = row_bytes + r * BYTES * sizeof(u32);
        const Bytes first = add_word<Op>(row, column, rows[r]);
        const Bytes second = pair ? add_word<Op>(row + PLANE_WORD, column + BYTES * WIDTH, rows[r]) : Bytes{};
        rows[r].count(add_carry(rows[r].eights, first, second));
      }
      row_bytes += (1 + pair) * PLANE_WORD, column += (1 + pair) * BYTES * WIDTH;
      if (++pending == CARRY_LIMIT) flush();
    }
  }
  if (pending || fresh) flush();
}

// A tile with one plane.
template <class Op>
static __attribute__((noinline)) void count_plane(const u8* rows, const Run* runs, int run_count, const u64* block,
                                                  Columns (*sums)[PANELS]) {
  for (int r = 0; r < TILE; r += ROWS_AT_ONCE)
    count_some_rows<Op>(rows + r * BYTES * sizeof(u32), runs, run_count, block, sums + r, true);
}
