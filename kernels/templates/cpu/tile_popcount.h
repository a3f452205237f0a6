// Eight rows x 16 columns with a vector popcount: 16 accumulators stay in registers.

constexpr int WIDTH = PANEL;
typedef u64 V64 __attribute__((vector_size(64)));

INLINE V64 load64(const u64* p) { return V64(_mm512_loadu_si512(p)); }
INLINE V64 popcount64(V64 x) { return V64(_mm512_popcnt_epi64(__m512i(x))); }

// The low halves of 16 counts.
INLINE Columns narrow_counts(V64 low, V64 high) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return Columns(_mm512_permutex2var_epi32(__m512i(low), even, __m512i(high)));
}

// Rows are counted as they are.
template <class Op, class Rows>
struct ReadyRows {
  const Rows& rows;
  int planes;
  INLINE ReadyRows of(const Rows& rows, int planes, const Run*, int, Buffer&) { return {rows, planes}; }
};

// Planes go from the most to the least significant bit; counts are doubled between two planes.
template <class Op, class Rows, class Store>
INLINE void count_tile(const ReadyRows<Op, Rows>& ready, const Run* runs, int run_count, const u64* block, Store store) {
  const Rows& rows = ready.rows;
  V64 low[TILE], high[TILE];
#pragma GCC unroll 8
  for (int r = 0; r < TILE; ++r) low[r] = high[r] = V64{};
  for (int p = ready.planes - 1;; --p) {
    for (const Run* run = runs; run != runs + run_count; ++run) {
      const u64* column = block + run->b * WIDTH;
      const i64 begin = rows.start(p, *run), end = begin + run->length;
      // Loaded earlier, the rows' pointers take the place of others, or wait in vector registers.
      __asm__ volatile("" : : "r"(&rows) : "memory");
      for (i64 k = begin; k < end; ++k, column += WIDTH) {
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
  for (int r = 0; r < TILE; ++r) store(r, 0, narrow_counts(low[r], high[r]));
}
