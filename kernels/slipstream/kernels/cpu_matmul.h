// out = x @ weight.T over weights in panels of 16 outputs: `[outputs / 16][inputs / G][16][G]`, where
// G elements fill 32 bits (float 1, bfloat16 2, int8 4). An output is summed in one accumulator, along
// the inputs: in the same order whatever the number of rows.

#pragma once

#include "cpu_vector.h"

namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTilePanels = 3;  // 24 of 32 registers accumulate
#else
constexpr int kTileRows = 4, kTilePanels = 1;
#endif
constexpr int64_t kAheadBytes = 3072;  // of a panel: the core's own prefetcher stops at each page

// Four bytes of x, in every lane.
template <typename T>
inline uint32_t word(const T* x) {
  uint32_t bits;
  std::memcpy(&bits, x, 4);
  return bits;
}

inline vec dot(vec total, const float* x, const float* panel) { return total + *x * load(panel); }

inline vec dot(vec total, const bf16* x, const bf16* panel) {
  const uvec pairs = *reinterpret_cast<const uvec*>(panel);
#if defined(__AVX512BF16__)
  return (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(int(word(x))),
                               (__m512bh)pairs);
#else
  total += load_one(x) * (vec)(pairs << 16);
  return total + load_one(x + 1) * (vec)(pairs & 0xFFFF0000u);
#endif
}

// x is unsigned.
inline ivec dot(ivec total, const uint8_t* x, const int8_t* panel) {
  const ivec bytes = *reinterpret_cast<const ivec*>(panel);
#if defined(__AVX512VNNI__)
  return (ivec)_mm512_dpbusd_epi32((__m512i)total, _mm512_set1_epi32(int(word(x))), (__m512i)bytes);
#else
  for (int i = 0; i < 4; i++) total += int32_t(x[i]) * ((bytes << (24 - 8 * i)) >> 24);
  return total;
#endif
}

template <typename X, typename W>
struct Product;
template <>
struct Product<float, float> {
  typedef vec sum;
  static constexpr int group = 1;
};
template <>
struct Product<bf16, bf16> {
  typedef vec sum;
  static constexpr int group = 2;
};
template <>
struct Product<uint8_t, int8_t> {
  typedef ivec sum;
  static constexpr int group = 4;
};

// R rows by P panels in registers; emit(row, panel, sum).
template <int R, int P, typename X, typename W, typename Emit>
inline void tile(const X* x, int64_t row, int64_t inputs, const W* panels, int64_t panel,
                 Emit&& emit) {
  constexpr int G = Product<X, W>::group;
  typename Product<X, W>::sum total[R][P] = {};
  const X* rows = x + row * inputs;
  const W* weights = panels + panel * inputs * kLanes;
  for (int64_t k = 0; k < inputs; k += G) {
    const W* column = weights + k * kLanes;
#pragma GCC unroll 4
    for (int p = 0; p < P; p++)
      __builtin_prefetch(column + p * inputs * kLanes + kAheadBytes / sizeof(W), 0, 2);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int p = 0; p < P; p++)
        total[r][p] = dot(total[r][p], rows + r * inputs + k, column + p * inputs * kLanes);
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) emit(row + r, panel + p, total[r][p]);
}

template <int R, int P, typename X, typename W, typename Emit>
void tiles(const X* x, int64_t row, int64_t end, int64_t inputs, const W* panels, int64_t panel,
           Emit&& emit) {
  for (; row + R <= end; row += R) tile<R, P>(x, row, inputs, panels, panel, emit);
  if constexpr (R > 1) tiles<R / 2, P>(x, row, end, inputs, panels, panel, emit);
}

// Rows [begin, end) by panels [first, last) of which at most kTilePanels are taken at a time.
template <int P, typename X, typename W, typename Emit>
void matmul(const X* x, int64_t begin, int64_t end, int64_t inputs, const W* panels, int64_t first,
            int64_t last, Emit&& emit) {
  for (; first + P <= last; first += P)
    tiles<kTileRows, P>(x, begin, end, inputs, panels, first, emit);
  if constexpr (P > 1) matmul<P - 1>(x, begin, end, inputs, panels, first, last, emit);
}

}  // namespace
