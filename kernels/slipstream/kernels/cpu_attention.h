// Causal attention of a mixed batch over KV blocks, read where they lie: online softmax over spans of
// four blocks. What a query yields depends on nothing but itself and the keys and values before it.

#pragma once

#include <type_traits>
#include <vector>

#include "cpu_matmul.h"

namespace {

constexpr int kBlockTokens = 16;   // one vector of keys is one KV block
constexpr int kSpanBlocks = 4;     // blocks between two corrections of the running maximum
constexpr int kSpanTokens = kSpanBlocks * kBlockTokens;
constexpr float kLog2E = 1.44269504088896341f;  // the softmax is one of powers of 2
constexpr int kTileQueries = 32;   // query rows (positions x heads of one group) that share a K block

template <typename T>
struct Attention {
  const T* query;
  T* out;
  const T* pool;
  const int32_t* block_tables;
  const int32_t* query_starts;
  const int32_t* context_lengths;
  int64_t num_rows, max_blocks, num_heads, num_kv_heads, dim;
  int64_t query_stride, block_stride, layer_offset;
  float scale;

  int64_t group() const { return num_heads / num_kv_heads; }
};

struct Tile {
  int32_t row, first_query, num_queries, first_head, num_heads;
};

// Of one thread; grows to what its largest tile needs.
struct Scratch {
  std::vector<uint32_t> query;  // [rows][words of a head]
  std::vector<float> scores, accumulated, top, total;  // weights take the place of scores
  std::vector<vec> values;  // of a span, in words of several tokens: [words][dim]
  std::vector<vec> keys;  // one block, transposed: [words of a head][16 tokens]
  std::vector<float> row;  // of what is quantized
  std::vector<float> added;  // to a chunk of a product: [rows][panels][16]

  void prepare(int64_t rows, int64_t dim) {
    query.resize(rows * dim);
    scores.resize(rows * kSpanTokens);
    accumulated.assign(rows * dim, 0.0f);
    values.resize(kSpanTokens * dim / kLanes);
    keys.resize(dim + kLanes);
    top.assign(rows, -INFINITY);
    total.assign(rows, 0.0f);
  }
};

// Calls f(constant R, first row) for groups of kMost rows and the rest: fixed sizes stay in registers.
template <int kMost, typename F>
inline void for_row_groups(int64_t rows, int64_t first, F&& f) {
  while (rows - first >= kMost) {
    f(std::integral_constant<int, kMost>{}, first);
    first += kMost;
  }
  if constexpr (kMost > 1) for_row_groups<kMost - 1>(rows, first, f);
}

inline vec load_some(const float* p, int64_t count) {
  vec some{};
  std::memcpy(&some, p, 4 * count);
  return some;
}

// Words of 32 bits: word d of 16 tokens becomes one vector.
template <typename T>
void load_keys(const T* block, int64_t dim, vec* keys) {
  const int64_t words = dim * int64_t(sizeof(T)) / 4;
  for (int64_t d = 0; d < words; d += kLanes) {
    for (int token = 0; token < kBlockTokens; token++) {
      const float* row = reinterpret_cast<const float*>(block + token * dim) + d;
      keys[d + token] = words - d >= kLanes ? load(row) : load_some(row, words - d);
    }
    transpose(keys + d);
  }
}

// Of a block that will be wanted: all at once the requests would fill the core's queue, and it would wait.
// So it is asked for line by line, between the arithmetic; into the second cache, for a span's fill the first.
inline void ask_for(const void* line) { __builtin_prefetch(line, 0, 2); }

// scores[m][0..16) = query[m] . key[0..16)
template <typename T>
void score_block(const T* query, const vec* keys, float* scores, int64_t rows, int64_t dim,
                 const T* ahead) {
  constexpr int G = 4 / sizeof(T);
  for_row_groups<8>(rows, 0, [&](auto size, int64_t m) {
    constexpr int R = decltype(size)::value;
    vec total[R] = {};
    for (int64_t d = 0; d < dim; d += G) {
      ask_for(ahead + d * kBlockTokens);
      for (int r = 0; r < R; r++)
        total[r] = dot(total[r], query + (m + r) * dim + d,
                       reinterpret_cast<const T*>(keys + d / G));
    }
    for (int r = 0; r < R; r++) store(scores + (m + r) * kSpanTokens, total[r]);
  });
}

// Words of G tokens, from the values of these tokens; of the last ones some may not be there.
inline void load_values(const float* block, int64_t dim, int64_t, vec* values, const float* ahead) {
  for (int64_t d = 0; d < kBlockTokens * dim; d += kLanes) {
    ask_for(ahead + d);
    values[d / kLanes] = load(block + d);
  }
}
inline void load_values(const bf16* block, int64_t dim, int64_t tokens, vec* values,
                        const bf16* ahead) {
  for (int64_t token = 0; token < tokens; token += 2)
    for (int64_t d = 0; d < dim; d += kLanes) {
      const hvec_u* first = reinterpret_cast<const hvec_u*>(block + token * dim + d);
      const hvec_u* second = reinterpret_cast<const hvec_u*>(block + (token + 1) * dim + d);
      ask_for(ahead + (token * dim + 2 * d));
      *values++ = (vec)by_turns(*first, token + 1 < tokens ? hvec(*second) : hvec{});
    }
}

// accumulated[m] += weights[m] . values, over so many words of tokens
template <int V, typename T>
void add_values(const T* weights, const vec* values, float* accumulated, int64_t rows, int64_t dim,
                int64_t words) {
  constexpr int G = 4 / sizeof(T);
  for_row_groups<4>(rows, 0, [&](auto size, int64_t m) {
    constexpr int R = decltype(size)::value;
    vec total[R][V];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) total[r][v] = load(accumulated + (m + r) * dim + v * kLanes);
    for (int64_t word = 0; word < words; word++)
      for (int v = 0; v < V; v++) {
        const T* value = reinterpret_cast<const T*>(values + word * dim / kLanes + v);
        for (int r = 0; r < R; r++)
          total[r][v] = dot(total[r][v], weights + (m + r) * G * kSpanTokens + word * G, value);
      }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) store(accumulated + (m + r) * dim + v * kLanes, total[r][v]);
  });
}

// One span of the online softmax for one query row: scores become weights of T, in the same place.
// `visible` tokens count. What is added up is what values are multiplied with.
template <bool all, typename T>
inline void soften_span(float* scores, float scale, float* accumulated, float& top, float& total,
                        int64_t visible, int64_t dim) {
  constexpr bool coarse = sizeof(T) == 2;
  const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vec score[kSpanBlocks], highest = splat(-INFINITY);
  for (int b = 0; b < kSpanBlocks; b++) {
    score[b] = load(scores + b * kLanes) * scale;
    if (!all) score[b] = lane < int32_t(visible - b * kLanes) ? score[b] : splat(-INFINITY);
    highest = larger(highest, score[b]);
  }
  const float new_top = std::max(top, maximum(highest));
  vec weights{};
  for (int b = 0; b < kSpanBlocks; b++) {
    vec weight = exp2<coarse>(score[b] - new_top);
    if (!all) weight = lane < int32_t(visible - b * kLanes) ? weight : splat(0.0f);
    weights += store_rounded(reinterpret_cast<T*>(scores) + b * kLanes, weight);
  }
  if (new_top != top) {
    const float shrink = exp2<false>(splat(top - new_top))[0];
    total *= shrink;
    for (int64_t d = 0; d < dim; d += kLanes) store(accumulated + d, load(accumulated + d) * shrink);
  }
  total += sum(weights);
  top = new_top;
}

template <typename T>
void soften(float* scores, float scale, float* accumulated, float& top, float& total,
            int64_t visible, int64_t dim) {
  if (visible >= kSpanTokens)
    soften_span<true, T>(scores, scale, accumulated, top, total, visible, dim);
  else if (visible > 0)
    soften_span<false, T>(scores, scale, accumulated, top, total, visible, dim);
  else
    std::memset(scores, 0, kSpanTokens * sizeof(T));
}

template <typename T>
void add_span(const T* weights, const vec* values, float* accumulated, int64_t rows, int64_t dim,
              int64_t words) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes)
    add_values<4>(weights, values + d / kLanes, accumulated + d, rows, dim, words);
  for (; d < dim; d += kLanes)
    add_values<1>(weights, values + d / kLanes, accumulated + d, rows, dim, words);
}

// One KV head's queries meet one span. `first`: their first row in the scratch. Blocks lie anywhere:
// those of the next span, up to `context`, are asked for while these are computed.
template <typename T>
void attend_span(const Attention<T>& a, const int32_t* table, int64_t kv_head, int64_t start,
                 int64_t context, int64_t first_position, int64_t first, int64_t rows,
                 Scratch& s) {
  constexpr int G = 4 / sizeof(T);
  const int64_t end = std::min(context, start + kSpanTokens);
  const auto at = [&](const T* base, int64_t t) {
    return base + table[t / kBlockTokens] * a.block_stride;
  };
  const auto ahead = [&](const T* base, int64_t t) {
    return at(base, t + kSpanTokens < context ? t + kSpanTokens : t);
  };
  const int64_t head_stride = kBlockTokens * a.dim;
  const T* keys = a.pool + a.layer_offset + kv_head * head_stride;
  const T* values = keys + a.num_kv_heads * head_stride;
  const T* queries = reinterpret_cast<const T*>(s.query.data()) + first * a.dim;
  float* accumulated = &s.accumulated[first * a.dim];
  for (int64_t t = start; t < end; t += kBlockTokens) {
    load_keys(at(keys, t), a.dim, s.keys.data());
    score_block(queries, s.keys.data(), s.scores.data() + (t - start), rows, a.dim, ahead(keys, t));
  }
  for (int64_t m = 0; m < rows; m++)
    soften<T>(&s.scores[m * kSpanTokens], a.scale * kLog2E, accumulated + m * a.dim, s.top[first + m],
              s.total[first + m], first_position + m / a.group() + 1 - start, a.dim);
  // Never touch values beyond the context: the slots may hold anything, and 0 * NaN is NaN.
  for (int64_t t = start; t < end; t += kBlockTokens)
    load_values(at(values, t), a.dim, std::min<int64_t>(kBlockTokens, end - t),
                &s.values[(t - start) / G * a.dim / kLanes], ahead(values, t));
  add_span(reinterpret_cast<const T*>(s.scores.data()), s.values.data(), accumulated, rows, a.dim,
           (end - start + G - 1) / G);
}

template <typename T>
void attend_tile(const Attention<T>& a, const Tile& tile, Scratch& s) {
  const int64_t group = a.group(), rows = tile.num_queries * group;
  const int64_t num_queries = a.query_starts[tile.row + 1] - a.query_starts[tile.row];
  const int64_t first_position = a.context_lengths[tile.row] - num_queries + tile.first_query;
  const int64_t context = first_position + tile.num_queries;
  const int64_t first_token = a.query_starts[tile.row] + tile.first_query;
  s.prepare(tile.num_heads * rows, a.dim);
  T* queries = reinterpret_cast<T*>(s.query.data());
  // Of the m-th row of the scratch: rows of one KV head after those of another.
  const auto token = [&](int64_t m) { return first_token + m % rows / group; };
  const auto head = [&](int64_t m) { return (tile.first_head + m / rows) * group + m % group; };
  for (int64_t m = 0; m < tile.num_heads * rows; m++)
    std::memcpy(queries + m * a.dim, a.query + token(m) * a.query_stride + head(m) * a.dim,
                a.dim * sizeof(T));
  const int32_t* table = a.block_tables + tile.row * a.max_blocks;
  for (int64_t start = 0; start < context; start += kSpanTokens)
    for (int64_t h = 0; h < tile.num_heads; h++)
      attend_span(a, table, tile.first_head + h, start, context, first_position, h * rows, rows, s);
  for (int64_t m = 0; m < tile.num_heads * rows; m++) {
    T* out = a.out + (token(m) * a.num_heads + head(m)) * a.dim;
    for (int64_t d = 0; d < a.dim; d += kLanes)
      store(out + d, load(&s.accumulated[m * a.dim + d]) / s.total[m]);
  }
}

// In the order in which they are taken: a prompt's last tiles are its longest. All KV heads of a row
// go together, for their blocks are adjacent, unless that made too few tiles.
std::vector<Tile> tiles_of(const int32_t* query_starts, int64_t num_rows, int64_t group,
                           int64_t num_kv_heads, int64_t wanted) {
  const int32_t most = int32_t(std::max<int64_t>(1, kTileQueries / group));
  int64_t count = 0;
  for (int64_t row = 0; row < num_rows; row++)
    count += (query_starts[row + 1] - query_starts[row] + most - 1) / most;
  const int32_t heads = count < wanted ? 1 : int32_t(num_kv_heads);
  std::vector<Tile> tiles;
  for (int32_t row = 0; row < num_rows; row++) {
    const int32_t num_queries = query_starts[row + 1] - query_starts[row];
    for (int32_t first = 0; first < num_queries; first += most)
      for (int32_t head = 0; head < num_kv_heads; head += heads)
        tiles.push_back({row, first, std::min(most, num_queries - first), head, heads});
  }
  std::reverse(tiles.begin(), tiles.end());
  return tiles;
}

}  // namespace
