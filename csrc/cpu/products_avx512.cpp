// float32 products for processors with AVX-512.
#include "products.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,prfchw")
#include <immintrin.h>
#define VECTOR_WIDTH 16
namespace {
#include "vec.h"
#include "transpose.h"

// 28 of the 32 vector registers hold sums: each step of K is 2 loads of the panel and 14 values of x.
constexpr int ROWS = 14;
constexpr int64_t BLOCK_INNER = 192;  // of K at a time: a panel's part stays in a first-level cache of 48 KiB, and sums of sums round less
constexpr int64_t CACHE_BYTES = 1280 * 1024;  // of a task's strips: they stay in a second-level cache of 2 MiB

// Inlined, whatever the compiler thinks: with what is passed to these functions in memory, a layer takes 3 % more time.
#define INLINE __attribute__((always_inline)) inline

// A strip, [K][ROWS], of `rows` rows of `inner` values and zeros in place of the others. The products read it as one stream: reading 14 rows
// at a time, they would take a tenth more time. It is written 16 values at a time: what follows it in memory must be written later.
INLINE void pack_strip(const char* x, int64_t stride, int64_t rows, int64_t inner, float* strip) {
  for (int64_t k = 0; k < inner; k += 16)
    transpose(x + k * 4, stride / 4, rows < ROWS ? rows : ROWS, inner - k < 16 ? inner - k : 16, strip + k * ROWS, ROWS);
}

void pack(const void* weight, int64_t stride, int64_t columns, int64_t inner, void* panel) {
  const float* w = static_cast<const float*>(weight);
  float* out = static_cast<float*>(panel);
  for (int64_t k = 0; k < inner; k += 16)
    for (int64_t half = 0; half < COLUMNS; half += 16)
      transpose(w + half * stride + k, stride, columns - half, inner - k < 16 ? inner - k : 16, out + k * COLUMNS + half, COLUMNS);
  __builtin_memset(out + inner * COLUMNS, 0, (whole(inner, INNER) - inner) * COLUMNS * 4);
}

// Products of the first COUNT rows of a strip with one panel, K = inner. done(row, half, sums) gets the results; ahead(), called once in every
// `step` of K, fetches what is needed later: a few lines at a time, so that none waits for room among those under way.
template <int COUNT, typename Ahead, typename Done>
INLINE void multiply_rows(const float* strip, const float* panel, int64_t inner, int64_t step, Ahead ahead, Done done) {
  __m512 sums[COUNT][2];
#pragma GCC unroll 14
  for (int i = 0; i < COUNT; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < inner;) {
    ahead();
    for (const int64_t end = inner - k < step ? inner : k + step; k < end; ++k) {
      __builtin_prefetch(strip + (k + 16) * ROWS);  // 7 % less time: the processor itself fetches it too late
      const __m512 left = _mm512_loadu_ps(panel + k * COLUMNS), right = _mm512_loadu_ps(panel + k * COLUMNS + WIDTH);
#pragma GCC unroll 14
      for (int i = 0; i < COUNT; ++i) {
        const __m512 value = _mm512_set1_ps(strip[k * ROWS + i]);
        sums[i][0] = _mm512_fmadd_ps(value, left, sums[i][0]);
        sums[i][1] = _mm512_fmadd_ps(value, right, sums[i][1]);
      }
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < COUNT; ++i) {
    done(i, 0, sums[i][0]);
    done(i, 1, sums[i][1]);
  }
}

// The first `rows` of ROWS, or a few more: the last rows of a batch are seldom 14, and every sum is the same however many they are.
template <typename Ahead, typename Done>
INLINE void multiply(const float* strip, int64_t rows, const float* panel, int64_t inner, int64_t step, Ahead ahead, Done done) {
  if (rows > 8) return multiply_rows<ROWS>(strip, panel, inner, step, ahead, done);
  rows > 4 ? multiply_rows<8>(strip, panel, inner, step, ahead, done) : multiply_rows<4>(strip, panel, inner, step, ahead, done);
}

// Strips that are at work together: as many as the cache takes, shared out evenly.
inline int64_t strips_at_once(const Linear& task) {
  const int64_t all = (task.rows + ROWS - 1) / ROWS, fit = CACHE_BYTES / (4 * ROWS * (task.inner + 1)), most = fit ? fit : 1;
  const int64_t groups = (all + most - 1) / most;
  return groups ? (all + groups - 1) / groups : 0;
}

struct Plan {  // of a linear layer's memory, in floats: strips, and the sums of one panel
  int64_t strips, sums, size;
  explicit Plan(const Linear& task)
      : strips(strips_at_once(task)), sums(whole(strips * ROWS * task.inner + 16 - ROWS, 16)), size(sums + strips * ROWS * COLUMNS) {}
};

int64_t linear_memory(const Linear& task) { return 4 * Plan(task).size; }

// A tile's sums through bias and GELU to the output at (row, column).
inline void finish(const Linear& task, const float* sums, int64_t row, int64_t column) {
  const int64_t rows = task.rows - row < ROWS ? task.rows - row : ROWS, left = task.columns - column;
  const float* bias = task.bias ? task.bias + column : nullptr;
  for (int64_t i = 0; i < rows; ++i) {
    float* out = reinterpret_cast<float*>(task.out + (row + i) * task.out_stride) + column;
    for (int64_t half = 0; half < COLUMNS && half < left; half += WIDTH) {
      const bool full = left - half >= WIDTH;
      Float value = load(sums + i * COLUMNS + half);
      if (bias) value += full ? load(bias + half) : load(bias + half, left - half);
      if (task.gelu) value = gelu(value);
      full ? store(out + half, value) : store(out + half, value, left - half);
    }
  }
}

// All strips of the task stay in the second-level cache while the panels stream past them, a part of one panel at a time.
void linear_together(const Linear& task, const Plan& plan, char* memory) {
  float *strips = reinterpret_cast<float*>(memory), *all_sums = strips + plan.sums;
  const int64_t panel_size = whole(task.inner, INNER) * COLUMNS, step = 12;
  const int64_t lines = (step * COLUMNS / 16 + plan.strips - 1) / plan.strips;  // of the next part, fetched at each step
  for (int64_t n = 0; n < task.columns; n += COLUMNS) {
    const float* panel = static_cast<const float*>(task.panels) + n / COLUMNS * panel_size;
    int64_t k = 0;
    do {
      const int64_t inner = task.inner - k < BLOCK_INNER ? task.inner - k : BLOCK_INNER;
      const bool last = k + inner == task.inner;
      const __mmask16 before = k ? 0xffff : 0;  // there are sums of earlier parts
      const float* next = last ? panel + panel_size : panel + (k + inner) * COLUMNS;
      for (int64_t row = 0; row < task.rows; row += ROWS) {
        float *strip = strips + k * plan.strips * ROWS + row * inner, *sums = all_sums + row * COLUMNS;
        const char* x = task.x + row * task.x_stride + k * 4;
        if (n == 0) pack_strip(x, task.x_stride, task.rows - row, inner, strip);
        x += ROWS * task.x_stride;
        const char* out = task.out + row * task.out_stride + n * 4;
        const float* old = sums;
        const auto ahead = [&]() __attribute__((always_inline)) {
          for (int64_t i = 0; i < lines; ++i, next += 16) __builtin_prefetch(next, 0, 2);
          __builtin_prefetch(old);
          __builtin_prefetch(old + 16);
          old += COLUMNS;
          if (last) {
            __builtin_prefetch(out, 1);
            __builtin_prefetch(out + 64, 1);
            out += task.out_stride;
          }
          if (n == 0) {
            for (int64_t i = 0; i < ROWS; ++i) __builtin_prefetch(x + i * task.x_stride, 0, 2);
            x += step * 4;
          }
        };
        const auto done = [&](int i, int half, Float value) __attribute__((always_inline)) {
          float* to = sums + i * COLUMNS + half * WIDTH;
          store(to, value + _mm512_maskz_loadu_ps(before, to));
        };
        multiply(strip, task.rows - row, panel + k * COLUMNS, inner, step, ahead, done);
        if (last) finish(task, sums, row, n);
      }
      k += inner;
    } while (k < task.inner);
  }
}

void linear(const Linear& task, char* memory) {
  const Plan plan(task);
  for (int64_t row = 0; row < task.rows; row += plan.strips * ROWS) {
    Linear part = task;
    part.x += row * task.x_stride;
    part.out += row * task.out_stride;
    part.rows = task.rows - row < plan.strips * ROWS ? task.rows - row : plan.strips * ROWS;
    linear_together(part, plan, memory);
  }
}

// Attention works on COLUMNS queries at a time, which stand beside each other in all it does: logits are [token][query] and results
// [value][query], so both products have panels of queries, and a softmax of whole vectors of queries needs no sum within a vector.
struct Places {  // of its memory, in floats
  int64_t keys, values, queries, logits, results, size;
  explicit Places(const Head& head)
      : keys(0), values(whole(whole(head.tokens, ROWS) * head.dim, 16)), queries(values + whole(whole(head.dim, ROWS) * head.tokens, 16)),
        logits(queries + whole(head.dim, INNER) * COLUMNS), results(logits + head.tokens * COLUMNS), size(results + head.dim * COLUMNS) {}
};

int64_t attention_memory(const Head& head) { return 4 * Places(head).size; }

// exp(scale (x - max x)) of the columns, not yet divided by their sums, whose reciprocals are returned.
inline void exponentials(float* logits, int64_t tokens, float scale, Float (&reciprocals)[2]) {
  for (int half = 0; half < 2; ++half, logits += WIDTH) {
    Float most[4];
    for (int i = 0; i < 4; ++i) most[i] = load(logits);
    int64_t token = 0;
    for (; token + 4 <= tokens; token += 4)
      for (int i = 0; i < 4; ++i) most[i] = larger(most[i], load(logits + (token + i) * COLUMNS));
    for (; token < tokens; ++token) most[0] = larger(most[0], load(logits + token * COLUMNS));
    const Float offset = larger(larger(most[0], most[1]), larger(most[2], most[3])) * -scale;
    Float total = {};
    for (token = 0; token < tokens;) {
      Float part = {};  // sums of sums round less
      for (const int64_t end = token + 32 < tokens ? token + 32 : tokens; token < end; ++token) {
        const Float value = exponential(load(logits + token * COLUMNS) * scale + offset);
        store(logits + token * COLUMNS, value);
        part += value;
      }
      total += part;
    }
    reciprocals[half] = 1.0f / total;
  }
}

// results [value][query] to `queries` rows of the output.
inline void store_results(const Head& head, const float* results, int64_t first, int64_t queries) {
  alignas(64) float square[16][16];
  for (int64_t d = 0; d < head.dim; d += 16)
    for (int64_t query = 0; query < queries; query += 16) {
      const int64_t left = head.dim - d, count = queries - query < 16 ? queries - query : 16;
      transpose(results + d * COLUMNS + query, COLUMNS, left, count, square, 16);
      for (int64_t i = 0; i < count; ++i) {
        float* out = reinterpret_cast<float*>(head.out + (first + query + i) * head.out_at.row) + d;
        left < 16 ? store(out, load(square[i]), left) : store(out, load(square[i]));
      }
    }
}

void attention(const Head& head, char* memory) {
  const Places at(head);
  float *base = reinterpret_cast<float*>(memory), *keys = base + at.keys, *values = base + at.values, *queries = base + at.queries,
        *logits = base + at.logits, *results = base + at.results;
  for (int64_t token = 0; token < head.tokens; token += ROWS)
    pack_strip(head.k + token * head.at.row, head.at.row, head.tokens - token, head.dim, keys + token * head.dim);
  for (int64_t d = 0; d < head.dim; d += ROWS) {  // strips of 14 values: [token][14]
    const __mmask16 mask = static_cast<__mmask16>((1 << (head.dim - d < ROWS ? head.dim - d : ROWS)) - 1);
    for (int64_t token = 0; token < head.tokens; ++token)
      _mm512_storeu_ps(values + d * head.tokens + token * ROWS, _mm512_maskz_loadu_ps(mask, head.v + token * head.at.row + d * 4));
  }
  for (int64_t first = 0; first < head.tokens; first += COLUMNS) {
    const int64_t count = head.tokens - first < COLUMNS ? head.tokens - first : COLUMNS;
    pack(head.q + first * head.at.row, head.at.row / 4, count, head.dim, queries);
    for (int64_t token = 0; token < head.tokens; token += ROWS) {
      const int64_t rows = head.tokens - token;
      const auto done = [&](int i, int half, Float value) __attribute__((always_inline)) {
        if (i < rows) store(logits + (token + i) * COLUMNS + half * WIDTH, value);
      };
      multiply(keys + token * head.dim, rows, queries, head.dim, head.dim, [] {}, done);
    }
    Float reciprocals[2];
    exponentials(logits, head.tokens, head.scale, reciprocals);
    int64_t row = first, byte = 0;
    const auto ahead = [&]() __attribute__((always_inline)) {  // the output, and the next head, which lies beside this one
      const int64_t next = row * head.at.row + head.dim * 4 + byte;
      __builtin_prefetch(head.out + row * head.out_at.row + byte, 1);
      __builtin_prefetch(head.q + next, 0, 2);
      __builtin_prefetch(head.k + next, 0, 2);
      __builtin_prefetch(head.v + next, 0, 2);
      byte += 64;
      if (byte >= head.dim * 4) byte = 0, ++row;
    };
    for (int64_t d = 0; d < head.dim; d += ROWS) {
      const auto done = [&](int i, int half, Float value) __attribute__((always_inline)) {
        if (d + i < head.dim) store(results + (d + i) * COLUMNS + half * WIDTH, value * reciprocals[half]);
      };
      multiply(values + d * head.tokens, head.dim - d, logits, head.tokens, 10, ahead, done);
    }
    store_results(head, results, first, count);
  }
}

constexpr Products PRODUCTS = {ROWS, false, pack, linear_memory, linear, attention_memory, attention};

}  // namespace

const Products* avx512_products() { return &PRODUCTS; }
#else
const Products* avx512_products() { return nullptr; }
#endif
