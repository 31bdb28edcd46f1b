// Draws one token per row from softmax(hidden @ weight.T / temperature) and returns its log-prob,
// without an (N, V) buffer. One pass over the vocabulary keeps a maximum and a sum for each tile. A
// uniform number then selects a tile, whose logits are computed again, and a token in that tile.

#include <algorithm>
#include <cmath>

#include "common.h"
#include "token_products.h"

// native_structs.py declares the same struct. Vectors are (N,).
struct Draw {
  const void *hidden, *weight;  // (N, D) and (V, D), contiguous and of one dtype
  const float* temperature;     // 0 draws the likeliest token, with its log-prob at temperature 1
  const int64_t *seeds, *positions;  // the key of the row's uniform number
  int64_t* token;
  float* logp;    // nats at the temperature; NaN where the logits are not finite
  float* logits;  // (N, V) output, or null if they are not needed
  void* workspace;
  int64_t n, v, d;
  int32_t dtype, threads;
};

EXPO_FAST_SIZEOF(draw, Draw)

namespace {

constexpr int64_t kColumns = 16;  // columns of the product that recomputes the logits of a row

// SplitMix64 (doi:10.1145/2714064.2660195). sampling.py draws the same numbers.
constexpr uint64_t kGolden = 0x9e3779b97f4a7c15;

uint64_t mix(uint64_t x) {
  x += kGolden;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

double uniform(int64_t seed, int64_t position) {
  return double(mix(mix(seed) ^ position * kGolden) >> 11) * 0x1p-53;
}

template <class T>
class Sampler {
 public:
  using P = Product<T>;

  explicit Sampler(const Draw& draw)
      : draw(draw), padded_n(round_up(draw.n, 16)), blocks((draw.n + kBlock - 1) / kBlock),
        tiles((draw.v + kTileRows - 1) / kTileRows), depth(round_up(draw.d, kPair<P>)) {
    char* at = static_cast<char*>(draw.workspace);
    auto take = [&](int64_t bytes) {
      char* part = at + used;
      used += round_up(bytes, 64);
      return part;
    };
    columns = reinterpret_cast<P*>(take(padded_n * depth * sizeof(P)));
    max_logit = reinterpret_cast<float*>(take(tiles * padded_n * 4));
    exp_sum = reinterpret_cast<float*>(take(tiles * padded_n * 4));
    logits = reinterpret_cast<float*>(take(draw.threads * kTileRows * kBlock * 4));
    copies = reinterpret_cast<P*>(take(draw.threads * kCopyRows * kCopyDepth * sizeof(P)));
  }

  int64_t used = 0;

  void run() {
    Team::run(draw.threads, [&](Team& team, int t) {
      const Buffers buffers{logits + t * kTileRows * kBlock, copies + t * kCopyRows * kCopyDepth};
      team.each(padded_n, [&](int64_t i) { pack(i); });
      team.each(tiles, [&](int64_t tile) {
        for (int64_t block = 0; block < blocks; ++block) sweep(tile, block, buffers);
      });
      team.each(padded_n / kLanes, [&](int64_t v) { pick(v * kLanes, buffers); });
      gemm_done();
    });
  }

 private:
  // The buffers of one thread.
  struct Buffers {
    float* z;  // (kTileRows, kBlock), the logits of a tile
    P* copy;   // (kCopyRows, kCopyDepth), weights of a product
  };

  const Draw& draw;
  const int64_t padded_n, blocks, tiles, depth;
  P* columns;        // the B of Z.T = weight @ hidden.T, one block after another
  float* max_logit;  // (tiles, padded_n), the largest logit of a tile
  float* exp_sum;    // (tiles, padded_n), sum exp((z - max_logit) / temperature) over a tile
  float* logits;     // of the threads' buffers
  P* copies;

  int64_t width(int64_t block) const { return std::min(kBlock, padded_n - block * kBlock); }
  int64_t rows(int64_t tile) const { return std::min(kTileRows, draw.v - tile * kTileRows); }

  void pack(int64_t i) {
    const int64_t block = i / kBlock, w = width(block);
    P* to = columns + block * kBlock * depth;
    const T* from = static_cast<const T*>(draw.hidden) + i * draw.d;
    for (int64_t k = 0; k < depth; ++k)
      copy_value(i < draw.n && k < draw.d ? from[k] : T{},
                 to[packed_index<P>(k, i % kBlock, w)]);
  }

  // Writes the logits (rows, w) of a tile for the first n of w tokens of a block.
  void product(int64_t tile, int64_t block, int64_t column, int64_t n, int64_t w,
               const Buffers& buffers) const {
    const T* a = static_cast<const T*>(draw.weight) + tile * kTileRows * draw.d;
    const P* b = columns + block * kBlock * depth + column * kPair<P>;
    const bool more = tile + draw.threads < tiles;
    const T* next = more ? a + draw.threads * kTileRows * draw.d : a;  // the thread's next tile
    multiply_tokens(rows(tile), n, w, depth, a, draw.d, b, width(block), buffers.z, w,
                    buffers.copy, next);
  }

  // Computes the logits of a tile for a block of tokens, and their maxima and sums.
  void sweep(int64_t tile, int64_t block, const Buffers& buffers) {
    const int64_t w = width(block), n = rows(tile), first = block * kBlock;
    product(tile, block, 0, std::min(kBlock, draw.n - first), w, buffers);
    const float* z = buffers.z;
    for (int64_t i = 0; i < w; i += kLanes) {
      Lanes largest = load<Lanes>(z + i), sum{};
      for (int64_t r = 1; r < n; ++r) {
        const Lanes logit = load<Lanes>(z + r * w + i);
        largest = logit > largest ? logit : largest;
      }
      const Power power(exponents(first + i));
      for (int64_t r = 0; r < n; ++r) sum += power(load<Lanes>(z + r * w + i) - largest);
      store(max_logit + tile * padded_n + first + i, largest);
      store(exp_sum + tile * padded_n + first + i, sum);
    }
    for (int64_t i = 0; draw.logits && i < std::min(w, draw.n - first); ++i)
      for (int64_t r = 0; r < n; ++r)
        draw.logits[(first + i) * draw.v + tile * kTileRows + r] = z[r * w + i];
  }

  Lanes exponents(int64_t first) const {
    Lanes k;
    for (int j = 0; j < kLanes; ++j) k[j] = exponent(std::min(first + j, draw.n - 1));
    return k;
  }

  float exponent(int64_t i) const {
    return float(M_LOG2E) / (draw.temperature[i] ? draw.temperature[i] : 1.0f);
  }

  // Draws tokens for kLanes rows from `first` on. First makes their sums relative to the largest
  // logit of all tiles.
  void pick(int64_t first, const Buffers& buffers) {
    const Power power(exponents(first));
    Lanes largest = load<Lanes>(max_logit + first);
    double sum[kLanes] = {};
    for (int64_t tile = 1; tile < tiles; ++tile) {
      const Lanes here = load<Lanes>(max_logit + tile * padded_n + first);
      largest = here > largest ? here : largest;
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t at = tile * padded_n + first;
      const Lanes part = load<Lanes>(exp_sum + at) * power(load<Lanes>(max_logit + at) - largest);
      store(exp_sum + at, part);
      for (int j = 0; j < kLanes; ++j) sum[j] += part[j];
    }
    for (int64_t i = first; i < std::min(first + kLanes, draw.n); ++i)
      pick_one(i, largest[i - first], sum[i - first], buffers);
  }

  // Draws the token of row i.
  void pick_one(int64_t i, float largest, double sum, const Buffers& buffers) const {
    draw.token[i] = 0;
    draw.logp[i] = NAN;
    if (!std::isfinite(sum)) return;
    const bool likeliest = draw.temperature[i] == 0;
    const double target = uniform(draw.seeds[i], draw.positions[i]) * sum;
    // If rounding leaves the target beyond the end, the last tile of positive weight is chosen.
    double running = 0, before = 0;
    int64_t chosen = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const float part = exp_sum[tile * padded_n + i];
      const bool has_largest = max_logit[tile * padded_n + i] == largest;
      const bool may_be_chosen = likeliest ? has_largest : part > 0;
      if (may_be_chosen) {
        chosen = tile;
        before = running;
      }
      running += part;
      const bool is_found = likeliest ? has_largest : running > target;
      if (is_found) break;
    }
    const int64_t column = i % kBlock;
    const int64_t first = kAnyColumn ? column : column / kColumns * kColumns;
    product(chosen, i / kBlock, first, column - first + 1, kColumns, buffers);
    const float* z = buffers.z + column - first;
    take_from(chosen, i, z, likeliest, target - before, largest, sum);
  }

  // Draws the token of row i from a tile. `rest` is the part of the target that lies in the tile,
  // in units in which the largest logit of all has weight 1.
  void take_from(int64_t tile, int64_t i, const float* z, bool likeliest, double rest,
                 double largest, double sum) const {
    const double k = exponent(i);
    double running = 0;
    int64_t chosen = 0;
    for (int64_t r = 0; r < rows(tile); ++r) {
      const float logit = z[r * kColumns];
      const double part = std::exp2((logit - largest) * k);
      const bool may_be_chosen = likeliest ? logit > z[chosen * kColumns] : part > 0;
      if (may_be_chosen) chosen = r;
      running += part;
      if (!likeliest && running > rest) break;
    }
    draw.token[i] = tile * kTileRows + chosen;
    draw.logp[i] = (z[chosen * kColumns] - largest) * k * M_LN2 - std::log(sum);
  }
};

}  // namespace

extern "C" {

// Returns the bytes of the workspace for a draw.
int64_t expo_fast_draw_bytes(const Draw* draw) {
  return draw->dtype == kFloat32 ? Sampler<float>(*draw).used : Sampler<bf16>(*draw).used;
}

// Draws a token for each row.
void expo_fast_draw(const Draw* draw) {
  if (draw->dtype == kFloat32) Sampler<float>(*draw).run();
  else Sampler<bf16>(*draw).run();
}

}  // extern "C"
