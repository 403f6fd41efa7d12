// What adapters add to a product, row by row: `scale * (x @ down.T) @ up.T`. Each row is summed in the
// same order whoever its neighbours are: tokens of one adapter only share what is read of it.

#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu_matmul.h"

namespace {

// A place of a table; mirrored in `cpu_adapters.py`. All zeros: it is free, or adds nothing here.
struct Adapter {
  const void* down;  // panels [parts][padded rank / 16][inputs / G][16][G]
  const void* up;    // [panels of outputs][rank][16]
  const float* scale;  // of each row of `down`
  int64_t rank, padded;
  int64_t panels;      // of `down`
};

constexpr int kGroupRows = 8;

// Rows that want one adapter.
struct Group {
  int32_t adapter, count;
  int32_t rows[kGroupRows];
};

// Of all rows, in blocks of `at_a_time`: those of a block have groups of their own.
class Groups {
 public:
  // `wanted(row)`: an adapter, or less than 0.
  template <typename Wanted>
  void assign(int64_t rows, int64_t at_a_time, Wanted&& wanted) {
    all_.clear();
    begins_.assign(1, 0);
    for (int64_t begin = 0; begin < rows; begin += at_a_time) {
      open_.assign(open_.size(), -1);
      for (int64_t row = begin; row < std::min(begin + at_a_time, rows); row++)
        if (const int32_t adapter = wanted(row); adapter >= 0) add(adapter, row);
      begins_.push_back(all_.size());
    }
  }

  const std::vector<Group>& all() const { return all_; }
  const Group* begin(int64_t block) const { return all_.data() + begins_[block]; }
  const Group* end(int64_t block) const { return all_.data() + begins_[block + 1]; }

 private:
  void add(int32_t adapter, int64_t row) {
    if (size_t(adapter) >= open_.size()) open_.resize(adapter + 1, -1);
    int64_t& last = open_[adapter];
    if (last < 0 || all_[last].count == kGroupRows) {
      last = int64_t(all_.size());
      all_.push_back(Group{adapter, 0, {}});
    }
    Group& group = all_[last];
    group.rows[group.count++] = int32_t(row);
  }

  std::vector<Group> all_;
  std::vector<size_t> begins_;
  std::vector<int64_t> open_;  // of each adapter, the group that is being filled
};

// Calls f(constant R, first) for rows of a group, as many at a time as there are.
template <typename F>
inline void for_rows_of(const Group& group, F&& f) {
  int first = 0;
  for (; first + 8 <= group.count; first += 8) f(std::integral_constant<int, 8>(), first);
  for (; first + 4 <= group.count; first += 4) f(std::integral_constant<int, 4>(), first);
  for (; first < group.count; first++) f(std::integral_constant<int, 1>(), first);
}

// One panel of `down`, for R rows of a group from its `first` on.
template <int R, typename T>
void shrink_rows(const T* x, int64_t inputs, const Adapter& adapter, int64_t panel, const Group& group,
                 int first, float* out, int64_t width) {
  constexpr int64_t G = 4 / sizeof(T);
  const T* weights = static_cast<const T*>(adapter.down) + panel * inputs * kLanes;
  const T* rows[R];
  for (int r = 0; r < R; r++) rows[r] = x + group.rows[first + r] * inputs;
  vec total[R] = {};
  for (int64_t k = 0; k < inputs; k += G)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) total[r] = dot(total[r], rows[r] + k, weights + k * kLanes);
  const vec scale = load(adapter.scale + panel * kLanes);
  for (int r = 0; r < R; r++)
    store(out + group.rows[first + r] * width + panel * kLanes, total[r] * scale);
}

template <typename T>
void shrink_group(const T* x, int64_t inputs, const Adapter& adapter, int64_t panel,
                  const Group& group, float* out, int64_t width) {
  for_rows_of(group, [&](auto rows, int first) {
    shrink_rows<rows()>(x, inputs, adapter, panel, group, first, out, width);
  });
}

// What R rows of a group get added to outputs of one panel; `out(row)` says where that goes.
template <int R, typename T, typename Out>
void expand_rows(const float* shrunk, int64_t width, const Adapter& adapter, int32_t part,
                 int64_t panel, const Group& group, int first, Out&& out) {
  const T* up = static_cast<const T*>(adapter.up) + panel * adapter.rank * kLanes;
  const float* inner[R];
  for (int r = 0; r < R; r++)
    inner[r] = shrunk + group.rows[first + r] * width + part * adapter.padded;
  vec total[R] = {};
  for (int64_t k = 0; k < adapter.rank; k++) {
    const vec column = load(up + k * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) total[r] += inner[r][k] * column;
  }
  for (int r = 0; r < R; r++) store(out(group.rows[first + r]), total[r]);
}

}  // namespace
