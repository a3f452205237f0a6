// Shared by every kernel: types, threads, lane sums, noise, and the few primitives that differ by ISA.
// A rendered source is self-contained: templates are included as text, constants come from the Python modules
// that define them (packing.py, reference/, noise.py).
{% include "headers.h" %}

#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int16_t i16;
typedef int32_t i32;
typedef int64_t i64;

constexpr int WORD = {{ word }};            // bits of a word
constexpr int PANEL = {{ panel }};          // channels side by side in a weight panel
constexpr int LANE_TILE = {{ lane_tile }};  // channels side by side in gradient lanes
constexpr int LANES = {{ lanes }};          // width of the vector a sum is defined over
constexpr i64 BLOCK = {{ block }};          // elements per block of the mean of a tensor
constexpr i64 SMALL = 1 << 15;              // elements below which a second thread costs more than it saves

// Exported functions return one of these.
enum Status { OK = 0, BAD_INDEX = 1 };

INLINE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
INLINE u64 tail_mask(i64 bits) { return bits >= WORD ? ~u64(0) : (u64(1) << bits) - 1; }

// -- threads -------------------------------------------------------------------------------------------------
// body(i) for i < count, in contiguous pieces. No result may depend on the number of threads.

template <class Body>
static void parallel_for(i64 count, i64 threads, Body body) {
  if (threads <= 1 || count <= 1) {
    for (i64 i = 0; i < count; ++i) body(i);
    return;
  }
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (i64 i = 0; i < count; ++i) body(i);
}

INLINE i64 useful_threads(i64 elements, i64 threads) { return elements < SMALL ? 1 : threads; }

// Grow-only memory of the calling thread: fresh pages cost as much as the products computed in them.
// A Buffer lives as long as its thread; its contents only during one call.
struct Buffer {
  void* data = nullptr;
  size_t capacity = 0;
  ~Buffer() { std::free(data); }
  template <class T>
  T* get(i64 count) {
    size_t bytes = (size_t(std::max<i64>(count, 1)) * sizeof(T) + 63) / 64 * 64;
    if (bytes > capacity) {
      std::free(data);
      data = std::aligned_alloc(64, bytes);
      if (!data) std::abort();
      capacity = bytes;
    }
    return static_cast<T*>(data);
  }
};

// -- row lists -----------------------------------------------------------------------------------------------

// Number of used entries of a selection (unused ones, at the end, are -1), or -1 where an index is out of range.
static i64 used_count(const i32* index, i64 count, i64 size) {
  i64 used = 0;
  for (i64 k = 0; k < count; ++k) {
    if (index[k] >= size) return -1;
    used += index[k] >= 0;
  }
  for (i64 k = 0; k < used; ++k)
    if (index[k] < 0) return -1;
  return used;
}

// -- sums in the defined order -------------------------------------------------------------------------------

INLINE float halve(float* lane) {
  for (int half = LANES / 2; half >= 1; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

// reference.lane_sum of value(0), ..., value(n - 1).
template <class Value>
INLINE float lane_sum(i64 n, Value value) {
  alignas(64) float lane[LANES] = {};
  i64 i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int l = 0; l < LANES; ++l) lane[l] += value(i + l);
  for (int l = 0; i + l < n; ++l) lane[l] += value(i + l);
  return halve(lane);
}

// Minimum and maximum as torch.amin and amax: once NaN, always NaN.
INLINE float nan_min(float low, float x) { return (x < low) | (x != x) ? x : low; }
INLINE float nan_max(float high, float x) { return (x > high) | (x != x) ? x : high; }

// -- noise (noise.py) ----------------------------------------------------------------------------------------

struct Keys {
  u32 k0, k1;
};

INLINE u32 hash32(u32 index, Keys keys) {
  u32 x = (index ^ keys.k0) * {{ multipliers[0] }}u;
  x = (x ^ (x >> 16)) * {{ multipliers[1] }}u;
  x = ((x ^ (x >> 15)) + keys.k1) * {{ multipliers[2] }}u;
  return x ^ (x >> 16);
}

INLINE float uniform(u32 index, Keys keys) { return float(i32(hash32(index, keys) >> 8)) * 0x1p-24f; }

// -- 64 elements <-> one word --------------------------------------------------------------------------------

enum Relation { NOT_LESS, GREATER, LESS_EQUAL, ABS_LESS_EQUAL };

INLINE bool holds(Relation relation, float x, float limit) {
  if (relation == NOT_LESS) return !(x < limit);
  if (relation == GREATER) return x > limit;
  return (relation == ABS_LESS_EQUAL ? std::fabs(x) : x) <= limit;
}

// Bit p of 64 bytes (byte i -> bit i).
INLINE u64 plane_of_bytes(const u8* bytes, int p) {
#if defined(__AVX512BW__)
  return _mm512_test_epi8_mask(_mm512_loadu_si512(bytes), _mm512_set1_epi8(char(1 << p)));
#elif defined(__AVX2__)
  const __m128i to_sign = _mm_cvtsi32_si128(7 - p);
  u64 word = 0;
  for (int i = 0; i < 2; ++i) {
    const __m256i v = _mm256_loadu_si256((const __m256i*)(bytes + 32 * i));
    word |= u64(u32(_mm256_movemask_epi8(_mm256_sll_epi16(v, to_sign)))) << (32 * i);
  }
  return word;
#else
  u64 word = 0;
  for (int i = 0; i < 8; ++i) {
    u64 eight;
    std::memcpy(&eight, bytes + 8 * i, 8);
    eight = (eight >> p) & 0x0101010101010101u;
    word |= ((eight * 0x0102040810204080u) >> 56) << (8 * i);  // gathers the eight low bits into one byte
  }
  return word;
#endif
}

// The limit that element i is compared with: one for all, or each its own.
INLINE float limit1(float limit, int) { return limit; }
INLINE float limit1(const float* limit, int i) { return limit[i]; }
#if defined(__AVX2__)
INLINE __m256 limit8(float limit, int) { return _mm256_set1_ps(limit); }
INLINE __m256 limit8(const float* limit, int i) { return _mm256_loadu_ps(limit + i); }
#endif
#if defined(__AVX512F__)
INLINE __m512 limit16(float limit, int) { return _mm512_set1_ps(limit); }
INLINE __m512 limit16(const float* limit, int i) { return _mm512_loadu_ps(limit + i); }
#endif

// Bit i of the result: whether x[i] is in the relation to its limit (a float, or an array of 64), for 64 floats. NaN:
// only NOT_LESS holds.
template <Relation RELATION, class Limit>
INLINE u64 compare64(const float* x, Limit limit) {
#if defined(__AVX2__)
  constexpr int COMPARE = RELATION == NOT_LESS ? _CMP_NLT_UQ : RELATION == GREATER ? _CMP_GT_OQ : _CMP_LE_OQ;
  u64 word = 0;
#if defined(__AVX512F__)
  for (int i = 0; i < 4; ++i) {
    __m512 v = _mm512_loadu_ps(x + 16 * i);
    if (RELATION == ABS_LESS_EQUAL) v = _mm512_abs_ps(v);
    word |= u64(_mm512_cmp_ps_mask(v, limit16(limit, 16 * i), COMPARE)) << (16 * i);
  }
#else
  for (int i = 0; i < 8; ++i) {
    __m256 v = _mm256_loadu_ps(x + 8 * i);
    if (RELATION == ABS_LESS_EQUAL) v = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
    word |= u64(u32(_mm256_movemask_ps(_mm256_cmp_ps(v, limit8(limit, 8 * i), COMPARE)))) << (8 * i);
  }
#endif
  return word;
#else
  alignas(64) u8 bytes[WORD];
  for (int i = 0; i < WORD; ++i) bytes[i] = holds(RELATION, x[i], limit1(limit, i));
  return plane_of_bytes(bytes, 0);
#endif
}

// mask[i] = all ones where bit i is set, else 0, for 64 bits.
INLINE void expand64(u64 word, u32* mask) {
#if defined(__AVX512DQ__)
  for (int i = 0; i < 4; ++i) _mm512_storeu_si512(mask + 16 * i, _mm512_movm_epi32(__mmask16(word >> (16 * i))));
#elif defined(__AVX2__)
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (int i = 0; i < 8; ++i) {
    __m256i byte = _mm256_set1_epi32(int(word >> (8 * i)) & 255);
    __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(byte, bit), bit);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(mask + 8 * i), set);
  }
#else
  for (int half = 0; half < 2; ++half) {
    u32 part = u32(word >> (32 * half));
    for (int i = 0; i < 32; ++i) mask[32 * half + i] = part & (u32(1) << i) ? ~u32(0) : 0;
  }
#endif
}

INLINE u32 float_bits(float x) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

INLINE float bits_float(u32 bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// -- transposes ----------------------------------------------------------------------------------------------

// a and b swap the blocks of STEP lanes next to the diagonal of a square matrix held by vectors of LANE... lanes.
template <int STEP, class V, class Mask, int... LANE>
INLINE void exchange(V& a, V& b, std::integer_sequence<int, LANE...>) {
  constexpr int COUNT = sizeof...(LANE);
#if defined(__clang__)
  V low = __builtin_shufflevector(a, b, (LANE & STEP ? COUNT + LANE - STEP : LANE)...);
  V high = __builtin_shufflevector(a, b, (LANE & STEP ? COUNT + LANE : LANE + STEP)...);
#else
  V low = __builtin_shuffle(a, b, Mask{(LANE & STEP ? COUNT + LANE - STEP : LANE)...});
  V high = __builtin_shuffle(a, b, Mask{(LANE & STEP ? COUNT + LANE : LANE + STEP)...});
#endif
  a = low, b = high;
}

// Transpose the COUNT x COUNT matrix held by COUNT vectors: blocks of COUNT / 2, ..., 2, 1 lanes.
template <class V, class Mask, int COUNT, int STEP = COUNT / 2>
INLINE void transpose_vectors(V* v) {
#pragma GCC unroll 16
  for (int i = 0; i < COUNT; ++i)
    if (!(i & STEP)) exchange<STEP, V, Mask>(v[i], v[i + STEP], std::make_integer_sequence<int, COUNT>());
  if constexpr (STEP > 1) transpose_vectors<V, Mask, COUNT, STEP / 2>(v);
}

// 64 x 64 bits: bit i of word j becomes bit j of word i, in place.

#if defined(__AVX512VBMI__) && defined(__GFNI__)
struct TransposeTables {
  alignas(64) u8 gather[64], spread[64];
  TransposeTables() {
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < 8; ++j) gather[8 * j + 7 - i] = spread[8 * j + i] = u8(8 * i + j);
  }
};
static const TransposeTables TABLES;

INLINE void transpose64(u64* words) {
  typedef u64 V8 __attribute__((vector_size(64)));
  const __m512i gather = _mm512_load_si512(TABLES.gather), spread = _mm512_load_si512(TABLES.spread);
  const __m512i identity = _mm512_set1_epi64(i64(0x8040201008040201u));
  V8 v[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    // Eight 8 x 8 blocks side by side; the affine map with the block as matrix and unit vectors transposes it.
    __m512i blocks = _mm512_permutexvar_epi8(gather, _mm512_loadu_si512(words + 8 * j));
    v[j] = V8(_mm512_gf2p8affine_epi64_epi8(identity, blocks, 0));
  }
  transpose_vectors<V8, V8, 8>(v);
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j)
    _mm512_storeu_si512(words + 8 * j, _mm512_permutexvar_epi8(spread, __m512i(v[j])));
}
#else
template <int STEP>
INLINE void swap_blocks(u64* words, u64 mask) {
  for (int block = 0; block < WORD; block += 2 * STEP)
    for (int i = block; i < block + STEP; ++i) {
      u64 change = ((words[i] >> STEP) ^ words[i + STEP]) & mask;
      words[i] ^= change << STEP;
      words[i + STEP] ^= change;
    }
}

INLINE void transpose64(u64* words) {
  swap_blocks<32>(words, 0x00000000ffffffffu);
  swap_blocks<16>(words, 0x0000ffff0000ffffu);
  swap_blocks<8>(words, 0x00ff00ff00ff00ffu);
  swap_blocks<4>(words, 0x0f0f0f0f0f0f0f0fu);
  swap_blocks<2>(words, 0x3333333333333333u);
  swap_blocks<1>(words, 0x5555555555555555u);
}
#endif

// -- elements as numbers -------------------------------------------------------------------------------------

typedef struct { uint16_t bits; } bf16;
INLINE float load(float x) { return x; }
INLINE float load(i32 x) { return float(x); }
INLINE float load(i16 x) { return float(x); }
INLINE float load(bf16 x) { return bits_float(u32(x.bits) << 16); }
