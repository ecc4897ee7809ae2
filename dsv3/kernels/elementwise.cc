// RMSNorm (alone and with the residual addition before it) and SwiGLU, forward and backward, float32. A sum
// across rows is taken over chunks cut by the shape alone and then in the order of the chunks, so that a
// result depends neither on the number of threads nor on their timing.
#include <cmath>
#include <memory>

#include "common.h"

namespace {

using dsv3::exp_nonpositive;
using dsv3::parallel_for;

constexpr int kLanes = 16;            // independent partial sums of a reduction: a vector register, or a few
constexpr int64_t kGrain = 16 << 10;  // elements in a task

int64_t count(int ndims, const int64_t* shape) {
  int64_t n = 1;
  for (int i = 0; i < ndims; ++i) n *= shape[i];
  return n;
}

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// The sum of term(j) for j in [0, n).
template <class Term>
inline float sum(int64_t n, Term term) {
  float lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += term(j + l);
  for (; j < n; ++j) lanes[j % kLanes] += term(j);
  for (int half = kLanes / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

inline float inverse_rms(const float* x, int64_t D, float eps) {
  return 1.0f / std::sqrt(sum(D, [&](int64_t j) { return x[j] * x[j]; }) / D + eps);
}

// x (+ residual -> total) -> y, all [rows, D]. residual and total are null without a residual.
void forward(int64_t rows, int64_t D, const float* x, const float* residual, const float* weight, float eps,
             float* total, float* y) {
  const int64_t step = std::max<int64_t>(1, kGrain / D);
  parallel_for(blocks(rows, step), [&](int64_t task) {
    for (int64_t r = task * step, end = std::min(rows, r + step); r < end; ++r) {
      const float* row = x + r * D;
      if (residual) {
        const float* other = residual + r * D;
        float* out = total + r * D;
        for (int64_t j = 0; j < D; ++j) out[j] = row[j] + other[j];
        row = out;
      }
      const float inv = inverse_rms(row, D, eps);
      float* __restrict out = y + r * D;
      for (int64_t j = 0; j < D; ++j) out[j] = row[j] * inv * weight[j];
    }
  });
}

// y_j = w_j x_j r with r = (mean x^2 + eps)^-1/2, hence dx_j = r (w_j dy_j - x_j r^2 mean(w dy x)) and
// dw_j = sum over rows of dy_j x_j r. dtotal, when not null, is added to dx.
void backward(int64_t rows, int64_t D, const float* x, const float* weight, float eps, const float* dtotal,
              const float* dy, float* dx, float* dweight) {
  const int64_t step = std::min<int64_t>(256, std::max<int64_t>(16, 2 * kGrain / D));
  const int64_t chunks = blocks(rows, step);
  std::unique_ptr<float[]> partial(new float[chunks * D]);
  parallel_for(chunks, [&](int64_t chunk) {
    float* __restrict dw = partial.get() + chunk * D;
    std::fill(dw, dw + D, 0.0f);
    for (int64_t r = chunk * step, end = std::min(rows, r + step); r < end; ++r) {
      const float *row = x + r * D, *dout = dy + r * D;
      const float inv = inverse_rms(row, D, eps);
      const float dot = sum(D, [&](int64_t j) { return weight[j] * dout[j] * row[j]; });
      const float slope = dot * inv * inv * inv / D;
      float* __restrict out = dx + r * D;
      if (dtotal) {
        const float* extra = dtotal + r * D;
        for (int64_t j = 0; j < D; ++j) out[j] = extra[j] + (inv * weight[j] * dout[j] - slope * row[j]);
      } else {
        for (int64_t j = 0; j < D; ++j) out[j] = inv * weight[j] * dout[j] - slope * row[j];
      }
      for (int64_t j = 0; j < D; ++j) dw[j] += dout[j] * (row[j] * inv);
    }
  });
  constexpr int64_t width = 64;
  parallel_for(blocks(D, width), [&](int64_t block) {
    const int64_t first = block * width, n = std::min(D - first, width);
    double total[width] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t j = 0; j < n; ++j) total[j] += partial[chunk * D + first + j];
    for (int64_t j = 0; j < n; ++j) dweight[first + j] = static_cast<float>(total[j]);
  });
}

inline float sigmoid(float x) {
  const float e = exp_nonpositive(-std::fabs(x));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

}  // namespace

extern "C" {

// x [..., D], weight [D], eps [1] -> y [..., D]
int rms_norm(int, void** data, int* ndims, int64_t** shapes, const char**, void*, void*) {
  float** p = reinterpret_cast<float**>(data);
  const int64_t D = shapes[1][0];
  forward(count(ndims[0], shapes[0]) / D, D, p[0], nullptr, p[1], p[2][0], nullptr, p[3]);
  return 0;
}

// x, weight, eps, dy -> dx, dweight
int rms_norm_grad(int, void** data, int* ndims, int64_t** shapes, const char**, void*, void*) {
  float** p = reinterpret_cast<float**>(data);
  const int64_t D = shapes[1][0];
  backward(count(ndims[0], shapes[0]) / D, D, p[0], p[1], p[2][0], nullptr, p[3], p[4], p[5]);
  return 0;
}

// x, residual, weight, eps -> total = x + residual, y = rms_norm(total)
int add_rms_norm(int, void** data, int* ndims, int64_t** shapes, const char**, void*, void*) {
  float** p = reinterpret_cast<float**>(data);
  const int64_t D = shapes[2][0];
  forward(count(ndims[0], shapes[0]) / D, D, p[0], p[1], p[2], p[3][0], p[4], p[5]);
  return 0;
}

// total, weight, eps, dtotal, dy -> dx (which is also dresidual), dweight
int add_rms_norm_grad(int, void** data, int* ndims, int64_t** shapes, const char**, void*, void*) {
  float** p = reinterpret_cast<float**>(data);
  const int64_t D = shapes[1][0];
  backward(count(ndims[0], shapes[0]) / D, D, p[0], p[1], p[2][0], p[3], p[4], p[5], p[6]);
  return 0;
}

// gate, up -> gate * sigmoid(gate) * up
int swiglu(int, void** data, int* ndims, int64_t** shapes, const char**, void*, void*) {
  const float *gate = static_cast<float*>(data[0]), *up = static_cast<float*>(data[1]);
  float* __restrict out = static_cast<float*>(data[2]);
  const int64_t n = count(ndims[0], shapes[0]);
  parallel_for(blocks(n, kGrain), [&](int64_t task) {
    const int64_t end = std::min(n, (task + 1) * kGrain);
    for (int64_t i = task * kGrain; i < end; ++i) out[i] = gate[i] * sigmoid(gate[i]) * up[i];
  });
  return 0;
}

// gate, up, dout -> dgate, dup. With s = sigmoid(g): d silu / dg = s (1 + g (1 - s)).
int swiglu_grad(int, void** data, int* ndims, int64_t** shapes, const char**, void*, void*) {
  const float *gate = static_cast<float*>(data[0]), *up = static_cast<float*>(data[1]);
  const float* dout = static_cast<float*>(data[2]);
  float *__restrict dgate = static_cast<float*>(data[3]), *__restrict dup = static_cast<float*>(data[4]);
  const int64_t n = count(ndims[0], shapes[0]);
  parallel_for(blocks(n, kGrain), [&](int64_t task) {
    const int64_t end = std::min(n, (task + 1) * kGrain);
    for (int64_t i = task * kGrain; i < end; ++i) {
      const float g = gate[i], s = sigmoid(g);
      dgate[i] = dout[i] * up[i] * s * (1.0f + g * (1.0f - s));
      dup[i] = dout[i] * g * s;
    }
  });
  return 0;
}
}
