// bfloat16 products for processors with AMX: its tiles are 16 rows of 64 bytes, and one instruction multiplies two of them.
#include "products.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,prfchw,amx-tile,amx-bf16")
#include <immintrin.h>
#define VECTOR_WIDTH 16
#define NARROW_RESULTS
namespace {
#include "vec.h"
#include "softmax.h"
#include "transpose.h"

using Value = bfloat16;
constexpr int ROWS = 32;
constexpr int64_t BLOCK_INNER = 256;  // of K at a time: a strip of x and a panel's part fit into the first-level cache of 48 KiB
constexpr int64_t STEP = 2048;         // bytes of a panel for 32 of K

// All eight tiles whole. They are the thread's own, and are given back, as others expect.
struct Setup {
  Setup() {
    alignas(64) struct { uint8_t palette, start, rest[14]; uint16_t columns[16]; uint8_t rows[16]; } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.columns[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
  }
  ~Setup() { _tile_release(); }
};

// Products of 32 rows of a (stride in bytes) with one panel, K = 32*steps, added to what the tiles 0 .. 3 hold: 2 x 2 blocks of 16 x 16.
// meanwhile(step): other work for the vector units, which wait otherwise.
template <typename Meanwhile>
inline void multiply(const char* a, int64_t stride, const char* panel, int64_t steps, Meanwhile meanwhile) {
  const char* below = a + 16 * stride;
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, a + step * 64, stride);
    _tile_loadd(5, below + step * 64, stride);
    _tile_loadd(6, panel + step * STEP, 64);
    _tile_loadd(7, panel + step * STEP + 1024, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    meanwhile(step);
  }
}

inline void multiply(const char* a, int64_t stride, const char* panel, int64_t steps) {
  multiply(a, stride, panel, steps, [](int64_t) {});
}

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void load_sums(const float* sums, int64_t stride) {  // stride in floats
  _tile_loadd(0, sums, stride * 4);
  _tile_loadd(1, sums + 16, stride * 4);
  _tile_loadd(2, sums + 16 * stride, stride * 4);
  _tile_loadd(3, sums + 16 * stride + 16, stride * 4);
}

inline void store_sums(float* sums, int64_t stride) {
  _tile_stored(0, sums, stride * 4);
  _tile_stored(1, sums + 16, stride * 4);
  _tile_stored(2, sums + 16 * stride, stride * 4);
  _tile_stored(3, sums + 16 * stride + 16, stride * 4);
}

constexpr int64_t strip_stride(int64_t inner) { return whole(inner, INNER) * 2 + 64; }  // bytes: no two rows share the sets of a cache

constexpr int64_t STRIP = ROWS * strip_stride(BLOCK_INNER) / 2;  // values

// `rows` rows of `inner` values, and zeros up to 32 rows and to a multiple of 32 values.
inline void copy_strip(const char* x, int64_t stride, int64_t rows, int64_t inner, void* to_strip) {
  char* strip = static_cast<char*>(to_strip);
  const int64_t to = strip_stride(inner);
  for (int64_t i = 0; i < ROWS; ++i) {
    const int64_t bytes = i < rows ? inner * 2 : 0;
    __builtin_memcpy(strip + i * to, x + i * stride, bytes);
    __builtin_memset(strip + i * to + bytes, 0, to - bytes);
  }
}

void pack(const void* weight, int64_t stride, int64_t columns, int64_t inner, void* panel) {
  const bfloat16* w = static_cast<const bfloat16*>(weight);
  int32_t* out = static_cast<int32_t*>(panel);
  for (int64_t k = 0; k < inner; k += INNER)
    for (int64_t half = 0; half < COLUMNS; half += 16, out += 256) {
      const int64_t pairs = inner - k < INNER ? (inner - k) / 2 : 16;
      transpose(w + half * stride + k, stride / 2, columns - half, pairs, out, 16);
      __builtin_memset(out + pairs * 16, 0, (16 - pairs) * 64);
    }
}

template <typename Meanwhile>
inline void tile(const Value* strip, int64_t, const Value* panel, int64_t inner, float* sums, bool add, Meanwhile meanwhile) {
  const int64_t steps = whole(inner, INNER) / INNER;
  add ? load_sums(sums, COLUMNS) : zero_sums();
  multiply(reinterpret_cast<const char*>(strip), strip_stride(inner), reinterpret_cast<const char*>(panel), steps,
           [&](int64_t step) __attribute__((always_inline)) { meanwhile(step, steps); });
  store_sums(sums, COLUMNS);
}

#include "linear_functions.h"

struct Layout {  // of an attention's memory, in bytes
  int64_t tokens, dim, q_stride, p_stride, keys, values, queries, logits, weights, size;
  explicit Layout(const Head& head)
      : tokens(whole(head.tokens, COLUMNS)), dim(whole(head.dim, COLUMNS)), q_stride(strip_stride(head.dim)), p_stride(strip_stride(tokens)),
        keys(0), values(keys + tokens * dim * 2), queries(values + tokens * dim * 2), logits(queries + ROWS * q_stride),
        weights(logits + ROWS * tokens * 4), size(weights + ROWS * p_stride) {}
};

int64_t attention_memory(const Head& head) { return Layout(head).size; }

// A panel of 32 values of v: for every 32 tokens two tiles of 16 values, pairs of tokens beside each other; zeros fill up.
inline void pack_values(const Head& head, int64_t d, int64_t tokens, bfloat16* out) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2,
                                         17, 1, 16, 0);
  for (int64_t token = 0; token < tokens; token += 32)
    for (int64_t half = d; half < d + COLUMNS; half += 16) {
      const int64_t left = head.dim - half;
      const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
      for (int64_t pair = token; pair < token + 32; pair += 2, out += 32) {
        const char* from = head.v + pair * head.stride + half * 2;
        const __m256i first = _mm256_maskz_loadu_epi16(pair < head.tokens ? mask : 0, from);
        const __m256i second = _mm256_maskz_loadu_epi16(pair + 1 < head.tokens ? mask : 0, from + head.stride);
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, both));
      }
    }
}

void attention(const Head& head, char* memory) {
  const Setup setup;
  const Layout at(head);
  char *keys = memory + at.keys, *values = memory + at.values, *queries = memory + at.queries, *weights = memory + at.weights;
  float* logits = reinterpret_cast<float*>(memory + at.logits);
  for (int64_t token = 0; token < at.tokens; token += COLUMNS)
    pack(head.k + token * head.stride, head.stride / 2, head.tokens - token, head.dim, keys + token * at.dim * 2);
  for (int64_t d = 0; d < at.dim; d += COLUMNS) pack_values(head, d, at.tokens, reinterpret_cast<bfloat16*>(values + d * at.tokens * 2));
  for (int64_t row = 0; row < head.tokens; row += ROWS) {
    const int64_t rows = head.tokens - row < ROWS ? head.tokens - row : ROWS;
    copy_strip(head.q + row * head.stride, head.stride, rows, head.dim, queries);
    for (int64_t token = 0; token < at.tokens; token += COLUMNS) {
      zero_sums();
      multiply(queries, at.q_stride, keys + token * at.dim * 2, at.dim / INNER);
      store_sums(logits + token, at.tokens);
    }
    float reciprocals[ROWS];
    for (int64_t i = 0; i < rows; ++i) {
      bfloat16* out = reinterpret_cast<bfloat16*>(weights + i * at.p_stride);
      reciprocals[i] = exponentials(logits + i * at.tokens, head.tokens, head.scale, out);
      __builtin_memset(out + head.tokens, 0, (at.tokens - head.tokens) * 2);
    }
    for (int64_t d = 0; d < at.dim; d += COLUMNS) {
      zero_sums();
      multiply(weights, at.p_stride, values + d * at.tokens * 2, at.tokens / INNER);
      store_sums(logits, COLUMNS);
      for (int64_t half = d; half < d + COLUMNS && half < head.dim; half += WIDTH)
        for (int64_t i = 0; i < rows; ++i) {
          const Float value = load(logits + i * COLUMNS + half - d) * reciprocals[i];
          bfloat16* out = reinterpret_cast<bfloat16*>(head.out + (row + i) * head.out_stride) + half;
          head.dim - half >= WIDTH ? store(out, value) : store(out, value, head.dim - half);
        }
    }
  }
}

constexpr Products PRODUCTS = {ROWS, pack, linear_memory, linear, attention_memory, attention};

}  // namespace

const Products* amx_products() { return &PRODUCTS; }
#else
const Products* amx_products() { return nullptr; }
#endif
