// Causal multi-head latent attention on the CPU, float32: rotation, scores, softmax and values of one
// (sequence, head) in one task. Queries go in blocks of rows, each against the keys it may see, so that half
// of the square and, for packed documents, everything before a block's first document is never computed. A
// block's probabilities live in scratch; the backward computes them again from the saved maximum and inverse
// sum of each row.
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
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
typedef int32_t Int __attribute__((vector_size(LANES * 4)));
constexpr float INF = std::numeric_limits<float>::infinity();

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Int load(const int32_t* p) {
  Int v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline float sum(Vec v) {
  float total = v[0];
  for (int lane = 1; lane < LANES; ++lane) total += v[lane];
  return total;
}
inline int64_t round_up(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// exp(x) for x <= 0, relative error below 1e-7; 0 below -87, NaN stays. 2^n e^r with |r| <= ln(2) / 2.
inline Vec exp_vec(Vec x) {
  // 12582912 = 1.5 * 2^23 pushes the integer part into the low bits
  const Vec shifted = x * 1.44269504088896341f + 12582912.f;
  const Vec n = shifted - 12582912.f;
  const Vec r = x - n * 0.693359375f - n * -2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  Int bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const Int exponent = (bits - 0x4B400000 + 127) << 23;
  Vec power;
  std::memcpy(&power, &exponent, sizeof power);
  return x < -87.f ? Vec{} : p * power;
}

// Sizes in the names of the package: B sequences, T tokens, H heads, N nope, R rope, V value channels of a
// head.
struct Sizes {
  int64_t B, T, H, N, R, V, rope_batch;  // rope_batch: 1 or B, the first dim of cos and sin
  int64_t K() const { return N + R; }
  // Queries of a block, few enough that their scores stay in the L2 cache.
  int64_t rows() const { return T <= 4096 ? 64 : T <= 16384 ? 32 : 16; }
  int64_t columns() const { return round_up(T); }
};

// q [B, T, H*(N+R)], kv [B, T, H*(N+V)], k_pe [B, T, R], cos and sin [1 or B, T, R/2], segments [B, T] or [1]
// for none, scale [H]: the same number H times, whose length says how many heads there are.
struct Inputs {
  const float *q, *kv, *k_pe, *cos, *sin;
  const int32_t* segments;
  const float* scale;
  Sizes size;

  Inputs(void** data, const int* ndims, int64_t** shapes) {
    q = static_cast<const float*>(data[0]), kv = static_cast<const float*>(data[1]);
    k_pe = static_cast<const float*>(data[2]);
    cos = static_cast<const float*>(data[3]), sin = static_cast<const float*>(data[4]);
    segments = ndims[5] == 2 ? static_cast<const int32_t*>(data[5]) : nullptr;
    scale = static_cast<const float*>(data[6]);
    const int64_t H = shapes[6][0], R = shapes[2][2], N = shapes[0][2] / H - R;
    size = {shapes[0][0], shapes[0][1], H, N, R, shapes[1][2] / H - N, shapes[3][0]};
  }

  int64_t angles_at(int64_t b, int64_t t) const {
    return ((size.rope_batch == 1 ? 0 : b) * size.T + t) * (size.R / 2);
  }
  const float* cos_at(int64_t b, int64_t t) const { return cos + angles_at(b, t); }
  const float* sin_at(int64_t b, int64_t t) const { return sin + angles_at(b, t); }
};

// pairs (2i, 2i+1) of n channels times (cos + i sin); sign -1 turns back
inline void rotate(const float* x, const float* cos, const float* sin, float sign, float factor, int64_t n,
                   float* out) {
  for (int64_t i = 0; i < n / 2; ++i) {
    const float a = x[2 * i] * factor, b = x[2 * i + 1] * factor, c = cos[i], s = sin[i] * sign;
    out[2 * i] = a * c - b * s;
    out[2 * i + 1] = a * s + b * c;
  }
}

// What one (sequence, head) works on, in the calling thread's scratch.
struct Task {
  const Inputs& in;
  Sizes z;
  int64_t b, h;
  float *k, *q, *scores;     // k [T, N+R] rotated, q [rows, N+R] rotated and scaled, scores [rows, columns]
  int32_t *segment, *first;  // document of a key; first key of a query's document
  float* rest;               // further scratch of `extra` floats

  static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

  Task(const Inputs& inputs, int64_t index, size_t extra)
      : in(inputs), z(inputs.size), b(index / z.H), h(index % z.H) {
    const int64_t n_k = padded(z.T * z.K()), n_q = padded(z.rows() * z.K()),
                  n_s = padded(z.rows() * z.columns());
    const int64_t n_t = in.segments ? padded(z.columns() + LANES) : 0;  // read by whole vectors from s0 on
    k = dsv3::scratch(n_k + n_q + n_s + 2 * n_t + extra);
    q = k + n_k, scores = q + n_q;
    segment = reinterpret_cast<int32_t*>(scores + n_s), first = segment + n_t;
    rest = scores + n_s + 2 * n_t;
    for (int64_t t = 0; t < z.T; ++t) {
      std::memcpy(k + t * z.K(), kv_at(t), z.N * sizeof(float));
      rotate(in.k_pe + (b * z.T + t) * z.R, cos_at(t), sin_at(t), 1.f, 1.f, z.R, k + t * z.K() + z.N);
    }
    if (in.segments) find_documents();
  }

  const float* kv_at(int64_t t) const { return in.kv + ((b * z.T + t) * z.H + h) * (z.N + z.V); }
  const float* cos_at(int64_t t) const { return in.cos_at(b, t); }
  const float* sin_at(int64_t t) const { return in.sin_at(b, t); }

  void find_documents() {
    std::memcpy(segment, in.segments + b * z.T, z.T * sizeof(int32_t));
    std::fill(segment + z.T, segment + z.columns() + LANES, 0);
    std::vector<int32_t> starts;  // a document is one run, or several when an id comes back
    for (int64_t t = 0; t < z.T; ++t) {
      if (t > 0 && segment[t] == segment[t - 1]) {
        first[t] = first[t - 1];
        continue;
      }
      auto same = [&](int32_t s) { return segment[s] == segment[t]; };
      const auto found = std::find_if(starts.begin(), starts.end(), same);
      first[t] = found == starts.end() ? static_cast<int32_t>(t) : *found;
      if (found == starts.end()) starts.push_back(static_cast<int32_t>(t));
    }
  }

  // First key that any query of rows [t0, t1) may see.
  int64_t first_key(int64_t t0, int64_t t1) const {
    return in.segments ? *std::min_element(first + t0, first + t1) : 0;
  }

  // scores[i, j] = scale * <query t0 + i, key s0 + j>
  void block_scores(int64_t t0, int64_t t1, int64_t s0) {
    for (int64_t t = t0; t < t1; ++t) {
      const float* from = in.q + ((b * z.T + t) * z.H + h) * z.K();
      float* to = q + (t - t0) * z.K();
      for (int64_t i = 0; i < z.N; ++i) to[i] = from[i] * in.scale[h];
      rotate(from + z.N, cos_at(t), sin_at(t), 1.f, in.scale[h], z.R, to + z.N);
    }
    dsv3::sgemm('N', 'T', t1 - t0, t1 - s0, z.K(), 1.f, q, z.K(), k + s0 * z.K(), z.K(), 0.f, scores,
                z.columns());
  }

  // Puts -inf where query t may not look, up to the vector that holds key t; returns the row's maximum.
  float mask(float* row, int64_t t, int64_t s0) const {
    const int32_t last = static_cast<int32_t>(t - s0);
    Vec top = Vec{} - INF;
    for (int64_t j = 0; j <= last; j += LANES) {
      Vec x = load(row + j);
      if (in.segments) x = load(segment + s0 + j) == segment[t] ? x : Vec{} - INF;
      if (j + LANES > last + 1) {
        Int column;
        for (int lane = 0; lane < LANES; ++lane) column[lane] = static_cast<int32_t>(j) + lane;
        x = column <= last ? x : Vec{} - INF;
      }
      store(row + j, x);
      top = x > top ? x : top;
    }
    float highest = top[0];
    for (int lane = 1; lane < LANES; ++lane) highest = std::max(highest, top[lane]);
    return highest;
  }
};

// Row in place: factor * exp(row - highest), zeros after key t up to column n; returns the sum before the
// factor.
inline float exponentials(float* row, int64_t last, int64_t n, float highest, float factor) {
  Vec lanes = {};
  int64_t j = 0;
  for (; j <= last; j += LANES) {
    const Vec e = exp_vec(load(row + j) - highest);
    store(row + j, e * factor);
    lanes += e;
  }
  for (; j < n; j += LANES) store(row + j, Vec{});
  return sum(lanes);
}

// The gradients of one (sequence, head): its part of dq and dkv, and dk_pe_share [T, R], still rotated.
// With P the probabilities and dP = dO V': dV = P' dO, dS = P * (dP - rowsum(P * dP)), dQ = scale dS K, dK =
// scale dS' Q.
void head_backward(const Inputs& in, int64_t index, const float* stats, const float* dout, float* dq,
                   float* dkv, float* dk_pe_share) {
  const Sizes& z = in.size;
  const int64_t n_block = Task::padded(z.rows() * z.columns()), n_k = Task::padded(z.T * z.K());
  Task task(in, index, n_block + n_k + Task::padded(z.rows() * z.K()));
  float *dscores = task.rest, *dk = dscores + n_block, *dq_block = dk + n_k;
  const int64_t b = task.b, h = task.h, ld = z.columns(), ld_kv = z.H * (z.N + z.V), ld_out = z.H * z.V;
  float* const dkv_head = dkv + (b * z.T * z.H + h) * (z.N + z.V);
  std::memset(dk, 0, z.T * z.K() * sizeof(float));
  for (int64_t t = 0; t < z.T; ++t) std::memset(dkv_head + t * ld_kv + z.N, 0, z.V * sizeof(float));

  for (int64_t t0 = 0; t0 < z.T; t0 += z.rows()) {
    const int64_t t1 = std::min(t0 + z.rows(), z.T), s0 = task.first_key(t0, t1), rows = t1 - t0,
                  keys = t1 - s0;
    const float* const dout_block = dout + ((b * z.T + t0) * z.H + h) * z.V;
    task.block_scores(t0, t1, s0);
    dsv3::sgemm('N', 'T', rows, keys, z.V, 1.f, dout_block, ld_out, task.kv_at(s0) + z.N, ld_kv, 0.f, dscores,
                ld);
    for (int64_t i = 0; i < rows; ++i) {
      const float* stat = stats + (index * z.T + t0 + i) * 2;
      float *p = task.scores + i * ld, *ds = dscores + i * ld;
      task.mask(p, t0 + i, s0);
      exponentials(p, t0 + i - s0, keys, stat[0], stat[1]);
      std::fill(ds + keys, ds + round_up(keys), 0.f);  // the product left these out, whole vectors read them
      Vec lanes = {};
      for (int64_t j = 0; j < keys; j += LANES) lanes += load(p + j) * load(ds + j);
      const float mean = sum(lanes);
      for (int64_t j = 0; j < keys; j += LANES) store(ds + j, load(p + j) * (load(ds + j) - mean));
    }
    dsv3::sgemm('T', 'N', keys, z.V, rows, 1.f, task.scores, ld, dout_block, ld_out, 1.f,
                dkv_head + s0 * ld_kv + z.N, ld_kv);
    dsv3::sgemm('T', 'N', keys, z.K(), rows, 1.f, dscores, ld, task.q, z.K(), 1.f, dk + s0 * z.K(), z.K());
    dsv3::sgemm('N', 'N', rows, z.K(), keys, in.scale[h], dscores, ld, task.k + s0 * z.K(), z.K(), 0.f,
                dq_block, z.K());
    for (int64_t t = t0; t < t1; ++t) {
      const float* from = dq_block + (t - t0) * z.K();
      float* to = dq + ((b * z.T + t) * z.H + h) * z.K();
      std::memcpy(to, from, z.N * sizeof(float));
      rotate(from + z.N, task.cos_at(t), task.sin_at(t), -1.f, 1.f, z.R, to + z.N);
    }
  }
  for (int64_t t = 0; t < z.T; ++t) {
    std::memcpy(dkv_head + t * ld_kv, dk + t * z.K(), z.N * sizeof(float));
    std::memcpy(dk_pe_share + t * z.R, dk + t * z.K() + z.N, z.R * sizeof(float));
  }
}

}  // namespace

extern "C" {

// Inputs as in Inputs; outputs: out [B, T, H*V], rows [B, H, T, 2] (maximum score, 1 / sum of exponentials).
int mla_forward(int, void** data, int* ndims, int64_t** shapes, const char**, void*, void*) {
  const Inputs in(data, ndims, shapes);
  float *out = static_cast<float*>(data[7]), *stats = static_cast<float*>(data[8]);
  dsv3::parallel_for(in.size.B * in.size.H, [&](int64_t index) {
    Task task(in, index, 0);
    const Sizes& z = task.z;
    for (int64_t t0 = 0; t0 < z.T; t0 += z.rows()) {
      const int64_t t1 = std::min(t0 + z.rows(), z.T), s0 = task.first_key(t0, t1);
      float* block = out + ((task.b * z.T + t0) * z.H + task.h) * z.V;
      float* stat = stats + (index * z.T + t0) * 2;
      task.block_scores(t0, t1, s0);
      for (int64_t t = t0; t < t1; ++t) {
        float* row = task.scores + (t - t0) * z.columns();
        const float highest = task.mask(row, t, s0);
        stat[(t - t0) * 2] = highest;
        stat[(t - t0) * 2 + 1] = 1.f / exponentials(row, t - s0, t1 - s0, highest, 1.f);
      }
      dsv3::sgemm('N', 'N', t1 - t0, z.V, t1 - s0, 1.f, task.scores, z.columns(), task.kv_at(s0) + z.N,
                  z.H * (z.N + z.V), 0.f, block, z.H * z.V);
      for (int64_t i = 0; i < t1 - t0; ++i)
        for (int64_t v = 0; v < z.V; ++v) block[i * z.H * z.V + v] *= stat[i * 2 + 1];
    }
  });
  return 0;
}

// Inputs: those of mla_forward, then rows, dout; outputs: dq, dkv, dk_pe in the shapes of q, kv, k_pe.
int mla_backward(int, void** data, int* ndims, int64_t** shapes, const char**, void*, void*) {
  const Inputs in(data, ndims, shapes);
  const float *stats = static_cast<float*>(data[7]), *dout = static_cast<float*>(data[8]);
  float *dq = static_cast<float*>(data[9]), *dkv = static_cast<float*>(data[10]);
  float* dk_pe = static_cast<float*>(data[11]);
  const Sizes& z = in.size;
  // Every head leaves its share of dk_pe, still rotated; they are added in the order of the heads, so that
  // the sum does not depend on which thread came first. Sequences go in groups of about 32 tasks to bound
  // that memory.
  const int64_t group = std::min(std::max<int64_t>(32 / z.H, 1), z.B);
  const std::unique_ptr<float[]> shares(new float[group * z.H * z.T * z.R]);
  for (int64_t b0 = 0; b0 < z.B; b0 += group) {
    const int64_t b1 = std::min(b0 + group, z.B);
    dsv3::parallel_for((b1 - b0) * z.H, [&](int64_t share) {
      head_backward(in, b0 * z.H + share, stats, dout, dq, dkv, shares.get() + share * z.T * z.R);
    });
    dsv3::parallel_for(b1 - b0, [&](int64_t i) {
      for (int64_t t = 0; t < z.T; ++t) {
        float* total = shares.get() + (i * z.H * z.T + t) * z.R;
        for (int64_t h = 1; h < z.H; ++h)
          for (int64_t r = 0; r < z.R; ++r) total[r] += total[h * z.T * z.R + r];
        const int64_t b = b0 + i;
        rotate(total, in.cos_at(b, t), in.sin_at(b, t), -1.f, 1.f, z.R, dk_pe + (b * z.T + t) * z.R);
      }
    });
  }
  return 0;
}

}  // extern "C"
