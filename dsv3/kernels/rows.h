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
constexpr int64_t kColumns = 64;       // of which a tile has a multiple
constexpr int64_t kChunk = 512;        // products added one by one: shorter sums have smaller rounding errors
constexpr int64_t kAlone = 256 << 10;  // products that are not worth another thread
constexpr int kWide = 16;              // numbers in a vector, which the compiler cuts to the machine's registers
constexpr int kDeep = 4;               // rows of the matrix that are used at a time

typedef float Wide __attribute__((vector_size(4 * kWide)));
typedef float WideAnywhere __attribute__((vector_size(4 * kWide), aligned(4), may_alias));
typedef int32_t Words __attribute__((vector_size(4 * kWide)));
typedef int32_t WordsAnywhere __attribute__((vector_size(4 * kWide), aligned(1), may_alias));

// 64 bytes of the matrix are one vector of float32 or, of int8, four: byte k of the words is vector k, which g++ makes with
// shifts in a third of the time of a conversion of 16 bytes that lie side by side. ``place`` undoes the order.
template <class Weight>
constexpr int kVectors = sizeof(float) / sizeof(Weight);

template <class Weight>
inline Wide widened(Words words, int k) {
  if constexpr (sizeof(Weight) == sizeof(float)) return (Wide)words;
  else return __builtin_convertvector((words << (24 - 8 * k)) >> 24, Wide);
}

// Where the sum of column j of n is.
template <class Weight>
inline int64_t place(int64_t j, int64_t n) {
  constexpr int64_t vectors = kVectors<Weight>, block = vectors * kWide;
  return j < n / block * block ? j / block * block + j % vectors * kWide + j % block / vectors : j;
}

// sums[r][j] += x[r][0] w[0][j] + ... + x[r][Deep - 1] w[Deep - 1][j], from left to right, for Rows rows and n columns.
// On the way it asks the memory for n columns of ``ahead`` rows at ``next``.
template <int Rows, int Deep, class Weight>
inline void add_products(const float* x, int64_t D, const Weight* w, int64_t F, float* sums, int64_t n, const Weight* next,
                         int ahead) {
  float factor[Rows][Deep];
  for (int r = 0; r < Rows; ++r)
    for (int d = 0; d < Deep; ++d) factor[r][d] = x[r * D + d];
  constexpr int vectors = kVectors<Weight>;
  int64_t j = 0;
  for (; j + vectors * kWide <= n; j += vectors * kWide) {
    Words words[Deep];
    for (int d = 0; d < Deep; ++d) words[d] = *reinterpret_cast<const WordsAnywhere*>(w + d * F + j);
    for (int i = 0; i < ahead; ++i) __builtin_prefetch(next + i * F + j);
#pragma GCC unroll 4
    for (int k = 0; k < vectors; ++k) {
      Wide weight[Deep];
      for (int d = 0; d < Deep; ++d) weight[d] = widened<Weight>(words[d], k);
      for (int r = 0; r < Rows; ++r) {
        float* at = sums + r * n + j + k * kWide;
        Wide sum = *reinterpret_cast<WideAnywhere*>(at);
        for (int d = 0; d < Deep; ++d) sum += factor[r][d] * weight[d];
        *reinterpret_cast<WideAnywhere*>(at) = sum;
      }
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int d = 0; d < Deep; ++d)
      for (int64_t c = j; c < n; ++c) sums[r * n + c] += factor[r][d] * static_cast<float>(w[d * F + c]);
}

// add_products for any number of rows, each four of which ask for their share of the next Deep rows of the matrix.
template <int Deep, class Weight>
inline void add_all(const float* x, int64_t rows, int64_t D, const Weight* w, int64_t F, float* sums, int64_t n) {
  const int fours = (rows + 3) / 4, share = (Deep + fours - 1) / fours;
  int asked = 0;
  for (int64_t r = 0; r < rows; asked = std::min(asked + share, Deep)) {
    const float* from = x + r * D;
    const Weight* next = w + (Deep + asked) * F;
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
// Total: int32_t when x and w hold integers up to 127, which makes the sums exact: those of a chunk are below 2^24.
template <class Total, class Weight>
inline void multiply_tile(const float* x, int64_t rows, int64_t D, const Weight* w, int64_t F, float* y, int64_t n) {
  alignas(64) float sums[kSums];
  alignas(64) Total totals[kSums];
  for (int64_t begin = 0; begin == 0 || begin < D; begin += kChunk) {
    const int64_t end = std::min(D, begin + kChunk);
    std::fill(sums, sums + rows * n, 0.0f);
    int64_t d = begin;
    for (; d + kDeep <= end; d += kDeep) add_all<kDeep>(x + d, rows, D, w + d * F, F, sums, n);
    for (; d < end; ++d) add_all<1>(x + d, rows, D, w + d * F, F, sums, n);
    for (int64_t i = 0; i < rows * n; ++i) {
      const Total sum = static_cast<Total>(sums[i]);
      totals[i] = begin ? totals[i] + sum : sum;
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < n; ++j) y[r * F + j] = static_cast<float>(totals[r * n + place<Weight>(j, n)]);
}

// Columns of a tile of so many rows.
inline int64_t tile_columns(int64_t rows) { return std::min<int64_t>(kSums / rows, 1024) / kColumns * kColumns; }

}  // namespace dsv3
