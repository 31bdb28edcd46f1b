// Products of weights with the tokens of a block: C (m, n) = A (m, k) @ B (k, n), n <= kBlock.
//
// gemm.h lays tokens along the vector lanes, so that one token costs as much as 16, and multiplies
// fp32 copies of bf16 weights. With AVX-512 and without fast products of bf16, the lanes
// are 16 rows of A here. They are transposed in registers, 32 bits of each at a time: a vector then
// holds the same element of 16 rows, or in bf16 two neighbouring elements, which are widened in
// registers. A token costs only its own products, and the next rows are fetched meanwhile. With few
// tokens, this takes little longer than reading the weights.
//
// Both sum in the same order, so that C has the same bits: fused multiply-adds with k ascending, from
// 0 on in each part of kPartDepth elements. The sums of the parts are added in their order.
#pragma once

#include "common.h"
#include "gemm.h"

#if defined(__AVX512F__) && !defined(EXPO_FAST_BF16)
#define EXPO_FAST_ROW_LANES
#endif

#if defined(EXPO_FAST_ROW_LANES)

constexpr bool kAnyColumn = true;  // n tokens may be any columns of B

constexpr int64_t kPartDepth = 256;  // kDepth of gemm.h for fp32
constexpr int kSide = 16;            // rows and words of a tile that is transposed in registers
constexpr int kPackedTiles = 2;      // tiles whose sums stay in registers together
static_assert(kCopyDepth % kPartDepth == 0);

// Elements of A in a 32-bit word.
template <class T>
constexpr int64_t kInWord = 4 / sizeof(T);

// Transposes 16 x 16 words. They stay in registers only if the function is inlined.
[[gnu::always_inline]] inline void transpose_words(__m512i (&x)[kSide]) {
  __m512i y[kSide];
  for (int i = 0; i < kSide; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < kSide; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  // Now x[4 i + c] holds, in its quarter q, word 4 q + c of the rows 4 i to 4 i + 3.
  constexpr int kEven = 0x88, kOdd = 0xdd;  // quarters 0 and 2, or 1 and 3, of both operands
  for (int c = 0; c < 4; ++c) {
    const __m512i even_low = _mm512_shuffle_i32x4(x[c], x[4 + c], kEven);
    const __m512i odd_low = _mm512_shuffle_i32x4(x[c], x[4 + c], kOdd);
    const __m512i even_high = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], kEven);
    const __m512i odd_high = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], kOdd);
    y[c] = _mm512_shuffle_i32x4(even_low, even_high, kEven);
    y[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, kEven);
    y[8 + c] = _mm512_shuffle_i32x4(even_low, even_high, kOdd);
    y[12 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, kOdd);
  }
  for (int i = 0; i < kSide; ++i) x[i] = y[i];
}

inline __m512i load_elements(const float* from, int64_t n) {
  return n >= 16 ? _mm512_loadu_si512(from)
                 : _mm512_maskz_loadu_epi32(__mmask16((1u << n) - 1), from);
}

inline __m512i load_elements(const bf16* from, int64_t n) {
  return n >= 32 ? _mm512_loadu_si512(from)
                 : _mm512_maskz_loadu_epi16(__mmask32((1u << n) - 1), from);
}

// Packs `depth` columns of J tiles of rows as words: to (words, J, 16). The last of the `rows` rows
// stands for those that are missing. Fetches half as many bytes from `next` on.
template <int J, class T>
inline void pack_tiles(int64_t rows, int64_t depth, const T* a, int64_t lda, float* to,
                       const char* next) {
  constexpr int64_t kStep = kSide * kInWord<T>;
  for (int64_t k = 0; k < depth; k += kStep, to += kSide * J * kSide) {
    const int64_t words = std::min<int64_t>(kSide, (depth - k + kInWord<T> - 1) / kInWord<T>);
    for (int j = 0; j < J; ++j) {
      __m512i x[kSide];
      for (int r = 0; r < kSide; ++r) {
        const int64_t row = std::min<int64_t>(j * kSide + r, rows - 1);
        x[r] = load_elements(a + row * lda + k, depth - k);
        if (r % 2 == 0) __builtin_prefetch(next + r / 2 * 64, 0, 2);
      }
      next += kSide / 2 * 64;
      transpose_words(x);
      for (int i = 0; i < words; ++i) _mm512_store_si512(to + (i * J + j) * kSide, x[i]);
    }
  }
}

// Returns element e of each word.
template <class T>
inline Lanes element(Lanes words, int64_t e) {
  if constexpr (sizeof(T) == 4) return words;
  const BitLanes bits = bits_as<BitLanes>(words);
  return bits_as<Lanes>(e ? bits & 0xffff0000u : bits << 16);
}

// Multiplies J packed tiles by R tokens. x: (depth, R) with stride ldx. sums: (R, J, 16). Fetches
// half as many bytes from `next` on as the tiles have.
template <int R, int J, class T>
inline void packed_block(int64_t depth, const float* packed, const float* x, int64_t ldx,
                         float* sums, bool add, const char* next) {
  Lanes sum[R][J];
#pragma GCC unroll 12  // as in gemm.h
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) sum[r][j] = Lanes{};
  auto words = [&](int64_t elements) __attribute__((always_inline)) {
    for (int64_t e = 0; e < elements; ++e, x += ldx) {
      Lanes row[J];
      for (int j = 0; j < J; ++j) row[j] = element<T>(load<Lanes>(packed + j * kSide), e);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
        for (int j = 0; j < J; ++j) sum[r][j] = multiply_add(sum[r][j], x + r, row[j]);
    }
    packed += J * kSide;
  };
  int64_t k = 0;
  for (; k + kInWord<T> <= depth; k += kInWord<T>) {
    if (k % (2 * kInWord<T>) == 0)
      for (int j = 0; j < J; ++j, next += 64) __builtin_prefetch(next, 0, 2);
    words(kInWord<T>);
  }
  if (k < depth) words(1);
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) {
      float* to = sums + (r * J + j) * kSide;
      store(to, add ? load<Lanes>(to) + sum[r][j] : sum[r][j]);
    }
}

// Multiplies J packed tiles by n tokens, 12 or fewer at a time. Of n > 2 tokens, the last ones may be
// multiplied together with the columns of B up to the next multiple of 16.
template <int J, class T>
inline void packed_tokens(int64_t n, int64_t depth, const float* packed, const float* b,
                          int64_t ldb, float* sums, bool add, const char* next) {
  auto tokens = [&](auto count) {
    packed_block<count, J, T>(depth, packed, b, ldb, sums, add, next);
    n -= count;
    b += count;
    sums += count * J * kSide;
  };
  while (n > 0) {
    if (n == 1) tokens(std::integral_constant<int, 1>{});
    else if (n == 2) tokens(std::integral_constant<int, 2>{});
    else if (n <= 4) tokens(std::integral_constant<int, 4>{});
    else if (n <= 6) tokens(std::integral_constant<int, 6>{});
    else if (n <= 8 || (n > 12 && n <= 16)) tokens(std::integral_constant<int, 8>{});
    else tokens(std::integral_constant<int, 12>{});
  }
}

// Writes C (rows, n rounded up to 16) from sums (n, J, 16).
template <int J>
inline void write_block(int64_t rows, int64_t n, const float* sums, float* c, int64_t ldc) {
  for (int64_t first = 0; first < n; first += kSide)
    for (int j = 0; j < J; ++j) {
      __m512i x[kSide];
      for (int i = 0; i < kSide; ++i)
        x[i] = first + i < n ? _mm512_load_si512(sums + ((first + i) * J + j) * kSide)
                             : _mm512_setzero_si512();
      transpose_words(x);
      const int64_t written = std::min<int64_t>(kSide, rows - j * kSide);
      for (int i = 0; i < written; ++i)
        _mm512_storeu_si512(c + (j * kSide + i) * ldc + first, x[i]);
    }
}

// Computes rows of C, at most J * 16, and fetches as many rows of A from `next` on.
template <int J, class T>
inline void multiply_tiles(int64_t rows, int64_t n, int64_t k, const T* a, int64_t lda,
                           const float* b, int64_t ldb, float* c, int64_t ldc, float* workspace,
                           const T* next) {
  float* sums = workspace;
  float* packed = workspace + kBlock * J * kSide;
  for (int64_t k0 = 0; k0 < k; k0 += kPartDepth) {
    const int64_t depth = std::min(kPartDepth, k - k0);
    const T* fetched = next + k0 * J * kSide;
    const T* second_half = fetched + depth * J * kSide / 2;
    pack_tiles<J>(rows, depth, a + k0, lda, packed, reinterpret_cast<const char*>(fetched));
    packed_tokens<J, T>(n, depth, packed, b + k0 * ldb, ldb, sums, k0 > 0,
                        reinterpret_cast<const char*>(second_half));
  }
  write_block<J>(rows, n, sums, c, ldc);
}

// Computes C (m, n) with 16 rows of A in the lanes. Its columns from n on, up to a multiple of 16,
// become 0.
template <class T>
inline void multiply_rows(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const float* b,
                          int64_t ldb, float* c, int64_t ldc, float* workspace, const T* next) {
  constexpr int64_t kRows = kPackedTiles * kSide;
  static_assert(kBlock * kRows + kPartDepth * kRows <= kCopyRows * kCopyDepth);
  for (int64_t row = 0; row < m; row += kRows) {
    const int64_t rows = std::min(kRows, m - row);
    const T* from = a + row * lda;
    const T* following = row + kRows < m ? from + kRows * lda : next;
    float* to = c + row * ldc;
    if (rows > kSide)
      multiply_tiles<kPackedTiles>(rows, n, k, from, lda, b, ldb, to, ldc, workspace, following);
    else multiply_tiles<1>(rows, n, k, from, lda, b, ldb, to, ldc, workspace, following);
  }
}

#else

constexpr bool kAnyColumn = false;  // the first of n tokens is a column that is a multiple of 16

#endif

// Computes C (m, n) = A (m, k) @ B (k, n), where B and C have columns up to w, a multiple of 16. The
// columns of C beyond n are of no use. May fetch what `next` points to, rows that the thread probably
// reads next. workspace: (kCopyRows, kCopyDepth), aligned to 64 bytes.
template <class T>
inline void multiply_tokens(int64_t m, [[maybe_unused]] int64_t n, [[maybe_unused]] int64_t w,
                            int64_t k, const T* a, int64_t lda, const Product<T>* b, int64_t ldb,
                            float* c, int64_t ldc, Product<T>* workspace,
                            [[maybe_unused]] const T* next) {
#if defined(EXPO_FAST_ROW_LANES)
  multiply_rows(m, n, k, a, lda, b, ldb, c, ldc, workspace, next);
#else
  multiply(m, w, k, a, lda, b, ldb, c, ldc, workspace);
#endif
}
