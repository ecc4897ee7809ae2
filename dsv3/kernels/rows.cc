// A few rows times a matrix, on all threads. See rows.h for the order of the sums.
#include "products.h"

extern "C" {

// x [rows, D], w [D, F] float32 -> y [rows, F]
int rows(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  float** p = reinterpret_cast<float**>(data);
  dsv3::multiply_all({{p[0], shapes[0][0], shapes[1][0], {p[1]}, shapes[1][1], p[2]}});
  return 0;
}

// x [rows, D], q [D, F] int8, scale [F], rounds [1] int32 -> y [rows, F]
int rows_int8(int, void** data, int*, int64_t** shapes, const char** dtypes, void*, void*) {
  const dsv3::Matrix w = dsv3::matrix(data[1], dtypes[1], data[2], *static_cast<int32_t*>(data[3]));
  dsv3::multiply_all({{static_cast<float*>(data[0]), shapes[0][0], shapes[1][0], w, shapes[1][1], static_cast<float*>(data[4])}});
  return 0;
}
}
