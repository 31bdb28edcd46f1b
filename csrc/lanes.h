// Vectors as wide as the target's registers, in the vector extensions of GCC and clang: one source
// serves AVX-512, AVX2 and all other targets.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitLanes __attribute__((vector_size(4 * kLanes)));
typedef uint16_t ShortLanes __attribute__((vector_size(2 * kLanes)));

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

template <class Vector, class T>
inline Vector load(const T* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class Vector, class T>
inline void store(T* to, Vector v) { std::memcpy(to, &v, sizeof v); }

inline Lanes broadcast(float x) { return x - Lanes{}; }

template <class To, class From>
inline To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof to);
  return to;
}

// Computes 2^(k x) for k > 0: exactly 0 for k x below -126.5, inf from 127.5, and NaN for NaN. The
// polynomial is fitted on [-1/2, 1/2] with a relative error of 2e-9. k x is not rounded before its
// integer part is subtracted, so large exponents lose no digits.
struct Power {
  Lanes k, low, high;

  explicit Power(Lanes k) : k(k), low(-127.0f / k), high(128.0f / k) {}

  Lanes operator()(Lanes x) const {
    x = x < low ? low : x;  // comparisons in this order keep NaN
    x = x > high ? high : x;
    const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const Lanes integer = (x * k + to_integer) - to_integer;
    const Lanes f = x * k - integer;  // one fused multiply-add, without rounding x * k
    Lanes p = f * 1.5345812029e-04f + 1.3399931362e-03f;
    p = p * f + 9.6184889583e-03f;
    p = p * f + 5.5503287766e-02f;
    p = p * f + 2.4022646891e-01f;
    p = p * f + 6.9314720574e-01f;
    p = p * f + 1.0f;
    const IntLanes exponent = (__builtin_convertvector(integer, IntLanes) + 127) << 23;
    return p * bits_as<Lanes>(exponent);
  }
};

// Rounds to bf16, to nearest with ties to even. The result is the upper half of each lane.
inline BitLanes rounded_to_bf16(Lanes x) {
#if defined(__AVX512BF16__)
  const __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)x);
  return (BitLanes)_mm512_cvtepu16_epi32(half) << 16;
#else
  BitLanes b = bits_as<BitLanes>(x);
  BitLanes rounded = (b + 0x7fffu + ((b >> 16) & 1u)) & 0xffff0000u;
  BitLanes nan = BitLanes{} + 0x7fc00000u;
  return x != x ? nan : rounded;
#endif
}

// Transposes 4 x 4 values. In bf16, a 64-bit word holds the four values of a row.
inline void transpose4(const bf16* from, int64_t from_stride, bf16* to, int64_t to_stride) {
  const uint64_t even = 0x0000ffff0000ffff, low = 0x00000000ffffffff;
  uint64_t a = load<uint64_t>(from), b = load<uint64_t>(from + from_stride);
  uint64_t c = load<uint64_t>(from + 2 * from_stride), d = load<uint64_t>(from + 3 * from_stride);
  const uint64_t ab = (a & even) | (b & even) << 16, cd = (c & even) | (d & even) << 16;
  const uint64_t ba = (a >> 16 & even) | (b & ~even), dc = (c >> 16 & even) | (d & ~even);
  store(to, (ab & low) | cd << 32);
  store(to + to_stride, (ba & low) | dc << 32);
  store(to + 2 * to_stride, ab >> 32 | (cd & ~low));
  store(to + 3 * to_stride, ba >> 32 | (dc & ~low));
}

inline void transpose4(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  typedef float Four __attribute__((vector_size(16)));
  const Four a = load<Four>(from), b = load<Four>(from + from_stride);
  const Four c = load<Four>(from + 2 * from_stride), d = load<Four>(from + 3 * from_stride);
  const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Four ba = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Four dc = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  store(to, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
  store(to + to_stride, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
  store(to + 2 * to_stride, __builtin_shufflevector(ba, dc, 0, 1, 4, 5));
  store(to + 3 * to_stride, __builtin_shufflevector(ba, dc, 2, 3, 6, 7));
}

inline float widen(float x) { return x; }

inline float widen(bf16 x) { return bits_as<float>(uint32_t{x.bits} << 16); }

inline float widen(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_as<float>(sign | 0x7f800000u | (rest & 0x3ff) << 13);
  // The exponent biases differ by 112. A product is right for subnormal numbers too.
  return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(rest << 13) * 0x1p112f));
}

inline void narrow(float x, float& to) { to = x; }

inline void narrow(float x, bf16& to) {
  uint32_t b = bits_as<uint32_t>(x);
  to.bits = x != x ? 0x7fc0 : (b + 0x7fff + ((b >> 16) & 1)) >> 16;
}

inline void narrow(const float* from, int64_t n, float* to) {
  std::memcpy(to, from, n * sizeof *to);
}

inline void narrow(const float* from, int64_t n, bf16* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const BitLanes high = rounded_to_bf16(load<Lanes>(from + i)) >> 16;
    store(to + i, __builtin_convertvector(high, ShortLanes));
  }
  for (; i < n; ++i) narrow(from[i], to[i]);
}

inline void convert(const float* from, int64_t n, float* to) {
  std::memcpy(to, from, n * sizeof *to);
}

inline void convert(const bf16* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const BitLanes bits = __builtin_convertvector(load<ShortLanes>(from + i), BitLanes);
    store(to + i, bits << 16);
  }
  for (; i < n; ++i) to[i] = widen(from[i]);
}

inline void convert(const fp16* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

inline void copy_value(bf16 from, bf16& to) { to = from; }

template <class From, class To>
inline void copy_value(From from, To& to) { narrow(widen(from), to); }
