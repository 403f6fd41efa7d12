// CPU kernels behind a plain C interface; `cpu.py` compiles and calls them, `reference.py` says what
// they must compute. All sums are in float32. No result depends on the number of threads, on the
// other rows of a batch, or on how a prompt was cut into chunks.

#include <type_traits>
#include <vector>

#include "cpu_vector.h"

namespace {

constexpr int kBlockTokens = 16;   // one vector of keys is one KV block
constexpr int kSpanBlocks = 4;     // blocks between two corrections of the running maximum
constexpr int kSpanTokens = kSpanBlocks * kBlockTokens;
constexpr int kTileRows = 32;      // query rows (positions x heads of one group) that share a K block
constexpr int64_t kParallelElements = 16384;  // below this a thread costs more than it saves

// --- Norm, activation, rotary, KV write ----------------------------------------------------------

template <typename T>
void rms_norm(const T* x, T* residual, const T* weight, T* out, int64_t rows, int64_t inner,
              int64_t dim, int64_t stride, float epsilon, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * inner * dim > kParallelElements)
  for (int64_t row = 0; row < rows * inner; row++) {
    const T* source = x + (row / inner) * stride + (row % inner) * dim;
    T* target = out + row * dim;
    T* carried = residual ? residual + row * dim : nullptr;
    vec squares{};
    for (int64_t i = 0; i < dim; i += kLanes) {
      vec value = load(source + i);
      if (carried) {
        value = round_to(load(carried + i) + value, x);
        store(carried + i, value);
      }
      squares += value * value;
    }
    const float inverse = 1.0f / std::sqrt(sum(squares) / float(dim) + epsilon);
    const T* input = carried ? carried : source;
    for (int64_t i = 0; i < dim; i += kLanes)
      store(target + i, load(weight + i) * round_to(load(input + i) * inverse, x));
  }
}

template <typename T>
void silu_and_mul(const T* x, T* out, int64_t rows, int64_t dim, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * dim > kParallelElements)
  for (int64_t row = 0; row < rows; row++) {
    const T* gate = x + row * 2 * dim;
    for (int64_t i = 0; i < dim; i += kLanes) {
      const vec g = load(gate + i);
      const vec activated = round_to(g / (1.0f + exp(-g)), x);
      store(out + row * dim + i, activated * load(gate + dim + i));
    }
  }
}

template <typename T>
void rotary(T* x, const float* cosine, const float* sine, int64_t tokens, int64_t heads, int64_t dim,
            int64_t stride, int threads) {
  const int64_t half = dim / 2;
#pragma omp parallel for num_threads(threads) if (tokens * heads * dim > kParallelElements)
  for (int64_t token = 0; token < tokens; token++) {
    const float* c = cosine + token * half;
    const float* s = sine + token * half;
    for (int64_t head = 0; head < heads; head++) {
      T* first = x + token * stride + head * dim;
      T* second = first + half;
#pragma omp simd
      for (int64_t i = 0; i < half; i++) {
        const float a = load_one(first + i), b = load_one(second + i);
        store_one(first + i, a * c[i] - b * s[i]);
        store_one(second + i, b * c[i] + a * s[i]);
      }
    }
  }
}

template <typename T>
void write_kv(const T* key, const T* value, T* pool, const int64_t* slots, int64_t tokens,
              int64_t key_stride, int64_t value_stride, int64_t heads, int64_t dim,
              int64_t block_stride, int64_t layer_offset) {
  const int64_t head_stride = kBlockTokens * dim;
  for (int64_t token = 0; token < tokens; token++) {
    const int64_t slot = slots[token];
    T* target = pool + (slot / kBlockTokens) * block_stride + layer_offset +
                (slot % kBlockTokens) * dim;
    for (int64_t head = 0; head < heads; head++) {
      std::memcpy(target + head * head_stride, key + token * key_stride + head * dim,
                  dim * sizeof(T));
      std::memcpy(target + (heads + head) * head_stride, value + token * value_stride + head * dim,
                  dim * sizeof(T));
    }
  }
}

// --- Paged attention -----------------------------------------------------------------------------

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
  int32_t row, first_query, num_queries;
};

struct Scratch {
  std::vector<float> query, scores, accumulated, values;
  std::vector<vec> keys;  // one block, transposed: [dim][16 tokens]
  std::vector<float> top, total;

  Scratch(int64_t rows, int64_t dim)
      : query(rows * dim), scores(rows * kSpanTokens), accumulated(rows * dim),
        values(kBlockTokens * dim), keys(dim), top(rows), total(rows) {}
};

// Calls f(constant R, first row) for groups of 8, then 4, 2, 1 rows: fixed sizes stay in registers.
template <int kMost, typename F>
inline void for_row_groups(int64_t rows, int64_t first, F&& f) {
  while (rows - first >= kMost) {
    f(std::integral_constant<int, kMost>{}, first);
    first += kMost;
  }
  if constexpr (kMost > 1) for_row_groups<kMost / 2>(rows, first, f);
}

template <typename T>
void load_keys(const T* block, int64_t dim, vec* keys) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    for (int token = 0; token < kBlockTokens; token++) keys[d + token] = load(block + token * dim + d);
    transpose(keys + d);
  }
}

inline const float* as_float(const float* block, int64_t, float*) { return block; }
inline const float* as_float(const bf16* block, int64_t elements, float* scratch) {
  for (int64_t i = 0; i < elements; i += kLanes) store(scratch + i, load(block + i));
  return scratch;
}

// scores[m][0..16) = query[m] . key[0..16)
void score_block(const float* query, const vec* keys, float* scores, int64_t rows, int64_t dim) {
  for_row_groups<8>(rows, 0, [&](auto size, int64_t m) {
    constexpr int R = decltype(size)::value;
    vec total[R] = {};
    for (int64_t d = 0; d < dim; d++)
      for (int r = 0; r < R; r++) total[r] += query[(m + r) * dim + d] * keys[d];
    for (int r = 0; r < R; r++) store(scores + (m + r) * kSpanTokens, total[r]);
  });
}

// accumulated[m] += weights[m][0..tokens) @ values[0..tokens)
template <int V>
void add_values(const float* weights, const float* values, float* accumulated, int64_t rows,
                int64_t dim, int64_t tokens) {
  for_row_groups<4>(rows, 0, [&](auto size, int64_t m) {
    constexpr int R = decltype(size)::value;
    vec total[R][V];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) total[r][v] = load(accumulated + (m + r) * dim + v * kLanes);
    for (int64_t token = 0; token < tokens; token++)
      for (int v = 0; v < V; v++) {
        const vec value = load(values + token * dim + v * kLanes);
        for (int r = 0; r < R; r++) total[r][v] += weights[(m + r) * kSpanTokens + token] * value;
      }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) store(accumulated + (m + r) * dim + v * kLanes, total[r][v]);
  });
}

// One span of the online softmax for one query row: scores become weights. `visible` tokens count.
void soften(float* scores, float* accumulated, float& top, float& total, int64_t visible,
            int64_t dim) {
  visible = std::clamp<int64_t>(visible, 0, kSpanTokens);
  const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vec highest = splat(-INFINITY);
  for (int64_t t = 0; t < visible; t += kLanes) {
    const vec score = load(scores + t);
    const vec seen = (lane < int32_t(visible - t)) ? score : splat(-INFINITY);
    highest = (seen > highest) ? seen : highest;
  }
  const float new_top = std::max(top, maximum(highest));
  vec weights{};
  for (int64_t t = 0; t < kSpanTokens; t += kLanes) {
    const vec weight =
        (lane < int32_t(visible - t)) ? exp(load(scores + t) - new_top) : splat(0.0f);
    store(scores + t, weight);
    weights += weight;
  }
  if (new_top != top) {
    const float shrink = exp(splat(top - new_top))[0];
    total *= shrink;
    for (int64_t d = 0; d < dim; d += kLanes) store(accumulated + d, load(accumulated + d) * shrink);
  }
  total += sum(weights);
  top = new_top;
}

template <typename T>
void attend_span(const Attention<T>& a, const int32_t* table, int64_t kv_head, int64_t start,
                 int64_t end, int64_t first_position, int64_t rows, Scratch& s) {
  const int64_t head_stride = kBlockTokens * a.dim;
  const T* keys = a.pool + a.layer_offset + kv_head * head_stride;
  const T* values = keys + a.num_kv_heads * head_stride;
  for (int64_t t = start; t < end; t += kBlockTokens) {
    load_keys(keys + table[t / kBlockTokens] * a.block_stride, a.dim, s.keys.data());
    score_block(s.query.data(), s.keys.data(), s.scores.data() + (t - start), rows, a.dim);
  }
  for (int64_t m = 0; m < rows; m++)
    soften(&s.scores[m * kSpanTokens], &s.accumulated[m * a.dim], s.top[m], s.total[m],
           first_position + m / a.group() + 1 - start, a.dim);
  for (int64_t t = start; t < end; t += kBlockTokens) {
    // Never touch values beyond the context: the slots may hold anything, and 0 * NaN is NaN.
    const int64_t tokens = std::min<int64_t>(kBlockTokens, end - t);
    const float* block = as_float(values + table[t / kBlockTokens] * a.block_stride, tokens * a.dim,
                                  s.values.data());
    const float* weights = s.scores.data() + (t - start);
    int64_t d = 0;
    for (; d + 4 * kLanes <= a.dim; d += 4 * kLanes)
      add_values<4>(weights, block + d, &s.accumulated[d], rows, a.dim, tokens);
    for (; d < a.dim; d += kLanes)
      add_values<1>(weights, block + d, &s.accumulated[d], rows, a.dim, tokens);
  }
}

template <typename T>
void attend_tile(const Attention<T>& a, Tile tile, int64_t kv_head, Scratch& s) {
  const int64_t group = a.group(), rows = tile.num_queries * group;
  const int64_t num_queries = a.query_starts[tile.row + 1] - a.query_starts[tile.row];
  const int64_t first_position = a.context_lengths[tile.row] - num_queries + tile.first_query;
  const int64_t end = first_position + tile.num_queries;
  const int64_t first_token = a.query_starts[tile.row] + tile.first_query;
  for (int64_t m = 0; m < rows; m++) {
    const T* query = a.query + (first_token + m / group) * a.query_stride +
                     (kv_head * group + m % group) * a.dim;
    for (int64_t d = 0; d < a.dim; d += kLanes)
      store(&s.query[m * a.dim + d], load(query + d) * a.scale);
  }
  std::fill(s.accumulated.begin(), s.accumulated.end(), 0.0f);
  std::fill(s.top.begin(), s.top.end(), -INFINITY);
  std::fill(s.total.begin(), s.total.end(), 0.0f);
  const int32_t* table = a.block_tables + tile.row * a.max_blocks;
  for (int64_t start = 0; start < end; start += kSpanTokens)
    attend_span(a, table, kv_head, start, std::min(end, start + kSpanTokens), first_position, rows,
                s);
  for (int64_t m = 0; m < rows; m++) {
    T* out = a.out + ((first_token + m / group) * a.num_heads + kv_head * group + m % group) * a.dim;
    for (int64_t d = 0; d < a.dim; d += kLanes)
      store(out + d, load(&s.accumulated[m * a.dim + d]) / s.total[m]);
  }
}

template <typename T>
void paged_attention(const Attention<T>& a, int threads) {
  const int32_t tile_queries = int32_t(std::max<int64_t>(1, kTileRows / a.group()));
  std::vector<Tile> tiles;
  for (int32_t row = 0; row < a.num_rows; row++) {
    const int32_t num_queries = a.query_starts[row + 1] - a.query_starts[row];
    for (int32_t first = 0; first < num_queries; first += tile_queries)
      tiles.push_back({row, first, std::min(tile_queries, num_queries - first)});
  }
  const int64_t tasks = int64_t(tiles.size()) * a.num_kv_heads;
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(tile_queries * a.group(), a.dim);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = tasks - 1; task >= 0; task--)  // a prompt's last tiles are its longest
      attend_tile(a, tiles[task / a.num_kv_heads], task % a.num_kv_heads, scratch);
  }
}

}  // namespace

#define SLIPSTREAM_EXPORT(T, NAME)                                                                 \
  extern "C" void rms_norm_##NAME(const T* x, T* residual, const T* weight, T* out, int64_t rows,  \
                                  int64_t inner, int64_t dim, int64_t stride, float epsilon,       \
                                  int threads) {                                                   \
    rms_norm(x, residual, weight, out, rows, inner, dim, stride, epsilon, threads);                \
  }                                                                                                \
  extern "C" void silu_and_mul_##NAME(const T* x, T* out, int64_t rows, int64_t dim, int threads) {\
    silu_and_mul(x, out, rows, dim, threads);                                                      \
  }                                                                                                \
  extern "C" void rotary_##NAME(T* x, const float* cosine, const float* sine, int64_t tokens,      \
                                int64_t heads, int64_t dim, int64_t stride, int threads) {         \
    rotary(x, cosine, sine, tokens, heads, dim, stride, threads);                                  \
  }                                                                                                \
  extern "C" void write_kv_##NAME(const T* key, const T* value, T* pool, const int64_t* slots,     \
                                  int64_t tokens, int64_t key_stride, int64_t value_stride,        \
                                  int64_t heads, int64_t dim, int64_t block_stride,                \
                                  int64_t layer_offset) {                                          \
    write_kv(key, value, pool, slots, tokens, key_stride, value_stride, heads, dim, block_stride,  \
             layer_offset);                                                                        \
  }                                                                                                \
  extern "C" void paged_attention_##NAME(                                                          \
      const T* query, T* out, const T* pool, const int32_t* block_tables,                          \
      const int32_t* query_starts, const int32_t* context_lengths, int64_t num_rows,               \
      int64_t max_blocks, int64_t num_heads, int64_t num_kv_heads, int64_t dim,                    \
      int64_t query_stride, int64_t block_stride, int64_t layer_offset, float scale, int threads) {\
    paged_attention(                                                                               \
        Attention<T>{query, out, pool, block_tables, query_starts, context_lengths, num_rows,      \
                     max_blocks, num_heads, num_kv_heads, dim, query_stride, block_stride,         \
                     layer_offset, scale},                                                         \
        threads);                                                                                  \
  }

SLIPSTREAM_EXPORT(float, float32)
SLIPSTREAM_EXPORT(bf16, bfloat16)
