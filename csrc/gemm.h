// Small matrix products inside one thread: C (M, N) = A (M, K) @ B (K, N), or C += A @ B, summed in
// fp32. N is a multiple of 16. If B is bf16, K is even and B is stored with its rows interleaved in
// pairs, as (K / 2, N, 2); A is bf16 or fp32.
#pragma once

#include <algorithm>
#include <type_traits>

#include "lanes.h"

#if defined(EXPO_FAST_AMX)
#include <ATen/native/CPUBlas.h>
#endif

#if defined(EXPO_FAST_AMX) || defined(__AVX512BF16__)
#define EXPO_FAST_BF16  // products of bf16 values are faster than products of their fp32 copies
#endif

// The type in which values of type T are multiplied.
#if defined(EXPO_FAST_BF16)
template <class T>
using Product = T;
#else
template <class T>
using Product = float;
#endif

// The neighbouring rows of B, and the values in a row of A, that one step along K multiplies.
template <class T>
constexpr int64_t kPair = sizeof(T) == 2 ? 2 : 1;

// Returns the index of element (k, i) in the matrix B of a product, which has n columns.
template <class T>
constexpr int64_t packed_index(int64_t k, int64_t i, int64_t n) {
  return (k / kPair<T> * n + i) * kPair<T> + k % kPair<T>;
}

inline Lanes multiply_add(Lanes sum, const float* a, Lanes b) { return sum + *a * b; }

#if defined(__AVX512BF16__)
inline Lanes multiply_add(Lanes sum, const bf16* a, Lanes b) {
  const __m512 pair = _mm512_castsi512_ps(_mm512_set1_epi32(load<int32_t>(a)));
  return _mm512_dpbf16_ps(sum, (__m512bh)pair, (__m512bh)b);
}
#endif

// Adds the products of neighbouring values of a row of A with as many rows of B.
template <class B, class A>
inline Lanes add_products(Lanes sum, const A* a, Lanes b) {
  if constexpr (sizeof(A) == sizeof(B)) {
    return multiply_add(sum, a, b);
  } else {
    const BitLanes pair = bits_as<BitLanes>(b);
    sum += a[0] * bits_as<Lanes>(pair << 16);
    return sum + a[1] * bits_as<Lanes>(pair & 0xffff0000u);
  }
}

// Computes R x J vectors of C. Their sums stay in registers during the loop over K: in 24 of the 32
// registers of AVX-512, or 12 of the 16 of AVX2. The sums start at 0 and are added to C at the end,
// so that they are rounded to the magnitude of C once and not at every step.
template <int R, int J, class A, class B>
inline void gemm_block(int64_t steps, const A* a, int64_t lda, const B* b, int64_t ldb, float* c,
                       int64_t ldc, bool add) {
  Lanes sum[R][J];
#pragma GCC unroll 12  // otherwise the sums are in memory before and after the loop over K
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) sum[r][j] = Lanes{};
  // Prefetch C, which may be in L3, while the loop over K runs: d_hidden is 9% faster.
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) __builtin_prefetch(c + r * ldc + j * kLanes, 1);
  for (int64_t k = 0; k < steps; ++k) {
    if (k * kPair<B> * sizeof(A) % 64 == 0)  // prefetch the next block's rows, one line at a time
      for (int r = 0; r < R; ++r) __builtin_prefetch(a + (R + r) * lda + k * kPair<B>);
    Lanes row[J];
    for (int j = 0; j < J; ++j) row[j] = load<Lanes>(b + (k * ldb + j * kLanes) * kPair<B>);
#pragma GCC unroll 12  // otherwise the sums of many rows do not stay in registers
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < J; ++j)
        sum[r][j] = add_products<B>(sum[r][j], a + r * lda + k * kPair<B>, row[j]);
  }
#pragma GCC unroll 12  // as above
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {
      float* to = c + r * ldc + j * kLanes;
      store(to, add ? load<Lanes>(to) + sum[r][j] : sum[r][j]);
    }
}

// Rows of C whose sums stay in registers together.
constexpr int kRegisterRows = 6;

// Rows of a tile: its part of C, with 64 columns, stays in L1. Without AMX it is a multiple of
// kRegisterRows, so that no rows remain.
#if defined(EXPO_FAST_AMX)
constexpr int64_t kTileRows = 128;
#else
constexpr int64_t kTileRows = 126;
#endif

// The next smaller number of rows to multiply together.
constexpr int fewer(int rows) { return rows > kRegisterRows ? rows / 2 : rows - 1; }

// Multiplies R rows at a time, and then the remaining rows in smaller blocks.
template <int R, int J, class A, class B>
inline void gemm_columns(int64_t m, int64_t steps, const A* a, int64_t lda, const B* b,
                         int64_t ldb, float* c, int64_t ldc, bool add) {
  for (; m >= R; m -= R, a += R * lda, c += R * ldc)
    gemm_block<R, J>(steps, a, lda, b, ldb, c, ldc, add);
  if constexpr (R > 1)
    if (m) gemm_columns<fewer(R), J>(m, steps, a, lda, b, ldb, c, ldc, add);
}

template <class A, class B>
inline void gemm(int64_t m, int64_t n, int64_t k, const A* a, int64_t lda, const B* b, int64_t ldb,
                 float* c, int64_t ldc, bool add) {
  constexpr int J = kLanes == 16 ? 4 : 2, R = kRegisterRows;
  // K is processed in parts of kDepth, so that a panel of B stays in cache and fp32 sums stay
  // short. In bf16 longer sums do no harm, because rounding the factors has cost more precision,
  // and longer rows of A are 4% faster (Zen 5).
  constexpr int64_t kDepth = kPair<B> == 2 ? 1024 : 256;
  for (int64_t k0 = 0; k0 < k; k0 += kDepth, add = true) {
    const int64_t steps = (k - k0 < kDepth ? k - k0 : kDepth) / kPair<B>;
    const A* a0 = a + k0;
    const B* b0 = b + k0 * ldb;
    int64_t j = 0;
    auto columns = [&](auto rows, auto width) {  // every shape has R * J independent sums
      for (; j + width * kLanes <= n; j += width * kLanes)
        gemm_columns<rows, width>(m, steps, a0, lda, b0 + j * kPair<B>, ldb, c + j, ldc, add);
    };
    columns(std::integral_constant<int, R>{}, std::integral_constant<int, J>{});
    if constexpr (J == 4)  // 48 columns are 15% faster than as 32 and 16 (Zen 4)
      columns(std::integral_constant<int, R * J / 3>{}, std::integral_constant<int, 3>{});
    columns(std::integral_constant<int, R * J / 2>{}, std::integral_constant<int, 2>{});
    columns(std::integral_constant<int, R * J / 2>{}, std::integral_constant<int, 1>{});
  }
}

#if defined(EXPO_FAST_AMX)
inline void gemm(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t lda, const bf16* b,
                 int64_t ldb, float* c, int64_t ldc, bool add) {
  auto cast = [](const bf16* x) { return reinterpret_cast<const at::BFloat16*>(x); };
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, cast(a), cast(b), c, true);
}
#endif

// The part of A that `multiply` copies at once. It stays in L2.
constexpr int64_t kCopyRows = 24, kCopyDepth = 1024;

// Computes C (m, n) = A (m, k) @ B (k, n), where B has the type of products. If A has another type,
// parts of it are copied to `copy`, (kCopyRows, kCopyDepth), while the next part is fetched.
template <class T>
inline void multiply(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const Product<T>* b,
                     int64_t ldb, float* c, int64_t ldc, [[maybe_unused]] Product<T>* copy) {
  if constexpr (sizeof(T) == sizeof(Product<T>)) {
    gemm(m, n, k, a, lda, b, ldb, c, ldc, false);
  } else {
    for (int64_t k0 = 0; k0 < k; k0 += kCopyDepth) {
      const int64_t depth = std::min(kCopyDepth, k - k0);
      for (int64_t row = 0; row < m; row += kCopyRows) {
        const int64_t rows = std::min(kCopyRows, m - row);
        for (int64_t r = 0; r < rows; ++r) {
          const T* from = a + (row + r) * lda + k0;
          convert(from, depth, copy + r * depth);
          for (int64_t i = 0; i < depth; i += 64 / sizeof(T))
            __builtin_prefetch(from + kCopyRows * lda + i, 0, 2);
        }
        gemm(rows, n, depth, copy, depth, b + k0 * ldb, ldb, c + row * ldc, ldc, k0 > 0);
      }
    }
  }
}

// Call this after the last product of a thread: AMX tiles that stay configured slow down its other
// code.
inline void gemm_done() {
#if defined(EXPO_FAST_AMX)
  at::native::cpublas::brgemm_release(true);
#endif
}
