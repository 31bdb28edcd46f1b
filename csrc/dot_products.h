// Dot products of rows of weight with the hidden states of few tokens, with lanes along the
// features. The GEMM of gemm.h has lanes along the tokens, which it pads to a multiple of 16, and
// reads one value of weight for each vector of products. For few tokens that takes twice as long.
#pragma once

#include "common.h"

// Up to this number of tokens, dot products are faster than the GEMM.
constexpr int64_t kFewTokens = 48;
// Rows of weight whose products with a few tokens stay in registers together.
constexpr int kDotRows = 4;
constexpr int kDotTokens = kLanes == 16 ? 6 : 2;

typedef float FourLanes __attribute__((vector_size(16)));

// Adds the lanes of x whose index modulo 4 is equal.
template <class Vector>
inline FourLanes added_to_four(Vector x) {
  if constexpr (sizeof(Vector) == 64) {
    return added_to_four(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                         __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
  } else if constexpr (sizeof(Vector) == 32) {
    return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
  } else {
    return x;
  }
}

// Returns the sum of the lanes of each of four vectors.
inline FourLanes sums_of_lanes(const Lanes* x) {
  const FourLanes a = added_to_four(x[0]), b = added_to_four(x[1]);
  const FourLanes c = added_to_four(x[2]), d = added_to_four(x[3]);
  const FourLanes ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) +
                       __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const FourLanes cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) +
                       __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// Writes R x N products. Each is summed in the same order for any R and N.
template <int R, int N>
inline void dot_block(int64_t depth, const float* a, int64_t lda, const float* b, float* c,
                      int64_t ldc) {
  Lanes sum[N][kDotRows];
#pragma GCC unroll 6
  for (int i = 0; i < N; ++i)
    for (int r = 0; r < kDotRows; ++r) sum[i][r] = Lanes{};
  for (int64_t k = 0; k < depth; k += kLanes) {
    Lanes row[R];
    for (int r = 0; r < R; ++r) row[r] = load<Lanes>(a + r * lda + k);
#pragma GCC unroll 6  // otherwise the sums do not stay in registers
    for (int i = 0; i < N; ++i) {
      const Lanes token = load<Lanes>(b + i * depth + k);
      for (int r = 0; r < R; ++r) sum[i][r] += row[r] * token;
    }
  }
  for (int i = 0; i < N; ++i) {
    const FourLanes total = sums_of_lanes(sum[i]);
    for (int r = 0; r < R; ++r) c[r * ldc + i] = total[r];
  }
}

// Multiplies N tokens at a time, and then the remaining tokens.
template <int R, int N>
inline void dot_tokens(int64_t n, int64_t depth, const float* a, int64_t lda, const float* b,
                       float* c, int64_t ldc) {
  for (; n >= N; n -= N, b += N * depth, c += N) dot_block<R, N>(depth, a, lda, b, c, ldc);
  if constexpr (N > 1)
    if (n) dot_tokens<R, N - 1>(n, depth, a, lda, b, c, ldc);
}

// Multiplies R rows at a time, and then the remaining rows.
template <int R>
inline void dot_rows(int64_t m, int64_t n, int64_t depth, const float* a, int64_t lda,
                     const float* b, float* c, int64_t ldc) {
  for (; m >= R; m -= R, a += R * lda, c += R * ldc)
    dot_tokens<R, kDotTokens>(n, depth, a, lda, b, c, ldc);
  if constexpr (R > 1)
    if (m) dot_rows<R - 1>(m, n, depth, a, lda, b, c, ldc);
}

// Computes C (m, n) = A (m, depth) @ B (n, depth).T. The depth is a multiple of 16.
inline void dot_products(int64_t m, int64_t n, int64_t depth, const float* a, int64_t lda,
                         const float* b, float* c, int64_t ldc) {
  dot_rows<kDotRows>(m, n, depth, a, lda, b, c, ldc);
}
