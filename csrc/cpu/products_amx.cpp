// bfloat16 products for processors with AMX: its tiles are 16 rows of 64 bytes, and one instruction multiplies two of them.
#include "products.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,prfchw,amx-tile,amx-bf16")
#include <immintrin.h>
#define VECTOR_WIDTH 16
#define ROUNDS_BFLOAT16
#define NARROW_RESULTS
namespace {
#include "vec.h"
#include "transpose.h"

using Value = bfloat16;
constexpr int64_t ROWS = 32;
constexpr int64_t STEP = 2048;  // bytes of 32 of K of a panel or a strip: two tiles
constexpr int64_t PART = 48;    // steps of K that are summed up in the tiles
// Steps of a panel that stay in the first-level cache of 48 KiB while the strips pass; all else is read past that cache, which would only lose
// what it holds.
constexpr int64_t HELD = 16;
constexpr int64_t CACHE_BYTES = 1024 * 1024;  // of strips and sums: they stay in a second-level cache of 2 MiB

// All eight tiles whole, and vectors that take denormal numbers for zeros, as the tiles do: exponentials run into them, and each would take a
// hundred cycles. Both are the thread's own, and are given back, as others expect.
struct Setup {
  const unsigned control = _mm_getcsr();
  Setup() {
    _mm_setcsr(control | _MM_FLUSH_ZERO_ON | 0x40);
    alignas(64) struct { uint8_t palette, start, rest[14]; uint16_t columns[16]; uint8_t rows[16]; } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.columns[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
  }
  ~Setup() {
    _tile_release();
    _mm_setcsr(control);
  }
};

// One step of 32 rows of tiles and a panel, added to the sums in the tiles 0 .. 3.
inline void multiply(const char* rows, const char* panel) {
  _tile_loadd(4, rows, 64);
  _tile_loadd(5, rows + 1024, 64);
  _tile_loadd(6, panel, 64);
  _tile_loadd(7, panel + 1024, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
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

// K in equal parts of up to PART steps: sums do not depend on how the work is shared out.
struct Parts {
  int64_t steps, count;  // of a part; parts
  explicit Parts(int64_t inner) {
    const int64_t all = inner ? (inner + INNER - 1) / INNER : 1;
    count = (all + PART - 1) / PART;
    steps = (all + count - 1) / count;
  }
};

// Strips that are at work together: as many as the cache takes, shared out evenly.
inline int64_t strips_at_once(const Linear& task, const Parts& parts) {
  const int64_t strip = parts.steps * STEP;
  const int64_t all = (task.rows + ROWS - 1) / ROWS, most = strip < CACHE_BYTES ? CACHE_BYTES / strip : 1, groups = (all + most - 1) / most;
  return groups ? (all + groups - 1) / groups : 0;
}

constexpr int64_t SUMS = ROWS * COLUMNS;  // of a tile of the output, in floats

// Sums of all tiles where K is in parts, or else those of the tile at work and of the one before it.
int64_t linear_memory(const Linear& task) {
  const Parts parts(task.inner);
  const int64_t strips = strips_at_once(task, parts), panels = whole(task.columns, COLUMNS) / COLUMNS;
  return strips * parts.steps * STEP + (parts.count > 1 ? strips * panels : 2) * SUMS * 4;
}

// A part of K of the rows of some strips.
struct Round {
  const char* x;
  int64_t rows, steps, bytes;  // bytes of a row that there are
  Round(const char* x, int64_t rows, int64_t inner) : x(x), rows(rows), steps(whole(inner, INNER) / INNER), bytes(inner * sizeof(Value)) {}
  Round(const Linear& task, const Parts& parts, int64_t row, int64_t part)
      : x(task.x + row * task.x_stride + part * parts.steps * 64), rows(task.rows - row) {
    const int64_t first = part * parts.steps, all = whole(task.inner, INNER) / INNER;
    steps = all - first < parts.steps ? all - first : parts.steps;
    bytes = (task.inner - first * INNER) * sizeof(Value);
  }
};

// Up to 32 rows of x in tiles, zeros around them.
inline void copy_strip_tiles(const Round& round, int64_t stride, int64_t row, char* strip) {
  const char* from = round.x + row * stride;
  const int64_t rows = round.rows - row < ROWS ? round.rows - row : ROWS;
  for (int64_t step = 0; step < round.steps; ++step, strip += STEP, from += 64) {
    const int64_t left = round.bytes - step * 64;
    const __mmask32 mask = left < 64 ? (1u << left / 2) - 1 : ~0u;
    for (int64_t i = 0; i < rows; ++i) _mm512_store_si512(strip + i * 64, _mm512_maskz_loadu_epi16(mask, from + i * stride));
    for (int64_t i = rows; i < ROWS; ++i) _mm512_store_si512(strip + i * 64, _mm512_setzero_si512());
  }
}

// One step of 32 rows of a strip and a panel, added to what the tiles 0 .. 3 hold.
template <bool HELD_PANEL> inline void add_products(const char* strip, const char* panel) {
  if (HELD_PANEL) {
    _tile_loadd(6, panel, 64);
    _tile_loadd(7, panel + 1024, 64);
  } else {
    _tile_stream_loadd(6, panel, 64);
    _tile_stream_loadd(7, panel + 1024, 64);
  }
  _tile_stream_loadd(4, strip, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_stream_loadd(5, strip + 1024, 64);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// A tile's sums on their way through bias and GELU to the output at (row, column).
struct Finished {
  const float* sums = nullptr;
  int64_t row = 0, column = 0;
};

// The rows begin .. end of ROWS.
inline void finish(const Linear& task, const Finished& tile, int64_t begin, int64_t end) {
  end = end < task.rows - tile.row ? end : task.rows - tile.row;
  const int64_t left = task.columns - tile.column;
  const __mmask32 mask = left < COLUMNS ? (1u << left) - 1 : ~0u;
  const float* bias = task.bias + tile.column;
  const int64_t stride = task.out_tiles ? 64 : task.out_stride;
  char* out = task.out + tile.row * task.out_stride + (task.out_tiles ? tile.column / INNER * STEP : tile.column * 2) + begin * stride;
  for (const float* sums = tile.sums + begin * COLUMNS; sums < tile.sums + end * COLUMNS; sums += COLUMNS, out += stride) {
    Float low = load(sums), high = load(sums + WIDTH);
    if (task.bias) {
      low += _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), bias);
      high += _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> WIDTH), bias + WIDTH);
    }
    if (task.gelu) {
      low = gelu(low);
      high = gelu(high);
    }
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    task.out_tiles ? _mm512_store_si512(out, _mm512_maskz_mov_epi16(mask, both)) : _mm512_mask_storeu_epi16(out, mask, both);
  }
}

// A few strips at a time, a part of K at a time: the rows of x are copied into tiles, which stay in the second-level cache while the panels of the
// weight pass. While the tiles multiply, the vector units finish the tile before, and the next panel and the next rows of x are fetched.
void linear(const Linear& task, char* strips) {
  const Setup setup;
  const Parts parts(task.inner);
  const int64_t together = strips_at_once(task, parts), panels = whole(task.columns, COLUMNS) / COLUMNS, all_steps = whole(task.inner, INNER) / INNER;
  float* sums = reinterpret_cast<float*>(strips + together * parts.steps * STEP);
  Finished finished;
  for (int64_t row = 0; row < task.rows; row += together * ROWS)
    for (int64_t part = 0; part < parts.count; ++part) {
      const bool last = part + 1 == parts.count;
      const Round round(task, parts, row, part);
      const int64_t steps = round.steps, count = round.rows < together * ROWS ? (round.rows + ROWS - 1) / ROWS : together;
      if (!task.x_tiles)
        for (int64_t s = 0; s < count; ++s) copy_strip_tiles(round, task.x_stride, s * ROWS, strips + s * steps * STEP);
      const int64_t lines = (STEP / 64 + count - 1) / count;       // of the next panel, to be fetched during a step
      for (int64_t p = 0; p < panels; ++p) {
        const char* panel = static_cast<const char*>(task.panels) + (p * all_steps + part * parts.steps) * STEP;
        const char* next = panel + all_steps * STEP;
        for (int64_t s = 0; s < count; ++s) {
          const int64_t tile = p * count + s, share = (ROWS + steps - 1) / steps;
          float* to = sums + (parts.count > 1 ? tile : 0) * SUMS;
          auto meanwhile = [&](int64_t step) __attribute__((always_inline)) {
            for (int64_t i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
            const int64_t begin = step * share, end = begin + share < ROWS ? begin + share : ROWS;
            if (part)
              for (const float* sum = to + SUMS + begin * COLUMNS; sum < to + SUMS + end * COLUMNS; sum += 16) __builtin_prefetch(sum);
            if (finished.sums) finish(task, finished, begin, end);
          };
          part ? load_sums(to, COLUMNS) : zero_sums();
          const char* strip = task.x_tiles ? task.x + (row + s * ROWS) * task.x_stride + part * parts.steps * STEP : strips + s * steps * STEP;
          int64_t step = 0;
          for (; step < steps && step < HELD; ++step) {
            add_products<true>(strip + step * STEP, panel + step * STEP);
            meanwhile(step);
          }
          for (; step < steps; ++step) {
            add_products<false>(strip + step * STEP, panel + step * STEP);
            meanwhile(step);
          }
          store_sums(to, COLUMNS);
          finished = last ? Finished{to, row + s * ROWS, p * COLUMNS} : Finished{};
        }
      }
    }
  if (finished.sums) finish(task, finished, 0, ROWS);
}

struct Layout {  // of an attention's memory, in bytes; two blocks of logits and weights
  int64_t tokens, dim, keys, values, queries, logits, weights, sums, size;
  explicit Layout(const Head& head)
      : tokens(whole(head.tokens, COLUMNS)), dim(whole(head.dim, COLUMNS)), keys(0), values(keys + tokens * dim * 2),
        queries(values + tokens * dim * 2), logits(queries + ROWS * dim * 2), weights(logits + 2 * ROWS * tokens * 4),
        sums(weights + 2 * ROWS * tokens * 2), size(sums + SUMS * 4) {}
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

inline __mmask32 first_columns(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }

// The largest of a row of logits, which are tiles of 32 x 32.
inline float largest(const float* logits, int64_t tokens) {
  Float low = splat(-__builtin_inff()), high = low;
  for (; tokens >= 32; tokens -= 32, logits += SUMS) {
    low = _mm512_max_ps(load(logits), low);
    high = _mm512_max_ps(load(logits + 16), high);
  }
  if (tokens) {
    const __mmask32 mask = first_columns(tokens);
    low = _mm512_mask_max_ps(low, mask, load(logits), low);
    high = _mm512_mask_max_ps(high, mask >> 16, load(logits + 16), high);
  }
  return _mm512_reduce_max_ps(_mm512_max_ps(low, high));
}

// 2^(scale*logit + offset) for a row, into a row of tiles; returns the reciprocal of their sum.
inline float exponentials(const float* logits, int64_t tokens, float scale, float offset, char* out) {
  Float total = {}, total2 = {};
  for (; tokens >= 32; tokens -= 32, logits += SUMS, out += STEP) {
    const Float low = power_of_2(load(logits) * scale + offset), high = power_of_2(load(logits + 16) * scale + offset);
    _mm512_store_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    total += low;
    total2 += high;
  }
  if (tokens) {
    const __mmask32 mask = first_columns(tokens);
    const Float low = _mm512_maskz_mov_ps(mask, power_of_2(load(logits) * scale + offset));
    const Float high = _mm512_maskz_mov_ps(mask >> 16, power_of_2(load(logits + 16) * scale + offset));
    _mm512_store_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    total += low;
    total2 += high;
  }
  return 1.0f / _mm512_reduce_add_ps(total + total2);
}

// In a pipeline of blocks of 32 tokens: while the tiles multiply queries with keys for one block, and weights with values for the block before the
// last, the vector units make weights of the last block's logits.
void attention(const Head& head, char* memory) {
  const Setup setup;
  const Layout at(head);
  char *keys = memory + at.keys, *values = memory + at.values, *queries = memory + at.queries;
  float* sums = reinterpret_cast<float*>(memory + at.sums);
  for (int64_t token = 0; token < at.tokens; token += COLUMNS)
    pack(head.k + token * head.stride, head.stride / 2, head.tokens - token, head.dim, keys + token * at.dim * 2);
  for (int64_t d = 0; d < at.dim; d += COLUMNS) pack_values(head, d, at.tokens, reinterpret_cast<bfloat16*>(values + d * at.tokens * 2));
  const int64_t blocks = at.tokens / ROWS, share = (ROWS * ROWS * ROWS + 2 * at.tokens * at.dim - 1) / (2 * at.tokens * at.dim);
  float reciprocals[2][ROWS];
  for (int64_t block = 0; block < blocks + 2; ++block) {
    const bool odd = block % 2;
    float* logits = reinterpret_cast<float*>(memory + at.logits);
    float *to_logits = logits + odd * ROWS * at.tokens, *from_logits = logits + !odd * ROWS * at.tokens;
    char *weights = memory + at.weights, *to_weights = weights + !odd * ROWS * at.tokens * 2, *from_weights = weights + odd * ROWS * at.tokens * 2;
    const int64_t waiting = block == 0 || block > blocks ? 0 : head.tokens - (block - 1) * ROWS < ROWS ? head.tokens - (block - 1) * ROWS : ROWS;
    float offsets[ROWS];
    const float scale = head.scale * 1.44269504088896341f;
    for (int64_t i = 0; i < waiting; ++i) offsets[i] = -scale * largest(from_logits + i * COLUMNS, head.tokens);
    int64_t done = 0;
    const auto meanwhile = [&](int64_t count) {
      for (const int64_t end = done + count < waiting ? done + count : waiting; done < end; ++done)
        reciprocals[!odd][done] = exponentials(from_logits + done * COLUMNS, head.tokens, scale, offsets[done], to_weights + done * 64);
    };
    if (block < blocks) {
      const int64_t row = block * ROWS;
      copy_strip_tiles(Round(head.q + row * head.stride, head.tokens - row, head.dim), head.stride, 0, queries);
      for (int64_t token = 0; token < at.tokens; token += COLUMNS) {
        zero_sums();
        for (int64_t step = 0; step < at.dim / INNER; ++step) {
          multiply(queries + step * STEP, keys + token * at.dim * 2 + step * STEP);
          meanwhile(share);
        }
        store_sums(to_logits + token * ROWS, COLUMNS);
      }
    }
    if (block >= 2)
      for (int64_t d = 0; d < at.dim; d += COLUMNS) {
        const int64_t row = (block - 2) * ROWS, rows = head.tokens - row < ROWS ? head.tokens - row : ROWS;
        zero_sums();
        for (int64_t step = 0; step < at.tokens / INNER; ++step) {
          multiply(from_weights + step * STEP, values + d * at.tokens * 2 + step * STEP);
          meanwhile(share);
        }
        store_sums(sums, COLUMNS);
        char* out = head.out + row * head.out_stride + d * 2;
        const __mmask32 mask = first_columns(head.dim - d);
        for (int64_t i = 0; i < rows; ++i, out += head.out_stride) {
          const Float low = load(sums + i * COLUMNS) * reciprocals[odd][i], high = load(sums + i * COLUMNS + 16) * reciprocals[odd][i];
          _mm512_mask_storeu_epi16(out, mask, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
      }
    meanwhile(ROWS);
  }
}

constexpr Products PRODUCTS = {ROWS, true, pack, linear_memory, linear, attention_memory, attention};

}  // namespace

const Products* amx_products() { return &PRODUCTS; }
#else
const Products* amx_products() { return nullptr; }
#endif
