// Vectors of 16 floats as GCC/Clang vector extensions, so that one source serves AVX-512, AVX2 and
// NEON. bfloat16 is widened on load and rounded to nearest even on store, as in torch.

#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kLanes = 16;

typedef float vec __attribute__((vector_size(64)));
typedef float vec_u __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef uint16_t hvec __attribute__((vector_size(32)));
typedef uint16_t hvec_u __attribute__((vector_size(32), aligned(2), may_alias));

typedef uint8_t bvec_u __attribute__((vector_size(16), aligned(1), may_alias));

struct bf16 {
  uint16_t bits;
};

// GCC takes these apart into halves.
#if defined(__AVX512BW__)
inline uvec widen(hvec x) { return (uvec)_mm512_cvtepu16_epi32((__m256i)x); }
inline hvec lower_halves(uvec x) { return (hvec)_mm512_cvtepi32_epi16((__m512i)x); }
#else
inline uvec widen(hvec x) { return __builtin_convertvector(x, uvec); }
inline hvec lower_halves(uvec x) { return __builtin_convertvector(x, hvec); }
#endif

// Words of one half of each: a's are the lower ones.
inline uvec by_turns(hvec a, hvec b) { return widen(a) | widen(b) << 16; }

inline vec splat(float x) { return x - vec{}; }
inline vec load(const float* p) { return *reinterpret_cast<const vec_u*>(p); }
inline vec load(const bf16* p) { return (vec)(widen(*reinterpret_cast<const hvec_u*>(p)) << 16); }
inline void store(float* p, vec x) { *reinterpret_cast<vec_u*>(p) = x; }

// Round to nearest even, as torch does; a NaN stays a NaN. The instruction takes what is below 1e-38,
// where a float32 has fewer digits, for 0.
inline hvec narrow(vec x) {
#if defined(__AVX512BF16__)
  return (hvec)_mm512_cvtneps_pbh((__m512)x);
#else
  const uvec bits = (uvec)x;
  const uvec rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uvec quiet = uvec{} + 0x7FC0u;
  return lower_halves((x == x) ? rounded : quiet);
#endif
}
inline void store(bf16* p, vec x) { *reinterpret_cast<hvec_u*>(p) = narrow(x); }
inline vec round_to(vec x, const float*) { return x; }
inline vec round_to(vec x, const bf16*) {
  return (vec)(widen(narrow(x)) << 16);
}

// Stored, and as it is read back.
inline vec store_rounded(float* p, vec x) {
  store(p, x);
  return x;
}
inline vec store_rounded(bf16* p, vec x) {
  const hvec half = narrow(x);
  *reinterpret_cast<hvec_u*>(p) = half;
  return (vec)(widen(half) << 16);
}

// A product that is not fused with an addition behind it: the compiler would do so for some numbers of
// rows and not for others, and a row would depend on its batch.
inline vec rounded(vec x) {
  asm("" : "+m"(x));
  return x;
}

inline float load_one(const float* p) { return *p; }
inline float load_one(const bf16* p) {
  const uint32_t bits = uint32_t(p->bits) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline void store_one(float* p, float x) { *p = x; }
inline void store_one(bf16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  p->bits = x == x ? uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16) : uint16_t(0x7FC0);
}

// Folds 16 lanes into one: halves, then halves of these.
template <typename F>
inline float fold(vec x, F&& f) {
  x = f(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = f(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  x = f(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  x = f(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  return x[0];
}
inline float sum(vec x) {
  return fold(x, [](vec a, vec b) { return a + b; });
}
inline float maximum(vec x) {
  return fold(x, [](vec a, vec b) { return a > b ? a : b; });
}

// exp to about 1 ulp (Cephes' expf): 2^n by the exponent bits, the rest by a polynomial.
inline vec exp(vec x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const vec magic = splat(12582912.0f);  // adding it rounds to an integer
  const vec n = (x * 1.44269504088896341f + magic) - magic;
  const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const ivec exponent = (__builtin_convertvector(n, ivec) + 127) << 23;
  return y * (vec)exponent;
}

// b if either is no number.
inline vec larger(vec a, vec b) {
#if defined(__AVX512F__)
  return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// 2^x of what is at most 0, to about 1 ulp; with `coarse` to 6e-5, enough for bfloat16.
template <bool coarse>
inline vec exp2(vec x) {
  x = larger(splat(-126.0f), x);  // a NaN stays one
#if defined(__AVX512F__)
  const vec n = (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const vec magic = splat(12582912.0f);  // adding it rounds to an integer
  const vec n = (x + magic) - magic;
#endif
  const vec r = x - n;  // of 2^r, the series of e^(r ln 2)
  vec y;
  if constexpr (coarse) {
    y = splat(9.6181291e-3f);
  } else {
    y = splat(1.5252734e-5f);
    y = y * r + 1.5403530e-4f;
    y = y * r + 1.3333558e-3f;
    y = y * r + 9.6181291e-3f;
  }
  y = y * r + 5.5504109e-2f;
  y = y * r + 2.4022651e-1f;
  y = y * r + 6.9314718e-1f;
  y = y * r + 1.0f;
#if defined(__AVX512F__)
  return (vec)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  return y * (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
#endif
}

// 16 x 16 transpose: four rounds, each zips row i with row i + 8.
inline void transpose(vec* rows) {
  for (int round = 0; round < 4; round++) {
    vec next[kLanes];
    for (int i = 0; i < kLanes / 2; i++) {
      next[2 * i] = __builtin_shufflevector(rows[i], rows[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20,
                                            5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + 8], 8, 24, 9, 25, 10, 26, 11, 27,
                                                12, 28, 13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < kLanes; i++) rows[i] = next[i];
  }
}

}  // namespace
