// Products with int8 weights: y = (x q) scale, a scale for each column. Weight-only: x is float32. With rounded tokens: so is
// x, to integers of at most 127 times a scale of the row, and all sums are exact integers.
#pragma once
#include <cmath>
#include <cstring>

#include "rows.h"

namespace dsv3 {

// x <- round(x / s) to nearest even, s = max |x| / 127, which it returns: 1 for a row of zeros, NaN (and a row of zeros) for
// one that holds what is not a finite number.
inline float round_token(float* x, int64_t n) {
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

// y [rows, F] of integers or sums <- y * scale (* token, where it is not null).
inline void apply_scales(float* y, int64_t rows, int64_t F, const float* scale, const float* token) {
  for (int64_t r = 0; r < rows; ++r) {
    const float factor = token ? token[r] : 1.0f;
    for (int64_t j = 0; j < F; ++j) y[r * F + j] = y[r * F + j] * scale[j] * factor;
  }
}

}  // namespace dsv3
