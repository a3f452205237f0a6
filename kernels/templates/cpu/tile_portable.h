// One row x 16 columns at a time, counted by shifts and masks in what vectors the compiler has.
// Counts of bytes are added up in bytes for up to 31 words (31 * 8 < 256), then widened.

constexpr int WIDTH = PANEL;
constexpr int BYTE_LIMIT = 31, VECTOR = 16, PARTS = PANEL * 8 / VECTOR;
typedef u64 Vector __attribute__((vector_size(VECTOR)));

INLINE Vector load_vector(const u64* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

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

// Rows are counted as they are.
template <class Op, class Rows>
struct ReadyRows {
  const Rows& rows;
  int planes;
  INLINE ReadyRows of(const Rows& rows, int planes, const Run*, int, Buffer&) { return {rows, planes}; }
};

// One plane of a row, added to twice what was counted before.
template <class Op, class Rows>
INLINE void count_plane(const Rows& rows, int r, int p, const Run* runs, int run_count, const u64* block, Vector* total) {
  Vector bytes[PARTS] = {};
  for (int i = 0; i < PARTS; ++i) total[i] += total[i];
  auto flush = [&]() {
    for (int i = 0; i < PARTS; ++i) total[i] += sum_bytes(bytes[i]), bytes[i] = Vector{};
  };
  i64 pending = 0;
  for (const Run* run = runs; run != runs + run_count; ++run) {
    const u64* column = block + run->b * WIDTH;
    i64 k = rows.start(p, *run);
    const i64 end = k + run->length;
    while (k < end) {
      const i64 stop = std::min(end, k + BYTE_LIMIT - pending);
      pending += stop - k;
      for (; k < stop; ++k, column += WIDTH)
#pragma GCC unroll 8
        for (int i = 0; i < PARTS; ++i) {
          const Vector a = Rows::word(rows, r, k) + Vector{};
          bytes[i] += byte_counts(Op::apply(a, load_vector(column + i * (PANEL / PARTS))));  // no byte overflows
        }
      if (pending == BYTE_LIMIT) flush(), pending = 0;
    }
  }
  flush();
}

template <class Op, class Rows, class Store>
INLINE void count_tile(const ReadyRows<Op, Rows>& ready, const Run* runs, int run_count, const u64* block, Store store) {
#pragma GCC unroll 1
  for (int r = 0; r < TILE; ++r) {
    Vector total[PARTS] = {};
    for (int p = ready.planes - 1; p >= 0; --p) count_plane<Op>(ready.rows, r, p, runs, run_count, block, total);
    u64 wide[PANEL];
    std::memcpy(wide, total, sizeof wide);
    Columns counts;
    for (int c = 0; c < PANEL; ++c) counts[c] = u32(wide[c]);
    store(r, 0, counts);
  }
}
