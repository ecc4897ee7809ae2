// Mixture of experts on the CPU: choice and counts of experts, grouped matmul, routed experts and gradients.
//
// A "pair" is one (token, slot) of idx [T, K]; pair p = t * K + k. Pairs are sorted by expert, stably, so
// that the rows of an expert are contiguous: rows ends[e-1] .. ends[e]. Sizes follow the legend T tokens, D
// hidden, F ffn, E experts, K top-k, and P = T * K pairs. Every sum is taken in an order that does not depend
// on the threads: results are bit-reproducible. A function returns 0, or 1 after it has said on stderr what
// was wrong with its integers.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <vector>

#include "products.h"

namespace {

using dsv3::parallel_for;
using dsv3::sgemm;

constexpr int64_t kLanes = 16;

// ---- elementwise ------------------------------------------------------------------------------------------

// exp(x) for x <= 88, flushed to 2^-126 below -87.3; relative error about 1e-7. Branch-free, so that a loop
// over it becomes vector code: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial in r, and n added to the
// exponent's bits.
inline float fast_exp(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.3f ? -87.3f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9875691e-4f;
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 5.0e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + (127u << 23);  // the round constant's own bits leave at the top
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

// The sum of n floats in a fixed order: kLanes running sums, then those in turn.
float sum(const float* values, int64_t n) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane];
  for (int64_t lane = 0; i + lane < n; ++lane) lanes[lane] += values[i + lane];
  float total = 0;
  for (float lane : lanes) total += lane;
  return total;
}

// out = weight * silu(gate) * up
void swiglu(const float* gate, const float* __restrict up, float weight, float* out, int64_t n) {  // out may be gate
  for (int64_t i = 0; i < n; ++i) {
    const float sigmoid = 1.0f / (1.0f + fast_exp(-gate[i]));
    out[i] = weight * (gate[i] * sigmoid * up[i]);
  }
}

// The backward of swiglu, for one row. hidden comes in as d_hidden (without the weight) and goes out as the
// weighted hidden, which the gradient of w_down needs. Returns the gradient of the weight.
float swiglu_grad(const float* __restrict gate, const float* __restrict up, float weight,
                  float* __restrict hidden, float* __restrict d_gate, float* __restrict d_up, int64_t n) {
  constexpr int64_t kBlock = 256;
  float products[kBlock], d_weight = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t size = std::min(kBlock, n - start);
    const float *g = gate + start, *u = up + start;
    float *h = hidden + start, *dg = d_gate + start, *du = d_up + start;
    for (int64_t i = 0; i < size; ++i) {
      const float e = fast_exp(-g[i]), sigmoid = 1.0f / (1.0f + e), silu = g[i] * sigmoid;
      const float value = silu * u[i];
      const float d = weight * h[i];
      products[i] = h[i] * value;
      dg[i] = d * u[i] * (sigmoid + silu * (e * sigmoid));  // 1 - sigmoid = e * sigmoid, without cancellation
      du[i] = d * silu;
      h[i] = weight * value;
    }
    d_weight += sum(products, size);
  }
  return d_weight;
}

// y = x / rms(x) * weight, a row at a time
void normalise(const float* x, int64_t n, int64_t D, const float* weight, float eps, float* y) {
  for (int64_t i = 0; i < n; ++i) {
    float squares[kLanes] = {}, total = 0;
    const float* row = x + i * D;
    for (int64_t d = 0; d < D; ++d) squares[d % kLanes] += row[d] * row[d];
    for (float s : squares) total += s;
    const float scale = 1.0f / std::sqrt(total / D + eps);
    for (int64_t d = 0; d < D; ++d) y[i * D + d] = row[d] * scale * weight[d];
  }
}

// ---- groups of rows ---------------------------------------------------------------------------------------

struct Rows {
  int64_t group, begin, end;
};

// The rows of every group in pieces of similar size, the largest first so that the threads end together.
std::vector<Rows> row_pieces(const int32_t* ends, int64_t groups) {
  const int64_t limit = std::clamp<int64_t>((ends[groups - 1] + 7) / 8, 32, 256);
  std::vector<Rows> pieces;
  for (int64_t g = 0, begin = 0; g < groups; begin = ends[g++]) {
    const int64_t size = ends[g] - begin, n = (size + limit - 1) / limit;
    for (int64_t i = 0; i < n; ++i) pieces.push_back({g, begin + size * i / n, begin + size * (i + 1) / n});
  }
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const Rows& a, const Rows& b) { return a.end - a.begin > b.end - b.begin; });
  return pieces;
}

// out[g] = left[rows of g]^T right[rows of g], with left [rows, M], right [rows, N], out [groups, M, N].
struct Outer {
  const float* left;
  int64_t M;
  const float* right;
  int64_t N;
  float* out;
};

// Every element of out is written once, empty groups included.
void outer_products(std::initializer_list<Outer> products, const int32_t* ends, int64_t groups) {
  struct Task {
    const Outer* outer;
    Rows rows;
    int64_t from, to;  // rows of out[g]
    int64_t cost() const { return (to - from) * outer->N * (rows.end - rows.begin + 1); }
  };
  const int64_t total = std::max<int64_t>(ends[groups - 1], 1);
  std::vector<Task> tasks;
  for (const Outer& outer : products) {
    for (int64_t g = 0, begin = 0; g < groups; begin = ends[g++]) {
      const int64_t pieces = std::max<int64_t>((ends[g] - begin) * 8 / total, 1);
      const int64_t step = ((outer.M + pieces - 1) / pieces + kLanes - 1) / kLanes * kLanes;
      for (int64_t from = 0; from < outer.M; from += step)
        tasks.push_back({&outer, {g, begin, ends[g]}, from, std::min(from + step, outer.M)});
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.cost() > b.cost(); });
  parallel_for(tasks.size(), [&](int64_t i) {
    const Task& task = tasks[i];
    const auto [left, M, right, N, out] = *task.outer;
    const auto [group, begin, end] = task.rows;
    float* target = out + (group * M + task.from) * N;
    if (begin == end)
      std::memset(target, 0, (task.to - task.from) * N * sizeof(float));
    else
      sgemm('T', 'N', task.to - task.from, N, end - begin, 1, left + begin * M + task.from, M,
            right + begin * N, N, 0, target, N);
  });
}

bool valid_ends(const int32_t* ends, int64_t groups, int64_t rows) {
  for (int64_t g = 0, before = 0; g < groups; before = ends[g++]) {
    if (ends[g] < before || ends[g] > rows) {
      std::fprintf(stderr, "dsv3: group_end[%ld] = %d: expected cumulative ends, from %ld to the %ld rows\n",
                   (long)g, ends[g], (long)before, (long)rows);
      return false;
    }
  }
  return true;
}

// out[rows of g] = x[rows of g] op(w[g]), zero past the last group. op(w[g]) is [K, N]; transposed, w[g] is
// [N, K].
int multiply_groups(char transpose, const float* x, const float* w, const int32_t* ends, float* out,
                    int64_t rows, int64_t K, int64_t N, int64_t groups) {
  if (!valid_ends(ends, groups, rows)) return 1;
  const auto pieces = row_pieces(ends, groups);
  parallel_for(pieces.size(), [&](int64_t i) {
    const auto [g, begin, end] = pieces[i];
    sgemm('N', transpose, end - begin, N, K, 1, x + begin * K, K, w + g * K * N, transpose == 'N' ? N : K, 0,
          out + begin * N, N);
  });
  std::memset(out + ends[groups - 1] * N, 0, (rows - ends[groups - 1]) * N * sizeof(float));
  return 0;
}

// ---- tokens and pairs -------------------------------------------------------------------------------------

// order[row] = pair and ends[e] = end of the rows of expert e: a stable counting sort by expert.
bool sort_pairs(const int32_t* idx, int64_t pairs, int64_t experts, int32_t* order, int32_t* ends) {
  std::vector<int32_t> next(experts + 1, 0);
  for (int64_t p = 0; p < pairs; ++p) {
    if (idx[p] < 0 || idx[p] >= experts) {
      std::fprintf(stderr, "dsv3: idx holds expert %d: expected 0 to %ld\n", idx[p], (long)experts - 1);
      return false;
    }
    ++next[idx[p] + 1];
  }
  for (int64_t e = 0; e < experts; ++e) ends[e] = next[e + 1] += next[e];
  for (int64_t p = 0; p < pairs; ++p) order[next[idx[p]]++] = p;
  return true;
}

// out[row] = x[token of the pair at row] for the rows [begin, end).
void gather(const float* x, const int32_t* order, int64_t begin, int64_t end, int64_t K, int64_t D,
            float* out) {
  for (int64_t row = begin; row < end; ++row)
    std::memcpy(out + (row - begin) * D, x + order[row] / K * D, D * sizeof(float));
}

// out[t] = the sum of the rows of token t, slot 0 first.
void combine(const float* rows, const int32_t* order, int64_t T, int64_t K, int64_t D, float* out) {
  std::vector<int32_t> row_of(T * K);
  for (int64_t row = 0; row < T * K; ++row) row_of[order[row]] = row;
  constexpr int64_t kTokens = 64;
  parallel_for((T + kTokens - 1) / kTokens, [&](int64_t task) {
    for (int64_t t = task * kTokens; t < std::min(T, (task + 1) * kTokens); ++t) {
      float* __restrict y = out + t * D;
      std::memcpy(y, rows + row_of[t * K] * D, D * sizeof(float));
      for (int64_t k = 1; k < K; ++k) {
        const float* __restrict row = rows + row_of[t * K + k] * D;
        for (int64_t d = 0; d < D; ++d) y[d] += row[d];
      }
    }
  });
}

inline bool beats(float a, float b) { return a > b || (b != b && a == a); }  // a number beats NaN

// The k highest of n values, highest first, ties to the lowest index. The indices are distinct, NaN or not.
void highest(const float* values, int64_t n, int64_t k, int32_t* chosen) {
  for (int64_t i = 0; i < n; ++i) {
    if (i >= k && !beats(values[i], values[chosen[k - 1]])) continue;
    int64_t place = std::min(i, k - 1);
    for (; place > 0 && beats(values[i], values[chosen[place - 1]]); --place)
      chosen[place] = chosen[place - 1];
    chosen[place] = i;
  }
}

// Group-limited choice of K of E experts. options: groups, groups kept, 1 when a group scores by its two highest.
struct Choice {
  int64_t E, groups, kept, size, summed, K;

  Choice(int64_t E, const int32_t* options, int64_t K)
      : E(E), groups(options[0]), kept(options[1]), size(E / groups), summed(std::min<int64_t>(options[2] ? 2 : 1, size)), K(K) {}

  // row [E] -> idx [K]
  void operator()(const float* row, int32_t* idx) const {
    std::vector<float> limited, scores(groups);
    std::vector<int32_t> best(std::max(groups, size));
    if (kept < groups) {
      for (int64_t g = 0; g < groups; ++g) {
        highest(row + g * size, size, summed, best.data());
        scores[g] = row[g * size + best[0]] + (summed == 2 ? row[g * size + best[1]] : 0.0f);
      }
      highest(scores.data(), groups, kept, best.data());
      limited.assign(E, -std::numeric_limits<float>::infinity());
      for (int64_t i = 0; i < kept; ++i)
        std::memcpy(&limited[best[i] * size], row + best[i] * size, size * sizeof(float));
      row = limited.data();
    }
    highest(row, E, K, idx);
  }
};

// scores[e]: sigmoid, or softmax, of a token's logits.
void score(const float* logits, int64_t E, bool sigmoid, float* scores) {
  if (sigmoid) {
    for (int64_t e = 0; e < E; ++e) scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
    return;
  }
  const float top = *std::max_element(logits, logits + E);
  for (int64_t e = 0; e < E; ++e) scores[e] = std::exp(logits[e] - top);
  const float total = sum(scores, E);
  for (int64_t e = 0; e < E; ++e) scores[e] /= total;
}

float* floats(void* pointer) { return static_cast<float*>(pointer); }
int32_t* ints(void* pointer) { return static_cast<int32_t*>(pointer); }

// ---- experts ----------------------------------------------------------------------------------------------

// What ``experts`` and ``experts_int8`` below share; out: their results. multiply(i, e, a, m, depth, width, product) is product
// [m, width] = a [m, depth] times matrix i of expert e: gate, up, down.
template <class Multiply>
int run_experts(const float* x, const int32_t* idx, const float* weights, const int64_t* w_gate, const int64_t* pairs,
                void** out, Multiply multiply) {
  const int64_t E = w_gate[0], D = w_gate[1], F = w_gate[2], T = pairs[0], K = pairs[1];
  float *y = floats(out[0]), *gate = floats(out[1]), *up = floats(out[2]), *rows = floats(out[5]);
  int32_t *order = ints(out[3]), *ends = ints(out[4]);
  if (!sort_pairs(idx, T * K, E, order, ends)) return 1;
  const auto pieces = row_pieces(ends, E);
  parallel_for(pieces.size(), [&](int64_t i) {
    const auto [e, begin, end] = pieces[i];
    const int64_t m = end - begin;
    float *inputs = dsv3::scratch(m * (D + F)), *hidden = inputs + m * D;
    float *g = gate + begin * F, *u = up + begin * F;
    gather(x, order, begin, end, K, D, inputs);
    multiply(0, e, inputs, m, D, F, g);
    multiply(1, e, inputs, m, D, F, u);
    // The weight scales the hidden row, which is shorter than the output's and gives the same product.
    for (int64_t r = 0; r < m; ++r)
      swiglu(g + r * F, u + r * F, weights[order[begin + r]], hidden + r * F, F);
    multiply(2, e, hidden, m, F, D, rows + begin * D);
  });
  combine(rows, order, T, K, D, y);
  return 0;
}

}  // namespace

extern "C" {

// x [M, K], w [E, K, N], group_end [E] -> out [M, N]
int grouped_matmul(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  return multiply_groups('N', floats(data[0]), floats(data[1]), ints(data[2]), floats(data[3]), shapes[0][0],
                         shapes[0][1], shapes[1][2], shapes[1][0]);
}

// x [M, K], w [E, K, N], group_end [E], d_out [M, N] -> dx [M, K], dw [E, K, N]
int grouped_matmul_grad(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const int64_t rows = shapes[0][0], K = shapes[0][1], N = shapes[1][2], groups = shapes[1][0];
  const int32_t* ends = ints(data[2]);
  const float* d_out = floats(data[3]);
  if (multiply_groups('T', d_out, floats(data[1]), ends, floats(data[4]), rows, N, K, groups)) return 1;
  outer_products({{floats(data[0]), K, d_out, N, floats(data[5])}}, ends, groups);
  return 0;
}

// x [T, D], w_gate [E, D, F], w_up [E, D, F], w_down [E, F, D], idx [T, K], weights [T, K]
// -> y [T, D], gate [P, F], up [P, F], order [P], ends [E], and P * D floats of scratch
int experts(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  // No expert has more rows than there are tokens: with few, a token's result owes nothing to the others.
  const bool few = shapes[0][0] <= dsv3::kFewRows;
  auto multiply = [&](int i, int64_t e, const float* a, int64_t m, int64_t depth, int64_t width, float* product) {
    const float* w = floats(data[1 + i]) + e * depth * width;
    if (few)
      dsv3::multiply({a, m, depth, {w}, width, product});
    else
      sgemm('N', 'N', m, width, depth, 1, a, depth, w, width, 0, product, width);
  };
  return run_experts(floats(data[0]), ints(data[4]), floats(data[5]), shapes[1], shapes[4], data + 6, multiply);
}

// x, gate [E, D, F], up (the same), down [E, F, D], idx, weights, scales of gate and up [E, F] and down [E, D], rounds [3] int32
// -> as experts. A matrix is int8, or float32, and then anything may stand in the place of its scale.
int experts_int8(int, void** data, int*, int64_t** shapes, const char** dtypes, void*, void*) {
  auto multiply = [&](int i, int64_t e, const float* a, int64_t m, int64_t depth, int64_t width, float* product) {
    const dsv3::Matrix w = dsv3::matrix(data[1 + i], dtypes[1 + i], data[6 + i], ints(data[9])[i]);
    dsv3::multiply({a, m, depth, w.at(e, depth, width), width, product});
  };
  return run_experts(floats(data[0]), ints(data[4]), floats(data[5]), shapes[1], shapes[4], data + 10, multiply);
}

// the inputs of experts, then gate [P, F], up [P, F], order [P], ends [E], dy [T, D]
// -> dx, dw_gate, dw_up, dw_down, d_weights, and P * (2 D + 3 F) floats of scratch
int experts_grad(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const int64_t T = shapes[0][0], D = shapes[0][1], E = shapes[1][0], F = shapes[1][2];
  const int64_t K = shapes[4][1], P = T * K;
  const float *x = floats(data[0]), *w_gate = floats(data[1]), *w_up = floats(data[2]);
  const float* w_down = floats(data[3]);
  const float *weights = floats(data[5]), *gate = floats(data[6]), *up = floats(data[7]);
  const float* dy = floats(data[10]);
  const int32_t *order = ints(data[8]), *ends = ints(data[9]);
  float *dx = floats(data[11]), *d_weights = floats(data[15]);
  float *inputs = floats(data[16]), *d_outputs = inputs + P * D;
  float *hidden = d_outputs + P * D, *d_gate = hidden + P * F, *d_up = d_gate + P * F;
  const auto pieces = row_pieces(ends, E);
  parallel_for(pieces.size(), [&](int64_t i) {
    const auto [e, begin, end] = pieces[i];
    gather(x, order, begin, end, K, D, inputs + begin * D);
    gather(dy, order, begin, end, K, D, d_outputs + begin * D);
    sgemm('N', 'T', end - begin, F, D, 1, d_outputs + begin * D, D, w_down + e * F * D, D, 0,
          hidden + begin * F, F);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * F;
      d_weights[order[row]] =
          swiglu_grad(gate + at, up + at, weights[order[row]], hidden + at, d_gate + at, d_up + at, F);
    }
  });
  outer_products({{inputs, D, d_gate, F, floats(data[12])},
                  {inputs, D, d_up, F, floats(data[13])},
                  {hidden, F, d_outputs, D, floats(data[14])}},
                 ends, E);
  float* d_inputs = inputs;  // the gathered inputs have served
  parallel_for(pieces.size(), [&](int64_t i) {
    const auto [e, begin, end] = pieces[i];
    float* d = d_inputs + begin * D;
    sgemm('N', 'T', end - begin, D, F, 1, d_gate + begin * F, F, w_gate + e * D * F, F, 0, d, D);
    sgemm('N', 'T', end - begin, D, F, 1, d_up + begin * F, F, w_up + e * D * F, F, 1, d, D);
  });
  combine(d_inputs, order, T, K, D, dx);
  return 0;
}

// choice [T, E], options [3] int32 (groups, groups kept, 1 when a group scores by its two highest)
// -> idx [T, K]
int choose_experts(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const int64_t T = shapes[0][0], E = shapes[0][1], K = shapes[2][1];
  const Choice choice(E, ints(data[1]), K);
  constexpr int64_t kTokens = 64;
  parallel_for((T + kTokens - 1) / kTokens, [&](int64_t task) {
    for (int64_t t = task * kTokens; t < std::min(T, (task + 1) * kTokens); ++t)
      choice(floats(data[0]) + t * E, ints(data[2]) + t * K);
  });
  return 0;
}

// idx of any shape, flattened by the caller: [P] int32 -> counts [E] int32
int count_experts(int, void** data, int*, int64_t** shapes, const char**, void*, void*) {
  const int64_t pairs = shapes[0][0], experts = shapes[1][0];
  const int32_t* idx = ints(data[0]);
  int32_t* counts = ints(data[1]);
  std::memset(counts, 0, experts * sizeof(int32_t));
  for (int64_t p = 0; p < pairs; ++p)
    if (idx[p] >= 0 && idx[p] < experts) ++counts[idx[p]];
  return 0;
}

// A dense feed-forward block of few tokens. x [n, D], its norm [D], w_gate and w_up [D, F], w_down [F, D], eps [1], scales of
// the three matrices and rounds [3] int32 (as in experts_int8) -> x + mlp [n, D]
int mlp_step(int, void** data, int*, int64_t** shapes, const char** dtypes, void*, void*) {
  const int64_t n = shapes[0][0], D = shapes[0][1], F = shapes[2][1];
  const float *x = floats(data[0]), *norm = floats(data[1]), eps = *floats(data[5]);
  auto w = [&](int i) { return dsv3::matrix(data[2 + i], dtypes[2 + i], data[6 + i], ints(data[9])[i]); };
  float* y = floats(data[10]);
  const std::unique_ptr<float[]> memory(new float[n * (D + 2 * F)]);
  float *h = memory.get(), *gate = h + n * D, *up = gate + n * F;
  normalise(x, n, D, norm, eps, h);
  dsv3::multiply_all({{h, n, D, w(0), F, gate}, {h, n, D, w(1), F, up}});
  swiglu(gate, up, 1.0f, gate, n * F);
  dsv3::multiply_all({{gate, n, F, w(2), D, y}});
  for (int64_t i = 0; i < n * D; ++i) y[i] += x[i];
  return 0;
}

// A mixture-of-experts block of few tokens. x [n, D], its norm [D], router [D, E], bias [E], w_gate and w_up [E, D, F], w_down
// [E, F, D], shared w_gate and w_up [D, G], w_down [G, D] ([1] each where there are none), options int32 (those of
// choose_experts, 1 for sigmoid scores, 1 for weights that sum to one, K), numbers (eps, factor of the weights), scales of the
// experts' three matrices and of the shared ones, rounds [6] int32 (as in experts_int8) -> x + moe [n, D]
int moe_step(int, void** data, int* ndims, int64_t** shapes, const char** dtypes, void*, void*) {
  const int64_t n = shapes[0][0], D = shapes[0][1], E = shapes[2][1], F = shapes[4][2], G = ndims[7] == 2 ? shapes[7][1] : 0;
  const float *x = floats(data[0]), *bias = floats(data[3]), *numbers = floats(data[11]);
  const int32_t* options = ints(data[10]);
  const int64_t K = options[5], P = n * K;
  auto w = [&](int i) { return dsv3::matrix(data[4 + i], dtypes[4 + i], data[12 + i], ints(data[18])[i]); };
  float* y = floats(data[19]);
  const std::unique_ptr<float[]> memory(new float[n * (2 * D + 2 * E + 2 * G + K) + P * (2 * D + 2 * F)]);
  float *h = memory.get(), *common = h + n * D, *logits = common + n * D, *scores = logits + n * E, *gate = scores + n * E;
  float *up = gate + n * G, *weights = up + n * G, *inputs = weights + P, *rows = inputs + P * D, *g = rows + P * D, *u = g + P * F;
  std::vector<int32_t> idx(P), order(P), ends(E);

  normalise(x, n, D, floats(data[1]), numbers[0], h);
  if (G) {
    dsv3::multiply_all({{h, n, D, {floats(data[2])}, E, logits}, {h, n, D, w(3), G, gate}, {h, n, D, w(4), G, up}});
    swiglu(gate, up, 1.0f, gate, n * G);
  } else {
    dsv3::multiply_all({{h, n, D, {floats(data[2])}, E, logits}});
  }
  const Choice choose(E, options, K);
  for (int64_t t = 0; t < n; ++t) {
    float *s = scores + t * E, *l = logits + t * E, *w = weights + t * K, total = 0;
    score(l, E, options[3], s);
    for (int64_t e = 0; e < E; ++e) l[e] = s[e] + bias[e];
    choose(l, &idx[t * K]);
    for (int64_t k = 0; k < K; ++k) total += w[k] = s[idx[t * K + k]];  // of the unbiased scores
    for (int64_t k = 0; k < K; ++k) w[k] = (options[4] ? w[k] / (total + 1e-20f) : w[k]) * numbers[1];
  }
  if (!sort_pairs(idx.data(), P, E, order.data(), ends.data())) return 1;
  gather(h, order.data(), 0, P, K, D, inputs);
  const auto pieces = row_pieces(ends.data(), E);
  const int64_t shared = G ? 1 : 0;
  auto task = [&](int64_t i) {
    if (i == (int64_t)pieces.size()) return dsv3::multiply({gate, n, G, w(5), D, common});
    const auto [e, begin, end] = pieces[i];
    const int64_t m = end - begin;
    dsv3::multiply({inputs + begin * D, m, D, w(0).at(e, D, F), F, g + begin * F});
    dsv3::multiply({inputs + begin * D, m, D, w(1).at(e, D, F), F, u + begin * F});
    for (int64_t r = begin; r < end; ++r) swiglu(g + r * F, u + r * F, weights[order[r]], g + r * F, F);
    dsv3::multiply({g + begin * F, m, F, w(2).at(e, F, D), D, rows + begin * D});
  };
  const int64_t tasks = pieces.size() + shared;
  if (n * D * (3 * K * F + G) > dsv3::kAlone)
    parallel_for(tasks, task);
  else
    for (int64_t i = 0; i < tasks; ++i) task(i);
  std::vector<int32_t> row_of(P);
  for (int64_t row = 0; row < P; ++row) row_of[order[row]] = row;
  for (int64_t t = 0; t < n; ++t)
    for (int64_t d = 0; d < D; ++d) {
      float routed = 0;
      for (int64_t k = 0; k < K; ++k) routed += rows[row_of[t * K + k] * D + d];
      y[t * D + d] = x[t * D + d] + (G ? routed + common[t * D + d] : routed);
    }
  return 0;
}
}
