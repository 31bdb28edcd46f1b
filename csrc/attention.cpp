// Causal attention over a tree of segments on a CPU, forward and backward.
//
// The tokens of a pack are divided into segments. A segment may continue an earlier one, its parent.
// The chain of a segment is the list of its ancestors, from the root on, and the segment itself. A
// token sees the tokens of its chain up to itself, within the window. Keys of a shared segment are
// read for all segments that continue it, and are not copied.
//
//   S = k q.T scale    P = softmax over keys    o = P.T v
//   d_v = P d_o    d_P = v d_o.T    d_S = P (d_P - sum(d_o o)) scale    d_q = d_S.T k    d_k = d_S q
//
// Queries lie along the vector lanes: a lane is one query head of one token, and the heads that share
// a kv head are neighbours. All arithmetic is fp32. Forward keeps only the logarithm of the softmax's
// denominator. Backward computes P again.
//
// Gradients of keys are summed in parts: a chunk of queries sums over its queries, and then the sums
// of all chunks are added in their order. Chunks depend on the segments only, so the results are the
// same for any number of threads.

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "common.h"
#include "gemm.h"
#include "matrices.h"

namespace {

constexpr int64_t kLanesAtOnce = 4 * kBlock;  // lanes whose keys' gradients are one product
constexpr int64_t kLanesStride = kLanesAtOnce + 16;
constexpr int64_t kKeyRows = kTileRows;       // keys of a tile in backward
constexpr int64_t kChunk = 256;               // tokens: a chunk of short segments ends from here on
constexpr int64_t kLongest = 512;             // tokens of a part of a longer segment
constexpr int64_t kParts = 16;                // parts of a segment, whose sums are in memory together
constexpr float kUnseen = -INFINITY;

}  // namespace

// op_backends/native_layer.py declares this struct too.
struct Attention {
  const void *q, *k, *v;          // (N, H, Dh), (N, Hkv, Dh)
  const int32_t *boundaries;      // (S + 1,) of the segments
  const int32_t *parents;         // (S,) -1: none; a parent comes before its segment
  void* out;                      // (N, H, Dh)
  float* log_sum;                 // (N, H) log2 of the sum of exp(scores)
  const void* d_out;              // (N, H, Dh)
  void *d_q, *d_k, *d_v;
  int64_t n, segments, heads, kv_heads, head_dim;
  int64_t window;                 // tokens that a token sees, with itself; 0: all
  float scale;
  int32_t dtype, threads;
};

EXPO_FAST_SIZEOF(attention, Attention)

namespace {

// A range of tokens in the pack, and the place of its first one among the keys of a chain.
struct Range {
  int64_t begin, end, place;

  int64_t size() const { return end - begin; }
};

// Queries of one segment, and the ranges of keys that they see.
struct Queries {
  int64_t segment, begin, end;  // tokens
  int64_t first_position;       // of token `begin` among the keys of its chain
  std::vector<Range> keys;      // the chain, up to `end`
};

class Tree {
 public:
  explicit Tree(const Attention& a) : a(a) {}

  int64_t begin(int64_t segment) const { return a.boundaries[segment]; }
  int64_t end(int64_t segment) const { return a.boundaries[segment + 1]; }

  // Returns tokens [first, last) of a segment with the keys that they see.
  Queries queries(int64_t segment, int64_t first, int64_t last) const {
    std::vector<int64_t> chain;
    for (int64_t s = a.parents[segment]; s >= 0; s = a.parents[s]) chain.push_back(s);
    std::reverse(chain.begin(), chain.end());
    Queries found{segment, first, last, 0, {}};
    int64_t place = 0;
    for (int64_t s : chain) {
      found.keys.push_back({begin(s), end(s), place});
      place += end(s) - begin(s);
    }
    found.keys.push_back({begin(segment), last, place});
    found.first_position = place + first - begin(segment);
    return found;
  }

 private:
  const Attention& a;
};

// k and v of all tokens in fp32, by kv head.
struct Keys {
  const int64_t n, head_dim, stride;
  Scratch<float> k, v;                // (Hkv, N, Dh)
  Scratch<float> transposed;          // (Hkv, Dh, stride), of v in forward and of k in backward

  template <class T>
  Keys(const Attention& a, bool backward, T)
      : n(a.n), head_dim(a.head_dim), stride(round_up(a.n, 16) + 16),
        k(a.kv_heads * a.n * a.head_dim), v(backward ? a.kv_heads * a.n * a.head_dim : 0),
        transposed(a.kv_heads * a.head_dim * stride) {
    const int64_t parts = (n + kBlock - 1) / kBlock;
    parallel_each(a.threads, a.kv_heads * parts, [&](int, int64_t item) {
      const int64_t head = item / parts, first = item % parts * kBlock;
      for (int64_t i = first; i < std::min(n, first + kBlock); ++i) {
        const int64_t from = (i * a.kv_heads + head) * head_dim;
        const T *key = static_cast<const T*>(a.k) + from, *value = static_cast<const T*>(a.v) + from;
        const int64_t to = (head * n + i) * head_dim;
        convert(key, head_dim, k.data.get() + to);
        if (backward) convert(value, head_dim, v.data.get() + to);
        const T* turned = backward ? key : value;
        float* column = transposed.data.get() + head * head_dim * stride + i;
        for (int64_t j = 0; j < head_dim; ++j) column[j * stride] = widen(turned[j]);
      }
    });
  }

  const float* key(int64_t head, int64_t token) const { return &k.data[(head * n + token) * head_dim]; }
  const float* value(int64_t head, int64_t token) const {
    return &v.data[(head * n + token) * head_dim];
  }
  const float* column(int64_t head, int64_t token) const {
    return &transposed.data[head * head_dim * stride + token];
  }
};

// The lanes of a block: queries [first, first + real) of a kv head, where query i is head i % group of
// token i / group after the first token.
struct Block {
  int64_t first, real, width;  // width is rounded up to 16
};

// Copies rows of a (N, H, Dh) matrix for the lanes of a block to columns (Dh, width). Padding is 0.
template <class T>
void copy_columns(const T* from, const Attention& a, int64_t head, const Queries& queries,
                  const Block& block, float* to) {
  const int64_t group = a.heads / a.kv_heads, w = block.width;
  for (int64_t i = 0; i < w; ++i) {
    const int64_t query = block.first + i, token = queries.begin + query / group;
    const T* row = from + (token * a.heads + head * group + query % group) * a.head_dim;
    for (int64_t j = 0; j < a.head_dim; ++j) to[j * w + i] = i < block.real ? widen(row[j]) : 0.0f;
  }
}

// Sets the scores of a row of keys to kUnseen in the lanes that do not see the key.
class Mask {
 public:
  Mask(const Attention& a, const Queries& queries, const Block& block) : window(a.window) {
    const int64_t group = a.heads / a.kv_heads;
    for (int64_t i = 0; i < block.width; ++i) {
      const int64_t query = block.first + std::min(i, block.real - 1);
      positions[i] = int32_t(queries.first_position + query / group);
    }
    lowest = positions[0];
    highest = positions[block.width - 1];
  }

  // The keys that some lane sees: places [begin, end) of the chain.
  int64_t begin() const { return window ? std::max<int64_t>(0, lowest - window + 1) : 0; }
  int64_t end() const { return highest + 1; }

  // Whether all lanes see the key.
  bool seen_by_all(int64_t place) const {
    return place <= lowest && (!window || place > highest - window);
  }

  Lanes apply(int64_t place, int64_t i, Lanes scores) const {
    const IntLanes position = load<IntLanes>(positions + i);
    IntLanes hidden = position < int32_t(place);
    if (window) hidden |= position - int32_t(window) >= int32_t(place);
    return hidden ? broadcast(kUnseen) : scores;
  }

 private:
  const int64_t window;
  int64_t lowest, highest;
  int32_t positions[kBlock];
};

// Calls f(range) for the parts of the ranges within places [begin, end).
template <class F>
void each_range(const std::vector<Range>& ranges, int64_t begin, int64_t end, F f) {
  for (const Range& range : ranges) {
    const int64_t low = std::max(begin, range.place);
    const int64_t high = std::min(end, range.place + range.size());
    if (low < high)
      f(Range{range.begin + low - range.place, range.begin + high - range.place, low});
  }
}

// The buffers of one thread in forward.
struct ForwardBuffers {
  Scratch<float> q, out, scores;

  ForwardBuffers(const Attention& a, int64_t most_keys)
      : q(a.head_dim * kBlock), out(a.head_dim * kBlock), scores(most_keys * kBlock) {}
};

template <class T>
void attend(const Attention& a, const Keys& keys, int64_t head, const Queries& queries,
            const Block& block, ForwardBuffers& buffers) {
  const int64_t Dh = a.head_dim, w = block.width, group = a.heads / a.kv_heads;
  const Mask mask(a, queries, block);
  const int64_t begin = mask.begin(), end = mask.end();
  float *q = buffers.q.data.get(), *scores = buffers.scores.data.get();
  copy_columns(static_cast<const T*>(a.q), a, head, queries, block, q);
  each_range(queries.keys, begin, end, [&](const Range& r) {
    gemm(r.size(), w, Dh, keys.key(head, r.begin), Dh, q, w, scores + (r.place - begin) * w, w,
         false);
  });
  const float log2_scale = a.scale * float(M_LOG2E);
  const Power power(broadcast(log2_scale));
  float sums[kBlock], log_sums[kBlock];
  for (int64_t i = 0; i < w; i += kLanes) {
    Lanes top = broadcast(kUnseen), sum{};
    for (int64_t place = begin; place < end; ++place) {
      float* at = scores + (place - begin) * w + i;
      Lanes s = load<Lanes>(at);
      if (!mask.seen_by_all(place)) {
        s = mask.apply(place, i, s);
        store(at, s);
      }
      top = s > top ? s : top;
    }
    for (int64_t place = begin; place < end; ++place) {
      float* at = scores + (place - begin) * w + i;
      const Lanes p = power(load<Lanes>(at) - top);
      store(at, p);
      sum += p;
    }
    store(sums + i, sum);
    for (int j = 0; j < kLanes; ++j) log_sums[i + j] = top[j] * log2_scale + std::log2(sum[j]);
  }
  float* out = buffers.out.data.get();
  bool add = false;
  each_range(queries.keys, begin, end, [&](const Range& r) {
    gemm(Dh, w, r.size(), keys.column(head, r.begin), keys.stride, scores + (r.place - begin) * w, w,
         out, w, add);
    add = true;
  });
  for (int64_t i = 0; i < block.real; ++i) {
    const int64_t query = block.first + i, token = queries.begin + query / group;
    const int64_t row = token * a.heads + head * group + query % group;
    const float scale = 1.0f / sums[i];
    T* to = static_cast<T*>(a.out) + row * Dh;
    for (int64_t j = 0; j < Dh; ++j) narrow(out[j * w + i] * scale, to[j]);
    a.log_sum[row] = log_sums[i];
  }
}

// The blocks of the queries of one kv head.
std::vector<Block> blocks_of(const Attention& a, const Queries& queries) {
  const int64_t n = (queries.end - queries.begin) * (a.heads / a.kv_heads);
  std::vector<Block> blocks;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t real = std::min(kBlock, n - first);
    blocks.push_back({first, real, round_up(real, 16)});
  }
  return blocks;
}

template <class T>
void forward(const Attention& a) {
  const Tree tree(a);
  const Keys keys(a, false, T{});
  struct Task { int64_t head, queries; Block block; };
  std::vector<Queries> queries;
  std::vector<Task> tasks;
  int64_t most_keys = 0;
  for (int64_t s = 0; s < a.segments; ++s) {
    if (tree.begin(s) == tree.end(s)) continue;
    queries.push_back(tree.queries(s, tree.begin(s), tree.end(s)));
    const Range& own = queries.back().keys.back();
    most_keys = std::max(most_keys, own.place + own.size());
    for (const Block& block : blocks_of(a, queries.back()))
      for (int64_t head = 0; head < a.kv_heads; ++head)
        tasks.push_back({head, int64_t(queries.size()) - 1, block});
  }
  std::vector<std::unique_ptr<ForwardBuffers>> buffers(a.threads);
  parallel_each(a.threads, tasks.size(), [&](int t, int64_t i) {
    if (!buffers[t]) buffers[t] = std::make_unique<ForwardBuffers>(a, most_keys);
    attend<T>(a, keys, tasks[i].head, queries[tasks[i].queries], tasks[i].block, *buffers[t]);
  });
}

// Queries whose gradients of keys are summed together: neighbouring segments with one parent, or a
// part of a long segment.
struct Chunk {
  std::vector<Queries> queries;
  std::vector<Range> keys;  // all that the queries see, with their rows in the chunk's sums
  int64_t rows = 0;         // of keys

  void add(Queries added) {
    if (queries.empty()) {  // all queries of the chunk share their ancestors' keys
      const size_t n_ancestors = added.keys.size() - 1;
      for (size_t i = 0; i < n_ancestors; ++i) add_keys(added.keys[i]);
    }
    add_keys(added.keys.back());
    queries.push_back(std::move(added));
  }

  void add_keys(const Range& range) {
    keys.push_back({range.begin, range.end, rows});
    rows += range.size();
  }

  int64_t row_of(int64_t token) const {
    for (const Range& range : keys)
      if (token >= range.begin && token < range.end) return range.place + token - range.begin;
    return -1;
  }
};

std::vector<Chunk> chunks_of(const Attention& a, const Tree& tree) {
  std::vector<Chunk> chunks;
  int64_t size = kChunk, last_parent = -1;
  for (int64_t s = 0; s < a.segments; ++s) {
    const int64_t length = tree.end(s) - tree.begin(s);
    const int64_t longest = std::max(kLongest, round_up((length + kParts - 1) / kParts, kBlock));
    for (int64_t first = tree.begin(s); first < tree.end(s); first += longest) {
      const int64_t end = std::min(first + longest, tree.end(s));
      const bool is_part = length > longest;
      if (is_part || size >= kChunk || a.parents[s] != last_parent) {
        chunks.emplace_back();
        size = 0;
      }
      chunks.back().add(tree.queries(s, first, end));
      size = is_part ? kChunk : size + end - first;
      last_parent = a.parents[s];
    }
  }
  return chunks;
}

// The buffers of one thread in backward. Lanes are those of up to kLanesAtOnce / kBlock blocks.
struct BackwardBuffers {
  Scratch<float> q, d_out, d_q;      // (Dh, w) of each block
  Scratch<float> q_rows, out_rows;   // (lanes, Dh rounded up to 16): q and d_out
  Scratch<float> z, d_p;             // (kKeyRows, kBlock)
  Scratch<float> p, d_s;             // (kKeyRows, kLanesStride)
  float log_sum[kLanesAtOnce], delta[kLanesAtOnce];

  explicit BackwardBuffers(int64_t Dh)
      : q(Dh * kLanesAtOnce), d_out(Dh * kLanesAtOnce), d_q(Dh * kLanesAtOnce),
        q_rows(round_up(Dh, 16) * kLanesAtOnce), out_rows(round_up(Dh, 16) * kLanesAtOnce),
        z(kKeyRows * kBlock), d_p(kKeyRows * kBlock), p(kKeyRows * kLanesStride),
        d_s(kKeyRows * kLanesStride) {}
};

template <class T>
class Backward {
 public:
  Backward(const Attention& a, const Keys& keys, BackwardBuffers& buffers)
      : a(a), keys(keys), b(buffers), Dh(a.head_dim), width(round_up(a.head_dim, 16)),
        group(a.heads / a.kv_heads) {}

  // Writes d_q of the chunk's queries of a kv head. Adds to d_k and d_v, (rows of the chunk, width).
  void run(int64_t head, const Chunk& chunk, float* d_k, float* d_v) {
    for (const Queries& queries : chunk.queries) {
      const std::vector<Block> all = blocks_of(a, queries);
      constexpr int64_t at_once = kLanesAtOnce / kBlock;
      for (size_t first = 0; first < all.size(); first += at_once) {
        const size_t end = std::min(all.size(), first + at_once);
        blocks.assign(all.begin() + first, all.begin() + end);
        take(head, queries);
        std::vector<Mask> masks;
        for (const Block& block : blocks) masks.emplace_back(a, queries, block);
        const int64_t begin = masks.front().begin(), last = masks.back().end();
        each_range(queries.keys, begin, last, [&](const Range& range) {
          for (int64_t at = 0; at < range.size(); at += kKeyRows) {
            const int64_t rows = std::min(kKeyRows, range.size() - at);
            const int64_t row = chunk.row_of(range.begin + at) * width;
            tile(head, masks, range.begin + at, range.place + at, rows, d_k + row, d_v + row);
          }
        });
        write_d_q(head, queries);
      }
    }
  }

 private:
  const Attention& a;
  const Keys& keys;
  BackwardBuffers& b;
  const int64_t Dh, width, group;
  std::vector<Block> blocks;
  int64_t lanes;  // of all blocks, with padding

  int64_t row_of(int64_t head, const Queries& queries, int64_t query) const {
    return (queries.begin + query / group) * a.heads + head * group + query % group;
  }

  // Copies queries, upstream gradients and sums of the blocks.
  void take(int64_t head, const Queries& queries) {
    auto q = static_cast<const T*>(a.q), out = static_cast<const T*>(a.out);
    auto d_out = static_cast<const T*>(a.d_out);
    lanes = (blocks.size() - 1) * kBlock + blocks.back().width;
    std::fill_n(b.q_rows.data.get(), lanes * width, 0.0f);
    std::fill_n(b.out_rows.data.get(), lanes * width, 0.0f);
    std::fill_n(b.d_q.data.get(), Dh * lanes, 0.0f);
    std::fill_n(b.log_sum, lanes, INFINITY);  // padding has P = 0
    std::fill_n(b.delta, lanes, 0.0f);
    for (size_t i = 0; i < blocks.size(); ++i) {
      const int64_t lane = i * kBlock;
      copy_columns(q, a, head, queries, blocks[i], b.q.data.get() + lane * Dh);
      copy_columns(d_out, a, head, queries, blocks[i], b.d_out.data.get() + lane * Dh);
      for (int64_t j = 0; j < blocks[i].real; ++j) {
        const int64_t row = row_of(head, queries, blocks[i].first + j);
        convert(q + row * Dh, Dh, b.q_rows.data.get() + (lane + j) * width);
        convert(d_out + row * Dh, Dh, b.out_rows.data.get() + (lane + j) * width);
        b.log_sum[lane + j] = a.log_sum[row];
        for (int64_t k = 0; k < Dh; ++k)
          b.delta[lane + j] += widen(out[row * Dh + k]) * widen(d_out[row * Dh + k]);
      }
    }
  }

  // Processes the keys [token, token + rows), which lie in one segment and have these places.
  void tile(int64_t head, const std::vector<Mask>& masks, int64_t token, int64_t place,
            int64_t rows, float* d_k, float* d_v) {
    for (size_t i = 0; i < blocks.size(); ++i) {
      const int64_t lane = i * kBlock, w = blocks[i].width;
      float *p = b.p.data.get() + lane, *d_s = b.d_s.data.get() + lane;
      if (place >= masks[i].end() || place + rows <= masks[i].begin()) {
        for (int64_t r = 0; r < rows; ++r) {
          std::fill_n(p + r * kLanesStride, w, 0.0f);
          std::fill_n(d_s + r * kLanesStride, w, 0.0f);
        }
        continue;
      }
      float *z = b.z.data.get(), *d_p = b.d_p.data.get();
      gemm(rows, w, Dh, keys.key(head, token), Dh, b.q.data.get() + lane * Dh, w, z, w, false);
      gemm(rows, w, Dh, keys.value(head, token), Dh, b.d_out.data.get() + lane * Dh, w, d_p, w,
           false);
      write_d_s(masks[i], place, rows, lane, w);
      gemm(Dh, w, rows, keys.column(head, token), keys.stride, d_s, kLanesStride,
           b.d_q.data.get() + lane * Dh, w, true);
    }
    gemm(rows, width, lanes, b.p.data.get(), kLanesStride, b.out_rows.data.get(), width, d_v, width,
         true);
    gemm(rows, width, lanes, b.d_s.data.get(), kLanesStride, b.q_rows.data.get(), width, d_k, width,
         true);
  }

  void write_d_s(const Mask& mask, int64_t place, int64_t rows, int64_t lane, int64_t w) {
    const Power power(broadcast(1.0f));
    const float log2_scale = a.scale * float(M_LOG2E);
    for (int64_t r = 0; r < rows; ++r) {
      const bool all = mask.seen_by_all(place + r);
      for (int64_t i = 0; i < w; i += kLanes) {
        const Lanes log_sum = load<Lanes>(b.log_sum + lane + i);
        Lanes x = load<Lanes>(&b.z.data[r * w + i]) * log2_scale - log_sum;
        if (!all) x = mask.apply(place + r, i, x);
        const Lanes p = power(x);
        const Lanes d_p = load<Lanes>(&b.d_p.data[r * w + i]);
        const int64_t to = r * kLanesStride + lane + i;
        store(&b.p.data[to], p);
        store(&b.d_s.data[to], p * (d_p - load<Lanes>(b.delta + lane + i)) * a.scale);
      }
    }
  }

  void write_d_q(int64_t head, const Queries& queries) {
    for (size_t i = 0; i < blocks.size(); ++i) {
      const float* from = b.d_q.data.get() + i * kBlock * Dh;
      for (int64_t j = 0; j < blocks[i].real; ++j) {
        T* to = static_cast<T*>(a.d_q) + row_of(head, queries, blocks[i].first + j) * Dh;
        for (int64_t k = 0; k < Dh; ++k) narrow(from[k * blocks[i].width + j], to[k]);
      }
    }
  }
};

template <class T>
void backward(const Attention& a) {
  const Tree tree(a);
  const Keys keys(a, true, T{});
  const std::vector<Chunk> chunks = chunks_of(a, tree);
  const int64_t n_chunks = chunks.size(), width = round_up(a.head_dim, 16);
  std::vector<int64_t> first_row(n_chunks + 1, 0);  // of the chunk's sums
  for (int64_t c = 0; c < n_chunks; ++c) first_row[c + 1] = first_row[c] + chunks[c].rows;
  const int64_t rows = first_row[n_chunks];
  Scratch<float> d_k(a.kv_heads * rows * width), d_v(a.kv_heads * rows * width);
  std::vector<std::unique_ptr<BackwardBuffers>> buffers(a.threads);
  parallel_each(a.threads, n_chunks * a.kv_heads, [&](int t, int64_t i) {
    if (!buffers[t]) buffers[t] = std::make_unique<BackwardBuffers>(a.head_dim);
    const int64_t chunk = i / a.kv_heads, head = i % a.kv_heads;
    const int64_t at = (head * rows + first_row[chunk]) * width;
    const int64_t size = chunks[chunk].rows * width;
    std::fill_n(d_k.data.get() + at, size, 0.0f);
    std::fill_n(d_v.data.get() + at, size, 0.0f);
    Backward<T>(a, keys, *buffers[t])
        .run(head, chunks[chunk], d_k.data.get() + at, d_v.data.get() + at);
  });
  // The rows of each segment in the sums of the chunks, in the order of the chunks.
  std::vector<std::vector<Range>> parts(a.segments);
  for (int64_t c = 0; c < n_chunks; ++c)
    for (const Range& range : chunks[c].keys) {
      const int32_t* above = std::upper_bound(a.boundaries, a.boundaries + a.segments + 1,
                                              int32_t(range.begin));
      parts[above - a.boundaries - 1].push_back({range.begin, range.end, first_row[c] + range.place});
    }
  parallel_each(a.threads, a.segments * a.kv_heads, [&](int, int64_t i) {
    const int64_t segment = i / a.kv_heads, head = i % a.kv_heads;
    Scratch<float> sums(2 * a.head_dim);
    float *sum_k = sums.data.get(), *sum_v = sums.data.get() + a.head_dim;
    for (int64_t token = tree.begin(segment); token < tree.end(segment); ++token) {
      std::fill_n(sum_k, 2 * a.head_dim, 0.0f);
      for (const Range& part : parts[segment]) {
        if (token < part.begin || token >= part.end) continue;
        const int64_t at = (head * rows + part.place + token - part.begin) * width;
        for (int64_t j = 0; j < a.head_dim; ++j) {
          sum_k[j] += d_k.data[at + j];
          sum_v[j] += d_v.data[at + j];
        }
      }
      const int64_t to = (token * a.kv_heads + head) * a.head_dim;
      narrow(sum_k, a.head_dim, static_cast<T*>(a.d_k) + to);
      narrow(sum_v, a.head_dim, static_cast<T*>(a.d_v) + to);
    }
  });
}

}  // namespace

// Each function returns 0, or 1 and sets the error.
extern "C" {

int32_t expo_fast_attention(const Attention* a) {
  return guarded([&] { with_matrix_type(a->dtype, [&](auto t) { forward<decltype(t)>(*a); }); });
}

int32_t expo_fast_attention_gradients(const Attention* a) {
  return guarded([&] { with_matrix_type(a->dtype, [&](auto t) { backward<decltype(t)>(*a); }); });
}

}  // extern "C"
