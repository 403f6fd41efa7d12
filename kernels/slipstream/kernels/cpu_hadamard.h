// The Walsh-Hadamard transform of a row, in blocks of the largest power of two that divides it. It is
// a rotation up to a factor: it leaves products of rows as they were, and spreads an outlier over its
// block, so that one scale serves the row. Additions in the order of `hadamard` in `ops.py`.

#pragma once

#include "cpu_vector.h"

namespace {

// Lanes whose numbers differ in one bit, as sum and difference; Others: each lane's partner.
template <int... Others>
inline vec butterfly(vec x, const vec signs) {
  return __builtin_shufflevector(x, x, Others...) + x * signs;
}

inline vec signs_of(int bit) {
  vec signs;
  for (int i = 0; i < kLanes; i++) signs[i] = i & bit ? -1.0f : 1.0f;
  return signs;
}

inline vec hadamard(vec x) {
  x = butterfly<1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14>(x, signs_of(1));
  x = butterfly<2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13>(x, signs_of(2));
  x = butterfly<4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11>(x, signs_of(4));
  return butterfly<8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7>(x, signs_of(8));
}

// In place; `count` is a multiple of 16.
inline void hadamard(float* row, int64_t count) {
  const int64_t block = count & -count;
  for (int64_t i = 0; i < count; i += kLanes) store(row + i, hadamard(load(row + i)));
  for (int64_t half = kLanes; half < block; half *= 2)
    for (int64_t first = 0; first < count; first += 2 * half)
      for (int64_t i = first; i < first + half; i += kLanes) {
        const vec a = load(row + i), b = load(row + i + half);
        store(row + i, a + b);
        store(row + i + half, a - b);
      }
}

}  // namespace
