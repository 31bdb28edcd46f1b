// Draws a token per row from softmax(hidden @ weight.T / temperature), with its log-prob and without
// an (N, V) buffer. One pass over the vocabulary leaves a maximum and a sum per tile. A uniform
// number then picks the tile, whose logits are computed again, and the token in it.

#include <algorithm>
#include <cmath>

#include "common.h"
#include "gemm.h"

// Mirrored by native_structs.py. Vectors are (N,).
struct Draw {
  const void *hidden, *weight;  // (N, D) and (V, D), contiguous and of one dtype
  const float* temperature;     // 0: the likeliest token, its log-prob at temperature 1
  const int64_t *seeds, *positions;  // the key of the row's uniform number
  int64_t* token;
  float* logp;    // nats at the temperature; NaN where the logits are not finite
  float* logits;  // (N, V) out, or null if they are not needed
  void* workspace;
  int64_t n, v, d;
  int32_t dtype, threads;
};

EXPO_FAST_SIZEOF(draw, Draw)

namespace {

constexpr int64_t kVectors = 16;  // columns of the product that recomputes a row's logits

// SplitMix64 (doi:10.1145/2714064.2660195), the same number as sampling.py's.
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
  explicit Sampler(const Draw& draw)
      : draw(draw), lanes(round_up(draw.n, 16)), blocks((draw.n + kBlock - 1) / kBlock),
        tiles((draw.v + kTall - 1) / kTall), depth(round_up(draw.d, kPair<T>)) {
    char* at = static_cast<char*>(draw.workspace);
    auto take = [&](int64_t bytes) {
      char* mine = at + used;
      used += round_up(bytes, 64);
      return mine;
    };
    columns = reinterpret_cast<T*>(take(lanes * depth * sizeof(T)));
    top = reinterpret_cast<float*>(take(tiles * lanes * 4));
    mass = reinterpret_cast<float*>(take(tiles * lanes * 4));
    logits = reinterpret_cast<float*>(take(draw.threads * kTall * kBlock * 4));
  }

  int64_t used = 0;

  void run() {
    Team::run(draw.threads, [&](Team& team, int t) {
      float* z = logits + t * kTall * kBlock;
      team.each(lanes, [&](int64_t i) { pack(i); });
      team.each(tiles, [&](int64_t tile) {
        for (int64_t block = 0; block < blocks; ++block) sweep(tile, block, z);
      });
      team.each(lanes / kLanes, [&](int64_t v) { pick(v * kLanes, z); });
      gemm_done();
    });
  }

 private:
  const Draw& draw;
  const int64_t lanes, blocks, tiles, depth;
  T* columns;          // B of Z.T = weight @ hidden.T, one block after another
  float *top, *mass;   // (tiles, lanes): largest logit, sum exp((z - top) / temperature)
  float* logits;       // (kTall, kBlock) per thread

  int64_t width(int64_t block) const { return std::min(kBlock, lanes - block * kBlock); }
  int64_t rows(int64_t tile) const { return std::min(kTall, draw.v - tile * kTall); }

  void pack(int64_t i) {
    const int64_t block = i / kBlock, w = width(block);
    T* to = columns + block * kBlock * depth;
    const T* from = static_cast<const T*>(draw.hidden) + i * draw.d;
    for (int64_t k = 0; k < depth; ++k)
      to[(k / kPair<T> * w + i % kBlock) * kPair<T> + k % kPair<T>] =
          i < draw.n && k < draw.d ? from[k] : T{};
  }

  // Logits (rows, w) of a tile for w of a block's tokens.
  void product(int64_t tile, int64_t block, int64_t lane, int64_t w, float* z) const {
    const T* a = static_cast<const T*>(draw.weight) + tile * kTall * draw.d;
    const T* b = columns + block * kBlock * depth + lane * kPair<T>;
    gemm(rows(tile), w, depth, a, draw.d, b, width(block), z, w, false);
  }

  void sweep(int64_t tile, int64_t block, float* z) {
    const int64_t w = width(block), n = rows(tile), first = block * kBlock;
    product(tile, block, 0, w, z);
    for (int64_t i = 0; i < w; i += kLanes) {
      Lanes most = load<Lanes>(z + i), sum{};
      for (int64_t r = 1; r < n; ++r) {
        const Lanes logit = load<Lanes>(z + r * w + i);
        most = logit > most ? logit : most;
      }
      const Power power(exponents(first + i));
      for (int64_t r = 0; r < n; ++r) sum += power(load<Lanes>(z + r * w + i) - most);
      store(top + tile * lanes + first + i, most);
      store(mass + tile * lanes + first + i, sum);
    }
    for (int64_t i = 0; draw.logits && i < std::min(w, draw.n - first); ++i)
      for (int64_t r = 0; r < n; ++r)
        draw.logits[(first + i) * draw.v + tile * kTall + r] = z[r * w + i];
  }

  Lanes exponents(int64_t first) const {
    Lanes k;
    for (int j = 0; j < kLanes; ++j) k[j] = exponent(std::min(first + j, draw.n - 1));
    return k;
  }

  float exponent(int64_t i) const {
    return float(M_LOG2E) / (draw.temperature[i] ? draw.temperature[i] : 1.0f);
  }

  // kLanes rows from `first` on; their sums become relative to the largest logit of all tiles.
  void pick(int64_t first, float* z) {
    const Power power(exponents(first));
    Lanes most = load<Lanes>(top + first);
    double sum[kLanes] = {};
    for (int64_t tile = 1; tile < tiles; ++tile) {
      const Lanes here = load<Lanes>(top + tile * lanes + first);
      most = here > most ? here : most;
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t at = tile * lanes + first;
      const Lanes part = load<Lanes>(mass + at) * power(load<Lanes>(top + at) - most);
      store(mass + at, part);
      for (int j = 0; j < kLanes; ++j) sum[j] += part[j];
    }
    for (int64_t i = first; i < std::min(first + kLanes, draw.n); ++i)
      pick_one(i, most[i - first], sum[i - first], z);
  }

  void pick_one(int64_t i, float most, double sum, float* z) const {
    draw.token[i] = 0;
    draw.logp[i] = NAN;
    if (!std::isfinite(sum)) return;
    const bool likeliest = draw.temperature[i] == 0;
    const double target = uniform(draw.seeds[i], draw.positions[i]) * sum;
    // Rounding may leave target at the very end: then it is the last one of positive weight.
    double running = 0, before = 0;
    int64_t chosen = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const float part = mass[tile * lanes + i];
      if (likeliest ? top[tile * lanes + i] == most : part > 0) chosen = tile, before = running;
      running += part;
      if (likeliest ? top[tile * lanes + i] == most : running > target) break;
    }
    const int64_t lane = i % kBlock / kVectors * kVectors;
    product(chosen, i / kBlock, lane, kVectors, z);
    take_from(chosen, i, z + i % kVectors, likeliest, target - before, most, sum);
  }

  // `rest` is the part of the target inside the tile. The largest logit of all has weight 1.
  void take_from(int64_t tile, int64_t i, const float* z, bool likeliest, double rest, double most,
                 double sum) const {
    const double k = exponent(i);
    double running = 0;
    int64_t chosen = 0;
    for (int64_t r = 0; r < rows(tile); ++r) {
      const float logit = z[r * kVectors];
      const double part = std::exp2((logit - most) * k);
      if (likeliest ? logit > z[chosen * kVectors] : part > 0) chosen = r;
      running += part;
      if (!likeliest && running > rest) break;
    }
    draw.token[i] = tile * kTall + chosen;
    draw.logp[i] = (z[chosen * kVectors] - most) * k * M_LN2 - std::log(sum);
  }
};

}  // namespace

extern "C" {

int64_t expo_fast_draw_bytes(const Draw* draw) {
  return draw->dtype == kFloat32 ? Sampler<float>(*draw).used : Sampler<bf16>(*draw).used;
}

void expo_fast_draw(const Draw* draw) {
  if (draw->dtype == kFloat32) Sampler<float>(*draw).run();
  else Sampler<bf16>(*draw).run();
}

}  // extern "C"
