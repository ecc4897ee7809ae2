// Products with a matrix of float32, or of int8 with a scale for each column: y = (x q) scale. With ``rounds`` the rows of x are
// rounded too, to integers of at most 127 times a scale of the row, and all sums are exact integers.
#pragma once
#include <cmath>
#include <cstring>
#include <vector>

#include "rows.h"

namespace dsv3 {

struct Matrix {
  const float* w;  // or null
  const int8_t* q = nullptr;
  const float* scale = nullptr;
  bool rounds = false;

  // The e-th of a stack of matrices [D, F].
  Matrix at(int64_t e, int64_t D, int64_t F) const {
    return q ? Matrix{nullptr, q + e * D * F, scale + e * F, rounds} : Matrix{w + e * D * F};
  }
};

// From inputs of an operator; a scale beside float32 is not read.
inline Matrix matrix(const void* data, const char* dtype, const void* scale, bool rounds) {
  if (std::strcmp(dtype, "int8")) return {static_cast<const float*>(data)};
  return {nullptr, static_cast<const int8_t*>(data), static_cast<const float*>(scale), rounds};
}

// x <- round(x / s) to nearest even, s = max |x| / 127, which it returns: 1 for a row of zeros, NaN (and a row of zeros) for
// one that holds what is not a finite number.
inline float round_row(float* x, int64_t n) {
  int32_t largest = 0;  // as bits, which order magnitudes and put infinity and NaN last
  for (int64_t j = 0; j < n; ++j) {
    int32_t bits;
    std::memcpy(&bits, x + j, 4);
    largest = std::max(largest, bits & 0x7fffffff);
  }
  if (largest >= 0x7f800000) {
    std::fill(x, x + n, 0.0f);
    return std::nanf("");
  }
  float scale;
  std::memcpy(&scale, &largest, 4);
  scale /= 127.0f;
  if (scale == 0) scale = 1;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  for (int64_t j = 0; j < n; ++j) x[j] = (x[j] / scale + kRound) - kRound;
  return scale;
}

// y = x w. x [rows, D], w [D, F], y [rows, F]
struct Product {
  const float* x;
  int64_t rows, D;
  Matrix w;
  int64_t F;
  float* y;
};

// A product with its rows as they are multiplied, which can be done in parts.
class Prepared {
 public:
  explicit Prepared(const Product& p) : p_(p), x_(p.x) {
    if (!p.w.rounds) return;
    rounded_.assign(p.x, p.x + p.rows * p.D);
    for (int64_t r = 0; r < p.rows; ++r) tokens_.push_back(round_row(rounded_.data() + r * p.D, p.D));
    x_ = rounded_.data();
  }

  // Columns j to j + n of rows r to r + m; m <= kFewRows, m * n <= kSums.
  void tile(int64_t r, int64_t m, int64_t j, int64_t n) const {
    const auto [x, rows, D, w, F, y] = p_;
    const float* from = x_ + r * D;
    float* to = y + r * F + j;
    if (!w.q) return multiply_tile<float>(from, m, D, w.w + j, F, to, n);
    if (w.rounds)
      multiply_tile<int32_t>(from, m, D, w.q + j, F, to, n);
    else
      multiply_tile<float>(from, m, D, w.q + j, F, to, n);
    for (int64_t i = 0; i < m; ++i) {
      const float token = w.rounds ? tokens_[r + i] : 1.0f;
      for (int64_t c = 0; c < n; ++c) to[i * F + c] = to[i * F + c] * w.scale[j + c] * token;
    }
  }

 private:
  Product p_;
  const float* x_;
  std::vector<float> rounded_, tokens_;
};

// On the calling thread.
inline void multiply(const Product& p) {
  const Prepared prepared(p);
  for (int64_t r = 0; r < p.rows; r += kFewRows) {
    const int64_t m = std::min(p.rows - r, kFewRows), step = tile_columns(m);
    for (int64_t j = 0; j < p.F; j += step) prepared.tile(r, m, j, std::min(step, p.F - j));
  }
}

// Several products, on all threads.
template <size_t N>
inline void multiply_all(const Product (&products)[N]) {
  struct Task {
    size_t product;
    int64_t r, m, j, n;
  };
  int64_t work = 0;
  for (const Product& p : products) work += p.rows * p.D * p.F;
  const int64_t threads = work > kAlone ? num_threads() : 1;
  std::vector<Prepared> prepared;
  std::vector<Task> tasks;
  prepared.reserve(N);
  for (size_t i = 0; i < N; ++i) {
    const Product& p = products[i];
    prepared.emplace_back(p);
    const int64_t share = (p.F + threads * kColumns - 1) / (threads * kColumns) * kColumns;
    const int64_t step = std::min(tile_columns(std::min(p.rows, kFewRows)), share);
    for (int64_t r = 0; r < p.rows; r += kFewRows)
      for (int64_t j = 0; j < p.F; j += step)
        tasks.push_back({i, r, std::min(p.rows - r, kFewRows), j, std::min(step, p.F - j)});
  }
  auto run = [&](int64_t i) {
    const Task& t = tasks[i];
    prepared[t.product].tile(t.r, t.m, t.j, t.n);
  };
  if (threads > 1) return parallel_for(tasks.size(), run);
  for (size_t i = 0; i < tasks.size(); ++i) run(i);
}

}  // namespace dsv3
