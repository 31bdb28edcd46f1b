// Log-probs of the LM head and their gradients on a CPU, without an (N, V) buffer.
//
//   z = hidden @ weight.T + bias    u_j = (z_j - base) / temperature    y: the target
//   forward   other = sum_{j != y} exp(u_j)    moment = sum_{j != y} exp(u_j) (z_j - base)
//   backward  dz_j = exp(u_j) (c0 + c1 (z_j - base)) for j != y,    dz_y is given
//             d_hidden = dz @ weight    d_weight = dz.T @ hidden    d_bias = sum_n dz
//
// Tokens lie along the vector lanes: Z.T = weight @ hidden.T reads weight in memory order, and sums
// over the vocabulary need no sum across lanes. Threads split the vocabulary, so that each thread
// owns its rows of d_weight. Partial sums of the threads are added in the order of the threads, so
// the same number of threads gives the same bits. A span of kSpan tokens reads weight from memory
// once. Forward is one GEMM. Backward is two if forward kept its exponentials in bf16, and three if
// it recomputes Z. A logit has the same bits for any number of tokens.

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>

#include "common.h"
#include "gemm.h"
#include "matrices.h"
#include "token_products.h"

namespace {

// Tokens that share a pass over weight. Both packed copies of their hidden states stay in L3.
constexpr int64_t kSpan = 1024;
// Vocabulary rows of a tile in forward. The logits of a tile stay in L1.
constexpr int64_t kForward = kTileRows;
// Vocabulary rows of a tile in backward. Its weight, dz and logits stay in or close to L2.
constexpr int64_t kBackward = 4 * kForward;
// Elements of padding after a row, so that rows do not compete for the same cache sets.
constexpr int64_t kPad = 32;

// Returns a row stride for n elements that is an odd multiple of kPad.
constexpr int64_t padded_stride(int64_t n) { return (n + kPad - 1) / kPad / 2 * 2 * kPad + kPad; }
// Vocabulary rows of the weight gradient of few tokens that are written at once.
constexpr int64_t kWrittenRows = 2 * kRegisterRows;

}  // namespace

// op_backends/native_head.py declares these structs too. Vectors are (N,) fp32 unless noted.
struct Head {
  const void *hidden, *weight;  // (N, D), contiguous; (V, D), each row contiguous
  const float* bias;            // (V,) or null
  const int64_t* targets;
  const float* base;
  const float* exponent;  // log2(e) / temperature
  int64_t n, v, d, weight_stride;
  int32_t hidden_dtype, weight_dtype, threads;
};

struct Gradients {
  const float *c0, *c1, *at_target;
  void* d_hidden;  // (N, D), contiguous, or null
  void* d_weight;  // (V, D), contiguous, or null; fp32 if N exceeds kSpan
  float* d_bias;   // (V,) or null
  int32_t d_hidden_dtype, d_weight_dtype;  // fp32 or bf16
  int32_t accumulate;  // 1: add to d_weight, which is fp32, and to d_bias
};

// Exponentials exp((z - base) / temperature) that forward keeps for backward, in bf16. The base is
// that of the token at the time of the tile, which may be lower than its last base.
struct Kept {
  bf16* exponentials;      // (V, stride); 0 for a token's target
  float* base;             // (ceil(V / kForward), stride)
  const int32_t* columns;  // (N,) ascending, where backward finds a token; null: at its own index
  int64_t stride;          // tokens that fit, a multiple of 16
};

EXPO_FAST_SIZEOF(head, Head)
EXPO_FAST_SIZEOF(gradients, Gradients)
EXPO_FAST_SIZEOF(kept, Kept)

namespace {

// The hidden states of a span of tokens, packed for the two products that read them.
template <class T>
struct Span {
  int64_t start, n, padded_n;  // padded_n is n rounded up to 16
  int64_t d, depth;            // depth is d rounded up to a multiple of kPair

  Span(const Head& head, bool backward)
      : d(head.d), depth(round_up(d, kPair<T>)),
        columns_(kSpan * depth), rows_(backward ? kSpan * round_up(d, 16) : 0) {}

  int64_t blocks() const { return (padded_n + kBlock - 1) / kBlock; }
  int64_t width(int64_t block) const { return std::min(kBlock, padded_n - block * kBlock); }
  // Returns (depth, width), the B of Z.T = weight @ hidden.T.
  const T* columns(int64_t block) const { return columns_.data.get() + block * kBlock * depth; }
  // Returns (padded_n, up to kBlock) from feature `start` on, the B of d_weight = dZ.T @ hidden.
  const T* rows(int64_t start) const { return rows_.data.get() + start * padded_n; }

  void take(const Head& head, int64_t first, bool backward) {
    start = first;
    n = std::min(kSpan, head.n - first);
    padded_n = round_up(n, 16);
    with_dtype(head.hidden_dtype, [&](auto type) {
      auto from = static_cast<const decltype(type)*>(head.hidden) + first * d;
      parallel(head.threads, [&](int t) {
        const Share share(blocks(), t, head.threads);
        for (int64_t b = share.begin; b < share.end; ++b) {
          pack_columns(from, b);
          if (backward) pack_rows(from, b);
        }
      });
    });
  }

 private:
  Scratch<T> columns_, rows_;

  template <class From>
  void pack_columns(const From* from, int64_t block) {
    T* to = const_cast<T*>(columns(block));
    const int64_t w = width(block);
    for (int64_t i = 0; i < w; ++i) {
      const int64_t token = block * kBlock + i;
      for (int64_t k = 0; k < depth; ++k) {
        const bool real = token < n && k < d;
        narrow(real ? widen(from[token * d + k]) : 0.0f,
               to[packed_index<T>(k, i, w)]);
      }
    }
  }

  template <class From>
  void pack_rows(const From* from, int64_t block) {
    const int64_t first = block * kBlock, end = first + width(block);
    for (int64_t start = 0; start < d; start += kBlock) {
      const int64_t w = std::min(kBlock, round_up(d, 16) - start);
      T* to = const_cast<T*>(rows(start));
      for (int64_t token = first; token < end; ++token)
        for (int64_t k = 0; k < w; ++k) {
          const bool real = token < n && start + k < d;
          narrow(real ? widen(from[token * d + start + k]) : 0.0f,
                 to[packed_index<T>(token, k, w)]);
        }
    }
  }
};

// Rows [start, start + rows) of weight as T: in place where the dtype allows it, else as a copy.
// The depth is a multiple of 16 in fp32, and of 2 in bf16.
template <class T>
struct WeightTile {
  WeightTile(const Head& head, int64_t rows)
      : head(head), depth(round_up(head.d, kMultiple)), in_place(usable(head)),
        copy_(in_place ? 0 : rows * depth) {}

  const Head& head;
  const int64_t depth;
  const bool in_place;
  const T* data;
  int64_t stride;

  void take(int64_t start, int64_t rows) {
    if (in_place) {
      data = static_cast<const T*>(head.weight) + start * head.weight_stride;
      stride = head.weight_stride;
      return;
    }
    T* to = copy_.data.get();
    with_dtype(head.weight_dtype, [&](auto type) {
      auto from = static_cast<const decltype(type)*>(head.weight) + start * head.weight_stride;
      for (int64_t r = 0; r < rows; ++r) {
        const auto row = from + r * head.weight_stride;
        if constexpr (sizeof(T) == 4)
          convert(row, head.d, to + r * depth);
        else
          for (int64_t k = 0; k < head.d; ++k) copy_value(row[k], to[r * depth + k]);
        std::fill(to + r * depth + head.d, to + (r + 1) * depth, T{});
      }
    });
    data = to;
    stride = depth;
  }

 private:
  Scratch<T> copy_;

  static constexpr int64_t kMultiple = kPair<T> == 2 ? 2 : 16;

  static bool usable(const Head& head) {
    const int32_t wanted = sizeof(T) == 2 ? kBFloat16 : kFloat32;
    return head.weight_dtype == wanted && head.d % kMultiple == 0;
  }
};

// Sets the logits of targets to kNever in Z.T of a tile, (rows, w).
template <class T>
void remove_targets(const Head& head, const Span<T>& span, int64_t start, int64_t rows,
                    int64_t block, float* z) {
  const int64_t w = span.width(block), first = span.start + block * kBlock;
  const int64_t real = std::min(w, span.start + span.n - first);
  for (int64_t i = 0; i < real; ++i) {
    const int64_t row = head.targets[first + i] - start;
    if (row >= 0 && row < rows) z[row * w + i] = kNever;
  }
}

// Writes Z.T of a tile, (rows, w), before the bias. The logits of targets are set to kNever.
template <class T>
void write_logits(const Head& head, const Span<T>& span, const WeightTile<T>& weight, int64_t start,
                  int64_t rows, int64_t block, float* z) {
  const int64_t w = span.width(block);
  gemm(rows, w, span.depth, weight.data, weight.stride, span.columns(block), w, z, w, false);
  remove_targets(head, span, start, rows, block, z);
}

// Whether `multiply_tokens` multiplies values of type Weight in T. It does not read fp16.
template <class T, class Weight>
constexpr bool kMultipliesTokens = std::is_same_v<T, float> && !std::is_same_v<Weight, fp16> &&
                                   std::is_same_v<Product<Weight>, float>;

template <class T>
bool multiplies_tokens(const Head& head) {
  bool result = false;
  with_dtype(head.weight_dtype,
             [&](auto weight) { result = kMultipliesTokens<T, decltype(weight)>; });
  return result;
}

// The same for the only block of a span, from the weight itself instead of a tile. For few tokens
// this is faster, and the bits are the same. copy: (kCopyRows, kCopyDepth).
template <class T>
void write_logits_of_few(const Head& head, const Span<T>& span, int64_t start, int64_t rows,
                         float* z, float* copy) {
  const int64_t w = span.width(0), stride = head.weight_stride;
  with_dtype(head.weight_dtype, [&](auto type) {
    using Weight = decltype(type);
    if constexpr (kMultipliesTokens<T, Weight>) {
      const Weight* a = static_cast<const Weight*>(head.weight) + start * stride;
      const Weight* next = start + rows < head.v ? a + rows * stride : a;
      multiply_tokens(rows, span.n, w, head.d, a, stride, span.columns(0), w, z, w, copy,
                      next);
    }
  });
  remove_targets(head, span, start, rows, 0, z);
}

void copy_padded(const float* from, int64_t n, int64_t padded_n, float pad, float* to) {
  std::fill(std::copy_n(from, n, to), to + padded_n, pad);
}

// What backward reads for each token of a span. Padding gives dz = 0.
struct TokenInputs {
  float base[kSpan], exponent[kSpan], c0[kSpan], c1[kSpan];

  TokenInputs() { poison(this, sizeof *this); }

  void take(const Head& head, const Gradients& g, int64_t start, int64_t n, int64_t padded_n) {
    copy_padded(head.base + start, n, padded_n, -kNever, base);
    copy_padded(head.exponent + start, n, padded_n, 1, exponent);
    copy_padded(g.c0 + start, n, padded_n, 0, c0);
    copy_padded(g.c1 + start, n, padded_n, 0, c1);
  }
};

float bias_of(const Head& head, int64_t row) {
  return head.bias ? std::max(head.bias[row], kNever) : 0.0f;
}

// Running sums over the vocabulary for each token: `other` sums exp((z - base) / T) and `moment`
// sums exp((z - base) / T) (z - base). The base starts at the logit of the target, so that nothing
// cancels as p_y -> 1. It moves up when the sum of a tile is much larger than the sum so far, so
// that the largest terms are exponentials of small numbers, and when the sum exceeds 2^60, so that
// kept exponentials and the factor from their base to the final one do not leave fp32's range.
struct Sums {
  double *other, *moment;
  float *base, *exponent;

  Sums at(int64_t i) const { return {other + i, moment + i, base + i, exponent + i}; }

  void move(int64_t i, float to) {
    const double step = double(base[i]) - to, scale = std::exp2(step * exponent[i]);
    moment[i] = scale * (moment[i] + step * other[i]);
    other[i] *= scale;
    base[i] = to;
  }

  void add(int64_t i, double more_other, double more_moment) {
    other[i] += more_other;
    moment[i] += more_moment;
  }
};

// Where forward keeps the exponentials of one tile and one block of tokens. Null: nowhere.
struct KeptTile {
  bf16* exponentials = nullptr;  // (rows, w) with row stride `stride`
  float* base = nullptr;         // (w,)
  int64_t stride = 0;

  KeptTile(const Kept* kept, int64_t tile, int64_t token) {
    if (!kept) return;
    stride = kept->stride;
    exponentials = kept->exponentials + tile * kForward * stride + token;
    base = kept->base + tile * stride + token;
  }
};

// Adds one tile of the vocabulary, for one block of tokens, to the sums.
void add_exponentials(const Head& head, const float* z, int64_t start, int64_t rows, int64_t w,
                      Sums to, const KeptTile& kept) {
  for (int64_t i = 0; i < w; i += kLanes) {
    const Power power(load<Lanes>(to.exponent + i));
    Lanes sum, product, largest;
    auto sweep = [&] {
      const Lanes base = load<Lanes>(to.base + i);
      sum = product = Lanes{};
      largest = broadcast(kNever);
      for (int64_t r = 0; r < rows; ++r) {
        Lanes logit = load<Lanes>(z + r * w + i);
        if (head.bias) logit += bias_of(head, start + r);
        const Lanes x = logit - base, e = power(x);
        if (kept.exponentials) store_narrow(kept.exponentials + r * kept.stride + i, e);
        sum += e;
        product += e * x;
        largest = logit > largest ? logit : largest;
      }
    };
    sweep();
    bool moved = false;
    for (int64_t j = 0; j < kLanes; ++j) {
      const double other = to.other[i + j];
      const bool is_large = sum[j] > 50 * (other + 1) || sum[j] + other > 0x1p60;
      if (is_large && largest[j] > to.base[i + j]) {
        to.move(i + j, largest[j]);
        moved = true;
      }
    }
    if (moved) sweep();
    if (kept.base) store(kept.base + i, load<Lanes>(to.base + i));
    for (int64_t j = 0; j < kLanes; ++j) to.add(i + j, sum[j], product[j]);
  }
}

template <class T>
void forward(const Head& head, const Kept* kept, double* other, double* moment, float* base) {
  Span<T> span(head, false);
  const int64_t tiles = (head.v + kForward - 1) / kForward;
  const int64_t padded_n = round_up(head.n, 16), size = head.threads * padded_n;
  Scratch<double> doubles(2 * size);
  Scratch<float> floats(2 * size), logits(head.threads * kForward * kBlock);
  const Sums sums{&doubles.data[0], &doubles.data[size], &floats.data[0], &floats.data[size]};
  std::fill_n(sums.other, 2 * size, 0.0);
  for (int t = 0; t < head.threads; ++t) {
    copy_padded(head.base, head.n, padded_n, -kNever, sums.base + t * padded_n);
    copy_padded(head.exponent, head.n, padded_n, 1, sums.exponent + t * padded_n);
  }
  Scratch<float> copies(head.threads * kCopyRows * kCopyDepth);
  for (int64_t first = 0; first < head.n; first += kSpan) {
    span.take(head, first, false);
    const bool few = span.blocks() == 1 && multiplies_tokens<T>(head);
    parallel(head.threads, [&](int t) {
      WeightTile<T> weight(head, few ? 0 : kForward);
      float* z = &logits.data[t * kForward * kBlock];
      float* copy = &copies.data[t * kCopyRows * kCopyDepth];
      const Share share(tiles, t, head.threads);
      for (int64_t tile = share.begin; tile < share.end; ++tile) {
        const int64_t start = tile * kForward, rows = std::min(kForward, head.v - start);
        if (!few) weight.take(start, rows);
        for (int64_t b = 0; b < span.blocks(); ++b) {
          if (few)
            write_logits_of_few(head, span, start, rows, z, copy);
          else
            write_logits(head, span, weight, start, rows, b, z);
          const int64_t token = first + b * kBlock;
          add_exponentials(head, z, start, rows, span.width(b), sums.at(t * padded_n + token),
                           KeptTile(kept, tile, token));
        }
      }
      gemm_done();
    });
  }
  for (int64_t i = 0; i < head.n; ++i) {
    base[i] = kNever;
    for (int t = 0; t < head.threads; ++t) base[i] = std::max(base[i], sums.base[t * padded_n + i]);
    other[i] = 0;
    moment[i] = 0;
    for (int t = 0; t < head.threads; ++t) {
      Sums part = sums.at(t * padded_n);
      part.move(i, base[i]);
      other[i] += part.other[i];
      moment[i] += part.moment[i];
    }
  }
}

// One thread's part of d_hidden = dz @ weight in bf16. Lanes lie along the tokens.
template <class T>
class HiddenGradient {
 public:
  explicit HiddenGradient(const Head& head, const Span<T>& span)
      : d(head.d), span(span), weight_t(d * kWeightStride), sums(kSpan * d) {}

  void begin() { std::fill_n(sums.data.get(), span.padded_n * d, 0.0f); }

  // Takes the next rows of weight.
  void take(const WeightTile<T>& weight, int64_t count) {
    rows = count;
    const int64_t rows_4 = rows / 4 * 4, d_4 = d / 4 * 4;  // rounded down to multiples of 4
    auto copy = [&](int64_t r, int64_t k) {
      weight_t.data[k * kWeightStride + r] = r < rows ? weight.data[r * weight.stride + k] : T{};
    };
    for (int64_t r0 = 0; r0 < rows_4; r0 += 32)  // fills one cache line of each row of weight_t
      for (int64_t k = 0; k < d_4; k += 4)
        for (int64_t r = r0; r < std::min(r0 + 32, rows_4); r += 4)
          transpose4(weight.data + r * weight.stride + k, weight.stride,
                     weight_t.data.get() + k * kWeightStride + r, kWeightStride);
    for (int64_t k = 0; k < d; ++k)
      for (int64_t r = k < d_4 ? rows_4 : 0; r < round_up(rows, 2); ++r) copy(r, k);
  }

  // Adds the products of a block. `pairs` is dz with its rows in pairs.
  void add(int64_t block, const T*, int64_t, const T* pairs) {
    const int64_t w = span.width(block);
    gemm(d, w, round_up(rows, 2), weight_t.data.get(), kWeightStride, pairs, w,
         sums.data.get() + block * kBlock * d, w, true);
  }

  float at(int64_t token, int64_t k) const {
    const int64_t block = token / kBlock;
    return sums.data[block * kBlock * d + k * span.width(block) + token % kBlock];
  }

 private:
  static constexpr int64_t kWeightStride = kBackward + kPad;
  const int64_t d;
  const Span<T>& span;
  Scratch<T> weight_t;  // (d, rows), weight.T with row stride kWeightStride
  Scratch<float> sums;  // (blocks, d, w)
  int64_t rows;
};

// The same in fp32, with the same bits. Lanes lie along the features: then dz is transposed and not
// weight, which is larger for few tokens.
template <>
class HiddenGradient<float> {
 public:
  explicit HiddenGradient(const Head& head, const Span<float>& span)
      : width(round_up(head.d, 16)), span(span), dz_t(kBlock * kStride), sums(kSpan * width) {}

  void begin() { std::fill_n(sums.data.get(), span.n * width, 0.0f); }

  void take(const WeightTile<float>& tile, int64_t count) {
    weight = tile.data;
    stride = tile.stride;
    rows = count;
  }

  // Adds the products of a block. `dz` is (rows, width of the block) with row stride dz_stride.
  void add(int64_t block, const float* dz, int64_t dz_stride, const float*) {
    const int64_t n = std::min(kBlock, span.n - block * kBlock);
    const int64_t rows_4 = rows / 4 * 4;
    for (int64_t i = 0; i < n; i += 4)  // dz has a multiple of 16 columns
      for (int64_t r = 0; r < rows_4; r += 4)
        transpose4(dz + r * dz_stride + i, dz_stride, &dz_t.data[i * kStride + r], kStride);
    for (int64_t r = rows_4; r < rows; ++r)
      for (int64_t i = 0; i < n; ++i) dz_t.data[i * kStride + r] = dz[r * dz_stride + i];
    gemm(n, width, rows, dz_t.data.get(), kStride, weight, stride,
         &sums.data[block * kBlock * width], width, true);
  }

  float at(int64_t token, int64_t k) const { return sums.data[token * width + k]; }

 private:
  static constexpr int64_t kStride = kBackward + kPad;
  const int64_t width;
  const Span<float>& span;
  Scratch<float> dz_t;  // (tokens of a block, rows) with row stride kStride
  Scratch<float> sums;  // (tokens, width)
  const float* weight;
  int64_t stride, rows;
};

// Backward on one thread.
template <class T>
class Backward {
 public:
  Backward(const Head& head, const Kept* kept, const Gradients& g, const Span<T>& span,
           const TokenInputs& inputs)
      : head(head), kept(kept), g(g), span(span), inputs(inputs), weight(head, kBackward),
        dz_stride(padded_stride(std::min(kSpan, head.n))), z(kBackward * kBlock),
        dz(kBackward * dz_stride), pairs(kPair<T> == 2 ? kBackward * kBlock : 0) {
    if (g.d_hidden) d_hidden = std::make_unique<HiddenGradient<T>>(head, span);
    poison(bias_sum, sizeof bias_sum);
  }

  void begin() { if (d_hidden) d_hidden->begin(); }

  void tile(int64_t first, int64_t count) {
    start = first;
    rows = count;
    if (d_hidden || !kept) weight.take(start, rows);
    if (d_hidden) d_hidden->take(weight, rows);
    if (g.d_bias) std::fill_n(bias_sum, rows, Lanes{});
    for (int64_t b = 0; b < span.blocks(); ++b) {
      if (kept) {
        write_kept_dz(b);
      } else {
        write_logits(head, span, weight, start, rows, b, z.data.get());
        write_dz(b);
      }
      set_targets(b);
      if (d_hidden) d_hidden->add(b, dz.data.get() + b * kBlock, dz_stride, pairs.data.get());
    }
    if (g.d_weight) with_matrix_type(g.d_weight_dtype, [&](auto type) { write_d_weight(type); });
    if (g.d_bias) write_d_bias();
  }

  std::unique_ptr<HiddenGradient<T>> d_hidden;  // null if it is not needed

 private:
  const Head& head;
  const Kept* kept;  // null: recompute the logits
  const Gradients& g;
  const Span<T>& span;
  const TokenInputs& inputs;
  WeightTile<T> weight;
  const int64_t dz_stride;
  Scratch<float> z;  // (rows, w), the logits of a block
  Scratch<T> dz;     // (rows, padded_n), with row stride dz_stride
  Scratch<T> pairs;  // (rows, w), dz of a block with rows in pairs, the B of a product in bf16
  Lanes bias_sum[kBackward];
  int64_t start, rows;

  // Whether d_weight and d_bias have the sums of earlier tokens.
  bool adds() const { return g.accumulate || span.start > 0; }

  void write_dz(int64_t block) {
    const int64_t w = span.width(block), at = block * kBlock;
    for (int64_t i = 0; i < w; i += kLanes) {
      const Lanes base = load<Lanes>(inputs.base + at + i);
      const Power power(load<Lanes>(inputs.exponent + at + i));
      const Lanes c0 = load<Lanes>(inputs.c0 + at + i), c1 = load<Lanes>(inputs.c1 + at + i);
      auto value = [&](int64_t r) {
        if (r >= rows) return Lanes{};
        Lanes x = load<Lanes>(&z.data[r * w + i]) - base;
        if (head.bias) x += bias_of(head, start + r);
        x = x < power.low ? power.low : x;  // else a large c1 times kNever would be inf
        const Lanes d = power(x) * (c0 + c1 * x);
        if (g.d_bias) bias_sum[r] += d;
        return d;
      };
      store_dz(block, i, 0, rows, value);
    }
  }

  // dz = e exp2((base of its tile - base) * exponent) c0, for tokens whose c1 is 0
  void write_kept_dz(int64_t block) {
    const int64_t w = span.width(block), at = block * kBlock;
    int32_t columns[kBlock];
    for (int64_t i = 0; i < w; ++i) columns[i] = column_of(std::min(at + i, span.n - 1));
    for (int64_t i = 0; i < w; i += kLanes) {
      bool adjacent = true;
      for (int j = 1; j < kLanes; ++j) adjacent &= columns[i + j] == columns[i] + j;
      const Lanes base = load<Lanes>(inputs.base + at + i), c0 = load<Lanes>(inputs.c0 + at + i);
      const Power power(load<Lanes>(inputs.exponent + at + i));
      for (int64_t end, first = 0; first < rows; first = end) {
        const int64_t tile = (start + first) / kForward;
        end = std::min(rows, (tile + 1) * kForward - start);
        Lanes tile_base;
        for (int j = 0; j < kLanes; ++j)
          tile_base[j] = kept->base[tile * kept->stride + columns[i + j]];
        const Lanes scale = power(tile_base - base) * c0;
        auto value = [&](int64_t r) {
          if (r >= rows) return Lanes{};
          const bf16* from = kept->exponentials + (start + r) * kept->stride;
          ShortLanes e;
          if (adjacent)
            e = load<ShortLanes>(from + columns[i]);
          else
            for (int j = 0; j < kLanes; ++j) e[j] = from[columns[i + j]].bits;
          const Lanes d = bits_as<Lanes>(__builtin_convertvector(e, BitLanes) << 16) * scale;
          if (g.d_bias) bias_sum[r] += d;
          return d;
        };
        store_dz(block, i, first, end, value);
      }
    }
  }

  // The place of a token of the span among the kept ones.
  int64_t column_of(int64_t token) const {
    return kept->columns ? kept->columns[span.start + token] : span.start + token;
  }

  // Stores value(r) for rows [first, end) and lanes [i, i + kLanes). In bf16, `first` is even.
  template <class Value>
  void store_dz(int64_t block, int64_t i, int64_t first, int64_t end, Value value) {
    const int64_t w = span.width(block);
    T* to = &dz.data[block * kBlock + i];
    for (int64_t r = first; r < end; r += kPair<T>) {
      const Lanes even = value(r);
      if constexpr (kPair<T> == 1) {
        store(to + r * dz_stride, even);
      } else {
        const BitLanes low = rounded_to_bf16(even) >> 16, high = rounded_to_bf16(value(r + 1));
        store(to + r * dz_stride, __builtin_convertvector(low, ShortLanes));
        store(to + (r + 1) * dz_stride, __builtin_convertvector(high >> 16, ShortLanes));
        store(&pairs.data[r * w + 2 * i], low | high);
      }
    }
  }

  void set_targets(int64_t block) {
    const int64_t w = span.width(block), at = block * kBlock;
    for (int64_t i = 0; i < std::min(w, span.n - at); ++i) {
      const int64_t token = span.start + at + i, row = head.targets[token] - start;
      if (row < 0 || row >= rows) continue;
      narrow(g.at_target[token], dz.data[row * dz_stride + at + i]);
      if constexpr (kPair<T> == 2)
        pairs.data[row / 2 * 2 * w + 2 * i + row % 2] = dz.data[row * dz_stride + at + i];
      if (g.d_bias) bias_sum[row][0] += g.at_target[token];
    }
  }

  // With few tokens, the writes of d_weight take most of the time. Then a product has few rows, so
  // that the writes run through memory in order.
  template <class To>
  void write_d_weight(To type) {
    const int64_t step = span.n > kBlock ? rows : kWrittenRows;
    for (int64_t first = 0; first < rows; first += step)
      for (int64_t k0 = 0; k0 < head.d; k0 += kBlock)
        write_d_weight_block(type, first, std::min(rows, first + step), k0);
  }

  // Writes rows [first, end) of d_weight from feature k0 on, for up to kBlock features.
  template <class To>
  void write_d_weight_block(To, int64_t first, int64_t end, int64_t k0) {
    const int64_t w = std::min(kBlock, round_up(head.d, 16) - k0);
    const int64_t real = std::min(w, head.d - k0), depth = round_up(span.n, kPair<T>);
    gemm(end - first, w, depth, dz.data.get() + first * dz_stride, dz_stride, span.rows(k0), w,
         z.data.get(), w, false);
    for (int64_t r = first; r < end; ++r) {
      To* to = static_cast<To*>(g.d_weight) + (start + r) * head.d + k0;
      const float* from = z.data.get() + (r - first) * w;
      if (sizeof(To) == 4 && adds())
        for (int64_t k = 0; k < real; ++k) narrow(widen(to[k]) + from[k], to[k]);
      else
        narrow(from, real, to);
    }
  }

  void write_d_bias() {
    for (int64_t r = 0; r < rows; ++r) {
      float sum = 0;
      for (int j = 0; j < kLanes; ++j) sum += bias_sum[r][j];
      g.d_bias[start + r] = adds() ? g.d_bias[start + r] + sum : sum;
    }
  }
};

// Adds the threads' parts of d_hidden for the tokens of one block.
template <class T, class To>
void write_d_hidden(const Span<T>& span, int64_t block,
                    const std::unique_ptr<Backward<T>>* parts, int n_parts, To* out) {
  const int64_t w = span.width(block), real = std::min(w, span.n - block * kBlock);
  To* to = out + (span.start + block * kBlock) * span.d;
  for (int64_t i = 0; i < real; ++i)
    for (int64_t k = 0; k < span.d; ++k) {
      float sum = 0;
      for (int t = 0; t < n_parts; ++t) sum += parts[t]->d_hidden->at(block * kBlock + i, k);
      narrow(sum, to[i * span.d + k]);
    }
}

template <class T>
void backward(const Head& head, const Kept* kept, const Gradients& g) {
  if (g.d_weight && g.d_weight_dtype != kFloat32 && (g.accumulate || head.n > kSpan))
    throw std::invalid_argument("the sum of several weight gradients must be fp32");
  Span<T> span(head, true);
  auto inputs = std::make_unique<TokenInputs>();
  const int64_t rows_per_thread = (head.v + head.threads - 1) / head.threads;
  const bool few = kPair<T> == 1 && head.n <= kBlock;
  const int64_t most = few ? kForward : kBackward;  // of few tokens, weight takes most of the cache
  const int64_t size = std::min(most, round_up(rows_per_thread, 16));
  const int64_t tiles = (head.v + size - 1) / size;
  auto parts = std::make_unique<std::unique_ptr<Backward<T>>[]>(head.threads);
  for (int t = 0; t < head.threads; ++t)
    parts[t] = std::make_unique<Backward<T>>(head, kept, g, span, *inputs);
  for (int64_t first = 0; first < head.n; first += kSpan) {
    span.take(head, first, true);
    inputs->take(head, g, first, span.n, span.padded_n);
    parallel(head.threads, [&](int t) {
      parts[t]->begin();
      const Share share(tiles, t, head.threads);
      for (int64_t tile = share.begin; tile < share.end; ++tile)
        parts[t]->tile(tile * size, std::min(size, head.v - tile * size));
      gemm_done();
    });
    if (!g.d_hidden) continue;
    parallel(head.threads, [&](int t) {
      const Share share(span.blocks(), t, head.threads);
      for (int64_t b = share.begin; b < share.end; ++b)
        with_matrix_type(g.d_hidden_dtype, [&](auto type) {
          write_d_hidden(span, b, parts.get(), head.threads,
                         static_cast<decltype(type)*>(g.d_hidden));
        });
    });
  }
}

// Calls f with a value of the type to multiply in. Returns 0, or 1 with the reason in last_error.
template <class F>
int32_t with_product(const Head& head, F f) {
  return guarded([&] {
#ifdef EXPO_FAST_BF16
    if (head.hidden_dtype == kBFloat16 && head.weight_dtype == kBFloat16) return f(bf16{});
#endif
    return f(float{});
  });
}

}  // namespace

extern "C" {

const char* expo_fast_error() { return last_error; }

// Returns whether oneDNN multiplies with AMX here. ONEDNN_MAX_CPU_ISA may forbid it on a CPU that
// has it.
int32_t expo_fast_has_amx() {
#if defined(EXPO_FAST_AMX)
  return at::native::cpublas::could_pack(at::kBFloat16);
#else
  return 0;
#endif
}

// Writes the logit of each row's target, (N,), summed in fp64.
int32_t expo_fast_anchor(const Head* head, float* out) {
  parallel(head->threads, [&](int t) {
    const Share share(head->n, t, head->threads);
    with_dtype(head->hidden_dtype, [&](auto x) {
      with_dtype(head->weight_dtype, [&](auto y) {
        for (int64_t i = share.begin; i < share.end; ++i) {
          const int64_t row = head->targets[i];
          auto a = static_cast<const decltype(x)*>(head->hidden) + i * head->d;
          auto b = static_cast<const decltype(y)*>(head->weight) + row * head->weight_stride;
          double sum = bias_of(*head, row);
          for (int64_t k = 0; k < head->d; ++k) sum += double(widen(a[k])) * widen(b[k]);
          out[i] = sum;
        }
      });
    });
  });
  return 0;
}

// Returns the vocabulary rows that share a base in Kept.
int32_t expo_fast_tile_rows() { return kForward; }

// Writes other and moment, (N,) fp64, and the base (N,) that they are relative to, which differs
// from head->base where p_y is small. If `kept` is not null, it writes the exponentials
// too. Returns 0, or 1 and sets the error.
int32_t expo_fast_forward(const Head* head, const Kept* kept, double* other, double* moment,
                          float* base) {
  return with_product(*head, [&](auto type) {
    forward<decltype(type)>(*head, kept, other, moment, base);
  });
}

// Writes the gradients that `g` asks for. If `kept` is not null, it reads the exponentials, and c1
// is 0. Returns 0, or 1 and sets the error.
int32_t expo_fast_backward(const Head* head, const Kept* kept, const Gradients* g) {
  return with_product(*head, [&](auto type) { backward<decltype(type)>(*head, kept, *g); });
}

}  // extern "C"
