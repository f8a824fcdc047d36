// bfloat16 products for processors with AMX: its tiles are 16 rows of 64 bytes, and one instruction multiplies two of them.
#include "products.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,amx-tile,amx-bf16")
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
constexpr int64_t CACHE_BYTES = 1024 * 1024;  // of strips: they stay in a second-level cache of 2 MiB

// What has been written so far is in memory: GCC does not know that the instructions which load tiles read it.
inline void written() { __asm__ volatile("" ::: "memory"); }

// All eight tiles whole, and vectors that take denormal numbers for zeros, as the tiles do: exponentials run into them, and each would take a
// hundred cycles. Both are the thread's own, and are given back, as others expect.
struct Setup {
  const unsigned control = _mm_getcsr();
  Setup() {
    _mm_setcsr(control | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
    alignas(64) struct { uint8_t palette, start, rest[14]; uint16_t columns[16]; uint8_t rows[16]; } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.columns[i] = 64, config.rows[i] = 16;
    written();
    _tile_loadconfig(&config);
  }
  ~Setup() {
    _tile_release();
    _mm_setcsr(control);
  }
};

// One step of K of a strip and a panel, added to the sums in the tiles 0 .. 3. The strip is read past the first-level cache, as the panel may be.
template <bool HELD_PANEL> inline void multiply(const char* strip, const char* panel) {
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

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void load_sums(const float* sums) {
  _tile_loadd(0, sums, COLUMNS * 4);
  _tile_loadd(1, sums + 16, COLUMNS * 4);
  _tile_loadd(2, sums + 16 * COLUMNS, COLUMNS * 4);
  _tile_loadd(3, sums + 16 * COLUMNS + 16, COLUMNS * 4);
}

inline void store_sums(float* sums) {
  _tile_stored(0, sums, COLUMNS * 4);
  _tile_stored(1, sums + 16, COLUMNS * 4);
  _tile_stored(2, sums + 16 * COLUMNS, COLUMNS * 4);
  _tile_stored(3, sums + 16 * COLUMNS + 16, COLUMNS * 4);
}

inline __mmask32 first_columns(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }

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

constexpr int64_t SUMS = ROWS * COLUMNS;  // of a tile of the output, in floats

// How a linear layer is divided: K in equal parts of up to PART steps, so that sums do not depend on how the work is shared out; and the strips
// that are at work together, as many as the cache takes, in equal groups.
struct Plan {
  int64_t steps, parts, part_steps, panels, strips;
  explicit Plan(const Linear& task)
      : steps(whole(task.inner, INNER) / INNER), parts((steps + PART - 1) / PART), part_steps((steps + parts - 1) / parts),
        panels(whole(task.columns, COLUMNS) / COLUMNS) {
    const int64_t strip = part_steps * STEP, most = strip < CACHE_BYTES ? CACHE_BYTES / strip : 1;
    const int64_t all = whole(task.rows, ROWS) / ROWS, groups = (all + most - 1) / most;
    strips = groups ? (all + groups - 1) / groups : 0;
  }
};

// Strips, and the sums of all their tiles where K is in parts, or else those of one tile.
int64_t linear_memory(const Linear& task) {
  const Plan plan(task);
  return plan.strips * plan.part_steps * STEP + (plan.parts > 1 ? plan.strips * plan.panels : 1) * SUMS * 4;
}

// Up to 32 rows of x, and of each up to 32 values of a step, in tiles with zeros around them.
inline void copy_strip(const char* x, int64_t stride, int64_t rows, int64_t values, int64_t steps, char* strip) {
  rows = rows < ROWS ? rows : ROWS;
  for (int64_t step = 0; step < steps; ++step, strip += STEP, x += 64, values -= INNER) {
    const __mmask32 mask = first_columns(values);
    for (int64_t i = 0; i < rows; ++i) _mm512_store_si512(strip + i * 64, _mm512_maskz_loadu_epi16(mask, x + i * stride));
    for (int64_t i = rows; i < ROWS; ++i) _mm512_store_si512(strip + i * 64, _mm512_setzero_si512());
  }
}

// A tile's sums on their way through bias and GELU to the output at (row, column).
struct Finished {
  const float* sums = nullptr;
  int64_t row = 0, column = 0;
};

// The rows begin .. end of ROWS.
inline void finish(const Linear& task, const Finished& tile, int64_t begin, int64_t end) {
  end = end < task.rows - tile.row ? end : task.rows - tile.row;
  const __mmask32 mask = first_columns(task.columns - tile.column);
  const int64_t stride = task.out_tiles ? 64 : task.out_stride;
  char* out = task.out + tile.row * task.out_stride + (task.out_tiles ? tile.column / INNER * STEP : tile.column * 2) + begin * stride;
  for (const float* sums = tile.sums + begin * COLUMNS; sums < tile.sums + end * COLUMNS; sums += COLUMNS, out += stride) {
    Float low = load(sums), high = load(sums + WIDTH);
    if (task.bias) {
      low += _mm512_maskz_loadu_ps(mask, task.bias + tile.column);
      high += _mm512_maskz_loadu_ps(mask >> WIDTH, task.bias + tile.column + WIDTH);
    }
    if (task.gelu) {
      low = gelu(low);
      high = gelu(high);
    }
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    task.out_tiles ? _mm512_store_si512(out, both) : _mm512_mask_storeu_epi16(out, mask, both);  // beyond the mask GELU(0)
  }
}

// A group of strips at a time, a part of K at a time: the rows of x are copied into tiles, unless they are tiles already, and stay in the
// second-level cache while the panels of the weight pass. While the tiles multiply, the vector units finish the tile before, and the next panel
// is fetched.
void linear(const Linear& task, char* memory) {
  const Setup setup;
  const Plan plan(task);
  float* sums = reinterpret_cast<float*>(memory + plan.strips * plan.part_steps * STEP);
  Finished finished;
  for (int64_t row = 0; row < task.rows; row += plan.strips * ROWS)
    for (int64_t part = 0; part < plan.parts; ++part) {
      const int64_t first = part * plan.part_steps, steps = plan.steps - first < plan.part_steps ? plan.steps - first : plan.part_steps;
      const int64_t rows = task.rows - row, strips = rows < plan.strips * ROWS ? whole(rows, ROWS) / ROWS : plan.strips;
      if (!task.x_tiles)
        for (int64_t s = 0; s < strips; ++s)
          copy_strip(task.x + (row + s * ROWS) * task.x_stride + first * 64, task.x_stride, rows - s * ROWS, task.inner - first * INNER, steps,
                     memory + s * steps * STEP);
      written();
      const bool last = part + 1 == plan.parts;
      const int64_t lines = (STEP / 64 + strips - 1) / strips;  // of the next panel, to be fetched during a step
      const int64_t share = (ROWS + steps - 1) / steps;         // rows to be finished
      for (int64_t p = 0; p < plan.panels; ++p) {
        const char* panel = static_cast<const char*>(task.panels) + (p * plan.steps + first) * STEP;
        const char* next = panel + plan.steps * STEP;
        for (int64_t s = 0; s < strips; ++s) {
          const char* strip = task.x_tiles ? task.x + (row + s * ROWS) * task.x_stride + first * STEP : memory + s * steps * STEP;
          float* to = sums + (plan.parts > 1 ? p * strips + s : 0) * SUMS;
          const auto meanwhile = [&](int64_t step) __attribute__((always_inline)) {
            for (int64_t i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
            const int64_t begin = step * share, end = begin + share < ROWS ? begin + share : ROWS;
            if (part)
              for (const float* sum = to + SUMS + begin * COLUMNS; sum < to + SUMS + end * COLUMNS; sum += 16) __builtin_prefetch(sum);
            if (finished.sums) finish(task, finished, begin, end);
          };
          part ? load_sums(to) : zero_sums();
          int64_t step = 0;
          for (; step < steps && step < HELD; ++step) {
            multiply<true>(strip + step * STEP, panel + step * STEP);
            meanwhile(step);
          }
          for (; step < steps; ++step) {
            multiply<false>(strip + step * STEP, panel + step * STEP);
            meanwhile(step);
          }
          store_sums(to);
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

// In a pipeline of blocks of 32 queries: while the tiles multiply one block's queries with the keys, and the weights of the block before the last
// with the values, the vector units make the last block's weights from its logits. Of what passes from one to the next there are two.
void attention(const Head& head, char* memory) {
  const Setup setup;
  const Layout at(head);
  char *keys = memory + at.keys, *values = memory + at.values, *queries = memory + at.queries;
  float* sums = reinterpret_cast<float*>(memory + at.sums);
  for (int64_t token = 0; token < at.tokens; token += COLUMNS)
    pack(head.k + token * head.stride, head.stride / 2, head.tokens - token, head.dim, keys + token * at.dim * 2);
  for (int64_t d = 0; d < at.dim; d += COLUMNS) pack_values(head, d, at.tokens, reinterpret_cast<bfloat16*>(values + d * at.tokens * 2));
  const int64_t blocks = at.tokens / ROWS, steps = 2 * blocks * at.dim / INNER, share = (ROWS + steps - 1) / steps;  // rows during a step
  const float scale = head.scale * 1.44269504088896341f;
  float offsets[ROWS], reciprocals[2][ROWS];
  const auto rows_of = [&](int64_t block) { return head.tokens - block * ROWS < ROWS ? head.tokens - block * ROWS : ROWS; };
  const auto logits_of = [&](int64_t block) { return reinterpret_cast<float*>(memory + at.logits) + block % 2 * ROWS * at.tokens; };
  const auto weights_of = [&](int64_t block) { return memory + at.weights + block % 2 * ROWS * at.tokens * 2; };
  for (int64_t block = 0; block < blocks + 2; ++block) {
    const bool weighs = block > 0 && block <= blocks;
    const float* logits = logits_of(block + 1);  // the last block's
    char* weights = weights_of(block + 1);
    float* reciprocal = reciprocals[(block + 1) % 2];
    const int64_t waiting = weighs ? rows_of(block - 1) : 0;
    for (int64_t i = 0; i < waiting; ++i) offsets[i] = -scale * largest(logits + i * COLUMNS, head.tokens);
    int64_t done = 0;
    const auto meanwhile = [&](int64_t count) {
      for (const int64_t end = done + count < waiting ? done + count : waiting; done < end; ++done)
        reciprocal[done] = exponentials(logits + done * COLUMNS, head.tokens, scale, offsets[done], weights + done * 64);
    };
    if (block < blocks) {
      copy_strip(head.q + block * ROWS * head.stride, head.stride, rows_of(block), head.dim, at.dim / INNER, queries);
      written();
      for (int64_t token = 0; token < at.tokens; token += COLUMNS) {
        zero_sums();
        for (int64_t step = 0; step < at.dim / INNER; ++step) {
          multiply<true>(queries + step * STEP, keys + token * at.dim * 2 + step * STEP);
          meanwhile(share);
        }
        store_sums(logits_of(block) + token * ROWS);
      }
    }
    if (block >= 2)
      for (int64_t d = 0; d < at.dim; d += COLUMNS) {
        zero_sums();
        for (int64_t step = 0; step < at.tokens / INNER; ++step) {
          multiply<true>(weights_of(block) + step * STEP, values + d * at.tokens * 2 + step * STEP);
          meanwhile(share);
        }
        store_sums(sums);
        char* out = head.out + (block - 2) * ROWS * head.out_stride + d * 2;
        for (int64_t i = 0; i < rows_of(block - 2); ++i, out += head.out_stride) {
          const float factor = reciprocals[block % 2][i];
          const Float low = load(sums + i * COLUMNS) * factor, high = load(sums + i * COLUMNS + WIDTH) * factor;
          _mm512_mask_storeu_epi16(out, first_columns(head.dim - d), (__m512i)_mm512_cvtne2ps_pbh(high, low));
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
