// The sum of squares of a list of tensors, and AdamW on lists of tensors in place: one call for a whole
// model. Both cut each tensor into pieces by its size alone, so that a result does not depend on the number
// of threads.
#include <cmath>
#include <cstring>
#include <vector>

#include "common.h"

namespace {

using dsv3::parallel_for;

constexpr int64_t kPiece = 32 << 10;  // elements in a task
constexpr int64_t kBlock = 512;       // elements converted at once
constexpr int kLanes = 8;

int64_t count(int ndims, const int64_t* shape) {
  int64_t n = 1;
  for (int i = 0; i < ndims; ++i) n *= shape[i];
  return n;
}

bool is_bfloat16(const char* dtype) { return std::strcmp(dtype, "bfloat16") == 0; }
bool is_float32(const char* dtype) { return std::strcmp(dtype, "float32") == 0; }

inline float from_bfloat16(uint16_t x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x) << 16); }

// Rounds to nearest, ties to even; a NaN stays one.
inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40u : rounded);
}

// A float32 or bfloat16 tensor of which a block at a time is seen as float32.
struct Values {
  void* data;
  bool narrow;

  // The n values from `start` on: the tensor's own memory, or `buffer` filled with their conversions.
  float* read(int64_t start, int64_t n, float* buffer) const {
    if (!narrow) return static_cast<float*>(data) + start;
    const uint16_t* x = static_cast<uint16_t*>(data) + start;
    for (int64_t i = 0; i < n; ++i) buffer[i] = from_bfloat16(x[i]);
    return buffer;
  }

  // Puts back what `read` gave and the caller changed.
  void write(int64_t start, int64_t n, const float* values) const {
    if (!narrow) return;
    uint16_t* x = static_cast<uint16_t*>(data) + start;
    for (int64_t i = 0; i < n; ++i) x[i] = to_bfloat16(values[i]);
  }
};

struct Piece {
  int leaf;
  int64_t start, size;
};

std::vector<Piece> pieces(int leaves, const int* ndims, int64_t* const* shapes) {
  std::vector<Piece> found;
  for (int leaf = 0; leaf < leaves; ++leaf) {
    const int64_t n = count(ndims[leaf], shapes[leaf]);
    for (int64_t start = 0; start < n; start += kPiece)
      found.push_back({leaf, start, std::min(kPiece, n - start)});
  }
  return found;
}

int unsupported(const char* what, int leaf, const char* dtype) {
  std::fprintf(stderr, "dsv3: AdamW: %s %d is %s, expected float32 or bfloat16\n", what, leaf, dtype);
  return 1;
}

struct Constants {
  float beta2, eps, grad_scale, rest1, rest2, sqrt_correction2, step;
};

// torch.optim.AdamW's order: decay, moments, denominator, step.
void update(const Constants& c, float keep, int64_t n, const float* g, float* p, float* m, float* v) {
  for (int64_t i = 0; i < n; ++i) {
    const float grad = g[i] * c.grad_scale;
    m[i] += c.rest1 * (grad - m[i]);
    v[i] = c.beta2 * v[i] + c.rest2 * grad * grad;
    p[i] = p[i] * keep - c.step * m[i] / (std::sqrt(v[i]) / c.sqrt_correction2 + c.eps);
  }
}

}  // namespace

extern "C" {

// any number of float32 or bfloat16 tensors -> [1] float32, the sum of the squares of all elements
int global_norm_sq(int n, void** data, int* ndims, int64_t** shapes, const char** dtypes, void*, void*) {
  const int leaves = n - 1;
  for (int leaf = 0; leaf < leaves; ++leaf)
    if (!is_float32(dtypes[leaf]) && !is_bfloat16(dtypes[leaf]))
      return unsupported("gradient", leaf, dtypes[leaf]);
  const std::vector<Piece> work = pieces(leaves, ndims, shapes);
  std::vector<double> partial(work.size());
  parallel_for(work.size(), [&](int64_t task) {
    const Piece& piece = work[task];
    const Values values{data[piece.leaf], is_bfloat16(dtypes[piece.leaf])};
    float buffer[kBlock];
    double lanes[kLanes] = {};
    for (int64_t done = 0; done < piece.size; done += kBlock) {
      const int64_t size = std::min(kBlock, piece.size - done), whole = size - size % kLanes;
      const float* x = values.read(piece.start + done, size, buffer);
      for (int64_t i = 0; i < whole; i += kLanes)
        for (int l = 0; l < kLanes; ++l) lanes[l] += static_cast<double>(x[i + l]) * x[i + l];
      for (int64_t i = whole; i < size; ++i) lanes[i - whole] += static_cast<double>(x[i]) * x[i];
    }
    for (double lane : lanes) partial[task] += lane;
  });
  double total = 0;
  for (double x : partial) total += x;
  *static_cast<float*>(data[leaves]) = static_cast<float>(total);
  return 0;
}

// scalars [8], decay [leaves] int32, then `leaves` tensors each of params, grads, m and v, then a float32
// master for each bfloat16 param, in order -> [1] float32, the learning rate. Params, m, v and masters are
// written in place.
int adamw_update(int n, void** data, int* ndims, int64_t** shapes, const char** dtypes, void*, void*) {
  const float* s = static_cast<float*>(data[0]);
  const int32_t* decay = static_cast<int32_t*>(data[1]);
  const int leaves = static_cast<int>(shapes[1][0]), inputs = n - 1;
  const int params = 2, grads = params + leaves, first = grads + leaves, second = first + leaves;
  std::vector<int> master(leaves, -1);
  int next = second + leaves;
  for (int leaf = 0; leaf < leaves; ++leaf) {
    for (int i : {params, grads, first, second})
      if (!is_float32(dtypes[i + leaf]) && !is_bfloat16(dtypes[i + leaf]))
        return unsupported("a tensor of leaf", leaf, dtypes[i + leaf]);
    if (is_bfloat16(dtypes[params + leaf])) master[leaf] = next++;
  }
  if (next != inputs) {
    std::fprintf(stderr, "dsv3: AdamW: expected %d inputs, found %d\n", next, inputs);
    return 1;
  }
  const double lr = s[0];
  Constants c;
  c.beta2 = s[2], c.eps = s[3], c.grad_scale = s[7];
  c.rest1 = static_cast<float>(1.0 - static_cast<double>(s[1]));
  c.rest2 = static_cast<float>(1.0 - static_cast<double>(s[2]));
  c.step = static_cast<float>(lr / s[5]);
  c.sqrt_correction2 = static_cast<float>(std::sqrt(static_cast<double>(s[6])));
  const float keep = static_cast<float>(1.0 - lr * s[4]);

  *static_cast<float*>(data[inputs]) = s[0];
  if (!std::isfinite(c.grad_scale)) return 0;  // gradients that are not finite change nothing

  const std::vector<Piece> work = pieces(leaves, ndims + params, shapes + params);
  parallel_for(work.size(), [&](int64_t task) {
    const auto [leaf, start, size] = work[task];
    const int owner = master[leaf] < 0 ? params + leaf : master[leaf];
    auto values = [&](int i) { return Values{data[i], is_bfloat16(dtypes[i])}; };
    const Values p = values(owner), g = values(grads + leaf), rounded = values(params + leaf);
    const Values m = values(first + leaf), v = values(second + leaf);
    float buffer[3][kBlock];
    for (int64_t at = start; at < start + size; at += kBlock) {
      const int64_t k = std::min(kBlock, start + size - at);
      float *pk = p.read(at, k, nullptr), *mk = m.read(at, k, buffer[0]), *vk = v.read(at, k, buffer[1]);
      update(c, decay[leaf] ? keep : 1.0f, k, g.read(at, k, buffer[2]), pk, mk, vk);
      m.write(at, k, mk);
      v.write(at, k, vk);
      rounded.write(at, k, pk);
    }
  });
  return 0;
}
// a float32 or bfloat16 leaf and as many float32 values -> [1] float32, 0. The leaf becomes the values, rounded to nearest,
// ties to even, in place.
int store(int n, void** data, int* ndims, int64_t** shapes, const char** dtypes, void*, void*) {
  if (n != 3 || !is_float32(dtypes[1])) return unsupported("stored value", 0, dtypes[1]);
  if (!is_float32(dtypes[0]) && !is_bfloat16(dtypes[0])) return unsupported("leaf", 0, dtypes[0]);
  const int64_t size = count(ndims[0], shapes[0]);
  const Values leaf{data[0], is_bfloat16(dtypes[0])};
  leaf.write(0, size, static_cast<float*>(data[1]));
  *static_cast<float*>(data[2]) = 0;
  return 0;
}
}
