// Forward pass of a decoder on a CPU over a paged key-value cache, for prompts and for new tokens.
//
//   x = embedding[token]
//   x += o(attend(rope(norm(q h)), rope(norm(k h)), v h)),    h = rms_norm(x)        every layer
//   x += down(silu(gate h) * (up h)),                         h = rms_norm(x)
//   hidden = rms_norm(x)
//
// Tokens lie along the vector lanes: Y.T = W @ X.T reads each weight in its memory order, once per
// call, and norms and rotations work lane by lane. Values are rounded to the model's dtype where
// PyTorch rounds them. Every number depends on its own sequence only and is summed in a fixed order:
// neither the other sequences of the batch, nor the number of threads, nor the way a sequence came
// into the cache change a bit of it.
//
// A page holds kPage tokens of all layers: (layer, kv head, keys then values). Keys of a page are
// (Dh, kPage) and values (kPage, Dh rounded up to 16), their rows in pairs as gemm.h needs them.
// Neighbouring rows of a call that share a page read it once.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common.h"
#include "gemm.h"

namespace {

constexpr int64_t kPage = 32;   // tokens; mirrored by cpu_engine.py
constexpr int64_t kTile = 48;   // output features multiplied at once: two such tiles fit in L1
constexpr int64_t kTogether = 8;  // rows that attend together

}  // namespace

// Mirrored by native_structs.py. Matrices are (out, in) and contiguous; null: there is none.
struct Layer {
  const void *input_norm, *post_norm, *q_norm, *k_norm;
  const void *q, *k, *v, *o, *gate, *up, *down;
  const void *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias;
  int64_t window;  // tokens that a token sees, itself included; 0: all
  int32_t rope;
};

struct Decoder {
  const Layer* layers;
  const void *embedding, *norm;
  int64_t n_layers, hidden, intermediate, heads, kv_heads, head_dim;
  float eps, scale;
  int32_t dtype;  // of all parameters, pages and hidden
};

// Tokens of one or more sequences. Those of a sequence are in order and directly follow the tokens
// that its cache holds.
struct Rows {
  const int64_t* tokens;    // (n,)
  const int64_t* positions; // (n,)
  const int32_t* tables;    // (n, table_stride) pages of each row's sequence
  const float *cos, *sin;   // (positions, Dh / 2)
  void *pages, *workspace;
  void* out;                // (n, D) after the last norm
  int64_t n, table_stride;
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

inline Lanes load_wide(const float* from) { return load<Lanes>(from); }

inline Lanes load_wide(const bf16* from) {
  return bits_as<Lanes>(__builtin_convertvector(load<ShortLanes>(from), BitLanes) << 16);
}

inline void store_rounded(float* to, Lanes x) { store(to, x); }

inline void store_rounded(bf16* to, Lanes x) {
  store(to, __builtin_convertvector(bits_as<BitLanes>(x) >> 16, ShortLanes));
}

// Two rows of a product's B, whose values are rounded already.
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

// The place of element (k, i) in the B of a product, which has w columns.
template <class T>
int64_t place(int64_t k, int64_t i, int64_t w) {
  return (k / kPair<T> * w + i) * kPair<T> + k % kPair<T>;
}

// Sizes that follow from a decoder and the number of rows of a call.
struct Sizes {
  int64_t n, lanes, blocks, group, wide;  // wide: Dh rounded up for values
  int64_t head, page;                     // elements of a kv head's keys and values; of a page

  Sizes(const Decoder& d, int64_t n)
      : n(n), lanes(round_up(n, 16)), blocks((n + kBlock - 1) / kBlock),
        group(d.heads / d.kv_heads), wide(round_up(d.head_dim, 16)),
        head(kPage * (d.head_dim + wide)), page(d.n_layers * d.kv_heads * head) {}

  int64_t width(int64_t block) const { return std::min(kBlock, lanes - block * kBlock); }
};

// Allocates parts of a workspace; without a workspace it only counts their bytes.
struct Arena {
  char* at;
  int64_t used = 0;

  template <class T>
  T* take(int64_t n) {
    T* mine = reinterpret_cast<T*>(at + used);
    used += round_up(n * sizeof(T), 64);
    return mine;
  }
};

// The work buffers of one thread.
template <class T>
struct Bench {
  float *z, *z2;              // (kTile or Dh, kBlock) of a product
  T* turned;                  // (Dh, kBlock), then (kBlock, Dh)
  float *scores, *sum;        // (queries, kPage), (queries, wide)
  float *top, *mass;          // (queries,) the largest score so far, and the sum of weights
  T* weights;                 // (queries, kPage)

  Bench(const Decoder& d, const Sizes& s, Arena& a) {
    const int64_t tall = std::max(kTile, d.head_dim), queries = kTogether * s.group;
    z = a.take<float>(tall * kBlock);
    z2 = a.take<float>(kTile * kBlock);
    turned = a.take<T>(2 * s.wide * kBlock);
    scores = a.take<float>(queries * kPage);
    sum = a.take<float>(queries * s.wide);
    top = a.take<float>(queries);
    mass = a.take<float>(queries);
    weights = a.take<T>(queries * kPage);
  }
};

template <class T>
class Pass {
 public:
  Pass(const Decoder& d, const Rows& rows, Arena arena) : d(d), rows(rows), s(d, rows.n) {
    const int64_t half = d.head_dim / 2;
    x = arena.take<T>(s.lanes * d.hidden);
    h = arena.take<T>(s.lanes * d.hidden);
    mixed = arena.take<T>(s.lanes * d.heads * d.head_dim);
    act = arena.take<T>(s.lanes * d.intermediate);
    q = arena.take<T>(s.n * d.heads * d.head_dim);
    cos = arena.take<float>(s.lanes * half);
    sin = arena.take<float>(s.lanes * half);
    rest = arena;
  }

  static int64_t bytes(const Decoder& d, int64_t n, int threads) {
    Rows rows{};
    rows.n = n;
    Pass pass(d, rows, Arena{nullptr});
    for (int t = 0; t < threads; ++t) Bench<T>(d, pass.s, pass.rest);
    return pass.rest.used;
  }

  void run() {
    Team::run(rows.threads, [&](Team& team, int t) {
      Arena arena = rest;
      for (int i = 0; i < t; ++i) Bench<T>(d, s, arena);
      const Bench<T> bench(d, s, arena);
      embed(team);
      for (int64_t l = 0; l < d.n_layers; ++l) layer(l, bench, team);
      norm(d.norm, team);
      write_hidden(team);
      gemm_done();
    });
  }

 private:
  const Decoder& d;
  const Rows& rows;
  const Sizes s;
  // Feature by token, one block after another: x plain, the others as B of a product.
  T *x, *h, *mixed, *act;
  T* q;              // (kv_heads, n, group, Dh)
  float *cos, *sin;  // (Dh / 2, width), one block after another
  Arena rest{nullptr};

  // Distribute vectors of tokens over the threads: f(block, first lane, width).
  template <class F>
  void lanes(Team& team, F f) const {
    team.each(s.lanes / kLanes, [&](int64_t v) {
      const int64_t block = v * kLanes / kBlock;
      f(block, v * kLanes % kBlock, s.width(block));
    });
  }

  // Distribute output features over the threads: f(first, count).
  template <class F>
  void tiles(int64_t features, Team& team, F f) const {
    team.each((features + kTile - 1) / kTile, [&](int64_t tile) {
      f(tile * kTile, std::min(kTile, features - tile * kTile));
    });
  }

  // A block's part of a features-by-tokens matrix.
  template <class U>
  static U* block_of(U* data, int64_t block, int64_t features) {
    return data + block * kBlock * features;
  }

  static Lanes parameter(const void* data, int64_t i) {
    return data ? broadcast(widen(static_cast<const T*>(data)[i])) : Lanes{};
  }

  void embed(Team& team) {
    const int64_t half = d.head_dim / 2;
    lanes(team, [&](int64_t block, int64_t lane, int64_t w) {
      T* to = block_of(x, block, d.hidden);
      float *to_cos = block_of(cos, block, half), *to_sin = block_of(sin, block, half);
      for (int64_t i = lane; i < lane + kLanes; ++i) {
        const int64_t row = block * kBlock + i;
        const bool real = row < s.n;
        const T* from = static_cast<const T*>(d.embedding) + (real ? rows.tokens[row] : 0) * d.hidden;
        for (int64_t k = 0; k < d.hidden; ++k) to[k * w + i] = real ? from[k] : T{};
        const int64_t turn = real ? rows.positions[row] * half : 0;
        for (int64_t k = 0; k < half; ++k) {
          to_cos[k * w + i] = rows.cos[turn + k];
          to_sin[k * w + i] = rows.sin[turn + k];
        }
      }
    });
  }

  // h = rms_norm(x) * weight, rounded once.
  void norm(const void* weight, Team& team) {
    lanes(team, [&](int64_t block, int64_t lane, int64_t w) {
      const T* from = block_of(x, block, d.hidden) + lane;
      T* to = block_of(h, block, d.hidden);
      Lanes sum[4] = {};
      for (int64_t k = 0; k < d.hidden; ++k) {
        const Lanes v = load_wide(from + k * w);
        sum[k % 4] += v * v;
      }
      const Lanes scale = inverse_root((sum[0] + sum[1]) + (sum[2] + sum[3]), d.hidden);
      for (int64_t k = 0; k < d.hidden; k += 2) {
        auto value = [&](int64_t k) {
          return rounded<T>(load_wide(from + k * w) * scale * parameter(weight, k));
        };
        store_rows(to + place<T>(k, lane, w), w, value(k), value(k + 1));
      }
    });
  }

  Lanes inverse_root(Lanes squares, int64_t n) const {
    Lanes x = squares / float(n) + d.eps;
    for (int j = 0; j < kLanes; ++j) x[j] = 1.0f / std::sqrt(x[j]);
    return x;
  }

  void layer(int64_t index, const Bench<T>& bench, Team& team) {
    const Layer& l = d.layers[index];
    norm(l.input_norm, team);
    team.each(d.heads + 2 * d.kv_heads, [&](int64_t head) { project(index, head, bench); });
    const int64_t chunks = (s.n + kTogether - 1) / kTogether;
    team.each(chunks * d.kv_heads, [&](int64_t item) {
      attend(index, item / chunks, item % chunks * kTogether, bench);
    });
    add_to_x(l.o, l.o_bias, mixed, d.heads * d.head_dim, bench, team);
    norm(l.post_norm, team);
    feed(l, bench, team);
    add_to_x(l.down, l.down_bias, act, d.intermediate, bench, team);
  }

  // z (count, w) = rows [first, first + count) of weight, times a block of `in`; rounded, with bias.
  void product(const void* weight, const void* bias, int64_t first, int64_t count, const T* in,
               int64_t depth, int64_t block, float* z) const {
    const int64_t w = s.width(block);
    const T* a = static_cast<const T*>(weight) + first * depth;
    gemm(count, w, depth, a, depth, block_of(in, block, depth), w, z, w, false);
    for (int64_t r = 0; r < count; ++r) {
      const Lanes b = parameter(bias, first + r);
      for (int64_t i = 0; i < w; i += kLanes)
        store(z + r * w + i, rounded<T>(load<Lanes>(z + r * w + i) + b));
    }
  }

  // One of the heads of q, then k, then v: queries into q, keys and values into their pages.
  void project(int64_t index, int64_t head, const Bench<T>& bench) {
    const Layer& l = d.layers[index];
    for (int64_t block = 0; block < s.blocks; ++block) {
      if (head < d.heads) {
        turn(l.q, l.q_bias, l.q_norm, l.rope, head, block, bench);
        write_queries(head, block, bench);
      } else if (head < d.heads + d.kv_heads) {
        turn(l.k, l.k_bias, l.k_norm, l.rope, head - d.heads, block, bench);
        write_pages<true>(index, head - d.heads, block, bench);
      } else {
        turn(l.v, l.v_bias, nullptr, false, head - d.heads - d.kv_heads, block, bench);
        write_pages<false>(index, head - d.heads - d.kv_heads, block, bench);
      }
    }
  }

  // One head of a block's tokens, normed and rotated, token by token in the second half of `turned`.
  void turn(const void* weight, const void* bias, const void* norm, bool rope, int64_t head,
            int64_t block, const Bench<T>& bench) const {
    const int64_t Dh = d.head_dim, half = Dh / 2, w = s.width(block);
    product(weight, bias, head * Dh, Dh, h, d.hidden, block, bench.z);
    const float *c = block_of(cos, block, half), *sn = block_of(sin, block, half);
    for (int64_t i = 0; i < w; i += kLanes) {
      float* z = bench.z + i;
      if (norm) {
        Lanes sum{};
        for (int64_t k = 0; k < Dh; ++k) sum += load<Lanes>(z + k * w) * load<Lanes>(z + k * w);
        const Lanes scale = inverse_root(sum, Dh);
        for (int64_t k = 0; k < Dh; ++k)
          store(z + k * w, rounded<T>(load<Lanes>(z + k * w) * scale * parameter(norm, k)));
      }
      for (int64_t k = 0; k < half && rope; ++k) {
        const Lanes a = load<Lanes>(z + k * w), b = load<Lanes>(z + (k + half) * w);
        const Lanes cosine = load<Lanes>(c + k * w + i), sine = load<Lanes>(sn + k * w + i);
        store(z + k * w, rounded<T>(rounded<T>(a * cosine) - rounded<T>(b * sine)));
        store(z + (k + half) * w, rounded<T>(rounded<T>(b * cosine) + rounded<T>(a * sine)));
      }
      for (int64_t k = 0; k < Dh; ++k)
        store_rounded(bench.turned + k * w + i, load<Lanes>(z + k * w));
    }
    T* to = bench.turned + Dh * kBlock;
    const int64_t whole = Dh / 4 * 4;
    for (int64_t i = 0; i < w; i += 4)
      for (int64_t k = 0; k < whole; k += 4)
        transpose4(bench.turned + k * w + i, w, to + i * Dh + k, Dh);
    for (int64_t i = 0; i < w; ++i)
      for (int64_t k = whole; k < Dh; ++k) to[i * Dh + k] = bench.turned[k * w + i];
  }

  // f(row, its Dh values) for the tokens of a block.
  template <class F>
  void each_row(int64_t block, const Bench<T>& bench, F f) const {
    const int64_t first = block * kBlock, end = std::min(first + kBlock, s.n);
    for (int64_t row = first; row < end; ++row)
      f(row, bench.turned + (kBlock + row - first) * d.head_dim);
  }

  void write_queries(int64_t head, int64_t block, const Bench<T>& bench) {
    const int64_t kv = head / s.group, j = head % s.group;
    each_row(block, bench, [&](int64_t row, const T* from) {
      std::copy_n(from, d.head_dim, q + ((kv * s.n + row) * s.group + j) * d.head_dim);
    });
  }

  T* keys(int64_t index, int64_t kv, int64_t page) const {
    return static_cast<T*>(rows.pages) + page * s.page + (index * d.kv_heads + kv) * s.head;
  }

  T* values(int64_t index, int64_t kv, int64_t page) const {
    return keys(index, kv, page) + kPage * d.head_dim;
  }

  // A head's Dh values to a column of a product's B, which has w of them.
  void scatter(const T* from, T* to, int64_t w) const {
    for (int64_t k = 0; k < d.head_dim; k += kPair<T>)
      std::copy_n(from + k, kPair<T>, to + k * w);
  }

  // Prefetch a kv head's part of a page: the hardware cannot predict which page is next.
  void prefetch(const T* from) const {
    for (int64_t k = 0; k < s.head; k += 64 / sizeof(T)) __builtin_prefetch(from + k, 0, 2);
  }

  template <bool kKeys>
  void write_pages(int64_t index, int64_t kv, int64_t block, const Bench<T>& bench) {
    each_row(block, bench, [&](int64_t row, const T* from) {
      const int64_t position = rows.positions[row], token = position % kPage;
      const int64_t page = rows.tables[row * rows.table_stride + position / kPage];
      T* to = kKeys ? keys(index, kv, page) : values(index, kv, page);
      if (kKeys) return scatter(from, to + place<T>(0, token, kPage), kPage);
      // memory that no token has written yet gets a weight of 0, and must not hold NaN
      if (!token) std::fill_n(to, kPage * s.wide, T{});
      for (int64_t k = 0; k < d.head_dim; ++k) to[place<T>(token, k, s.wide)] = from[k];
    });
  }

  // Rows [first, first + kTogether) of a kv head, page by page from the earliest that any sees.
  void attend(int64_t index, int64_t kv, int64_t first, const Bench<T>& bench) {
    const int64_t end = std::min(first + kTogether, s.n), window = d.layers[index].window;
    auto from = [&](int64_t row) {  // the first position that the row sees
      return window ? std::max<int64_t>(0, rows.positions[row] - window + 1) : 0;
    };
    auto table = [&](int64_t row) { return rows.tables + row * rows.table_stride; };
    int64_t page = from(first) / kPage, last = 0;
    for (int64_t row = first; row < end; ++row) {
      page = std::min(page, from(row) / kPage);
      last = std::max(last, rows.positions[row] / kPage);
    }
    const int64_t queries = (end - first) * s.group;
    std::fill_n(bench.sum, queries * s.wide, 0.0f);
    std::fill_n(bench.top, queries, -INFINITY);
    std::fill_n(bench.mass, queries, 0.0f);
    for (; page <= last; ++page) {
      auto sees = [&](int64_t row) {
        return from(row) < (page + 1) * kPage && rows.positions[row] >= page * kPage;
      };
      for (int64_t row = first, next; row < end; row = next) {
        next = row + 1;
        if (!sees(row)) continue;
        while (next < end && sees(next) && table(next)[page] == table(row)[page]) ++next;
        if (next < end) prefetch(keys(index, kv, table(next)[page]));
        else if (page < last) prefetch(keys(index, kv, table(first)[page + 1]));
        fold(index, kv, first, row, next, page, table(row)[page], bench, from);
      }
    }
    for (int64_t row = first; row < end; ++row) write_mixed(kv, row, row - first, bench);
  }

  // Add a page of keys and values to the running softmax of the rows [row, next) that share it.
  template <class From>
  void fold(int64_t index, int64_t kv, int64_t first, int64_t row, int64_t next, int64_t page,
            int64_t id, const Bench<T>& bench, From from) {
    const int64_t Dh = d.head_dim, count = (next - row) * s.group, at = (row - first) * s.group;
    gemm(count, kPage, Dh, q + (kv * s.n + row) * s.group * Dh, Dh, keys(index, kv, id), kPage,
         bench.scores, kPage, false);
    const float nats = d.scale * float(M_LOG2E);
    const Power power(broadcast(nats));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = row + i / s.group;
      const int64_t low = std::max<int64_t>(from(r) - page * kPage, 0);
      const int64_t high = std::min<int64_t>(rows.positions[r] - page * kPage, kPage);
      float* scores = bench.scores + i * kPage;
      Lanes most = broadcast(-INFINITY);
      for (int64_t j = 0; j < kPage; j += kLanes) {
        const IntLanes place = kLane + int32_t(j);
        const IntLanes hidden = (place < int32_t(low)) | (place > int32_t(high));
        const Lanes z = hidden ? broadcast(-INFINITY) : load<Lanes>(scores + j);
        store(scores + j, z);
        most = z > most ? z : most;
      }
      const float before = bench.top[at + i], top = std::max(before, largest(most));
      const float keep = before == top ? 1.0f : std::exp2((before - top) * nats);
      Lanes mass{};
      for (int64_t j = 0; j < kPage; j += kLanes) {
        const Lanes p = rounded<T>(power(load<Lanes>(scores + j) - top));
        store_rounded(bench.weights + i * kPage + j, p);
        mass += p;
      }
      bench.top[at + i] = top;
      bench.mass[at + i] = bench.mass[at + i] * keep + total(mass);
      if (keep == 1.0f) continue;
      float* sum = bench.sum + (at + i) * s.wide;
      for (int64_t k = 0; k < s.wide; k += kLanes) store(sum + k, load<Lanes>(sum + k) * keep);
    }
    gemm(count, s.wide, kPage, bench.weights, kPage, values(index, kv, id), s.wide,
         bench.sum + at * s.wide, s.wide, true);
  }

  void write_mixed(int64_t kv, int64_t row, int64_t slot, const Bench<T>& bench) {
    const int64_t Dh = d.head_dim, block = row / kBlock, i = row % kBlock, w = s.width(block);
    T* to = block_of(mixed, block, d.heads * Dh);
    for (int64_t j = 0; j < s.group; ++j) {
      const float* sum = bench.sum + (slot * s.group + j) * s.wide;
      const float scale = 1.0f / bench.mass[slot * s.group + j];
      T* row = bench.turned;
      for (int64_t k = 0; k < s.wide; k += kLanes)
        store_rounded(row + k, rounded<T>(load<Lanes>(sum + k) * scale));
      scatter(row, to + place<T>((kv * s.group + j) * Dh, i, w), w);
    }
  }

  void add_to_x(const void* weight, const void* bias, const T* in, int64_t depth,
                const Bench<T>& bench, Team& team) {
    tiles(d.hidden, team, [&](int64_t first, int64_t count) {
      for (int64_t block = 0; block < s.blocks; ++block) {
        const int64_t w = s.width(block);
        product(weight, bias, first, count, in, depth, block, bench.z);
        T* to = block_of(x, block, d.hidden) + first * w;
        for (int64_t i = 0; i < count * w; i += kLanes)
          store_rounded(to + i, rounded<T>(load_wide(to + i) + load<Lanes>(bench.z + i)));
      }
    });
  }

  // act = silu(gate h) * (up h)
  void feed(const Layer& l, const Bench<T>& bench, Team& team) {
    const Power exponential(broadcast(float(M_LOG2E)));
    tiles(d.intermediate, team, [&](int64_t first, int64_t count) {
      for (int64_t block = 0; block < s.blocks; ++block) {
        const int64_t w = s.width(block);
        product(l.gate, l.gate_bias, first, count, h, d.hidden, block, bench.z);
        product(l.up, l.up_bias, first, count, h, d.hidden, block, bench.z2);
        T* to = block_of(act, block, d.intermediate);
        for (int64_t r = 0; r < count; r += 2)
          for (int64_t i = 0; i < w; i += kLanes) {
            auto value = [&](int64_t at) {
              const Lanes g = load<Lanes>(bench.z + at), u = load<Lanes>(bench.z2 + at);
              return rounded<T>(rounded<T>(g / (1.0f + exponential(-g))) * u);
            };
            store_rows(to + place<T>(first + r, i, w), w, value(r * w + i),
                       value((r + 1) * w + i));
          }
      }
    });
  }

  void write_hidden(Team& team) {
    team.each(s.n, [&](int64_t row) {
      const int64_t block = row / kBlock, i = row % kBlock, w = s.width(block);
      const T* from = block_of(h, block, d.hidden);
      T* to = static_cast<T*>(rows.out) + row * d.hidden;
      for (int64_t k = 0; k < d.hidden; ++k) to[k] = from[place<T>(k, i, w)];
    });
  }
};

}  // namespace

extern "C" {

// Bytes of a page, and of the workspace of a call.
int64_t expo_fast_page_bytes(const Decoder* d) {
  return Sizes(*d, 0).page * (d->dtype == kFloat32 ? 4 : 2);
}

int64_t expo_fast_workspace_bytes(const Decoder* d, int64_t n, int32_t threads) {
  return d->dtype == kFloat32 ? Pass<float>::bytes(*d, n, threads)
                              : Pass<bf16>::bytes(*d, n, threads);
}

// Writes the rows' keys and values to their pages, and `out`.
void expo_fast_decoder(const Decoder* d, const Rows* rows) {
  Arena arena{static_cast<char*>(rows->workspace)};
  if (d->dtype == kFloat32) Pass<float>(*d, *rows, arena).run();
  else Pass<bf16>(*d, *rows, arena).run();
}

}  // extern "C"
