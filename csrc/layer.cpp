// Forward and backward of the functions of a decoder layer on a CPU: linear maps, norms, rotations and
// the gated activation. Values are fp32 or bf16 in memory, and all arithmetic is fp32.
//
//   linear    y = x @ weight.T + bias
//   norm      y = x / sqrt(mean(x^2) + eps) * weight
//   rotate    (a, b) -> (a cos - b sin, b cos + a sin), for the halves a and b of each head
//   swiglu    y = gate / (1 + exp(-gate)) * up
//
// A matrix is contiguous, with one token a row. Every sum has a fixed order, which does not depend on
// the number of threads.

#include <algorithm>
#include <cmath>

#include "common.h"
#include "gemm.h"
#include "matrices.h"

namespace {

constexpr int64_t kDeep = 1024;   // tokens of one product of the weight gradient
constexpr int64_t kNormRows = 64; // tokens whose part of a norm's weight gradient is summed together

}  // namespace

// op_backends/native_layer.py declares these structs too. A null output is not computed.
struct Linear {
  const void *x, *weight, *bias;  // (N, in), (out, in), (out,) or null
  const void* d_y;                // (N, out)
  void *y, *d_x, *d_weight, *d_bias;
  int64_t n, in, out;
  int32_t dtype, threads;  // one dtype for all matrices
};

struct Norm {
  const void *x, *weight, *d_y;  // (N, D), (D,), (N, D)
  void* y;                       // (N, D)
  float* scale;                  // (N,) 1 / sqrt(mean(x^2) + eps), for backward
  void *d_x, *d_weight;          // (N, D), (D,)
  int64_t n, d;
  float eps;
  int32_t dtype, threads;
};

struct Rotation {
  const void *x, *cos, *sin;  // (N, heads, Dh), (N, Dh / 2)
  void* y;
  int64_t n, heads, head_dim;
  int32_t inverse, dtype, threads;  // inverse: by the negative angles, for backward
};

struct Swiglu {
  const void *gate, *up, *d_y;  // (size,)
  void *y, *d_gate, *d_up;      // backward computes y again, unless it is null
  int64_t size;
  int32_t dtype, threads;
};

EXPO_FAST_SIZEOF(linear, Linear)
EXPO_FAST_SIZEOF(norm, Norm)
EXPO_FAST_SIZEOF(rotation, Rotation)
EXPO_FAST_SIZEOF(swiglu, Swiglu)

namespace {

inline float rounded(float x, float) { return x; }

inline float rounded(float x, bf16) {
  bf16 y;
  narrow(x, y);
  return widen(y);
}

inline Lanes rounded(Lanes x, float) { return x; }
inline Lanes rounded(Lanes x, bf16) { return bits_as<Lanes>(rounded_to_bf16(x)); }

// Calls f(k, lanes) for each index k < n: for vectors of kLanes values, and then for single ones.
template <class F>
void each_vector(int64_t n, F f) {
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) f(k, std::true_type{});
  for (; k < n; ++k) f(k, std::false_type{});
}

// A matrix (rows, columns) in fp32, as blocks of up to 64 columns: the B of products. Columns that
// pad a block are 0.
struct Blocks {
  const int64_t rows, columns;
  Scratch<float> data;

  Blocks(int64_t rows, int64_t columns)
      : rows(rows), columns(columns), data(rows * round_up(columns, 16)) {}

  int64_t count() const { return (columns + kBlock - 1) / kBlock; }
  int64_t width(int64_t block) const {  // with padding
    return std::min(kBlock, round_up(columns, 16) - block * kBlock);
  }
  int64_t real(int64_t block) const { return std::min(kBlock, columns - block * kBlock); }
  float* at(int64_t block) { return data.data.get() + block * kBlock * rows; }

  // Copies the matrix `from`, (rows, columns).
  template <class T>
  void copy(const T* from, int threads) {
    parallel_each(threads, count(), [&](int, int64_t block) {
      const int64_t w = width(block), n = real(block);
      float* to = at(block);
      for (int64_t r = 0; r < rows; ++r) {
        convert(from + r * columns + block * kBlock, n, to + r * w);
        std::fill(to + r * w + n, to + (r + 1) * w, 0.0f);
      }
    });
  }

  // Copies the transpose of the matrix `from`, (columns, rows).
  template <class T>
  void copy_transposed(const T* from, int threads) {
    parallel_each(threads, count(), [&](int, int64_t block) {
      const int64_t w = width(block), n = real(block);
      float* to = at(block);
      for (int64_t k0 = 0; k0 < rows; k0 += kLanes) {  // one cache line of each row at a time
        const int64_t end = std::min(rows, k0 + kLanes);
        for (int64_t i = 0; i < n; ++i)
          for (int64_t k = k0; k < end; ++k)
            to[k * w + i] = widen(from[(block * kBlock + i) * rows + k]);
        for (int64_t k = k0; k < end; ++k) std::fill(to + k * w + n, to + (k + 1) * w, 0.0f);
      }
    });
  }
};

// Rows of a tile, so that every thread gets some of n rows.
int64_t tile_rows(int64_t n, int threads) {
  const int64_t share = round_up((n + threads - 1) / threads, kRegisterRows);
  return std::clamp<int64_t>(share, kRegisterRows, kTileRows);
}

// y (N, columns of b) = x (N, K) @ b + bias, rounded once.
template <class T>
void multiply(const T* x, int64_t n, Blocks& b, const T* bias, T* y, int threads) {
  const int64_t depth = b.rows, size = tile_rows(n, threads);
  const int64_t tiles = (n + size - 1) / size;
  Scratch<float> copies(threads * size * depth), products(threads * size * kBlock);
  parallel_each(threads, tiles, [&](int t, int64_t tile) {
    const int64_t first = tile * size, rows = std::min(size, n - first);
    float* a = copies.data.get() + t * size * depth;
    float* z = products.data.get() + t * size * kBlock;
    convert(x + first * depth, rows * depth, a);
    for (int64_t block = 0; block < b.count(); ++block) {
      const int64_t w = b.width(block), real = b.real(block), column = block * kBlock;
      if (depth == 0) std::fill_n(z, rows * w, 0.0f);
      gemm(rows, w, depth, a, depth, b.at(block), w, z, w, false);
      if (bias)
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t i = 0; i < real; ++i) z[r * w + i] += widen(bias[column + i]);
      for (int64_t r = 0; r < rows; ++r)
        narrow(z + r * w, real, y + (first + r) * b.columns + column);
    }
  });
}

template <class T>
void linear(const Linear& l) {
  Blocks weight(l.in, l.out);
  weight.copy_transposed(static_cast<const T*>(l.weight), l.threads);
  multiply(static_cast<const T*>(l.x), l.n, weight, static_cast<const T*>(l.bias),
           static_cast<T*>(l.y), l.threads);
}

// d_weight (out, in) = d_y.T @ x
template <class T>
void write_d_weight(const Linear& l) {
  auto d_y = static_cast<const T*>(l.d_y);
  Blocks x(l.n, l.in);
  x.copy(static_cast<const T*>(l.x), l.threads);
  const int64_t size = tile_rows(l.out, l.threads), tiles = (l.out + size - 1) / size;
  const int64_t depth = std::min(kDeep, l.n), width = round_up(l.in, 16);
  Scratch<float> copies(l.threads * size * depth), sums(l.threads * size * width);
  parallel_each(l.threads, tiles, [&](int t, int64_t tile) {
    const int64_t first = tile * size, rows = std::min(size, l.out - first);
    float* a = copies.data.get() + t * size * depth;
    float* sum = sums.data.get() + t * size * width;
    if (l.n == 0) std::fill_n(sum, size * width, 0.0f);
    for (int64_t n0 = 0; n0 < l.n; n0 += kDeep) {
      const int64_t count = std::min(kDeep, l.n - n0);
      for (int64_t i0 = 0; i0 < count; i0 += kLanes) {  // one cache line of each row at a time
        const int64_t end = std::min(count, i0 + kLanes);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t i = i0; i < end; ++i)
            a[r * count + i] = widen(d_y[(n0 + i) * l.out + first + r]);
      }
      for (int64_t block = 0; block < x.count(); ++block) {
        const int64_t w = x.width(block);
        gemm(rows, w, count, a, count, x.at(block) + n0 * w, w, sum + block * kBlock * rows, w,
             n0 > 0);
      }
    }
    for (int64_t block = 0; block < x.count(); ++block)
      for (int64_t r = 0; r < rows; ++r)
        narrow(sum + block * kBlock * rows + r * x.width(block), x.real(block),
               static_cast<T*>(l.d_weight) + (first + r) * l.in + block * kBlock);
  });
}

template <class T>
void write_d_bias(const Linear& l) {
  auto d_y = static_cast<const T*>(l.d_y);
  Scratch<float> sums(l.out);
  float* sum = sums.data.get();
  std::fill_n(sum, l.out, 0.0f);
  for (int64_t i = 0; i < l.n; ++i)
    for (int64_t k = 0; k < l.out; ++k) sum[k] += widen(d_y[i * l.out + k]);
  narrow(sum, l.out, static_cast<T*>(l.d_bias));
}

template <class T>
void linear_gradients(const Linear& l) {
  if (l.d_x) {
    Blocks weight(l.out, l.in);
    weight.copy(static_cast<const T*>(l.weight), l.threads);
    multiply<T>(static_cast<const T*>(l.d_y), l.n, weight, nullptr, static_cast<T*>(l.d_x),
                l.threads);
  }
  if (l.d_weight) write_d_weight<T>(l);
  if (l.d_bias) write_d_bias<T>(l);
}

// Runs f(first, end) over ranges of n items, which differ by the number of threads. Each item's
// result must not depend on its range.
template <class F>
void parallel_ranges(int threads, int64_t n, F f) {
  parallel(threads, [&](int t) {
    const Share share(n, t, threads);
    f(share.begin, share.end);
  });
}

float total(Lanes x) {
  float sum = 0;
  for (int j = 0; j < kLanes; ++j) sum += x[j];
  return sum;
}

// Returns sum_k f(k), with f(k, std::true_type{}) the vector that starts at k.
template <class F>
float sum_over(int64_t n, F f) {
  Lanes lanes{};
  float rest = 0;
  each_vector(n, [&](int64_t k, auto is_vector) {
    if constexpr (is_vector)
      lanes += f(k, is_vector);
    else
      rest += f(k, is_vector);
  });
  return total(lanes) + rest;
}

// Returns the value at `from` as fp32: a vector or a single one.
template <class T>
Lanes value(const T* from, std::true_type) { return load_wide(from); }

template <class T>
float value(const T* from, std::false_type) { return widen(*from); }

template <class T>
void put(T* to, Lanes x) { store_narrow(to, x); }

template <class T>
void put(T* to, float x) { narrow(x, *to); }

template <class T>
void norm(const Norm& m) {
  parallel_ranges(m.threads, m.n, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      const T* x = static_cast<const T*>(m.x) + row * m.d;
      const float squares = sum_over(m.d, [&](int64_t k, auto v) {
        return value(x + k, v) * value(x + k, v);
      });
      const float scale = 1.0f / std::sqrt(squares / float(m.d) + m.eps);
      m.scale[row] = scale;
      const T* weight = static_cast<const T*>(m.weight);
      T* y = static_cast<T*>(m.y) + row * m.d;
      each_vector(m.d, [&](int64_t k, auto v) {
        put(y + k, value(x + k, v) * scale * value(weight + k, v));
      });
    }
  });
}

// d_x_k = scale (w_k d_y_k - n_k mean_j(w_j d_y_j n_j)),    n = x * scale
template <class T>
void norm_gradients(const Norm& m) {
  const int64_t parts = (m.n + kNormRows - 1) / kNormRows;
  Scratch<float> d_weights(m.d_weight ? parts * m.d : 0);
  parallel_each(m.threads, parts, [&](int, int64_t part) {
    float* d_weight = d_weights.data.get() + part * m.d;
    if (m.d_weight) std::fill_n(d_weight, m.d, 0.0f);
    const int64_t end = std::min(m.n, (part + 1) * kNormRows);
    for (int64_t row = part * kNormRows; row < end; ++row) {
      const T* weight = static_cast<const T*>(m.weight);
      const T* x = static_cast<const T*>(m.x) + row * m.d;
      const T* d_y = static_cast<const T*>(m.d_y) + row * m.d;
      const float scale = m.scale[row];
      const float mean = scale / float(m.d) * sum_over(m.d, [&](int64_t k, auto v) {
        return value(d_y + k, v) * value(weight + k, v) * value(x + k, v);
      });
      T* d_x = static_cast<T*>(m.d_x) + row * m.d;
      each_vector(m.d, [&](int64_t k, auto v) {
        const auto normalized = value(x + k, v) * scale, upstream = value(d_y + k, v);
        put(d_x + k, scale * (value(weight + k, v) * upstream - normalized * mean));
        if (m.d_weight) put(d_weight + k, value(d_weight + k, v) + upstream * normalized);
      });
    }
  });
  if (!m.d_weight) return;
  Scratch<float> sums(m.d);
  std::fill_n(sums.data.get(), m.d, 0.0f);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t k = 0; k < m.d; ++k) sums.data[k] += d_weights.data[part * m.d + k];
  narrow(sums.data.get(), m.d, static_cast<T*>(m.d_weight));
}

// In bf16, products and sums are rounded where PyTorch rounds them.
template <class T>
void rotate(const Rotation& r) {
  const int64_t half = r.head_dim / 2;
  const float sign = r.inverse ? -1.0f : 1.0f;
  parallel_ranges(r.threads, r.n, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      const T* cosines = static_cast<const T*>(r.cos) + row * half;
      const T* sines = static_cast<const T*>(r.sin) + row * half;
      for (int64_t head = 0; head < r.heads; ++head) {
        const int64_t at = (row * r.heads + head) * r.head_dim;
        const T* x = static_cast<const T*>(r.x) + at;
        T* y = static_cast<T*>(r.y) + at;
        each_vector(half, [&](int64_t k, auto v) {
          const auto a = value(x + k, v), b = value(x + half + k, v);
          const auto cosine = value(cosines + k, v), sine = sign * value(sines + k, v);
          put(y + k, rounded(a * cosine, T{}) - rounded(b * sine, T{}));
          put(y + half + k, rounded(b * cosine, T{}) + rounded(a * sine, T{}));
        });
      }
    }
  });
}

inline Lanes sigmoid(Lanes x) { return 1.0f / (1.0f + Power(broadcast(float(M_LOG2E)))(-x)); }

inline float sigmoid(float x) { return sigmoid(broadcast(x))[0]; }

template <class T>
void swiglu(const Swiglu& s) {
  auto gate = static_cast<const T*>(s.gate), up = static_cast<const T*>(s.up);
  auto y = static_cast<T*>(s.y);
  parallel_ranges(s.threads, s.size / kLanes + 1, [&](int64_t first, int64_t end) {
    const int64_t start = first * kLanes, n = std::min(s.size, end * kLanes) - start;
    each_vector(std::max<int64_t>(n, 0), [&](int64_t i, auto v) {
      const auto g = value(gate + start + i, v);
      put(y + start + i, rounded(g * sigmoid(g), T{}) * value(up + start + i, v));
    });
  });
}

template <class T>
void swiglu_gradients(const Swiglu& s) {
  auto gate = static_cast<const T*>(s.gate), up = static_cast<const T*>(s.up);
  auto d_y = static_cast<const T*>(s.d_y);
  auto d_gate = static_cast<T*>(s.d_gate), d_up = static_cast<T*>(s.d_up);
  auto y = static_cast<T*>(s.y);
  parallel_ranges(s.threads, s.size / kLanes + 1, [&](int64_t first, int64_t end) {
    const int64_t start = first * kLanes, n = std::min(s.size, end * kLanes) - start;
    each_vector(std::max<int64_t>(n, 0), [&](int64_t i, auto v) {
      const int64_t at = start + i;
      const auto g = value(gate + at, v), upstream = value(d_y + at, v), share = sigmoid(g);
      const auto activated = rounded(g * share, T{}), factor = value(up + at, v);
      if (y) put(y + at, activated * factor);
      put(d_up + at, upstream * activated);
      put(d_gate + at, upstream * factor * share * (1.0f + g * (1.0f - share)));
    });
  });
}

}  // namespace

// Each function returns 0, or 1 and sets the error.
extern "C" {

const char* expo_fast_error() { return last_error; }

int32_t expo_fast_linear(const Linear* l) {
  return guarded([&] { with_matrix_type(l->dtype, [&](auto t) { linear<decltype(t)>(*l); }); });
}

int32_t expo_fast_linear_gradients(const Linear* l) {
  return guarded([&] {
    with_matrix_type(l->dtype, [&](auto t) { linear_gradients<decltype(t)>(*l); });
  });
}

int32_t expo_fast_norm(const Norm* m) {
  return guarded([&] { with_matrix_type(m->dtype, [&](auto t) { norm<decltype(t)>(*m); }); });
}

int32_t expo_fast_norm_gradients(const Norm* m) {
  return guarded([&] {
    with_matrix_type(m->dtype, [&](auto t) { norm_gradients<decltype(t)>(*m); });
  });
}

int32_t expo_fast_rotate(const Rotation* r) {
  return guarded([&] { with_matrix_type(r->dtype, [&](auto t) { rotate<decltype(t)>(*r); }); });
}

int32_t expo_fast_swiglu(const Swiglu* s) {
  return guarded([&] { with_matrix_type(s->dtype, [&](auto t) { swiglu<decltype(t)>(*s); }); });
}

int32_t expo_fast_swiglu_gradients(const Swiglu* s) {
  return guarded([&] {
    with_matrix_type(s->dtype, [&](auto t) { swiglu_gradients<decltype(t)>(*s); });
  });
}

}  // extern "C"
