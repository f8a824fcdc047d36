// float32 products for processors with AVX-512.
#include "products.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,prfchw")
#include <immintrin.h>
#define VECTOR_WIDTH 16
namespace {
#include "vec.h"
#include "softmax.h"
#include "transpose.h"

// 28 of the 32 vector registers hold sums: each step of K is 2 loads of the panel and 14 values of x.
using Value = float;
constexpr int ROWS = 14;
constexpr int64_t BLOCK_INNER = 192;  // of K at a time: a panel's part and two strips fit into the first-level cache of 48 KiB
constexpr int64_t STRIDE = BLOCK_INNER + 16;  // of a strip's rows, in values: no two of them share the sets of a cache
constexpr int64_t STRIP = ROWS * STRIDE;

// Products of COUNT rows of a, STRIDE values apart, with one panel, K = inner. done(row, half, sums) gets the results, ahead(k) says what to
// fetch meanwhile. STRIDE is known when this is compiled: there are not enough registers for 14 addresses.
template <int COUNT, int64_t STRIDE, typename Ahead, typename Done>
inline void multiply_rows(const float* a, const float* panel, int64_t inner, Ahead ahead, Done done) {
  __m512 sums[COUNT][2];
#pragma GCC unroll 14
  for (int i = 0; i < COUNT; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < inner; ++k) {
    __builtin_prefetch(ahead(k));
    const __m512 left = _mm512_loadu_ps(panel + k * COLUMNS), right = _mm512_loadu_ps(panel + k * COLUMNS + WIDTH);
#pragma GCC unroll 14
    for (int i = 0; i < COUNT; ++i) {
      const __m512 value = _mm512_set1_ps(a[i * STRIDE + k]);
      sums[i][0] = _mm512_fmadd_ps(value, left, sums[i][0]);
      sums[i][1] = _mm512_fmadd_ps(value, right, sums[i][1]);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < COUNT; ++i) {
    done(i, 0, sums[i][0]);
    done(i, 1, sums[i][1]);
  }
}

// The first `rows` of ROWS, or a few more: the last rows of a batch are seldom 14, and every sum is the same however many they are.
template <int64_t STRIDE, typename Ahead, typename Done>
inline void multiply(const float* a, int64_t rows, const float* panel, int64_t inner, Ahead ahead, Done done) {
  if (rows > 8) return multiply_rows<ROWS, STRIDE>(a, panel, inner, ahead, done);
  rows > 4 ? multiply_rows<8, STRIDE>(a, panel, inner, ahead, done) : multiply_rows<4, STRIDE>(a, panel, inner, ahead, done);
}

// `rows` rows of `inner` values, and zeros up to ROWS rows, to where no two rows share the sets of a cache.
inline void copy_strip(const char* x, int64_t stride, int64_t rows, int64_t inner, float* strip) {
  for (int64_t i = 0; i < ROWS; ++i) {
    if (i < rows) {
      __builtin_memcpy(strip + i * STRIDE, x + i * stride, inner * sizeof(float));
    } else {
      __builtin_memset(strip + i * STRIDE, 0, inner * sizeof(float));
    }
  }
}

void pack(const void* weight, int64_t stride, int64_t columns, int64_t inner, void* panel) {
  const float* w = static_cast<const float*>(weight);
  float* out = static_cast<float*>(panel);
  for (int64_t k = 0; k < inner; k += 16)
    for (int64_t half = 0; half < COLUMNS; half += 16)
      transpose(w + half * stride + k, stride, columns - half, inner - k < 16 ? inner - k : 16, out + k * COLUMNS + half, COLUMNS);
  __builtin_memset(out + inner * COLUMNS, 0, (whole(inner, INNER) - inner) * COLUMNS * 4);
}

struct Setup {};

template <typename Meanwhile>
inline void tile(const float* strip, int64_t rows, const float* panel, int64_t inner, float* sums, bool add, Meanwhile meanwhile) {
  meanwhile(0, 1);
  const auto following = [&](int64_t k) __attribute__((always_inline)) { return strip + ROWS * STRIDE + k * 16; };  // strip: 7 to 10 % less time
  multiply<STRIDE>(strip, rows, panel, inner, following, [&](int i, int half, Float value) __attribute__((always_inline)) {
    float* to = sums + i * COLUMNS + half * WIDTH;
    store(to, add ? value + load(to) : value);
  });
}

#include "linear_functions.h"

static_assert(MAX_DIM <= BLOCK_INNER, "the queries of a strip");

constexpr int64_t logits_stride(int64_t tokens) { return tokens <= BLOCK_INNER ? STRIDE : MAX_TOKENS + 16; }

struct Layout {  // of an attention's memory, in floats
  int64_t tokens, dim, keys, values, queries, logits, size;
  explicit Layout(const Head& head)
      : tokens(whole(head.tokens, COLUMNS)), dim(whole(head.dim, COLUMNS)), keys(0), values(keys + tokens * dim),
        queries(values + tokens * dim), logits(queries + ROWS * STRIDE), size(logits + ROWS * logits_stride(tokens)) {}
};

int64_t attention_memory(const Head& head) { return 4 * Layout(head).size; }

template <int64_t LOGITS> void attention(const Head& head, char* memory) {
  const Layout at(head);
  float *base = reinterpret_cast<float*>(memory), *keys = base + at.keys, *values = base + at.values, *queries = base + at.queries,
        *logits = base + at.logits;
  auto row = [&](const char* p, int64_t token) { return reinterpret_cast<const float*>(p + token * head.stride); };
  for (int64_t token = 0; token < at.tokens; token += COLUMNS)
    pack(head.k + token * head.stride, head.stride / 4, head.tokens - token, head.dim, keys + token * at.dim);
  for (int64_t d = 0; d < head.dim; d += COLUMNS) {  // [panel of 32 values][token][32]
    const int64_t count = head.dim - d < COLUMNS ? head.dim - d : COLUMNS;
    float* panel = values + d * at.tokens;
    for (int64_t token = 0; token < head.tokens; ++token, panel += COLUMNS) {
      __builtin_memcpy(panel, row(head.v, token) + d, count * 4);
      if (count < COLUMNS) __builtin_memset(panel + count, 0, (COLUMNS - count) * 4);
    }
  }
  for (int64_t first = 0; first < head.tokens; first += ROWS) {
    const int64_t rows = head.tokens - first < ROWS ? head.tokens - first : ROWS;
    copy_strip(head.q + first * head.stride, head.stride, rows, head.dim, queries);
    for (int64_t token = 0; token < head.tokens; token += COLUMNS) {
      const char* from = (token % 96 == 0 ? head.q : token % 96 == 32 ? head.k : head.v) + first * head.stride + head.dim * 4;
      const auto next_head = [&](int64_t k) __attribute__((always_inline)) { return from + k / 4 * head.stride + k % 4 * 64; };
      multiply<STRIDE>(queries, rows, keys + token * at.dim, head.dim, next_head,
           [&](int i, int half, Float value) __attribute__((always_inline)) { store(logits + i * LOGITS + token + half * WIDTH, value); });
    }
    float reciprocals[ROWS];
    for (int i = 0; i < rows; ++i) reciprocals[i] = exponentials(logits + i * LOGITS, head.tokens, head.scale, logits + i * LOGITS);
    for (int64_t d = 0; d < head.dim; d += COLUMNS) {
      multiply<LOGITS>(logits, rows, values + d * at.tokens, head.tokens, [&](int64_t) { return logits; },
           [&](int i, int half, Float value) __attribute__((always_inline)) {
             const int64_t column = d + half * WIDTH, left = head.dim - column;
             if (i >= rows || left <= 0) return;
             float* out = reinterpret_cast<float*>(head.out + (first + i) * head.out_stride) + column;
             value *= reciprocals[i];
             left >= WIDTH ? store(out, value) : store(out, value, left);
           });
    }
  }
}

void attention(const Head& head, char* memory) {
  head.tokens <= BLOCK_INNER ? attention<STRIDE>(head, memory) : attention<MAX_TOKENS + 16>(head, memory);
}

constexpr Products PRODUCTS = {ROWS, pack, linear_memory, linear, attention_memory, attention};

}  // namespace

const Products* avx512_products() { return &PRODUCTS; }
#else
const Products* avx512_products() { return nullptr; }
#endif
