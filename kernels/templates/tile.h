// The micro-kernel of all three products: popcounts of 8 rows x 16 columns, over one list of word runs.
//
//     count[r][c] = sum over planes p of 2**p sum over words k of popcount(row_r,p[k] op column_c[k])
//
// Columns are a panel [k][16]. Planes go from the most to the least significant bit; counts are doubled between
// two planes. A run is `length` consecutive words at word `a` of the rows and word `b` of the panel.

struct Run {
  i64 a, b, length;
};

struct Xor {
  template <class T>
  INLINE T apply(T a, T b) { return a ^ b; }
};

struct And {
  template <class T>
  INLINE T apply(T a, T b) { return a & b; }
};

constexpr int TILE = 8;

// Eight independent rows; planes follow each other at a fixed distance.
struct RowPointers {
  const u64* row[TILE];
  i64 plane_stride;
  INLINE u64 word(const RowPointers& rows, int r, i64 k) { return rows.row[r][k]; }
  i64 start(int plane, const Run& run) const { return plane * plane_stride + run.a; }
};

// Eight channels side by side, [k][8].
struct LaneTile {
  const u64* base;
  i64 plane_stride;
  INLINE u64 word(const LaneTile& lanes, int r, i64 k) { return lanes.base[k * TILE + r]; }
  i64 start(int plane, const Run& run) const { return plane * plane_stride + run.a; }
};

typedef u32 Columns __attribute__((vector_size(4 * PANEL)));  // a row's counts, one per column

#if defined(__AVX512VPOPCNTDQ__)

typedef u64 V64 __attribute__((vector_size(64)));

INLINE V64 load64(const u64* p) { return V64(_mm512_loadu_si512(p)); }
INLINE V64 popcount64(V64 x) { return V64(_mm512_popcnt_epi64(__m512i(x))); }

// The low halves of 16 counts.
INLINE Columns narrow_counts(V64 low, V64 high) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return Columns(_mm512_permutex2var_epi32(__m512i(low), even, __m512i(high)));
}

// store(r, counts) receives row r. 16 accumulators stay in registers.
template <class Op, class Rows, class Store>
INLINE void count_tile(const Rows& rows, int planes, const Run* runs, int run_count, const u64* panel, Store store) {
  V64 low[TILE], high[TILE];
#pragma GCC unroll 8
  for (int r = 0; r < TILE; ++r) low[r] = high[r] = V64{};
  for (int p = planes - 1;; --p) {
    for (const Run* run = runs; run != runs + run_count; ++run) {
      const u64* column = panel + run->b * PANEL;
      const i64 begin = rows.start(p, *run), end = begin + run->length;
      // Loaded earlier, the rows' pointers take the place of others, or wait in vector registers.
      __asm__ volatile("" : : "r"(&rows) : "memory");
      for (i64 k = begin; k < end; ++k, column += PANEL) {
        const V64 b0 = load64(column), b1 = load64(column + 8);
#pragma GCC unroll 8
        for (int r = 0; r < TILE; ++r) {
          const V64 a = V64(_mm512_set1_epi64(i64(Rows::word(rows, r, k))));
          low[r] += popcount64(Op::apply(a, b0));
          high[r] += popcount64(Op::apply(a, b1));
        }
      }
    }
    if (p <= 0) break;
#pragma GCC unroll 8
    for (int r = 0; r < TILE; ++r) low[r] += low[r], high[r] += high[r];
  }
#pragma GCC unroll 8
  for (int r = 0; r < TILE; ++r) store(r, narrow_counts(low[r], high[r]));
}

#else

// Popcounts per byte, added up in bytes for up to 31 words (31 * 8 < 256), then widened.
constexpr int BYTE_LIMIT = 31;
#if defined(__AVX2__)
constexpr int VECTOR = 32, ROWS_AT_ONCE = 2;
#else
constexpr int VECTOR = 16, ROWS_AT_ONCE = 1;
#endif
constexpr int PARTS = PANEL * 8 / VECTOR;
typedef u64 Vector __attribute__((vector_size(VECTOR)));

INLINE Vector load_vector(const u64* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

#if defined(__AVX2__)
INLINE Vector byte_counts(Vector x) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m256i nibble = _mm256_set1_epi8(15);
  __m256i low = _mm256_and_si256(__m256i(x), nibble);
  __m256i high = _mm256_and_si256(_mm256_srli_epi64(__m256i(x), 4), nibble);
  return Vector(_mm256_add_epi8(_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high)));
}

INLINE Vector sum_bytes(Vector x) { return Vector(_mm256_sad_epu8(__m256i(x), _mm256_setzero_si256())); }
#else
INLINE Vector byte_counts(Vector x) {
  x -= (x >> 1) & 0x5555555555555555u;
  x = (x & 0x3333333333333333u) + ((x >> 2) & 0x3333333333333333u);
  return (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
}

INLINE Vector sum_bytes(Vector x) {
  x = (x & 0x00ff00ff00ff00ffu) + ((x >> 8) & 0x00ff00ff00ff00ffu);
  x += x >> 16;
  return (x + (x >> 32)) & 0xffffu;
}
#endif

INLINE Vector byte_add(Vector a, Vector b) {
  typedef u8 Bytes __attribute__((vector_size(VECTOR)));
  return Vector(Bytes(a) + Bytes(b));
}

// Rows r .. r + ROWS_AT_ONCE - 1 of a tile.
template <class Op, class Rows, class Store>
INLINE void count_rows(const Rows& rows, int r, int planes, const Run* runs, int run_count, const u64* panel,
                       Store store) {
  Vector total[ROWS_AT_ONCE][PARTS] = {};
  for (int p = planes - 1; p >= 0; --p) {
    Vector bytes[ROWS_AT_ONCE][PARTS] = {};
    for (auto& row : total)
      for (auto& part : row) part += part;
    auto flush = [&]() {
      for (int q = 0; q < ROWS_AT_ONCE; ++q)
        for (int i = 0; i < PARTS; ++i) total[q][i] += sum_bytes(bytes[q][i]), bytes[q][i] = Vector{};
    };
    i64 pending = 0;
    for (const Run* run = runs; run != runs + run_count; ++run) {
      const u64* column = panel + run->b * PANEL;
      i64 k = rows.start(p, *run);
      const i64 end = k + run->length;
      while (k < end) {
        const i64 stop = std::min(end, k + BYTE_LIMIT - pending);
        pending += stop - k;
        for (; k < stop; ++k, column += PANEL)
#pragma GCC unroll 8
          for (int i = 0; i < PARTS; ++i)
#pragma GCC unroll 2
            for (int q = 0; q < ROWS_AT_ONCE; ++q) {
              const Vector a = Rows::word(rows, r + q, k) + Vector{};
              const Vector b = load_vector(column + i * (PANEL / PARTS));
              bytes[q][i] = byte_add(bytes[q][i], byte_counts(Op::apply(a, b)));
            }
        if (pending == BYTE_LIMIT) flush(), pending = 0;
      }
    }
    flush();
  }
  for (int q = 0; q < ROWS_AT_ONCE; ++q) {
    u64 wide[PANEL];
    std::memcpy(wide, total[q], sizeof wide);
    Columns counts;
    for (int c = 0; c < PANEL; ++c) counts[c] = u32(wide[c]);
    store(r + q, counts);
  }
}

template <class Op, class Rows, class Store>
INLINE void count_tile(const Rows& rows, int planes, const Run* runs, int run_count, const u64* panel, Store store) {
#pragma GCC unroll 1
  for (int r = 0; r < TILE; r += ROWS_AT_ONCE) count_rows<Op>(rows, r, planes, runs, run_count, panel, store);
}

#endif

// For `store`, which must call nothing: no vector register keeps its value in a call, not even one that is rarely made.
template <class Element>
INLINE void store_columns(Element* to, Columns columns) {
  typedef Element Elements __attribute__((vector_size(PANEL * sizeof(Element))));
  const Elements elements = __builtin_convertvector(columns, Elements);
  std::memcpy(to, &elements, sizeof elements);
}

INLINE Columns load_columns(const i32* from) {
  Columns columns;
  std::memcpy(&columns, from, sizeof columns);
  return columns;
}
