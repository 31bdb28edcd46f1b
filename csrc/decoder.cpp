// Forward pass of a decoder on a CPU over a paged key-value cache, for prompts and for new tokens.
//
//   x = embedding[token]
//   x += o(attend(rope(norm(q h)), rope(norm(k h)), v h)),    h = rms_norm(x)        every layer
//   x += down(silu(gate h) * (up h)),                         h = rms_norm(x)
//   hidden = rms_norm(x)
//
// Each norm but the last may be missing. Architectures also differ in norms after o and down, in
// GELU in place of SiLU, and in factors of x, of scores and of hidden.
//
// Tokens lie along the vector lanes: Y.T = W @ X.T reads each weight once per call, in memory
// order, and norms and rotations work on each lane separately. token_products.h may multiply with
// output features in the lanes instead. Values are rounded to the model's
// dtype where PyTorch rounds them. Every number depends on its own sequence only and is summed in a
// fixed order. It is the same to the bit for any other sequences in the batch, for any number of
// threads, and for any division of the sequence into calls.
//
// A page holds the keys and values of kPage tokens in all layers, ordered by layer, then by kv
// head, with the keys before the values. The keys of a head are (Dh, kPage) and its values are
// (kPage, Dh rounded up to 16), with rows in pairs as gemm.h needs them. Neighbouring rows of a
// call that share a page read it once.

#include <algorithm>
#include <cmath>

#include "common.h"
#include "matrices.h"
#include "token_products.h"

namespace {

constexpr int64_t kPage = 32;     // tokens in a page; the same number as in cpu_engine.py
constexpr int64_t kTile = kAnyColumn ? 32 : 48;  // output features of a product: two tiles fit in L1
constexpr int64_t kTogether = 8;  // neighbouring rows whose attention one thread computes together
constexpr int64_t kSpan = 4;      // pages whose scores become weights together
constexpr int64_t kSpanTokens = kSpan * kPage;

enum Activation : int32_t { kSilu, kGeluTanh };  // the order of ACTIVATIONS in shape.py

}  // namespace

// native_structs.py declares the same structs. Matrices are (out, in) and contiguous. A parameter
// that the model does not have is null.
struct Layer {
  const void *before_attention, *after_attention, *before_mlp, *after_mlp;  // norms
  const void *q_norm, *k_norm;
  const void *q, *k, *v, *o, *gate, *up, *down;
  const void *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias;
  int64_t window;  // how many tokens a token sees, itself included; 0 means all
  int32_t rope;    // the set of RoPE's frequencies; -1 means no RoPE
};

struct Decoder {
  const Layer* layers;
  const void *embedding, *norm;
  int64_t n_layers, hidden, intermediate, heads, kv_heads, head_dim;
  int64_t rotary_dim, rope_sets;  // RoPE rotates the first dimensions of a head
  float eps, norm_offset;         // a norm multiplies by norm_offset + weight
  float attention_scale, embedding_scale, residual_scale, logit_scale;
  int32_t activation;       // kSilu or kGeluTanh
  int32_t norms_all_heads;  // q_norm and k_norm are over all heads together
  int32_t dtype;            // of all parameters, pages and hidden
};

// The tokens of a call, from one or more sequences. The tokens of a sequence are in order and
// directly follow the tokens that the cache holds already.
struct Rows {
  const int64_t* tokens;    // (n,)
  const int64_t* positions; // (n,)
  const int32_t* tables;    // (n, table_stride), the pages of each row's sequence
  const float *cos, *sin;   // (rope_sets, n_positions, rotary_dim / 2)
  void *pages, *workspace;
  void* out;                // (n, D) output, after the last norm
  int64_t n, table_stride, n_positions;
  int32_t threads;
};

EXPO_FAST_SIZEOF(layer, Layer)
EXPO_FAST_SIZEOF(decoder, Decoder)
EXPO_FAST_SIZEOF(rows, Rows)

namespace {

const IntLanes kLane = [] {  // 0, 1, 2, ...
  IntLanes index;
  for (int j = 0; j < kLanes; ++j) index[j] = j;
  return index;
}();

template <class T>
inline Lanes rounded(Lanes x) {
  if constexpr (sizeof(T) == 4) return x;
  else return bits_as<Lanes>(rounded_to_bf16(x));
}

// Stores values that are rounded to the type already. `store_narrow` rounds.
inline void store_rounded(float* to, Lanes x) { store(to, x); }

inline void store_rounded(bf16* to, Lanes x) {
  store(to, __builtin_convertvector(bits_as<BitLanes>(x) >> 16, ShortLanes));
}

// Stores two rows of the matrix B of a product. Their values are rounded already.
inline void store_rows(float* to, int64_t w, Lanes even, Lanes odd) {
  store(to, even);
  store(to + w, odd);
}

inline void store_rows(bf16* to, int64_t, Lanes even, Lanes odd) {
  store(to, bits_as<BitLanes>(even) >> 16 | bits_as<BitLanes>(odd));
}

#if defined(__AVX512F__)
inline float largest(Lanes x) { return _mm512_reduce_max_ps((__m512)x); }
inline float total(Lanes x) { return _mm512_reduce_add_ps((__m512)x); }
#else
inline float largest(Lanes x) {
  float top = x[0];
  for (int j = 1; j < kLanes; ++j) top = x[j] > top ? x[j] : top;
  return top;
}

inline float total(Lanes x) {
  float sum = x[0];
  for (int j = 1; j < kLanes; ++j) sum += x[j];
  return sum;
}
#endif

// Sizes that follow from the decoder and the number of rows of a call.
struct Sizes {
  int64_t n, padded_n, blocks;           // padded_n is n rounded up to 16
  int64_t group, value_width;            // query heads of a kv head; Dh rounded up to 16
  int64_t head_elements, page_elements;  // of a kv head in a page; of a page

  Sizes(const Decoder& d, int64_t n)
      : n(n), padded_n(round_up(n, 16)), blocks((n + kBlock - 1) / kBlock),
        group(d.heads / d.kv_heads), value_width(round_up(d.head_dim, 16)),
        head_elements(kPage * (d.head_dim + value_width)),
        page_elements(d.n_layers * d.kv_heads * head_elements) {}

  int64_t width(int64_t block) const { return std::min(kBlock, padded_n - block * kBlock); }
};

// Allocates parts of a workspace. Without a workspace it only counts the bytes of the parts.
struct Arena {
  char* at;
  int64_t used = 0;

  template <class T>
  T* take(int64_t n) {
    T* part = reinterpret_cast<T*>(at + used);
    used += round_up(n * sizeof(T), 64);
    return part;
  }
};

// The work buffers of one thread. The number of queries is kTogether * group.
template <class T>
struct Buffers {
  float *z, *z2;       // (kTile or Dh, kBlock), the results of products
  T* transposed;       // (Dh, kBlock), one head of a block, and then its transpose (kBlock, Dh)
  float* scores;       // (queries, kSpanTokens)
  float* sum;          // (queries, value_width), the weighted sum of values so far
  float* max_score;    // (queries,), the largest score so far
  float* weight_sum;   // (queries,), the sum of attention weights so far
  Product<T>* weights; // (queries, kSpanTokens), of attention
  Product<T>* copy;    // (kCopyRows, kCopyDepth), weights of a product

  Buffers(const Decoder& d, const Sizes& s, Arena& a) {
    const int64_t features = std::max(kTile, d.head_dim), queries = kTogether * s.group;
    z = a.take<float>(features * kBlock);
    z2 = a.take<float>(kTile * kBlock);
    transposed = a.take<T>(2 * s.value_width * kBlock);
    scores = a.take<float>(queries * kSpanTokens);
    sum = a.take<float>(queries * s.value_width);
    max_score = a.take<float>(queries);
    weight_sum = a.take<float>(queries);
    weights = a.take<Product<T>>(queries * kSpanTokens);
    copy = a.take<Product<T>>(kCopyRows * kCopyDepth);
  }
};

// The forward pass of one call.
template <class T>
class Pass {
 public:
  using P = Product<T>;

  Pass(const Decoder& d, const Rows& rows, Arena arena) : d(d), rows(rows), s(d, rows.n) {
    const int64_t angles = d.rope_sets * d.rotary_dim / 2;
    x = arena.take<T>(s.padded_n * d.hidden);
    h = arena.take<P>(s.padded_n * d.hidden);
    attended = arena.take<P>(s.padded_n * d.heads * d.head_dim);
    activation = arena.take<P>(s.padded_n * d.intermediate);
    q = arena.take<P>(s.n * d.heads * d.head_dim);
    cos = arena.take<float>(s.padded_n * angles);
    sin = arena.take<float>(s.padded_n * angles);
    if (d.norms_all_heads) {
      const int64_t normed_heads = d.heads + d.kv_heads;
      unnormed = arena.take<T>(s.padded_n * normed_heads * d.head_dim);
      squares = arena.take<float>(s.padded_n * normed_heads);
    }
    free_memory = arena;
  }

  static int64_t bytes(const Decoder& d, int64_t n, int threads) {
    Rows rows{};
    rows.n = n;
    Pass pass(d, rows, Arena{nullptr});
    for (int t = 0; t < threads; ++t) Buffers<T>(d, pass.s, pass.free_memory);
    return pass.free_memory.used;
  }

  void run() {
    Team::run(rows.threads, [&](Team& team, int t) {
      Arena arena = free_memory;
      for (int i = 0; i < t; ++i) Buffers<T>(d, s, arena);
      const Buffers<T> buffers(d, s, arena);
      embed(team);
      for (int64_t l = 0; l < d.n_layers; ++l) layer(l, buffers, team);
      norm(d.norm, team);
      write_hidden(team);
      gemm_done();
    });
  }

 private:
  const Decoder& d;
  const Rows& rows;
  const Sizes s;
  // Features by tokens, one block after another. x is plain, the others are the B of a product.
  T* x;
  P *h, *attended, *activation;
  P* q;              // (kv_heads, n, group, Dh)
  float *cos, *sin;  // (rope_sets * rotary_dim / 2, width), one block after another
  T* unnormed = nullptr;  // all heads of q and k by tokens, plain; only with norms_all_heads
  float* squares = nullptr;  // (heads + kv_heads, width), sums over a head, one block after another
  Arena free_memory{nullptr};

  // Distributes vectors of tokens over the threads: calls f(block, first column, width).
  template <class F>
  void each_token_vector(Team& team, F f) const {
    team.each(s.padded_n / kLanes, [&](int64_t v) {
      const int64_t block = v * kLanes / kBlock;
      f(block, v * kLanes % kBlock, s.width(block));
    });
  }

  // Distributes output features over the threads: calls f(first, count).
  template <class F>
  void each_tile(int64_t features, Team& team, F f) const {
    team.each((features + kTile - 1) / kTile, [&](int64_t tile) {
      f(tile * kTile, std::min(kTile, features - tile * kTile));
    });
  }

  // Returns the part of a features-by-tokens matrix that belongs to a block.
  template <class U>
  static U* block_of(U* data, int64_t block, int64_t features) {
    return data + block * kBlock * features;
  }

  static Lanes parameter(const void* data, int64_t i) {
    return data ? broadcast(widen(static_cast<const T*>(data)[i])) : Lanes{};
  }

  // Returns the factor of a norm for feature i.
  Lanes norm_factor(const void* weight, int64_t i) const {
    return parameter(weight, i) + d.norm_offset;
  }

  void embed(Team& team) {
    const int64_t half = d.rotary_dim / 2, angles = d.rope_sets * half;
    each_token_vector(team, [&](int64_t block, int64_t column, int64_t w) {
      T* to = block_of(x, block, d.hidden);
      float *to_cos = block_of(cos, block, angles), *to_sin = block_of(sin, block, angles);
      for (int64_t i = column; i < column + kLanes; ++i) {
        const int64_t row = block * kBlock + i;
        const bool real = row < s.n;  // not padding
        const int64_t token = real ? rows.tokens[row] : 0;
        const T* from = static_cast<const T*>(d.embedding) + token * d.hidden;
        for (int64_t k = 0; k < d.hidden; ++k) to[k * w + i] = real ? from[k] : T{};
        const int64_t position = real ? rows.positions[row] : 0;
        for (int64_t set = 0; set < d.rope_sets; ++set) {
          const int64_t at = (set * rows.n_positions + position) * half;
          for (int64_t k = 0; k < half; ++k) {
            to_cos[(set * half + k) * w + i] = rows.cos[at + k];
            to_sin[(set * half + k) * w + i] = rows.sin[at + k];
          }
        }
      }
      if (d.embedding_scale == 1) return;
      for (int64_t k = 0; k < d.hidden; ++k) {
        T* at = to + k * w + column;
        store_rounded(at, rounded<T>(load_wide(at) * d.embedding_scale));
      }
    });
  }

  // Writes h = rms_norm(x), rounded once, or h = x if the layer has no such norm.
  void norm(const void* weight, Team& team) {
    each_token_vector(team, [&](int64_t block, int64_t column, int64_t w) {
      const T* from = block_of(x, block, d.hidden) + column;
      P* to = block_of(h, block, d.hidden);
      const Lanes scale = weight ? norm_scale(from, w) : Lanes{};
      for (int64_t k = 0; k < d.hidden; k += 2) {
        auto value = [&](int64_t k) {
          const Lanes v = load_wide(from + k * w);
          return weight ? rounded<T>(v * scale * norm_factor(weight, k)) : v;
        };
        store_rows(to + packed_index<P>(k, column, w), w, value(k), value(k + 1));
      }
    });
  }

  // Returns 1 / rms of one vector of tokens. from: (D, w).
  Lanes norm_scale(const T* from, int64_t w) const {
    Lanes sum[4] = {};
    for (int64_t k = 0; k < d.hidden; ++k) {
      const Lanes v = load_wide(from + k * w);
      sum[k % 4] += v * v;
    }
    return inverse_root((sum[0] + sum[1]) + (sum[2] + sum[3]), d.hidden);
  }

  Lanes inverse_root(Lanes squares, int64_t n) const {
    Lanes x = squares / float(n) + d.eps;
    for (int j = 0; j < kLanes; ++j) x[j] = 1.0f / std::sqrt(x[j]);
    return x;
  }

  void layer(int64_t index, const Buffers<T>& buffers, Team& team) {
    const Layer& l = d.layers[index];
    norm(l.before_attention, team);
    if (d.norms_all_heads)
      team.each(d.heads + d.kv_heads, [&](int64_t head) { project_unnormed(l, head, buffers); });
    team.each(d.heads + 2 * d.kv_heads, [&](int64_t head) { project(index, head, buffers); });
    const int64_t chunks = (s.n + kTogether - 1) / kTogether;
    team.each(chunks * d.kv_heads, [&](int64_t item) {
      attend(index, item / chunks, item % chunks * kTogether, buffers);
    });
    const Weight o{l.o, l.o_bias, l.gate, d.hidden, d.heads * d.head_dim};
    add_to_x(o, l.after_attention, attended, buffers, team);
    norm(l.before_mlp, team);
    feed_forward(l, buffers, team);
    const void* then = index + 1 < d.n_layers ? d.layers[index + 1].q : nullptr;
    const Weight down{l.down, l.down_bias, then, d.hidden, d.intermediate};
    add_to_x(down, l.after_mlp, activation, buffers, team);
  }

  // A matrix of the model. `then` is a matrix that the next products read.
  struct Weight {
    const void *data, *bias, *then;
    int64_t features, depth;

    const T* row(int64_t i) const { return static_cast<const T*>(data) + i * depth; }

    // Returns where a thread probably reads on that skips `step` rows from row i on.
    const T* following(int64_t i, int64_t step) const {
      if (i + step < features) return row(i + step);
      return then ? static_cast<const T*>(then) + (i + step - features) * depth : row(i);
    }
  };

  // Writes z (count, w): rows [first, first + count) of weight times a block of `in`, plus the
  // bias, rounded.
  void product(const Weight& weight, int64_t first, int64_t count, const P* in, int64_t block,
               const Buffers<T>& buffers, float* z) const {
    const int64_t w = s.width(block), depth = weight.depth;
    const T* a = weight.row(first);
    const P* b = block_of(in, block, depth);
    const T* next = weight.following(first, rows.threads * count);
    const int64_t tokens = std::min(kBlock, s.n - block * kBlock);
    multiply_tokens(count, tokens, w, depth, a, depth, b, w, z, w, buffers.copy, next);
    for (int64_t r = 0; r < count; ++r) {
      const Lanes b = parameter(weight.bias, first + r);
      for (int64_t i = 0; i < w; i += kLanes)
        store(z + r * w + i, rounded<T>(load<Lanes>(z + r * w + i) + b));
    }
  }

  // The heads of queries, keys or values of a layer.
  struct Heads {
    Weight weight;
    const void* norm;
    int32_t rope;
    int64_t first, count;  // among all heads, which are numbered with those of q first, then k, v
  };

  Heads heads_of(const Layer& l, int64_t head) const {
    const int64_t queries = d.heads * d.head_dim, keys = d.kv_heads * d.head_dim;
    const Weight q{l.q, l.q_bias, l.k, queries, d.hidden};
    const Weight k{l.k, l.k_bias, l.v, keys, d.hidden};
    const Weight v{l.v, l.v_bias, l.o, keys, d.hidden};
    if (head < d.heads) return {q, l.q_norm, l.rope, 0, d.heads};
    if (head < d.heads + d.kv_heads) return {k, l.k_norm, l.rope, d.heads, d.kv_heads};
    return {v, nullptr, -1, d.heads + d.kv_heads, d.kv_heads};
  }

  // Computes one head. Queries are written to q, keys and values to their pages.
  void project(int64_t index, int64_t head, const Buffers<T>& buffers) {
    const Heads heads = heads_of(d.layers[index], head);
    const int64_t own = head - heads.first;
    for (int64_t block = 0; block < s.blocks; ++block) {
      project_head(heads, own, block, buffers);
      if (head < d.heads) write_queries(own, block, buffers);
      else if (head < d.heads + d.kv_heads) write_pages<true>(index, own, block, buffers);
      else write_pages<false>(index, own, block, buffers);
    }
  }

  T* unnormed_head(int64_t head, int64_t block) const {
    const int64_t features = (d.heads + d.kv_heads) * d.head_dim;
    return block_of(unnormed, block, features) + head * d.head_dim * s.width(block);
  }

  // Computes one head of queries or keys before its norm, and the sum of its squares.
  void project_unnormed(const Layer& l, int64_t head, const Buffers<T>& buffers) {
    const Heads heads = heads_of(l, head);
    const int64_t Dh = d.head_dim, own = head - heads.first;
    for (int64_t block = 0; block < s.blocks; ++block) {
      const int64_t w = s.width(block);
      product(heads.weight, own * Dh, Dh, h, block, buffers, buffers.z);
      T* to = unnormed_head(head, block);
      float* sums = block_of(squares, block, d.heads + d.kv_heads) + head * w;
      for (int64_t i = 0; i < w; i += kLanes) {
        store(sums + i, sum_of_squares(buffers.z + i, w));
        for (int64_t k = 0; k < Dh; ++k)
          store_rounded(to + k * w + i, load<Lanes>(buffers.z + k * w + i));
      }
    }
  }

  // Returns the sum of the squares of a head's values z (Dh, w).
  Lanes sum_of_squares(const float* z, int64_t w) const {
    Lanes sum{};
    for (int64_t k = 0; k < d.head_dim; ++k) sum += load<Lanes>(z + k * w) * load<Lanes>(z + k * w);
    return sum;
  }

  // Returns 1 / rms of one vector of tokens, over a head z (Dh, w) or over all heads together.
  Lanes head_norm_scale(const Heads& heads, const float* z, int64_t block, int64_t i) const {
    const int64_t w = s.width(block);
    if (!d.norms_all_heads) return inverse_root(sum_of_squares(z, w), d.head_dim);
    const float* sums = block_of(squares, block, d.heads + d.kv_heads) + heads.first * w + i;
    Lanes sum{};
    for (int64_t j = 0; j < heads.count; ++j) sum += load<Lanes>(sums + j * w);
    return inverse_root(sum, heads.count * d.head_dim);
  }

  // Computes head `own` of `heads` for a block's tokens, normalized and rotated. The second half of
  // `transposed` then holds it as (kBlock, Dh).
  void project_head(const Heads& heads, int64_t own, int64_t block,
                    const Buffers<T>& buffers) const {
    const int64_t Dh = d.head_dim, half = d.rotary_dim / 2, w = s.width(block);
    const bool computed = heads.norm && d.norms_all_heads;
    if (computed) {
      const T* from = unnormed_head(heads.first + own, block);
      for (int64_t i = 0; i < Dh * w; i += kLanes) store(buffers.z + i, load_wide(from + i));
    } else {
      product(heads.weight, own * Dh, Dh, h, block, buffers, buffers.z);
    }
    const int64_t set = std::max<int64_t>(heads.rope, 0) * half;
    const float* cosines = block_of(cos, block, d.rope_sets * half) + set * w;
    const float* sines = block_of(sin, block, d.rope_sets * half) + set * w;
    const int64_t first_factor = d.norms_all_heads ? own * Dh : 0;
    for (int64_t i = 0; i < w; i += kLanes) {
      float* z = buffers.z + i;
      if (heads.norm) {
        const Lanes scale = head_norm_scale(heads, z, block, i);
        for (int64_t k = 0; k < Dh; ++k) {
          const Lanes factor = norm_factor(heads.norm, first_factor + k);
          store(z + k * w, rounded<T>(load<Lanes>(z + k * w) * scale * factor));
        }
      }
      for (int64_t k = 0; k < half && heads.rope >= 0; ++k) {
        const Lanes a = load<Lanes>(z + k * w), b = load<Lanes>(z + (k + half) * w);
        const Lanes cosine = load<Lanes>(cosines + k * w + i);
        const Lanes sine = load<Lanes>(sines + k * w + i);
        store(z + k * w, rounded<T>(rounded<T>(a * cosine) - rounded<T>(b * sine)));
        store(z + (k + half) * w, rounded<T>(rounded<T>(b * cosine) + rounded<T>(a * sine)));
      }
      for (int64_t k = 0; k < Dh; ++k)
        store_rounded(buffers.transposed + k * w + i, load<Lanes>(z + k * w));
    }
    T* to = buffers.transposed + Dh * kBlock;
    const int64_t multiple_of_4 = Dh / 4 * 4;
    for (int64_t i = 0; i < w; i += 4)
      for (int64_t k = 0; k < multiple_of_4; k += 4)
        transpose4(buffers.transposed + k * w + i, w, to + i * Dh + k, Dh);
    for (int64_t i = 0; i < w; ++i)
      for (int64_t k = multiple_of_4; k < Dh; ++k) to[i * Dh + k] = buffers.transposed[k * w + i];
  }

  // Calls f(row, its Dh values) for each token of a block.
  template <class F>
  void each_row(int64_t block, const Buffers<T>& buffers, F f) const {
    const int64_t first = block * kBlock, end = std::min(first + kBlock, s.n);
    for (int64_t row = first; row < end; ++row)
      f(row, buffers.transposed + (kBlock + row - first) * d.head_dim);
  }

  void write_queries(int64_t head, int64_t block, const Buffers<T>& buffers) {
    const int64_t kv = head / s.group, j = head % s.group;
    each_row(block, buffers, [&](int64_t row, const T* from) {
      P* to = q + ((kv * s.n + row) * s.group + j) * d.head_dim;
      for (int64_t k = 0; k < d.head_dim; ++k) copy_value(from[k], to[k]);
    });
  }

  T* keys(int64_t index, int64_t kv, int64_t page) const {
    const int64_t head = index * d.kv_heads + kv;
    return static_cast<T*>(rows.pages) + page * s.page_elements + head * s.head_elements;
  }

  T* values(int64_t index, int64_t kv, int64_t page) const {
    return keys(index, kv, page) + kPage * d.head_dim;
  }

  // Copies a head's Dh values to a column of the matrix B of a product, which has w columns.
  template <class To>
  void scatter(const T* from, To* to, int64_t w) const {
    for (int64_t k = 0; k < d.head_dim; k += kPair<To>)
      for (int64_t j = 0; j < kPair<To>; ++j) copy_value(from[k + j], to[k * w + j]);
  }

  // Prefetches a kv head's part of a page. The hardware cannot predict which page is next.
  void prefetch(const T* from) const {
    for (int64_t k = 0; k < s.head_elements; k += 64 / sizeof(T))
      __builtin_prefetch(from + k, 0, 2);
  }

  template <bool kKeys>
  void write_pages(int64_t index, int64_t kv, int64_t block, const Buffers<T>& buffers) {
    each_row(block, buffers, [&](int64_t row, const T* from) {
      const int64_t position = rows.positions[row], token = position % kPage;
      const int64_t page = rows.tables[row * rows.table_stride + position / kPage];
      T* to = kKeys ? keys(index, kv, page) : values(index, kv, page);
      if (kKeys) return scatter(from, to + packed_index<T>(0, token, kPage), kPage);
      // Slots without a token have weight 0. They must not hold NaN, because 0 * NaN is NaN.
      if (!token) std::fill_n(to, kPage * s.value_width, T{});
      for (int64_t k = 0; k < d.head_dim; ++k)
        to[packed_index<T>(token, k, s.value_width)] = from[k];
    });
  }

  // Neighbouring rows whose attention one thread computes, for a kv head of a layer.
  struct Neighbours {
    int64_t index, kv, first, end;  // the layer, the kv head and the rows
  };

  // Returns the first position that a row sees.
  int64_t first_seen(const Neighbours& of, int64_t row) const {
    const int64_t window = d.layers[of.index].window;
    return window ? std::max<int64_t>(0, rows.positions[row] - window + 1) : 0;
  }

  int32_t page_of(int64_t row, int64_t page) const {
    return rows.tables[row * rows.table_stride + page];
  }

  // Computes the attention of rows [first, first + kTogether) for a kv head, one span of pages after
  // another from the earliest page that any of the rows sees. Spans begin at multiples of kSpan, so
  // that the sums of a row do not depend on its neighbours.
  void attend(int64_t index, int64_t kv, int64_t first, const Buffers<T>& buffers) {
    const Neighbours of{index, kv, first, std::min(first + kTogether, s.n)};
    int64_t page = first_seen(of, first) / kPage, last = 0;
    for (int64_t row = first; row < of.end; ++row) {
      page = std::min(page, first_seen(of, row) / kPage);
      last = std::max(last, rows.positions[row] / kPage);
    }
    const int64_t queries = (of.end - first) * s.group;
    std::fill_n(buffers.sum, queries * s.value_width, 0.0f);
    std::fill_n(buffers.max_score, queries, -INFINITY);
    std::fill_n(buffers.weight_sum, queries, 0.0f);
    while (page <= last) {
      const int64_t span = page / kSpan * kSpan, end = std::min(span + kSpan, last + 1);
      each_run(of, page, end, [&](int64_t page, int64_t row, int64_t next, int64_t follows) {
        prefetch(keys(index, kv, follows));
        const P* queries_of_rows = q + (kv * s.n + row) * s.group * d.head_dim;
        float* scores = buffers.scores + at(of, row) * kSpanTokens + (page - span) * kPage;
        gemm((next - row) * s.group, kPage, d.head_dim, queries_of_rows, d.head_dim,
             keys(index, kv, page_of(row, page)), kPage, scores, kSpanTokens, false);
      });
      for (int64_t row = first; row < of.end; ++row) weigh(of, row, span, buffers);
      each_run(of, page, end, [&](int64_t page, int64_t row, int64_t next, int64_t) {
        const P* weights = buffers.weights + at(of, row) * kSpanTokens + (page - span) * kPage;
        gemm((next - row) * s.group, s.value_width, kPage, weights, kSpanTokens,
             values(index, kv, page_of(row, page)), s.value_width,
             buffers.sum + at(of, row) * s.value_width, s.value_width, true);
      });
      page = end;
    }
    for (int64_t row = first; row < of.end; ++row) write_attended(kv, row, row - first, buffers);
  }

  // Returns the place of a row's first query in the buffers.
  int64_t at(const Neighbours& of, int64_t row) const { return (row - of.first) * s.group; }

  // Calls f(page, row, next, follows) for each of the pages [page, end) and for rows [row, next) that
  // see it and share it. follows: the id of a page that is probably read next.
  template <class F>
  void each_run(const Neighbours& of, int64_t page, int64_t end, F f) const {
    for (; page < end; ++page) {
      auto sees = [&](int64_t row) {
        return first_seen(of, row) < (page + 1) * kPage && rows.positions[row] >= page * kPage;
      };
      for (int64_t row = of.first, next; row < of.end; row = next) {
        next = row + 1;
        if (!sees(row)) continue;
        const int32_t id = page_of(row, page);
        while (next < of.end && sees(next) && page_of(next, page) == id) ++next;
        const bool more_pages = (page + 1) * kPage <= rows.positions[of.first];
        if (next < of.end) f(page, row, next, page_of(next, page));
        else f(page, row, next, more_pages ? page_of(of.first, page + 1) : id);
      }
    }
  }

  // Turns the scores of a row's queries over a span of pages into weights of a running softmax.
  void weigh(const Neighbours& of, int64_t row, int64_t span, const Buffers<T>& buffers) const {
    const int64_t low = std::max<int64_t>(first_seen(of, row) - span * kPage, 0);
    const int64_t high = std::min<int64_t>(rows.positions[row] - span * kPage, kSpanTokens - 1);
    const int64_t begin = low / kPage * kPage, end = round_up(high + 1, kPage);
    if (begin >= end) return;
    const float log2_scale = d.attention_scale * float(M_LOG2E);
    const Power power(broadcast(log2_scale));
    for (int64_t i = at(of, row); i < at(of, row + 1); ++i) {
      float* scores = buffers.scores + i * kSpanTokens;
      Lanes span_max = broadcast(-INFINITY);
      for (int64_t j = begin; j < end; j += kLanes) {
        Lanes z = load<Lanes>(scores + j);
        if (j < low || j + kLanes > high + 1) {
          const IntLanes slot = kLane + int32_t(j);
          const IntLanes hidden = (slot < int32_t(low)) | (slot > int32_t(high));
          z = hidden ? broadcast(-INFINITY) : z;
          store(scores + j, z);
        }
        span_max = z > span_max ? z : span_max;
      }
      const float old_max = buffers.max_score[i];
      const float new_max = std::max(old_max, largest(span_max));
      const float rescale = old_max == new_max ? 1.0f : std::exp2((old_max - new_max) * log2_scale);
      Lanes weights{};
      for (int64_t j = begin; j < end; j += kLanes) {
        const Lanes p = rounded<T>(power(load<Lanes>(scores + j) - new_max));
        store_rounded(buffers.weights + i * kSpanTokens + j, p);
        weights += p;
      }
      buffers.max_score[i] = new_max;
      buffers.weight_sum[i] = buffers.weight_sum[i] * rescale + total(weights);
      if (rescale == 1.0f) continue;
      float* sum = buffers.sum + i * s.value_width;
      for (int64_t k = 0; k < s.value_width; k += kLanes)
        store(sum + k, load<Lanes>(sum + k) * rescale);
    }
  }

  void write_attended(int64_t kv, int64_t row, int64_t slot, const Buffers<T>& buffers) {
    const int64_t Dh = d.head_dim, block = row / kBlock, i = row % kBlock, w = s.width(block);
    P* to = block_of(attended, block, d.heads * Dh);
    for (int64_t j = 0; j < s.group; ++j) {
      const float* sum = buffers.sum + (slot * s.group + j) * s.value_width;
      const float scale = 1.0f / buffers.weight_sum[slot * s.group + j];
      T* head_out = buffers.transposed;
      for (int64_t k = 0; k < s.value_width; k += kLanes)
        store_rounded(head_out + k, rounded<T>(load<Lanes>(sum + k) * scale));
      scatter(head_out, to + packed_index<P>((kv * s.group + j) * Dh, i, w), w);
    }
  }

  // Adds a product to x, after the norm of `after` if the layer has one.
  void add_to_x(const Weight& weight, const void* after, const P* in, const Buffers<T>& buffers,
                Team& team) {
    // With a norm, the product is kept in the memory of h, which no later product reads.
    T* kept = reinterpret_cast<T*>(h);
    each_tile(d.hidden, team, [&](int64_t first, int64_t count) {
      for (int64_t block = 0; block < s.blocks; ++block) {
        const int64_t w = s.width(block);
        product(weight, first, count, in, block, buffers, buffers.z);
        T* to = block_of(after ? kept : x, block, d.hidden) + first * w;
        for (int64_t i = 0; i < count * w; i += kLanes) {
          const Lanes z = load<Lanes>(buffers.z + i);
          if (after) store_rounded(to + i, z);
          else add_residual(to + i, z);
        }
      }
    });
    if (!after) return;
    each_token_vector(team, [&](int64_t block, int64_t column, int64_t w) {
      const T* from = block_of(kept, block, d.hidden) + column;
      T* to = block_of(x, block, d.hidden) + column;
      const Lanes scale = norm_scale(from, w);
      for (int64_t k = 0; k < d.hidden; ++k) {
        const Lanes v = load_wide(from + k * w) * scale * norm_factor(after, k);
        add_residual(to + k * w, rounded<T>(v));
      }
    });
  }

  void add_residual(T* to, Lanes z) const {
    if (d.residual_scale != 1) z = rounded<T>(z * d.residual_scale);
    store_rounded(to, rounded<T>(load_wide(to) + z));
  }

  // Returns y with g * sigmoid(y) = the activation of g. GELU's tanh is that of sigmoid(2 u).
  Lanes sigmoid_argument(Lanes g) const {
    if (d.activation == kSilu) return g;
    const float root = 0.7978845608f;  // sqrt(2 / pi)
    return 2 * root * (g + 0.044715f * g * g * g);
  }

  // Writes activation = silu(gate h) * (up h), or with GELU in place of SiLU.
  void feed_forward(const Layer& l, const Buffers<T>& buffers, Team& team) {
    const Power exponential(broadcast(float(M_LOG2E)));
    const Weight gate{l.gate, l.gate_bias, l.down, d.intermediate, d.hidden};
    const Weight up{l.up, l.up_bias, nullptr, d.intermediate, d.hidden};
    each_tile(d.intermediate, team, [&](int64_t first, int64_t count) {
      for (int64_t block = 0; block < s.blocks; ++block) {
        const int64_t w = s.width(block);
        product(gate, first, count, h, block, buffers, buffers.z);
        product(up, first, count, h, block, buffers, buffers.z2);
        P* to = block_of(activation, block, d.intermediate);
        for (int64_t r = 0; r < count; r += 2)
          for (int64_t i = 0; i < w; i += kLanes) {
            auto value = [&](int64_t at) {
              const Lanes g = load<Lanes>(buffers.z + at), u = load<Lanes>(buffers.z2 + at);
              const Lanes y = sigmoid_argument(g);
              return rounded<T>(rounded<T>(g / (1.0f + exponential(-y))) * u);
            };
            store_rows(to + packed_index<P>(first + r, i, w), w, value(r * w + i),
                       value((r + 1) * w + i));
          }
      }
    });
  }

  void write_hidden(Team& team) {
    team.each(s.n, [&](int64_t row) {
      const int64_t block = row / kBlock, i = row % kBlock, w = s.width(block);
      const P* from = block_of(h, block, d.hidden);
      T* to = static_cast<T*>(rows.out) + row * d.hidden;
      for (int64_t k = 0; k < d.hidden; ++k) copy_value(from[packed_index<P>(k, i, w)], to[k]);
      if (d.logit_scale == 1) return;
      for (int64_t k = 0; k < d.hidden; ++k) narrow(widen(to[k]) * d.logit_scale, to[k]);
    });
  }
};

}  // namespace

extern "C" {

// Returns the bytes of a page.
int64_t expo_fast_page_bytes(const Decoder* d) {
  return Sizes(*d, 0).page_elements * (d->dtype == kFloat32 ? 4 : 2);
}

// Returns the bytes of the workspace for a call of n rows.
int64_t expo_fast_workspace_bytes(const Decoder* d, int64_t n, int32_t threads) {
  return d->dtype == kFloat32 ? Pass<float>::bytes(*d, n, threads)
                              : Pass<bf16>::bytes(*d, n, threads);
}

// Runs the decoder: writes the keys and values of the rows to their pages, and the hidden states to
// `out`.
void expo_fast_decoder(const Decoder* d, const Rows* rows) {
  Arena arena{static_cast<char*>(rows->workspace)};
  if (d->dtype == kFloat32) Pass<float>(*d, *rows, arena).run();
  else Pass<bf16>(*d, *rows, arena).run();
}

}  // extern "C"
