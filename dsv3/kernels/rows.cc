// A few rows times a matrix on all threads. See rows.h for the order of the sums, int8.h for quantised weights.
#include <vector>

#include "int8.h"

namespace {

float* floats(void* pointer) { return static_cast<float*>(pointer); }

}  // namespace

extern "C" {

// x [rows, D], w [D, F] -> y [rows, F]
int rows(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  dsv3::multiply_rows_together<float>(floats(data[0]), shapes[0][0], shapes[1][0], floats(data[1]), shapes[1][1],
                                      floats(data[2]));
  return 0;
}

// x [rows, D], q [D, F] int8, scale [F] -> y [rows, F]
int w8a16(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const int64_t rows = shapes[0][0], D = shapes[1][0], F = shapes[1][1];
  dsv3::multiply_rows_together<float>(floats(data[0]), rows, D, static_cast<const int8_t*>(data[1]), F, floats(data[3]));
  dsv3::apply_scales(floats(data[3]), rows, F, floats(data[2]), nullptr);
  return 0;
}

// the same with each row of x rounded to eight bits
int w8a8(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const int64_t rows = shapes[0][0], D = shapes[1][0], F = shapes[1][1];
  std::vector<float> x(floats(data[0]), floats(data[0]) + rows * D), token(rows);
  for (int64_t r = 0; r < rows; ++r) token[r] = dsv3::round_token(x.data() + r * D, D);
  dsv3::multiply_rows_together<int32_t>(x.data(), rows, D, static_cast<const int8_t*>(data[1]), F, floats(data[3]));
  dsv3::apply_scales(floats(data[3]), rows, F, floats(data[2]), token.data());
  return 0;
}
}
