// The micro-kernel of all three products: popcounts of 8 rows x WIDTH columns, over one list of word runs.
//
//     count[r][c] = sum over planes p of 2**p sum over words k of popcount(row_r,p[k] op column_c[k])
//
// A run is `length` consecutive words at word `a` of the rows and word `b` of the columns. Every instruction set
// brings what suits it:
//
//     WIDTH              columns of a block, a multiple of PANEL
//     ReadyRows          what a tile's rows become before they are counted, for any number of blocks
//     lay_out_columns    panels [k][PANEL] to a block [k][WIDTH], where these differ
//     count_tile         the counts; store(r, p, counts) receives panel p of row r

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

typedef u32 Columns __attribute__((vector_size(4 * PANEL)));  // counts of a row and a panel

// Up to WIDTH / PANEL panels as one block [words][WIDTH]; what is missing is zero. A panel has room for panel_words.
void lay_out_columns(const u64* panels, i64 count, i64 panel_words, i64 words, u64* block);

#if defined(__AVX512VPOPCNTDQ__) && !defined(FQT_TABLES)
{% include "tile_popcount.h" %}
#elif defined(__AVX2__)
{% include "tile_tables.h" %}
#else
{% include "tile_portable.h" %}
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
