// A few rows times a matrix, float32, on all threads. See rows.h for the order of the sums.
#include "rows.h"

extern "C" {

// x [rows, D], w [D, F] -> y [rows, F]
int rows(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  using namespace dsv3;
  const float *x = static_cast<float*>(data[0]), *w = static_cast<float*>(data[1]);
  float* y = static_cast<float*>(data[2]);
  const int64_t rows = shapes[0][0], D = shapes[1][0], F = shapes[1][1];
  const int64_t share = rows * D * F <= kAlone ? F : (F / kWide + num_threads()) / num_threads() * kWide;
  const int64_t step = std::min(tile_columns(rows), std::max<int64_t>(share, kWide));
  parallel_for((F + step - 1) / step, [&](int64_t tile) {
    multiply_tile(x, rows, D, w + tile * step, F, y + tile * step, std::min(step, F - tile * step));
  });
  return 0;
}
}
