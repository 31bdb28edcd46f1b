// Norms of gradients, and AdamW, over a list of fp32 tensors in one pass over memory.
//
//   squares  sum a^2, sum b^2 and sum (a + b)^2 of the two terms a and b of a list of gradients
//   adamw    the update of optimizer.py, with the scale of clipping, the write of the bf16 copy and
//            the sum of the squared changes of the weights
//
// Every sum has a fixed order, which does not depend on the number of threads. `adamw` has the
// roundings of PyTorch's fused AdamW for AVX2, whose products and sums are fused where `fused` stands
// here. The library is compiled without other contractions (PART_FLAGS of native_library.py).

#include <cmath>

#include "common.h"

namespace {

constexpr int64_t kChunk = 1 << 16;  // elements of one item of work
constexpr int64_t kStep = 512;       // elements whose changes are kept until they are summed
constexpr int64_t kTorchLanes = 8;   // PyTorch rounds the rest of a tensor in another way

}  // namespace

// op_backends/native_optimizer.py declares these structs too.
struct GradTerms {
  const float *first, *second;  // (size,); null: 0
  int64_t size;
};

struct Squares {
  const GradTerms* tensors;
  int64_t n;
  double* sums;  // (3,) of the first terms, of the second terms, of the sums of both
  int32_t threads;
};

struct Parameter {
  float *weight, *exp_avg, *exp_avg_sq;  // (size,)
  const float *first, *second;           // (size,) the terms of the gradient; second: null: 0
  bf16* copy;                            // (size,) the rounded weights, or null
  int64_t size;
  float decay;      // lr * weight decay
  float kept;       // 1 - lr * weight decay
  float step_size;  // lr / (1 - beta1^t)
  float root;       // sqrt(1 - beta2^t)
};

struct AdamW {
  const Parameter* parameters;
  int64_t n;
  double* squared_change;  // (1,)
  float clip;              // factor of the gradients
  float grad_share;        // 1 - beta1
  float beta2;
  float square_share;  // 1 - beta2
  float eps;
  int32_t threads;
};

EXPO_FAST_SIZEOF(grad_terms, GradTerms)
EXPO_FAST_SIZEOF(squares, Squares)
EXPO_FAST_SIZEOF(parameter, Parameter)
EXPO_FAST_SIZEOF(adamw, AdamW)

namespace {

// a * b + c, rounded once where the target has an instruction for it.
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// A sum of squares in fp64: 16 partial sums, whose order is the same on every target.
struct SquareSum {
  typedef float Values __attribute__((vector_size(32)));
  typedef double Sums __attribute__((vector_size(64)));
  Sums even{}, odd{};
  double rest = 0;

  static Sums square(Values x) {
    const Sums wide = __builtin_convertvector(x, Sums);
    return wide * wide;
  }

  // f(i) is the value at i as Values or, for std::false_type, as float.
  template <class F>
  void add(int64_t n, F f) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      even += square(f(i, std::true_type{}));
      odd += square(f(i + 8, std::true_type{}));
    }
    for (; i < n; ++i) {
      const double x = f(i, std::false_type{});
      rest += x * x;
    }
  }

  double total() const {
    const Sums both = even + odd;
    double sum = rest;
    for (int j = 0; j < 8; ++j) sum += both[j];
    return sum;
  }
};

inline SquareSum::Values value(const float* x, std::true_type) {
  return load<SquareSum::Values>(x);
}
inline float value(const float* x, std::false_type) { return *x; }

// A part of a tensor.
struct Chunk {
  int64_t tensor, begin, size;
};

template <class T>
std::vector<Chunk> chunks_of(const T* tensors, int64_t n) {
  std::vector<Chunk> chunks;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t begin = 0; begin < tensors[i].size; begin += kChunk)
      chunks.push_back({i, begin, std::min(kChunk, tensors[i].size - begin)});
  return chunks;
}

void squares(const Squares& s) {
  const std::vector<Chunk> chunks = chunks_of(s.tensors, s.n);
  Scratch<double> parts(3 * chunks.size());
  parallel_each(s.threads, chunks.size(), [&](int, int64_t c) {
    const Chunk& chunk = chunks[c];
    const GradTerms& terms = s.tensors[chunk.tensor];
    double* part = parts.data.get() + 3 * c;
    SquareSum first, second, both;
    const float* a = terms.first ? terms.first + chunk.begin : nullptr;
    const float* b = terms.second ? terms.second + chunk.begin : nullptr;
    if (a) first.add(chunk.size, [&](int64_t i, auto v) { return value(a + i, v); });
    if (b) second.add(chunk.size, [&](int64_t i, auto v) { return value(b + i, v); });
    part[0] = first.total();
    part[1] = second.total();
    part[2] = part[0] + part[1];
    if (a && b) {
      both.add(chunk.size, [&](int64_t i, auto v) { return value(a + i, v) + value(b + i, v); });
      part[2] = both.total();
    }
  });
  for (int k = 0; k < 3; ++k) {
    s.sums[k] = 0;
    for (size_t c = 0; c < chunks.size(); ++c) s.sums[k] += parts.data[3 * c + k];
  }
}

// Updates `n` elements and writes the changes of the weights. REST: with the roundings of PyTorch for
// the last elements of a tensor.
template <bool REST>
void update(const AdamW& o, const Parameter& p, int64_t begin, int64_t n, float* __restrict change) {
  float* __restrict weight = p.weight + begin;
  float* __restrict exp_avg = p.exp_avg + begin;
  float* __restrict exp_avg_sq = p.exp_avg_sq + begin;
  const bool keeps_most = o.grad_share < 0.5f;  // as torch.lerp
  const float share = keeps_most ? o.grad_share : o.grad_share - 1.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float grad = change[i], m = exp_avg[i], v = exp_avg_sq[i];
    exp_avg[i] = fused(share, grad - m, keeps_most ? m : grad);
    const float scaled = o.square_share * grad;
    exp_avg_sq[i] =
        REST ? fused(v, o.beta2, scaled * grad) : fused(scaled, grad, v * o.beta2);
    const float denominator = std::sqrt(exp_avg_sq[i]) / p.root + o.eps;
    const float adam = -p.step_size * exp_avg[i] / denominator;
    change[i] = weight[i] * p.decay - adam;
    weight[i] = weight[i] * p.kept + adam;
  }
}

void write_grads(const AdamW& o, const Parameter& p, int64_t begin, int64_t n, float* to) {
  const float* first = p.first + begin;
  if (p.second) {
    const float* second = p.second + begin;
    for (int64_t i = 0; i < n; ++i) to[i] = (first[i] + second[i]) * o.clip;
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = first[i] * o.clip;
  }
}

void adamw(const AdamW& o) {
  const std::vector<Chunk> chunks = chunks_of(o.parameters, o.n);
  Scratch<double> parts(chunks.size());
  parallel_each(o.threads, chunks.size(), [&](int, int64_t c) {
    const Chunk& chunk = chunks[c];
    const Parameter& p = o.parameters[chunk.tensor];
    const int64_t rest = p.size - p.size % kTorchLanes;
    SquareSum sum;
    alignas(64) float changes[kStep];  // first the gradients
    for (int64_t at = chunk.begin; at < chunk.begin + chunk.size; at += kStep) {
      const int64_t n = std::min(kStep, chunk.begin + chunk.size - at);
      const int64_t full = std::min(n, rest - at);
      write_grads(o, p, at, n, changes);
      update<false>(o, p, at, full, changes);
      update<true>(o, p, at + full, n - full, changes + full);
      if (p.copy) narrow(p.weight + at, n, p.copy + at);
      sum.add(n, [&](int64_t i, auto v) { return value(changes + i, v); });
    }
    parts.data[c] = sum.total();
  });
  *o.squared_change = 0;
  for (size_t c = 0; c < chunks.size(); ++c) *o.squared_change += parts.data[c];
}

}  // namespace

// Each function returns 0, or 1 and sets the error.
extern "C" {

const char* expo_fast_error() { return last_error; }

int32_t expo_fast_squares(const Squares* s) {
  return guarded([&] { squares(*s); });
}

int32_t expo_fast_adamw(const AdamW* o) {
  return guarded([&] { adamw(*o); });
}

}  // extern "C"
