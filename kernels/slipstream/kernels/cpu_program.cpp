// A model's step as a program: operations in a fixed order over numbered buffers, carried out by a
// team of threads in one call. `program.py` writes programs and compiles this; `reference.py` says
// what each operation computes. Sums are float32 (int8 products: int32). No result depends on the
// number of threads, on the other rows of a batch, or on how a prompt was cut into chunks.

#include <map>
#include <utility>

#include "cpu_adapters.h"
#include "cpu_attention.h"
#include "cpu_draw.h"
#include "cpu_hadamard.h"
#include "cpu_team.h"

namespace {

enum Kind : int32_t { kEmbed, kTake, kNorm, kQuantize, kLinear, kGated, kRotate, kAttend, kShrink };
enum Rows : int32_t { kTokens, kSamples };

// Mirrored in `program.py`, field by field.
struct Op {
  int32_t kind, dtype;  // dtype: 0 float32, 1 bfloat16
  int32_t rows;
  int32_t wide;         // kLinear: the result is float32
  int32_t quantized;    // kLinear, kGated: int8 weights, quantized inputs
  int32_t turned;       // kQuantize: rows are rotated first
  int32_t in, residual, out;  // buffers; residual: also the scales of quantized inputs
  int32_t shrunk;       // kLinear, kGated: buffer of what adapters' `down` made, if some may add
  const void* weight;
  const void* second;   // kLinear: bias; kRotate: the norm of keys
  const float* scale;   // of quantized weights, one for each output
  const int32_t* sums;  // of quantized weights, one for each output
  const Adapter* adapters;  // kShrink, kLinear, kGated: the table of one matrix
  const int32_t* parts;     // of each panel of outputs
  int64_t inputs, outputs;
  int64_t heads, kv_heads, head_dim, layer;
  int64_t inner;        // width of a row of `shrunk`, which is float32
  float number;         // kNorm, kRotate: epsilon; kAttend: scale
};

struct Step {
  int64_t tokens, rows, samples, max_blocks;
  const int64_t *token_ids, *slots, *sample_indices;
  const int32_t *block_tables, *query_starts, *context_lengths;
  const int32_t* adapters;  // of each token, less than 0: none; null: nobody has one
  const float *cosine, *sine;
  void* pool;
  int64_t block_stride, layer_stride;  // of the pool, in elements
  void* const* buffers;
};

constexpr int64_t kChunkRows = 64;  // of a product's rows in one chunk
constexpr int64_t kTilesPerThread = 3;  // below that a tile is one KV head
constexpr int64_t kRowsElements = 2048;  // elements in one chunk of what goes row by row
constexpr int64_t kAddedPanels = std::max(kTilePanels, 2);  // that adapters add to at a time

inline int32_t adapter_of(const Op& op, const Step& step, int64_t row) {
  if (!step.adapters) return -1;
  return step.adapters[op.rows == kTokens ? row : step.sample_indices[row]];
}

template <typename T>
class Typed {
 public:
  // `groups`: of the operation's rows, where it has adapters.
  Typed(const Op& op, const Step& step, const Groups* groups)
      : op(op), step(step), groups(groups) {}

  void embed(int64_t begin, int64_t end) const {  // out of the panels of the vocabulary
    constexpr int64_t G = 4 / sizeof(T);
    for (int64_t row = begin; row < end; row++) {
      const int64_t token = step.token_ids[row];
      const T* panel = static_cast<const T*>(op.weight) + token / kLanes * kLanes * op.outputs;
      T* out = at(op.out, row, op.outputs);
      for (int64_t i = 0; i < op.outputs; i += G)
        std::memcpy(out + i, panel + i * kLanes + token % kLanes * G, 4);
    }
  }

  void take(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; row++)
      std::memcpy(at(op.out, row, op.outputs), at(op.in, step.sample_indices[row], op.outputs),
                  op.outputs * sizeof(T));
  }

  void norm(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; row++) {
      T* carried = op.residual < 0 ? nullptr : at(op.residual, row, op.outputs);
      norm_row(at(op.in, row, op.outputs), carried, static_cast<const T*>(op.weight),
               at(op.out, row, op.outputs), op.outputs);
    }
  }

  // Rotated, then symmetric, one scale for each row, which is no number if one of the row is none; 128
  // is added, for products want one unsigned side.
  void quantize(int64_t begin, int64_t end, Scratch& scratch) const {
    uint8_t* bytes = static_cast<uint8_t*>(step.buffers[op.out]);
    float* scales = static_cast<float*>(step.buffers[op.residual]);
    scratch.row.resize(op.inputs);
    float* x = scratch.row.data();
    for (int64_t row = begin; row < end; row++) {
      for (int64_t i = 0; i < op.inputs; i += kLanes)
        store(x + i, load(at(op.in, row, op.inputs) + i));
      if (op.turned) hadamard(x, op.inputs);
      vec top{}, broken{};
      for (int64_t i = 0; i < op.inputs; i += kLanes) {
        const vec value = load(x + i);
        const vec size = value < 0.0f ? -value : value;
        top = size > top ? size : top;
        broken += value - value;
      }
      const float scale = std::max(maximum(top), 1e-30f) / 127.0f;
      for (int64_t i = 0; i < op.inputs; i += kLanes) {
        const vec magic = splat(12582912.0f);  // adding it rounds to an integer
        const vec value = (load(x + i) * (1.0f / scale) + magic) - magic;
        const ivec level = __builtin_convertvector(value, ivec) + 128;
        *reinterpret_cast<bvec_u*>(bytes + row * op.inputs + i) =
            __builtin_convertvector(level, bvec_u);
      }
      scales[row] = scale + sum(broken);
    }
  }

  template <bool Adapted>
  void linear(int64_t begin, int64_t end, int64_t panel, Scratch& scratch) const {
    const T* bias = static_cast<const T*>(op.second);
    const int64_t panels = (op.outputs + kLanes - 1) / kLanes;
    const int64_t last = std::min(panel + kTilePanels, panels);
    if (Adapted) add_up(begin, panel, last - panel, scratch);
    const auto put = [&](int64_t row, int64_t p, vec value) {
      const int64_t first = p * kLanes, count = op.outputs - first;
      if (bias && count >= kLanes) value += load(bias + first);
      if (bias && count < kLanes)
        for (int64_t i = 0; i < count; i++) value[i] += load_one(bias + first + i);
      if (Adapted) value = with_added(value, row - begin, row, p - panel, scratch);
      if (op.wide)
        put_some(static_cast<float*>(step.buffers[op.out]) + row * op.outputs + first, value, count);
      else
        put_some(at(op.out, row, op.outputs) + first, value, count);
    };
    multiply<kTilePanels>(begin, end, panel, last, put);
  }

  // Panels of gate and up alternate.
  template <bool Adapted>
  void gated(int64_t begin, int64_t end, int64_t panel, Scratch& scratch) const {
    const T* bias = static_cast<const T*>(op.second);
    if (Adapted) add_up(begin, panel, 2, scratch);
    vec gate{};
    const auto put = [&](int64_t row, int64_t p, vec value) {
      if (bias) value += load(bias + p * kLanes);
      if (Adapted) value = with_added(value, row - begin, row, p - panel, scratch);
      value = round_to(value, static_cast<const T*>(nullptr));
      if (p % 2 == 0) {
        gate = value;
        return;
      }
      const vec activated = round_to(gate / (1.0f + exp(-gate)), static_cast<const T*>(nullptr));
      store(at(op.out, row, op.outputs) + p / 2 * kLanes, activated * value);
    };
    multiply<2>(begin, end, panel, panel + 2, put);
  }

  void shrink(const Group& group, int64_t panel) const {
    const Adapter& adapter = op.adapters[group.adapter];
    if (panel < adapter.panels)
      shrink_group(at(op.in, 0, 0), op.inputs, adapter, panel, group,
                   static_cast<float*>(step.buffers[op.out]), op.inner);
  }

  void rotate(int64_t begin, int64_t end) const {
    const int64_t width = (op.heads + 2 * op.kv_heads) * op.head_dim, keys = op.heads * op.head_dim;
    const int64_t values = keys + op.kv_heads * op.head_dim, side = kBlockTokens * op.head_dim;
    for (int64_t row = begin; row < end; row++) {
      T* x = at(op.in, row, width);
      for (int64_t head = 0; head < op.heads + op.kv_heads; head++) {
        T* one = x + head * op.head_dim;
        const void* weight = head < op.heads ? op.weight : op.second;
        if (weight) norm_row(one, nullptr, static_cast<const T*>(weight), one, op.head_dim);
        turn(one, row);
      }
      T* target = static_cast<T*>(step.pool) + op.layer * step.layer_stride +
                  step.slots[row] / kBlockTokens * step.block_stride +
                  step.slots[row] % kBlockTokens * op.head_dim;
      for (int64_t head = 0; head < op.kv_heads; head++) {
        std::memcpy(target + head * side, x + keys + head * op.head_dim, op.head_dim * sizeof(T));
        std::memcpy(target + (op.kv_heads + head) * side, x + values + head * op.head_dim,
                    op.head_dim * sizeof(T));
      }
    }
  }

  void attend(const Tile& tile, Scratch& scratch) const {
    attend_tile(
        Attention<T>{at(op.in, 0, 0), at(op.out, 0, 0), static_cast<const T*>(step.pool),
                     step.block_tables, step.query_starts, step.context_lengths, step.rows,
                     step.max_blocks, op.heads, op.kv_heads, op.head_dim,
                     (op.heads + 2 * op.kv_heads) * op.head_dim, step.block_stride,
                     op.layer * step.layer_stride, op.number},
        tile, scratch);
  }

 private:
  T* at(int32_t buffer, int64_t row, int64_t width) const {
    return static_cast<T*>(step.buffers[buffer]) + row * width;
  }

  template <typename Out>
  static void put_some(Out* out, vec value, int64_t count) {
    if (count >= kLanes) return store(out, value);
    for (int64_t i = 0; i < count; i++) store_one(out + i, value[i]);
  }

  // Of a product's chunk: what adapters add, summed apart and added last, once.
  void add_up(int64_t begin, int64_t panel, int64_t count, Scratch& scratch) const {
    scratch.added.resize(kChunkRows * kAddedPanels * kLanes);
    const float* shrunk = static_cast<const float*>(step.buffers[op.shrunk]);
    for (const Group* group = groups->begin(begin / kChunkRows);
         group != groups->end(begin / kChunkRows); group++) {
      const Adapter& adapter = op.adapters[group->adapter];
      if (!adapter.rank) continue;
      for (int64_t p = panel; p < panel + count; p++)
        for_rows_of(*group, [&](auto rows, int first) {
          expand_rows<rows(), T>(shrunk, op.inner, adapter, op.parts[p], p, *group, first,
                                 [&](int64_t row) {
                                   return scratch.added.data() +
                                          ((row - begin) * kAddedPanels + p - panel) * kLanes;
                                 });
        });
    }
  }

  vec with_added(vec value, int64_t index, int64_t row, int64_t panel, const Scratch& scratch) const {
    if (!adapter_at(row)) return value;
    return value + load(scratch.added.data() + (index * kAddedPanels + panel) * kLanes);
  }

  // What adds to this row; null if nothing does.
  const Adapter* adapter_at(int64_t row) const {
    const int32_t adapter = adapter_of(op, step, row);
    return adapter < 0 || !op.adapters[adapter].rank ? nullptr : op.adapters + adapter;
  }

  template <int P, typename Put>
  void multiply(int64_t begin, int64_t end, int64_t first, int64_t last, Put&& put) const {
    if (!op.quantized) {
      matmul<P>(at(op.in, 0, 0), begin, end, op.inputs, static_cast<const T*>(op.weight), first,
                last, put);
      return;
    }
    const float* scales = static_cast<const float*>(step.buffers[op.residual]);
    matmul<P>(static_cast<const uint8_t*>(step.buffers[op.in]), begin, end, op.inputs,
              static_cast<const int8_t*>(op.weight), first, last,
              [&](int64_t row, int64_t panel, ivec sum) {
                const int64_t at = panel * kLanes;
                sum -= 128 * *reinterpret_cast<const ivec*>(op.sums + at);
                put(row, panel,
                    rounded(__builtin_convertvector(sum, vec) * scales[row] * load(op.scale + at)));
              });
  }

  void norm_row(const T* x, T* carried, const T* weight, T* out, int64_t dim) const {
    vec squares{};
    for (int64_t i = 0; i < dim; i += kLanes) {
      vec value = load(x + i);
      if (carried) {
        value = round_to(load(carried + i) + value, x);
        store(carried + i, value);
      }
      squares += value * value;
    }
    const float inverse = 1.0f / std::sqrt(sum(squares) / float(dim) + op.number);
    const T* input = carried ? carried : x;
    for (int64_t i = 0; i < dim; i += kLanes)
      store(out + i, load(weight + i) * round_to(load(input + i) * inverse, x));
  }

  void turn(T* x, int64_t row) const {
    const int64_t half = op.head_dim / 2;
    const float *c = step.cosine + row * half, *s = step.sine + row * half;
    T* y = x + half;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
      const float a = load_one(x + i), b = load_one(y + i);
      store_one(x + i, a * c[i] - b * s[i]);
      store_one(y + i, b * c[i] + a * s[i]);
    }
  }

  const Op& op;
  const Step& step;
  const Groups* groups;
};

class Program final : public Work {
 public:
  Program(Team& team, const Op* ops, int64_t count)
      : team_(team), ops_(ops, ops + count), scratch_(team.threads()) {}

  void run(const Step& step, int64_t* clock_ns) {
    step_ = step;
    tiles_.clear();
    for (const Op& op : ops_)
      if (op.kind == kAttend && !tiles_.count({op.heads, op.kv_heads}))
        tiles_[{op.heads, op.kv_heads}] = tiles_of(step.query_starts, step.rows,
                                                   op.heads / op.kv_heads, op.kv_heads,
                                                   kTilesPerThread * team_.threads());
    bool grouped[2] = {};
    for (const Op& op : ops_)
      if (op.kind == kShrink && !std::exchange(grouped[op.rows], true)) group(op);
    team_.run(*this, int64_t(ops_.size()), clock_ns);
  }

  int64_t chunks(int64_t phase) const override {
    const Op& op = ops_[phase];
    const int64_t rows = op.rows == kTokens ? step_.tokens : step_.samples;
    switch (op.kind) {
      case kLinear: return blocks(rows, kChunkRows) * blocks(panels(op), kTilePanels);
      case kGated: return blocks(rows, kChunkRows) * blocks(op.outputs, kLanes);
      case kAttend: return int64_t(tiles(op).size());
      case kShrink: return int64_t(groups_[op.rows].all().size()) * (op.inner / kLanes);
      default: return blocks(rows, at_a_time(op));
    }
  }

  void run(int64_t phase, int64_t chunk, int thread) const override {
    const Op& op = ops_[phase];
    const Groups* groups = op.adapters ? &groups_[op.rows] : nullptr;
    if (op.dtype == 0) run_typed(Typed<float>(op, step_, groups), op, chunk, thread);
    else run_typed(Typed<bf16>(op, step_, groups), op, chunk, thread);
  }

 private:
  static int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }
  static int64_t panels(const Op& op) { return blocks(op.outputs, kLanes); }
  static int64_t at_a_time(const Op& op) {
    return std::max<int64_t>(1, kRowsElements / std::max<int64_t>({op.inputs, op.outputs, 1}));
  }
  void group(const Op& op) {
    const int64_t rows = op.rows == kTokens ? step_.tokens : step_.samples;
    groups_[op.rows].assign(rows, kChunkRows,
                            [&](int64_t row) { return adapter_of(op, step_, row); });
  }
  const std::vector<Tile>& tiles(const Op& op) const { return tiles_.at({op.heads, op.kv_heads}); }

  template <typename Ops>
  void run_typed(const Ops& typed, const Op& op, int64_t chunk, int thread) const {
    const int64_t rows = op.rows == kTokens ? step_.tokens : step_.samples;
    const bool product = op.kind == kLinear || op.kind == kGated;
    const int64_t parts = blocks(rows, kChunkRows), size = product ? kChunkRows : at_a_time(op);
    const int64_t begin = (product ? chunk % std::max<int64_t>(parts, 1) : chunk) * size;
    const int64_t end = std::min(begin + size, rows), column = chunk / std::max<int64_t>(parts, 1);
    switch (op.kind) {
      case kEmbed: return typed.embed(begin, end);
      case kTake: return typed.take(begin, end);
      case kNorm: return typed.norm(begin, end);
      case kQuantize: return typed.quantize(begin, end, scratch_[thread]);
      case kLinear:
        if (op.adapters)
          return typed.template linear<true>(begin, end, column * kTilePanels, scratch_[thread]);
        return typed.template linear<false>(begin, end, column * kTilePanels, scratch_[thread]);
      case kGated:
        if (op.adapters)
          return typed.template gated<true>(begin, end, column * 2, scratch_[thread]);
        return typed.template gated<false>(begin, end, column * 2, scratch_[thread]);
      case kShrink: {
        const int64_t panels = op.inner / kLanes;
        return typed.shrink(groups_[op.rows].all()[chunk / panels], chunk % panels);
      }
      case kRotate: return typed.rotate(begin, end);
      case kAttend: return typed.attend(tiles(op)[chunk], scratch_[thread]);
    }
  }

  Team& team_;
  std::vector<Op> ops_;
  Step step_{};
  std::map<std::pair<int64_t, int64_t>, std::vector<Tile>> tiles_;
  Groups groups_[2];  // of tokens, of samples
  mutable std::vector<Scratch> scratch_;
};

}  // namespace

extern "C" {
void* team_new(int threads, int64_t max_phases) { return new Team(threads, max_phases); }
void team_delete(void* team) { delete static_cast<Team*>(team); }
void* program_new(void* team, const Op* ops, int64_t count) {
  return new Program(*static_cast<Team*>(team), ops, count);
}
void program_delete(void* program) { delete static_cast<Program*>(program); }
void program_run(void* program, const Step* step, int64_t* clock_ns) {
  static_cast<Program*>(program)->run(*step, clock_ns);
}
void draw(void* team, const float* logits, int64_t vocab, Draw* draws, int64_t count) {
  static_cast<Team*>(team)->run(Draws(logits, vocab, draws, count), 1);
}
}
