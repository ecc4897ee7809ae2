// The latent cache of multi-head latent attention on the CPU, float32: writing rows into it, and attending over it with
// the up-projections absorbed into query and output, so that no key or value is ever made.
#include <cmath>
#include <cstring>
#include <memory>

#include "products.h"

namespace {

using Vec = dsv3::Wide;
constexpr int LANES = dsv3::kWide;

inline Vec load(const float* p) { return *reinterpret_cast<const dsv3::WideAnywhere*>(p); }

inline float* floats(void* p) { return static_cast<float*>(p); }
inline int32_t* ints(void* p) { return static_cast<int32_t*>(p); }

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

// y = x / rms(x) * weight, a row at a time.
inline void normalise(const float* x, int64_t n, int64_t D, const float* weight, float eps, float* y) {
  for (int64_t i = 0; i < n; ++i) {
    const float* row = x + i * D;
    const float scale = 1.f / std::sqrt(dot(row, row, D) / D + eps);
    for (int64_t d = 0; d < D; ++d) y[i * D + d] = row[d] * scale * weight[d];
  }
}

// A layer's cache and where n tokens are in it. pool [S, W], W = C + R; cos and sin [L, R/2]; tables [B, M].
struct Cache {
  const float *cos, *sin;
  int64_t L, C, R;
  const int32_t *positions, *slots, *tables;
  int64_t n, B, M, block;
  float* pool;
  int64_t S;
  int64_t W() const { return C + R; }
  const int32_t* table(int64_t i) const { return tables + i / (n / B) * M; }
  const float* row(const int32_t* table, int64_t j) const { return pool + (table[j / block] * block + j % block) * W(); }

  bool writable() const {
    for (int64_t i = 0; i < n; ++i)
      if (positions[i] < 0 || positions[i] >= L || slots[i] < 0 || slots[i] >= S) {
        std::fprintf(stderr, "dsv3: position %d of %ld, slot %d of %ld\n", positions[i], long(L), slots[i], long(S));
        return false;
      }
    return true;
  }

  bool readable() const {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j <= positions[i] / block; ++j)
        if (positions[i] < 0 || positions[i] >= L || j >= M || table(i)[j] < 0 || (table(i)[j] + 1) * block > S) {
          std::fprintf(stderr, "dsv3: position %d of %ld, of a table of %ld blocks of %ld in a pool of %ld rows\n", positions[i],
                       long(L), long(M), long(block), long(S));
          return false;
        }
    return true;
  }

  // latent [n, W], as projected -> rows [n, W], normalised and turned, and the same in their slots.
  void write(const float* latent, const float* norm, float eps, float* rows) const {
    for (int64_t i = 0; i < n; ++i) {
      const float* x = latent + i * W();
      float* y = rows + i * W();
      normalise(x, 1, C, norm, eps, y);
      rotate(x + C, cos + positions[i] * R / 2, sin + positions[i] * R / 2, R / 2, y + C);
      std::memcpy(pool + slots[i] * W(), y, W() * sizeof(float));
    }
  }

  // q [n, H*(N+R)], w [C, H*(N+V)] -> out [n, H*V]. A head and some tokens are a task, so that its part of w is read once.
  void attend(const float* q, const float* w, const float* head_scale, int64_t H, int64_t N, int64_t V, float* out) const {
    constexpr int64_t group = 16;
    const int64_t ld = H * (N + V), K = N + R;
    int64_t work = 0;
    for (int64_t i = 0; i < n; ++i) work += H * (C * (N + V) + (positions[i] + 1) * 2 * W());
    auto task = [&](int64_t index) {
      const int64_t h = index % H, from = index / H * group, to = std::min(from + group, n);
      const float* w_h = w + h * (N + V);
      int64_t longest = 0;
      for (int64_t i = from; i < to; ++i) longest = std::max<int64_t>(longest, positions[i] + 1);
      float* query = dsv3::scratch(2 * W() + longest);
      float *sum = query + W(), *weights = sum + W();
      for (int64_t i = from; i < to; ++i) {
        const float* q_h = q + (i * H + h) * K;
        for (int64_t c = 0; c < C; ++c) query[c] = dot(q_h, w_h + c * ld, N);
        rotate(q_h + N, cos + positions[i] * R / 2, sin + positions[i] * R / 2, R / 2, query + C);
        const int32_t* blocks = table(i);
        const int64_t keys = positions[i] + 1;
        float highest = -INFINITY;
        for (int64_t j = 0; j < keys; ++j) {
          weights[j] = dot(query, row(blocks, j), W()) * head_scale[h];
          highest = std::max(highest, weights[j]);
        }
        for (int64_t j = 0; j < keys; ++j) weights[j] = dsv3::exp_nonpositive(weights[j] - highest);
        float total = 0.f;
        std::memset(sum, 0, C * sizeof(float));
        for (int64_t j = 0; j < keys; ++j) {
          total += weights[j];
          add_scaled(sum, row(blocks, j), weights[j], C);
        }
        float* y = out + (i * H + h) * V;
        std::memset(y, 0, V * sizeof(float));
        for (int64_t c = 0; c < C; ++c) add_scaled(y, w_h + c * ld + N, sum[c] / total, V);
      }
    };
    const int64_t tasks = H * ((n + group - 1) / group);
    if (work > dsv3::kAlone) return dsv3::parallel_for(tasks, task);
    for (int64_t i = 0; i < tasks; ++i) task(i);
  }
};

}  // namespace

extern "C" {

// latent [n, C+R], norm [C], cos and sin [L, R/2], positions [n], slots [n], pool [S, C+R], eps [1] -> rows [n, C+R]
int latent_write(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const int64_t C = shapes[1][0], n = shapes[0][0];
  const Cache cache{floats(data[2]), floats(data[3]), shapes[2][0], C, shapes[0][1] - C, ints(data[4]), ints(data[5]), nullptr,
                    n, n, 0, 1, floats(data[6]), shapes[6][0]};
  if (!cache.writable()) return 1;
  cache.write(floats(data[0]), floats(data[1]), *floats(data[7]), floats(data[8]));
  return 0;
}

// q [n, H*(N+R)], w [C, H*(N+V)], cos and sin [L, R/2], positions [n], tables [B, M], pool [S, C+R], head_scale [H],
// block [block_size] (its length alone counts), written (what must have happened before) -> out [n, H*V]
int latent_attention(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const int64_t H = shapes[7][0], C = shapes[1][0], R = shapes[6][1] - C, N = shapes[0][1] / H - R, V = shapes[1][1] / H - N;
  const Cache cache{floats(data[2]), floats(data[3]), shapes[2][0], C, R, ints(data[4]), nullptr, ints(data[5]),
                    shapes[0][0], shapes[5][0], shapes[5][1], shapes[8][0], floats(data[6]), shapes[6][0]};
  if (!cache.readable()) return 1;
  cache.attend(floats(data[0]), floats(data[1]), floats(data[7]), H, N, V, floats(data[10]));
  return 0;
}

// A whole attention block of few tokens. x [n, D], its norm [D], wq_a [D, Q] and q_norm [Q] (or [D] both, where there is one
// wq in the place of wq_b), wq_b [Q, H*(N+R)], wkv_a [D, C+R], kv_norm [C], wkv_b [C, H*(N+V)], wo [H*V, D], cos, sin,
// positions, slots, tables, pool, head_scale [H], block [block_size], eps [1], scales of wq_a, wq_b, wkv_a and wo and rounds [4]
// int32 (as for experts_int8 in moe.cc) -> x + attention [n, D]
int attention_step(int, void** data, int* ndims, int64_t** shapes, const char** dtypes, void*, void*) {
  const float *x = floats(data[0]), eps = *floats(data[17]);
  const bool low_rank = ndims[2] == 2;
  const int64_t n = shapes[0][0], D = shapes[0][1], Q = low_rank ? shapes[2][1] : 0, A = shapes[4][1], W = shapes[5][1];
  const int64_t C = shapes[6][0], R = W - C, H = shapes[15][0], N = A / H - R, V = shapes[7][1] / H - N;
  const Cache cache{floats(data[9]), floats(data[10]), shapes[9][0], C, R, ints(data[11]), ints(data[12]), ints(data[13]),
                    n, shapes[13][0], shapes[13][1], shapes[16][0], floats(data[14]), shapes[14][0]};
  if (!cache.writable() || !cache.readable()) return 1;
  const std::unique_ptr<float[]> memory(new float[n * (D + 2 * Q + 2 * W + A + H * V)]);
  float *h = memory.get(), *qa = h + n * D, *qn = qa + n * Q, *latent = qn + n * Q, *rows = latent + n * W, *q = rows + n * W;
  float *out = q + n * A, *y = floats(data[23]);
  auto matrix = [&](int at, int i) { return dsv3::matrix(data[at], dtypes[at], data[18 + i], ints(data[22])[i]); };
  const dsv3::Matrix wq_a = matrix(2, 0), wq_b = matrix(4, 1), wkv_a = matrix(5, 2), wo = matrix(8, 3);
  normalise(x, n, D, floats(data[1]), eps, h);
  if (low_rank) {
    dsv3::multiply_all({{h, n, D, wq_a, Q, qa}, {h, n, D, wkv_a, W, latent}});
    normalise(qa, n, Q, floats(data[3]), eps, qn);
    dsv3::multiply_all({{qn, n, Q, wq_b, A, q}});
  } else {
    dsv3::multiply_all({{h, n, D, wq_b, A, q}, {h, n, D, wkv_a, W, latent}});
  }
  cache.write(latent, floats(data[6]), eps, rows);
  cache.attend(q, floats(data[7]), floats(data[15]), H, N, V, out);
  dsv3::multiply_all({{out, n, H * V, wo, D, y}});
  for (int64_t i = 0; i < n * D; ++i) y[i] += x[i];
  return 0;
}

}  // extern "C"
