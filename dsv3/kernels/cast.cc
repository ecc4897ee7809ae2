// Casts between float32, bfloat16 and FP8 E4M3, and transposes, on the host, for checkpoints. Called by ctypes
// from many Python threads at once: one thread each, no state, no pool.
//
// A matrix is an address and the bytes from one row to the next; elements of a row lie side by side. Nothing
// is assumed of alignment, since tensors start anywhere in a file: load and store are memcpy, which compiles
// to plain (vector) moves.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

namespace {

template <class T>
inline T load(const char* p, int64_t i) {
  T value;
  std::memcpy(&value, p + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

template <class T>
inline void store(char* p, int64_t i, T value) {
  std::memcpy(p + i * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
}

inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

constexpr uint32_t kInf = 0x7f800000, kMagnitude = 0x7fffffff;

// condition ? a : b by masks: a branch, which GCC makes of a choice between floating-point results, would keep
// loops from vectorising.
inline uint32_t choose(bool condition, uint32_t a, uint32_t b) {
  const uint32_t mask = -static_cast<uint32_t>(condition);
  return (a & mask) | (b & ~mask);
}

// -- one element. No branches, so that loops over them vectorise --------------------------------------------
inline float from_bfloat16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

// Rounds to nearest, ties to even; a NaN stays one, made quiet.
inline uint32_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & kMagnitude) > kInf ? (bits >> 16) | 0x40u : rounded;
}

inline float as_float(float x) { return x; }
inline float as_float(uint16_t x) { return from_bfloat16(x); }

// E4M3: 1 sign, 4 exponent bits of bias 7, 3 mantissa bits; magnitude 0x7f is NaN. Below 8 it counts steps of
// 2^-9; above, 20 zeros behind it and the bias of float32 make it a float32.
inline float from_e4m3(uint8_t code) {
  const uint32_t magnitude = code & 0x7fu;
  const uint32_t normal = (magnitude << 20) + (120u << 23);
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f);
  const uint32_t number = choose(magnitude < 8, subnormal, normal);
  return float_of(choose(magnitude == 0x7f, 0x7fc00000u, number) | (code & 0x80u) << 24);
}

// Rounds to nearest, ties to even; beyond +-448 becomes +-448, the code 0x7e; NaN stays NaN, 0x7f.
inline uint32_t to_e4m3(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & kMagnitude;
  const uint32_t rounded = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  const uint32_t normal = std::min(rounded, 0x7eu) | (magnitude > kInf);
  // Below 2^-6 a code counts steps of 2^-9, which is what the last bit of a float32 near 2^14 is worth.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0x1p14f) - bits_of(0x1p14f);
  return choose(magnitude < 0x3c800000u, subnormal, normal) | ((bits >> 24) & 0x80u);
}

// out[k] = cast(in[k]). cast is a lambda, never a pointer to a function: that would be called for each element.
// Its results of 32 bits pass through a buffer: where one loop makes and stores them, GCC narrows every term.
template <class In, class Out, class Cast>
inline void each(const char* __restrict in, char* __restrict out, int64_t n, Cast cast) {
  using Result = decltype(cast(In{}));
  if constexpr (sizeof(Result) == sizeof(Out)) {
    for (int64_t k = 0; k < n; ++k) store<Out>(out, k, cast(load<In>(in, k)));
  } else {
    constexpr int64_t piece = 256;
    Result results[piece];
    for (int64_t k = 0; k < n; k += piece) {
      const int64_t size = std::min(piece, n - k);
      for (int64_t l = 0; l < size; ++l) results[l] = cast(load<In>(in, k + l));
      for (int64_t l = 0; l < size; ++l) store<Out>(out, k + l, static_cast<Out>(results[l]));
    }
  }
}

// -- transposes -------------------------------------------------------------------------------------------

// a[from], b[from], a[from + 1], b[from + 1], ...: one shuffle.
template <int from, class V, int... i>
inline V interleave(V a, V b, std::integer_sequence<int, i...>) {
  return V{(i % 2 ? b[from + i / 2] : a[from + i / 2])...};
}

// A square of 16 bytes a side: interleaving rows with those half the square below, as often as the side can
// be halved, moves element (i, j) to (j, i).
template <class T>
inline void transpose_square(const char* in, int64_t stride, T* out, int64_t side) {
  typedef T V __attribute__((vector_size(16)));
  constexpr int n = 16 / sizeof(T);
  constexpr std::make_integer_sequence<int, n> all{};
  V rows[n], next[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) std::memcpy(&rows[i], in + i * stride, 16);
#pragma GCC unroll 4
  for (int step = 1; step < n; step *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = interleave<0>(rows[i], rows[i + n / 2], all);
      next[2 * i + 1] = interleave<n / 2>(rows[i], rows[i + n / 2], all);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) std::memcpy(out + i * side, &rows[i], 16);
}

// -- matrices ---------------------------------------------------------------------------------------------
struct Matrix {
  int64_t m, n;  // of the input
  const char* in;
  int64_t in_stride;
  char* out;
  int64_t out_stride;
};

// Calls row(i, j, n, in, out) for stretches that cover the result: elements j to j+n of its row i, to be made
// from the n values at `in`. Transposed, it goes by tiles: whole cache lines are read and, by way of a buffer,
// written, however far apart rows are.
template <class In, class Out, class Row>
inline void map_rows(const Matrix& x, int64_t transposed, Row row) {
  if (!transposed) {
    for (int64_t i = 0; i < x.m; ++i) row(i, 0, x.n, x.in + i * x.in_stride, x.out + i * x.out_stride);
    return;
  }
  constexpr int64_t size = sizeof(In), side = std::min<int64_t>(128, 512 / size), square = 16 / size;
  alignas(64) In tile[side * side];
  for (int64_t j = 0; j < x.n; j += side) {
    for (int64_t i = 0; i < x.m; i += side) {
      const int64_t height = std::min(side, x.m - i), width = std::min(side, x.n - j);
      const int64_t even_height = height / square * square, even_width = width / square * square;
      const char* in = x.in + i * x.in_stride + j * size;
      for (int64_t a = 0; a < even_height; a += square)
        for (int64_t b = 0; b < even_width; b += square)
          transpose_square<In>(in + a * x.in_stride + b * size, x.in_stride, tile + b * side + a, side);
      for (int64_t a = 0; a < height; ++a)
        for (int64_t b = a < even_height ? even_width : 0; b < width; ++b)
          tile[b * side + a] = load<In>(in + a * x.in_stride, b);
      for (int64_t b = 0; b < width; ++b)
        row(j + b, i, height, reinterpret_cast<const char*>(tile + b * side),
            x.out + (j + b) * x.out_stride + i * static_cast<int64_t>(sizeof(Out)));
    }
  }
}

template <class In, class Out, class Cast>
inline void map(const Matrix& x, int64_t transposed, Cast cast) {
  map_rows<In, Out>(x, transposed, [&](int64_t, int64_t, int64_t n, const char* in, char* out) {
    each<In, Out>(in, out, n, cast);
  });
}

// Blocks of b0 x b1 elements, of which the matrix starts at (row, column) of the whole tensor. scales are the whole
// tensor's, one a block, row_step and column_step apart.
struct Blocks {
  int64_t b0, b1, row, column;
  const float* scales;
  int64_t row_step, column_step;
};

template <class Out, class Narrow>
inline void dequantise_to(const Matrix& x, int64_t transposed, const Blocks& s, Narrow narrow) {
  map_rows<uint8_t, Out>(x, transposed, [&](int64_t i, int64_t j, int64_t n, const char* in, char* out) {
    const float* scales = s.scales + (s.row + i) / s.b0 * s.row_step;
    for (int64_t k = 0, end; k < n; k = end) {
      const int64_t block = (s.column + j + k) / s.b1;
      end = std::min(n, (block + 1) * s.b1 - s.column - j);
      const float scale = scales[block * s.column_step];
      each<uint8_t, Out>(in + k, out + k * static_cast<int64_t>(sizeof(Out)), end - k,
                         [=](uint8_t code) { return narrow(from_e4m3(code) * scale); });
    }
  });
}

// The largest magnitude as bits: as integers, magnitudes compare as the numbers do, and NaN is above them all.
template <class In>
inline uint32_t largest(const char* in, int64_t n) {
  uint32_t most = 0;
  for (int64_t k = 0; k < n; ++k) most = std::max(most, bits_of(as_float(load<In>(in, k))) & kMagnitude);
  return most;
}

// amax / 448, or the next power of two that is not below it: 448 is 1.75 * 2^8. No power is below 2^-127, the
// least of the 8-bit format of scales. A block of zeros, or one whose scale would underflow, has the scale 1.
inline float scale_of(uint32_t amax, int64_t powers) {
  if (powers && amax) {
    const int32_t exponent = static_cast<int32_t>(amax >> 23) - 8 + ((amax & 0x7fffffu) > 0x600000u);
    return exponent > 0 ? float_of(static_cast<uint32_t>(exponent) << 23) : 0x1p-127f;
  }
  const float scale = float_of(amax) / 448.0f;
  return scale > 0 ? scale : 1.0f;
}

enum { kScales = 1, kCodes = 2 };  // what quantise makes

// By strips of some blocks side by side: rows are read in runs that the processor fetches ahead, and the second look
// at a strip finds it in the cache.
template <class In>
inline void quantise_from(const Matrix& x, int64_t b0, int64_t b1, float* scales, int64_t powers, int64_t make) {
  constexpr int64_t size = sizeof(In), strip = 1024;
  const int64_t columns = (x.n + b1 - 1) / b1, abreast = std::max<int64_t>(1, strip / b1);
  for (int64_t i = 0; i < x.m; i += b0) {
    const int64_t height = std::min(b0, x.m - i);
    for (int64_t first = 0; first < columns; first += abreast) {
      const int64_t last = std::min(first + abreast, columns);
      float* of_strip = scales + i / b0 * columns + first;
      if (make & kScales) {
        uint32_t amax[strip] = {};
        for (int64_t a = i; a < i + height; ++a)
          for (int64_t b = first; b < last; ++b)
            amax[b - first] = std::max(amax[b - first], largest<In>(x.in + a * x.in_stride + b * b1 * size,
                                                                    std::min(b1, x.n - b * b1)));
        for (int64_t b = 0; b < last - first; ++b) of_strip[b] = scale_of(amax[b], powers);
      }
      if (!(make & kCodes)) continue;
      for (int64_t a = i; a < i + height; ++a)
        for (int64_t b = first; b < last; ++b) {
          const float scale = of_strip[b - first];
          each<In, uint8_t>(x.in + a * x.in_stride + b * b1 * size, x.out + a * x.out_stride + b * b1,
                            std::min(b1, x.n - b * b1),
                            [=](In value) { return to_e4m3(as_float(value) / scale); });
        }
    }
  }
}

// Of float16 (0x7c00), bfloat16 (0x7f80) or float32 (0x7f800000): are all exponents below that of infinity?
template <class In>
inline bool below(const char* in, int64_t stride, int64_t m, int64_t n, In infinity) {
  constexpr In magnitude = static_cast<In>(~In{0}) >> 1;
  constexpr int64_t piece = 4096;  // looked at before giving up early
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; j += piece) {
      In most = 0;
      const char* from = in + i * stride;
      for (int64_t k = j; k < std::min(n, j + piece); ++k)
        most = std::max(most, static_cast<In>(load<In>(from, k) & magnitude));
      if (most >= infinity) return false;
    }
  }
  return true;
}

}  // namespace

extern "C" {

#define MATRIX int64_t m, int64_t n, const char *in, int64_t in_stride, char *out, int64_t out_stride

void cast_widen(MATRIX, int64_t transposed) {
  map<uint16_t, float>({m, n, in, in_stride, out, out_stride}, transposed, [](uint16_t value) { return from_bfloat16(value); });
}

void cast_narrow(MATRIX, int64_t transposed) {
  map<float, uint16_t>({m, n, in, in_stride, out, out_stride}, transposed, [](float value) { return to_bfloat16(value); });
}

void cast_transpose(MATRIX, int64_t size) {
  const Matrix x{m, n, in, in_stride, out, out_stride};
  const auto same = [](auto value) { return value; };
  if (size == 1) map<uint8_t, uint8_t>(x, true, same);
  if (size == 2) map<uint16_t, uint16_t>(x, true, same);
  if (size == 4) map<uint32_t, uint32_t>(x, true, same);
  if (size == 8) map<uint64_t, uint64_t>(x, true, same);
}

// Blocks are given as of the result: transposed, the caller swaps their sides.
void cast_dequantise(MATRIX, int64_t transposed, int64_t b0, int64_t b1, int64_t row, int64_t column,
                     const float* scales, int64_t row_step, int64_t column_step, int64_t bfloat16) {
  const Matrix x{m, n, in, in_stride, out, out_stride};
  const Blocks blocks{b0, b1, row, column, scales, row_step, column_step};
  if (bfloat16)
    dequantise_to<uint16_t>(x, transposed, blocks, [](float value) { return to_bfloat16(value); });
  else
    dequantise_to<float>(x, transposed, blocks, [](float value) { return value; });
}

void cast_quantise(MATRIX, int64_t bfloat16, int64_t b0, int64_t b1, float* scales, int64_t powers, int64_t make) {
  const Matrix x{m, n, in, in_stride, out, out_stride};
  if (bfloat16)
    quantise_from<uint16_t>(x, b0, b1, scales, powers, make);
  else
    quantise_from<float>(x, b0, b1, scales, powers, make);
}

int64_t cast_all_below(int64_t m, int64_t n, const char* in, int64_t in_stride, int64_t size, int64_t infinity) {
  return size == 2 ? below<uint16_t>(in, in_stride, m, n, static_cast<uint16_t>(infinity))
                   : below<uint32_t>(in, in_stride, m, n, static_cast<uint32_t>(infinity));
}

}  // extern "C"
