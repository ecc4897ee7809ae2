// The latent cache of multi-head latent attention on the CPU, float32: writing rows into it, and attending over it with
// the up-projections absorbed into query and output, so that no key or value is ever made.
#include <cmath>
#include <cstring>
#include <vector>

#include "common.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vec __attribute__((vector_size(LANES * 4)));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Two accumulators: the order of the sum follows from n alone.
inline float dot(const float* a, const float* b, int64_t n) {
  Vec even = {}, odd = {};
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    even += load(a + i) * load(b + i);
    odd += load(a + i + LANES) * load(b + i + LANES);
  }
  even += odd;
  if (i + LANES <= n) even += load(a + i) * load(b + i), i += LANES;
  float total = 0.f;
  for (int lane = 0; lane < LANES; ++lane) total += even[lane];
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

inline void add_scaled(float* y, const float* x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

// Interleaved pairs of x, turned: all real parts, then all imaginary ones.
inline void rotate(const float* x, const float* cos, const float* sin, int64_t half, float* out) {
  for (int64_t i = 0; i < half; ++i) {
    out[i] = x[2 * i] * cos[i] - x[2 * i + 1] * sin[i];
    out[half + i] = x[2 * i] * sin[i] + x[2 * i + 1] * cos[i];
  }
}

}  // namespace

extern "C" {

// latent [n, C+R], norm [C], cos and sin [L, R/2], positions [n], slots [n], pool [S, C+R], eps [1]; out: rows [n, C+R].
// Normalises the first C channels, turns the other R, and leaves each row in the result and in its slot of the pool.
int latent_write(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const float *latent = static_cast<float*>(data[0]), *norm = static_cast<float*>(data[1]);
  const float *cos = static_cast<float*>(data[2]), *sin = static_cast<float*>(data[3]);
  const int32_t *positions = static_cast<int32_t*>(data[4]), *slots = static_cast<int32_t*>(data[5]);
  float* pool = static_cast<float*>(data[6]);
  const float eps = *static_cast<float*>(data[7]);
  float* rows = static_cast<float*>(data[8]);
  const int64_t n = shapes[0][0], W = shapes[0][1], C = shapes[1][0], half = (W - C) / 2, L = shapes[2][0], S = shapes[6][0];
  for (int64_t i = 0; i < n; ++i)
    if (positions[i] < 0 || positions[i] >= L || slots[i] < 0 || slots[i] >= S) {
      std::fprintf(stderr, "dsv3: latent_write: position %d of %ld, slot %d of %ld\n", positions[i], long(L), slots[i], long(S));
      return 1;
    }
  for (int64_t i = 0; i < n; ++i) {
    const float* x = latent + i * W;
    float* y = rows + i * W;
    const float scale = 1.f / std::sqrt(dot(x, x, C) / C + eps);
    for (int64_t c = 0; c < C; ++c) y[c] = x[c] * scale * norm[c];
    rotate(x + C, cos + positions[i] * half, sin + positions[i] * half, half, y + C);
    std::memcpy(pool + slots[i] * W, y, W * sizeof(float));
  }
  return 0;
}

// q [n, H*(N+R)], w [C, H*(N+V)], cos and sin [L, R/2], positions [n], tables [B, M], pool [S, C+R], head_scale [H],
// block [block_size] (its length alone counts), written (unused: what must have happened before); out [n, H*V].
// Token i belongs to row i / (n / B) of the tables and sees positions 0 .. positions[i] of it.
int latent_attention(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const float *q = static_cast<float*>(data[0]), *w = static_cast<float*>(data[1]);
  const float *cos = static_cast<float*>(data[2]), *sin = static_cast<float*>(data[3]);
  const int32_t *positions = static_cast<int32_t*>(data[4]), *tables = static_cast<int32_t*>(data[5]);
  const float *pool = static_cast<float*>(data[6]), *head_scale = static_cast<float*>(data[7]);
  float* out = static_cast<float*>(data[10]);
  const int64_t n = shapes[0][0], H = shapes[7][0], C = shapes[1][0], W = shapes[6][1], R = W - C;
  const int64_t K = shapes[0][1] / H, N = K - R, V = shapes[1][1] / H - N, M = shapes[5][1], T = n / shapes[5][0];
  const int64_t block = shapes[8][0], S = shapes[6][0], ld = H * (N + V), group = 16;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t* table = tables + i / T * M;
    for (int64_t j = 0; j <= positions[i] / block; ++j)
      if (positions[i] < 0 || j >= M || table[j] < 0 || (table[j] + 1) * block > S) {
        std::fprintf(stderr, "dsv3: latent_attention: position %d of a table of %ld blocks of %ld, pool of %ld slots\n",
                     positions[i], long(M), long(block), long(S));
        return 1;
      }
  }
  const int64_t groups = (n + group - 1) / group;
  dsv3::parallel_for(H * groups, [&](int64_t task) {
    const int64_t h = task % H, from = task / H * group, to = std::min(from + group, n);
    const float* w_h = w + h * (N + V);
    int64_t longest = 0;
    for (int64_t i = from; i < to; ++i) longest = std::max<int64_t>(longest, positions[i] + 1);
    float* query = dsv3::scratch(2 * W + longest);
    float *sum = query + W, *weights = sum + W;
    for (int64_t i = from; i < to; ++i) {
      const float* q_h = q + (i * H + h) * K;
      for (int64_t c = 0; c < C; ++c) query[c] = dot(q_h, w_h + c * ld, N);
      rotate(q_h + N, cos + positions[i] * R / 2, sin + positions[i] * R / 2, R / 2, query + C);
      const int32_t* table = tables + i / T * M;
      const int64_t keys = positions[i] + 1;
      float highest = -INFINITY;
      for (int64_t j = 0; j < keys; ++j) {
        const float* row = pool + (table[j / block] * block + j % block) * W;
        weights[j] = dot(query, row, W) * head_scale[h];
        highest = std::max(highest, weights[j]);
      }
      for (int64_t j = 0; j < keys; ++j) weights[j] = dsv3::exp_nonpositive(weights[j] - highest);
      float total = 0.f;
      std::memset(sum, 0, C * sizeof(float));
      for (int64_t j = 0; j < keys; ++j) {
        total += weights[j];
        add_scaled(sum, pool + (table[j / block] * block + j % block) * W, weights[j], C);
      }
      float* y = out + (i * H + h) * V;
      std::memset(y, 0, V * sizeof(float));
      for (int64_t c = 0; c < C; ++c) add_scaled(y, w_h + c * ld + N, sum[c] / total, V);
    }
  });
  return 0;
}

}  // extern "C"
