// Cross entropy of float32 logits, alone and fused with the matmul that makes them, forward and backward. The
// forward keeps two numbers a token, m = max logit and s = ln sum exp(logit - m): their sum, the log-sum-exp,
// would lose the digits of s beside a large m. The backward is exp(logit - m - s). A label below 0 is
// ignored. All tiles are cut by the shapes alone, so that a result does not depend on the number of threads.
#include <cfloat>
#include <cmath>
#include <memory>

#include "common.h"

namespace {

using dsv3::exp_nonpositive;
using dsv3::parallel_for;

constexpr int kLanes = 16;

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// max and sum of exp(x - max) of the logits seen so far. A NaN or +inf logit makes the sum NaN, -inf counts
// as absent.
struct Softmax {
  float max = -FLT_MAX;
  double sum = 0;

  void add(const float* x, int64_t n) {
    constexpr int64_t block = 1024;
    for (; n > 0; x += block, n -= block) one_block(x, std::min(n, block));
  }

  float log_sum() const { return static_cast<float>(std::log(sum)); }

 private:
  void one_block(const float* x, int64_t n) {
    float top[kLanes], total[kLanes] = {};
    std::fill(top, top + kLanes, max);
    const int64_t whole = n - n % kLanes;
    for (int64_t j = 0; j < whole; j += kLanes)
      for (int l = 0; l < kLanes; ++l) top[l] = x[j + l] > top[l] ? x[j + l] : top[l];
    for (int64_t j = whole; j < n; ++j) top[j - whole] = x[j] > top[j - whole] ? x[j] : top[j - whole];
    const float now = *std::max_element(top, top + kLanes);
    for (int64_t j = 0; j < whole; j += kLanes)
      for (int l = 0; l < kLanes; ++l) total[l] += exp_nonpositive(x[j + l] - now);
    for (int64_t j = whole; j < n; ++j) total[j - whole] += exp_nonpositive(x[j] - now);
    double added = 0;
    for (int l = 0; l < kLanes; ++l) added += total[l];
    sum = sum * exp_nonpositive(max - now) + added;
    max = now;
  }
};

// out[j] = (softmax(x)[first + j] - (first + j == label)) * scale, for the n logits from `first` on.
void gradient(const float* x, int64_t n, int64_t first, int32_t label, const float* stats, float scale,
              float* out) {
  const float m = stats[0], s = stats[1];
  for (int64_t j = 0; j < n; ++j) out[j] = exp_nonpositive((x[j] - m) - s) * scale;
  if (label >= first && label < first + n) out[label - first] -= scale;
}

int check_labels(const int32_t* labels, int64_t tokens, int64_t W) {
  for (int64_t t = 0; t < tokens; ++t)
    if (labels[t] >= W) {
      std::fprintf(stderr, "dsv3: label %d of token %lld is outside a vocabulary of %lld\n", labels[t],
                   static_cast<long long>(t), static_cast<long long>(W));
      return 1;
    }
  return 0;
}

// The fused kernels take tokens by kRows in the forward and kChunk in the backward, the vocabulary by kTile.
// Their buffers' rows are kPad longer, since rows a power of two apart would share the same few cache lines.
constexpr int64_t kRows = 256, kChunk = 512, kTile = 1024, kPad = 16;

}  // namespace

extern "C" {

// logits [tokens, W], labels [tokens] int32 -> loss [tokens], stats [tokens, 2] (max,
// ln sum exp(logit - max))
int cross_entropy(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const float* logits = static_cast<float*>(data[0]);
  const int32_t* labels = static_cast<int32_t*>(data[1]);
  float *loss = static_cast<float*>(data[2]), *stats = static_cast<float*>(data[3]);
  const int64_t tokens = shapes[0][0], W = shapes[0][1], step = std::max<int64_t>(1, 16384 / W);
  if (int error = check_labels(labels, tokens, W)) return error;
  parallel_for(blocks(tokens, step), [&](int64_t task) {
    for (int64_t t = task * step, end = std::min(tokens, t + step); t < end; ++t) {
      Softmax softmax;
      if (labels[t] >= 0) softmax.add(logits + t * W, W);
      stats[2 * t] = softmax.max;
      stats[2 * t + 1] = labels[t] < 0 ? 0.0f : softmax.log_sum();
      loss[t] = labels[t] < 0 ? 0.0f : (softmax.max - logits[t * W + labels[t]]) + stats[2 * t + 1];
    }
  });
  return 0;
}

// logits, labels, stats, dloss [tokens] -> dlogits [tokens, W]
int cross_entropy_grad(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const float* logits = static_cast<float*>(data[0]);
  const int32_t* labels = static_cast<int32_t*>(data[1]);
  const float *stats = static_cast<float*>(data[2]), *dloss = static_cast<float*>(data[3]);
  float* dlogits = static_cast<float*>(data[4]);
  const int64_t tokens = shapes[0][0], W = shapes[0][1], step = std::max<int64_t>(1, 16384 / W);
  parallel_for(blocks(tokens, step), [&](int64_t task) {
    for (int64_t t = task * step, end = std::min(tokens, t + step); t < end; ++t) {
      float* out = dlogits + t * W;
      if (labels[t] < 0) std::fill(out, out + W, 0.0f);
      else gradient(logits + t * W, W, 0, labels[t], stats + 2 * t, dloss[t], out);
    }
  });
  return 0;
}

// h [tokens, D], w [D, W], labels [tokens] int32 -> loss [tokens], stats [tokens, 2]
int linear_cross_entropy(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const float *h = static_cast<float*>(data[0]), *w = static_cast<float*>(data[1]);
  const int32_t* labels = static_cast<int32_t*>(data[2]);
  float *loss = static_cast<float*>(data[3]), *stats = static_cast<float*>(data[4]);
  const int64_t tokens = shapes[0][0], D = shapes[0][1], W = shapes[1][1];
  if (int error = check_labels(labels, tokens, W)) return error;
  parallel_for(blocks(tokens, kRows), [&](int64_t task) {
    const int64_t start = task * kRows, rows = std::min(kRows, tokens - start);
    constexpr int64_t stride = kTile + kPad;
    float* tile = dsv3::scratch(kRows * stride);
    Softmax softmax[kRows];
    float picked[kRows] = {};
    for (int64_t first = 0; first < W; first += kTile) {
      const int64_t n = std::min(kTile, W - first);
      dsv3::sgemm('N', 'N', rows, n, D, 1.0f, h + start * D, D, w + first, W, 0.0f, tile, stride);
      for (int64_t r = 0; r < rows; ++r) {
        const int32_t label = labels[start + r];
        if (label < 0) continue;
        softmax[r].add(tile + r * stride, n);
        if (label >= first && label < first + n) picked[r] = tile[r * stride + label - first];
      }
    }
    for (int64_t r = 0, t = start; r < rows; ++r, ++t) {
      stats[2 * t] = softmax[r].max;
      stats[2 * t + 1] = labels[t] < 0 ? 0.0f : softmax[r].log_sum();
      loss[t] = labels[t] < 0 ? 0.0f : (softmax[r].max - picked[r]) + stats[2 * t + 1];
    }
  });
  return 0;
}

// h, w, labels, stats, dloss [tokens] -> dh [tokens, D], dw [D, W]. For each chunk of tokens: threads take
// tiles of the vocabulary, make the tile's gradient of the logits and add to the tile's columns of dw, which
// nobody else writes; then threads take blocks of dh.
int linear_cross_entropy_grad(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const float *h = static_cast<float*>(data[0]), *w = static_cast<float*>(data[1]);
  const int32_t* labels = static_cast<int32_t*>(data[2]);
  const float *stats = static_cast<float*>(data[3]), *dloss = static_cast<float*>(data[4]);
  float *dh = static_cast<float*>(data[5]), *dw = static_cast<float*>(data[6]);
  const int64_t tokens = shapes[0][0], D = shapes[0][1], W = shapes[1][1], stride = W + kPad;
  std::unique_ptr<float[]> dlogits(new float[std::min(kChunk, tokens) * stride]);
  if (!tokens) std::fill(dw, dw + D * W, 0.0f);
  for (int64_t start = 0; start < tokens; start += kChunk) {
    const int64_t rows = std::min(kChunk, tokens - start);
    parallel_for(blocks(W, kTile), [&](int64_t task) {
      const int64_t first = task * kTile, n = std::min(kTile, W - first);
      dsv3::sgemm('N', 'N', rows, n, D, 1.0f, h + start * D, D, w + first, W, 0.0f, dlogits.get() + first,
                  stride);
      for (int64_t r = 0, t = start; r < rows; ++r, ++t) {
        float* out = dlogits.get() + r * stride + first;
        if (labels[t] < 0) std::fill(out, out + n, 0.0f);
        else gradient(out, n, first, labels[t], stats + 2 * t, dloss[t], out);
      }
      dsv3::sgemm('T', 'N', D, n, rows, 1.0f, h + start * D, D, dlogits.get() + first, stride,
                  start ? 1.0f : 0.0f, dw + first, W);
    });
    constexpr int64_t step = 256;
    const int64_t columns = blocks(D, step);
    parallel_for(blocks(rows, step) * columns, [&](int64_t task) {
      const int64_t r = task / columns * step, d = task % columns * step;
      dsv3::sgemm('N', 'T', std::min(step, rows - r), std::min(step, D - d), W, 1.0f,
                  dlogits.get() + r * stride, stride, w + d * W, W, 0.0f, dh + (start + r) * D + d, D);
    });
  }
  return 0;
}
}
