// A few rows times a matrix: what a step of decoding is made of. The matrix is read from memory once, whatever the rows.
//
// Every element of the result is one sum over d, taken in an order that the matrix alone decides: kChunk products one after
// another, then the sums of the chunks one after another. How many rows there are, how columns are shared out and among how
// many threads changes no bit: a row has the same result alone and in any batch.
#pragma once
#include "common.h"

namespace dsv3 {

constexpr int64_t kFewRows = 32;       // of a tile; kernels/linear.py says the same
constexpr int64_t kSums = 4096;        // running sums of a tile, [rows, columns]: half of a first-level cache
constexpr int64_t kChunk = 512;        // products added one by one: shorter sums have smaller rounding errors
constexpr int64_t kAlone = 256 << 10;  // products that are not worth another thread
constexpr int kWide = 16;              // columns of a vector, which the compiler cuts to the machine's registers
constexpr int kDeep = 4;               // rows of the matrix that are used at a time

typedef float Wide __attribute__((vector_size(4 * kWide)));
typedef float WideAnywhere __attribute__((vector_size(4 * kWide), aligned(4), may_alias));

inline Wide load(const float* p) { return *reinterpret_cast<const WideAnywhere*>(p); }
inline void store(float* p, Wide v) { *reinterpret_cast<WideAnywhere*>(p) = v; }

// sums[r][j] += x[r][0] w[0][j] + ... + x[r][Deep - 1] w[Deep - 1][j], from left to right, for Rows rows and n columns.
// On the way it asks the memory for n columns of ``ahead`` rows at ``next``.
template <int Rows, int Deep>
inline void add_products(const float* x, int64_t D, const float* w, int64_t F, float* sums, int64_t n, const float* next,
                         int ahead) {
  float factor[Rows][Deep];
  for (int r = 0; r < Rows; ++r)
    for (int d = 0; d < Deep; ++d) factor[r][d] = x[r * D + d];
  int64_t j = 0;
  for (; j + kWide <= n; j += kWide) {
    Wide weight[Deep];
    for (int d = 0; d < Deep; ++d) weight[d] = load(w + d * F + j);
    for (int i = 0; i < ahead; ++i) __builtin_prefetch(next + i * F + j);
    for (int r = 0; r < Rows; ++r) {
      Wide sum = load(sums + r * n + j);
      for (int d = 0; d < Deep; ++d) sum += factor[r][d] * weight[d];
      store(sums + r * n + j, sum);
    }
  }
  for (; j < n; ++j)
    for (int r = 0; r < Rows; ++r)
      for (int d = 0; d < Deep; ++d) sums[r * n + j] += factor[r][d] * w[d * F + j];
}

// add_products for any number of rows, each four of which ask for their share of the next Deep rows of the matrix.
template <int Deep>
inline void add_all(const float* x, int64_t rows, int64_t D, const float* w, int64_t F, float* sums, int64_t n) {
  const int fours = (rows + 3) / 4, share = (Deep + fours - 1) / fours;
  int asked = 0;
  for (int64_t r = 0; r < rows; asked = std::min(asked + share, Deep)) {
    const float *from = x + r * D, *next = w + (Deep + asked) * F;
    float* to = sums + r * n;
    const int ahead = std::min(share, Deep - asked);
    if (rows - r >= 4) {
      add_products<4, Deep>(from, D, w, F, to, n, next, ahead), r += 4;
    } else if (rows - r >= 2) {
      add_products<2, Deep>(from, D, w, F, to, n, next, ahead), r += 2;
    } else {
      add_products<1, Deep>(from, D, w, F, to, n, next, ahead), r += 1;
    }
  }
}

// y = x w for a tile: x [rows, D], n columns of w [D, F] and of y [rows, F]; rows <= kFewRows, rows * n <= kSums.
inline void multiply_tile(const float* x, int64_t rows, int64_t D, const float* w, int64_t F, float* y, int64_t n) {
  alignas(64) float sums[kSums];
  for (int64_t begin = 0; begin == 0 || begin < D; begin += kChunk) {
    const int64_t end = std::min(D, begin + kChunk);
    std::fill(sums, sums + rows * n, 0.0f);
    int64_t d = begin;
    for (; d + kDeep <= end; d += kDeep) add_all<kDeep>(x + d, rows, D, w + d * F, F, sums, n);
    for (; d < end; ++d) add_all<1>(x + d, rows, D, w + d * F, F, sums, n);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < n; ++j) y[r * F + j] = begin ? y[r * F + j] + sums[r * n + j] : sums[r * n + j];
  }
}

// Columns of a tile of so many rows.
inline int64_t tile_columns(int64_t rows) { return std::min<int64_t>(kSums / rows / kWide * kWide, 1024); }

// y = x w on the calling thread. x [rows, D], w [D, F] -> y [rows, F]; rows <= kFewRows.
inline void multiply_rows(const float* x, int64_t rows, int64_t D, const float* w, int64_t F, float* y) {
  const int64_t step = tile_columns(rows);
  for (int64_t j = 0; j < F; j += step) multiply_tile(x, rows, D, w + j, F, y + j, std::min(step, F - j));
}

// y = x w, as one of several products that the threads share.
struct Product {
  const float* x;
  int64_t rows, D;
  const float* w;
  int64_t F;
  float* y;
};

// All of them, cut into tiles of columns; rows <= kFewRows.
template <size_t N>
inline void multiply_all(const Product (&products)[N]) {
  int64_t work = 0, tiles = 0, ends[N], steps[N];
  for (const Product& p : products) work += p.rows * p.D * p.F;
  for (size_t i = 0; i < N; ++i) {
    const Product& p = products[i];
    const int64_t share = work <= kAlone ? p.F : (p.F / kWide + num_threads()) / num_threads() * kWide;
    steps[i] = std::min(tile_columns(p.rows), std::max<int64_t>(share, kWide));
    ends[i] = tiles += (p.F + steps[i] - 1) / steps[i];
  }
  auto tile = [&](int64_t task) {
    size_t i = 0;
    while (task >= ends[i]) ++i;
    const Product& p = products[i];
    const int64_t j = (task - (i ? ends[i - 1] : 0)) * steps[i];
    multiply_tile(p.x, p.rows, p.D, p.w + j, p.F, p.y + j, std::min(steps[i], p.F - j));
  };
  if (work > kAlone) return parallel_for(tiles, tile);
  for (int64_t task = 0; task < tiles; ++task) tile(task);
}

}  // namespace dsv3
