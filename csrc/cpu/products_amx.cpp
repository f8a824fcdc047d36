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
constexpr int64_t WHOLE = 48;   // steps of K that are summed up in the tiles; of more than that,
constexpr int64_t PART = 16;    // these: as many as the first-level cache holds
// Steps of a panel that stay in the first-level cache of 48 KiB while the strips pass; all else is read past that cache, which would only lose
// what it holds.
constexpr int64_t HELD = 16;
constexpr int64_t CACHE_BYTES = 1600 * 1024;  // of strips: they stay in a second-level cache of 2 MiB

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

#define INLINE_LAMBDA __attribute__((always_inline))
#define INLINE INLINE_LAMBDA inline

// Products of two strips of 16 rows (tiles 4 and 5) and two panels of 16 columns (6 and 7) are added to the sums in the tiles 0 .. 3. The operands of a
// step of K are loaded while the tiles multiply those of the step before, and the sums of one tile of the output are stored while the next one
// begins, so that the multiplier hardly waits. Strips are read past the first-level cache, and what of a panel is not held there.
INLINE void load_operands(const char* strip, const char* panel) {
  _tile_stream_loadd(4, strip, 64);
  _tile_loadd(6, panel, 64);
  _tile_stream_loadd(5, strip + 1024, 64);
  _tile_loadd(7, panel + 1024, 64);
}

// Multiplies what is loaded, and loads the next operands.
template <bool HELD_PANEL> INLINE void multiply(const char* next_strip, const char* next_panel) {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_stream_loadd(4, next_strip, 64);
  _tile_dpbf16ps(2, 5, 6);
  if (HELD_PANEL) _tile_loadd(6, next_panel, 64);
  else _tile_stream_loadd(6, next_panel, 64);
  _tile_dpbf16ps(3, 5, 7);
  _tile_stream_loadd(5, next_strip + 1024, 64);
  if (HELD_PANEL) _tile_loadd(7, next_panel + 1024, 64);
  else _tile_stream_loadd(7, next_panel + 1024, 64);
}

// The same where a tile of the output begins, with the sums `from` or with zeros; those of the tile before, if there was one, go to `to`.
template <bool ZEROS> INLINE void multiply_first(float* to, const float* from, const char* next_strip, const char* next_panel) {
#define NEXT_SUMS(TILE, OFFSET)                           \
  if (to) _tile_stored(TILE, to + (OFFSET), COLUMNS * 4); \
  if (ZEROS) _tile_zero(TILE);                            \
  else _tile_loadd(TILE, from + (OFFSET), COLUMNS * 4)
  written();
  NEXT_SUMS(0, 0);
  _tile_dpbf16ps(0, 4, 6);
  NEXT_SUMS(1, 16);
  _tile_dpbf16ps(1, 4, 7);
  _tile_stream_loadd(4, next_strip, 64);
  NEXT_SUMS(2, 16 * COLUMNS);
  _tile_dpbf16ps(2, 5, 6);
  _tile_loadd(6, next_panel, 64);
  NEXT_SUMS(3, 16 * COLUMNS + 16);
  _tile_dpbf16ps(3, 5, 7);
  _tile_stream_loadd(5, next_strip + 1024, 64);
  _tile_loadd(7, next_panel + 1024, 64);
  written();
#undef NEXT_SUMS
}

INLINE void store_sums(float* sums) {
  _tile_stored(0, sums, COLUMNS * 4);
  _tile_stored(1, sums + 16, COLUMNS * 4);
  _tile_stored(2, sums + 16 * COLUMNS, COLUMNS * 4);
  _tile_stored(3, sums + 16 * COLUMNS + 16, COLUMNS * 4);
  written();
}

inline __mmask32 first_columns(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }

// strides in bytes: from row to row, and from 32 values of a row to the next.
inline void pack_panel(const char* weight, int64_t row, int64_t step, int64_t columns, int64_t inner, void* panel) {
  int32_t* out = static_cast<int32_t*>(panel);
  for (int64_t k = 0; k < inner; k += INNER, weight += step)
    for (int64_t half = 0; half < COLUMNS; half += 16, out += 256) {
      const int64_t pairs = inner - k < INNER ? (inner - k) / 2 : 16;
      transpose(weight + half * row, row / 4, columns - half, pairs, out, 16);
      __builtin_memset(out + pairs * 16, 0, (16 - pairs) * 64);
    }
}

void pack(const void* weight, int64_t stride, int64_t columns, int64_t inner, void* panel) {
  pack_panel(static_cast<const char*>(weight), stride * 2, 64, columns, inner, panel);
}

constexpr int64_t SUMS = ROWS * COLUMNS;  // of a tile of the output, in floats

// How a linear layer is divided: K in one part as long as that gains, or else in parts of PART steps, so that sums do not depend on how the work
// is shared out; and the strips that are at work together, as many as the cache takes, in equal groups.
struct Plan {
  int64_t steps, parts, part_steps, panels, strips;
  explicit Plan(const Linear& task)
      : steps(whole(task.inner, INNER) / INNER), parts(steps <= WHOLE ? 1 : (steps + PART - 1) / PART), part_steps(parts > 1 ? PART : steps),
        panels(whole(task.columns, COLUMNS) / COLUMNS) {
    const int64_t strip = part_steps * STEP, most = strip < CACHE_BYTES ? CACHE_BYTES / strip : 1;
    const int64_t all = whole(task.rows, ROWS) / ROWS, groups = (all + most - 1) / most;
    strips = groups ? (all + groups - 1) / groups : 0;
  }
  int64_t steps_of(int64_t part) const { return steps - part * part_steps < part_steps ? steps - part * part_steps : part_steps; }
};

// Up to 32 rows of x, and of each up to 32 values of a step, in tiles with zeros around them.
inline void copy_strip(const char* x, int64_t stride, int64_t rows, int64_t values, int64_t steps, char* strip) {
  rows = rows < ROWS ? rows : ROWS;
  for (int64_t step = 0; step < steps; ++step, strip += STEP, x += 64, values -= INNER) {
    const __mmask32 mask = first_columns(values);
    for (int64_t i = 0; i < rows; ++i) _mm512_store_si512(strip + i * 64, _mm512_maskz_loadu_epi16(mask, x + i * stride));
    for (int64_t i = rows; i < ROWS; ++i) _mm512_store_si512(strip + i * 64, _mm512_setzero_si512());
  }
}

// What a strip of queries makes of its logits, tile by tile: weights 2^(scale*logit + offset) in tiles, and the reciprocals of their sums; or, where
// the offsets are to be found, those that make the largest weight of each query 1. That takes a pass of its own, so it is tried without offsets first:
// sums between these two leave float32 and bfloat16 room for all weights that matter, and for the products with the values.
constexpr float LEAST_SUM = 0x1p-100f, MOST_SUM = 0x1p64f;

struct Softmax {
  float scale;
  int64_t tokens;
  bool finds_offsets, fits;
  char* weights;
  float offsets[ROWS], reciprocals[ROWS];
  alignas(64) float so_far[ROWS][WIDTH];  // sums of weights, or largest logits

  void begin(const Head& head, char* to) {
    scale = head.scale * 1.44269504088896341f;
    tokens = head.tokens;
    finds_offsets = false;
    fits = true;
    weights = to;
    for (float& offset : offsets) offset = 0;
  }
};

// A tile's sums on their way to the output at (row, column), through bias and GELU or times a factor for each row of the tile; or to a softmax.
struct Finished {
  const Linear* task = nullptr;
  Softmax* softmax = nullptr;
  const float* factors = nullptr;
  int64_t row = 0, column = 0;
  float* sums = nullptr;
};

// The rows begin .. end of ROWS.
inline void weigh(Softmax& softmax, const float* sums, int64_t column, int64_t begin, int64_t end) {
  const __mmask32 mask = first_columns(softmax.tokens - column);
  const bool full = mask == ~0u, last = column + COLUMNS >= softmax.tokens;
  char* weights = softmax.weights + column / INNER * STEP;
  for (int64_t i = begin; i < end; ++i) {
    Float low = load(sums + i * COLUMNS), high = load(sums + i * COLUMNS + WIDTH);
    if (softmax.finds_offsets) {
      const Float least = splat(-__builtin_inff());
      low = _mm512_mask_mov_ps(least, mask, low);
      high = _mm512_max_ps(_mm512_mask_mov_ps(least, mask >> WIDTH, high), low);
      if (column) high = _mm512_max_ps(high, load(softmax.so_far[i]));
      store(softmax.so_far[i], high);
      if (last) softmax.offsets[i] = -softmax.scale * _mm512_reduce_max_ps(high);
      continue;
    }
    low = power_of_2(low * softmax.scale + softmax.offsets[i]);
    high = power_of_2(high * softmax.scale + softmax.offsets[i]);
    if (!full) low = _mm512_maskz_mov_ps(mask, low), high = _mm512_maskz_mov_ps(mask >> WIDTH, high);
    _mm512_store_si512(weights + i * 64, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    Float total = low + high;
    if (column) total += load(softmax.so_far[i]);
    store(softmax.so_far[i], total);
    if (last) {
      const float sum = _mm512_reduce_add_ps(total);
      softmax.reciprocals[i] = 1.0f / sum;
      softmax.fits &= sum > LEAST_SUM && sum < MOST_SUM;
    }
  }
}

// The rows begin .. end of ROWS.
inline void finish(const Finished& tile, int64_t begin, int64_t end) {
  const Linear& task = *tile.task;
  end = end < task.rows - tile.row ? end : task.rows - tile.row;
  const __mmask32 mask = first_columns(task.columns - tile.column);
  const int64_t stride = task.out_tiles ? 64 : task.out_stride;
  char* out = task.out + tile.row * task.out_stride + (task.out_tiles ? tile.column / INNER * STEP : tile.column * 2) + begin * stride;
  for (; begin < end; ++begin, out += stride) {
    Float low = load(tile.sums + begin * COLUMNS), high = load(tile.sums + begin * COLUMNS + WIDTH);
    if (tile.factors) {
      low *= tile.factors[begin];
      high *= tile.factors[begin];
    }
    if (task.bias) {
      low += _mm512_maskz_loadu_ps(mask, task.bias + tile.column);
      high += _mm512_maskz_loadu_ps(mask >> WIDTH, task.bias + tile.column + WIDTH);
    }
    if (task.gelu) {
      low = gelu(low);
      high = gelu(high);
    }
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    task.out_tiles ? _mm512_storeu_si512(out, both) : _mm512_mask_storeu_epi16(out, mask, both);  // beyond the mask GELU(0)
  }
}

// Products of a group of strips and some panels, over a part of K.
struct Pass {
  const Linear* task = nullptr;  // what becomes of the sums after the last part of K
  Softmax* softmax = nullptr;    // or this
  const float* factors = nullptr;
  int64_t row = 0;  // of the task, where the group begins
  const char* strips;
  int64_t strip_bytes = 0, count = 1;  // from strip to strip
  const char* panels;
  int64_t panel_bytes, panel_count, steps;
  float* sums;                     // of one tile; of all where K is in parts
  bool first = true, last = true;  // of the parts of K
  const char* after = nullptr;     // the panel that is wanted next; null: nothing is to be fetched
};

// The strips stay in the second-level cache while the panels of the weight pass. While the tiles multiply, the vector units finish the tile of the
// output before, and the next panel is fetched.
template <bool HAS_SOFTMAX> class Pipeline {
 public:
  void run(const Pass& pass) {
    const int64_t lines = pass.after ? (STEP / 64 + pass.count - 1) / pass.count : 0;  // of the next panel, to be fetched during a step
    const int64_t share = pass.steps > 1 ? (ROWS + pass.steps - 2) / (pass.steps - 1) : 0;  // rows to be finished in every step but the first
    const bool whole_k = pass.first && pass.last;
    written();
    load_operands(pass.strips, pass.panels);
    for (int64_t p = 0; p < pass.panel_count; ++p) {
      const char* panel = pass.panels + p * pass.panel_bytes;
      const char* next_panel = p + 1 < pass.panel_count ? panel + pass.panel_bytes : pass.after ? pass.after : panel;
      const char* fetched = next_panel;
      for (int64_t s = 0; s < pass.count; ++s) {
        const bool more = s + 1 < pass.count;
        const char *strip = pass.strips + s * pass.strip_bytes, *then_strip = more ? strip + pass.strip_bytes : pass.strips;
        const char* then_panel = more ? panel : next_panel;
        float* to = pass.sums + (whole_k ? 0 : p * pass.count + s) * SUMS;
        const auto fetch = [&]() INLINE_LAMBDA {
          for (int64_t i = 0; i < lines; ++i, fetched += 64) __builtin_prefetch(fetched, 0, 2);
        };
        const auto meanwhile = [&](int64_t step) INLINE_LAMBDA {
          fetch();
          const int64_t begin = (step - 1) * share, end = begin + share < ROWS ? begin + share : ROWS;
          if (!pass.first)
            for (const float* sum = to + SUMS + begin * COLUMNS; sum < to + SUMS + end * COLUMNS; sum += 16) __builtin_prefetch(sum);
          advance(finished_, begin, end);
        };
        const bool single = pass.steps == 1;
        const char *second_strip = single ? then_strip : strip + STEP, *second_panel = single ? then_panel : panel + STEP;
        pass.first ? multiply_first<true>(begun_.sums, to, second_strip, second_panel)
                   : multiply_first<false>(begun_.sums, to, second_strip, second_panel);
        finished_ = begun_;
        begun_ = {pass.last ? pass.task : nullptr, pass.softmax, pass.factors, pass.row + s * ROWS, p * COLUMNS, to};
        if (single) advance(finished_, 0, ROWS);
        fetch();
        int64_t step = 1;
        for (; step + 1 < pass.steps && step + 1 < HELD; ++step) {
          multiply<true>(strip + (step + 1) * STEP, panel + (step + 1) * STEP);
          meanwhile(step);
        }
        for (; step + 1 < pass.steps; ++step) {
          multiply<false>(strip + (step + 1) * STEP, panel + (step + 1) * STEP);
          meanwhile(step);
        }
        if (step < pass.steps) {
          multiply<true>(then_strip, then_panel);
          meanwhile(step);
        }
      }
    }
  }

  // The end of the last tile. What has been written may be read after it.
  void flush() {
    if (begun_.sums) store_sums(begun_.sums);
    advance(begun_, 0, ROWS);
    begun_ = {};
    written();
  }

 private:
  static INLINE void advance(const Finished& tile, int64_t begin, int64_t end) {
    if (HAS_SOFTMAX && tile.softmax) weigh(*tile.softmax, tile.sums, tile.column, begin, end);
    else if (tile.task) finish(tile, begin, end);
  }

  Finished begun_, finished_;  // the tile of the output in the registers, and the one before
};

// Strips, unless x has them, and the sums of all their tiles where K is in parts, or else those of one tile.
int64_t linear_memory(const Linear& task) {
  const Plan plan(task);
  return (task.x_tiles ? 0 : plan.strips * plan.part_steps * STEP) + (plan.parts > 1 ? plan.strips * plan.panels : 1) * SUMS * 4;
}

// A group of strips at a time, a part of K at a time.
void linear(const Linear& task, char* memory) {
  const Setup setup;
  const Plan plan(task);
  float* sums = reinterpret_cast<float*>(memory + (task.x_tiles ? 0 : plan.strips * plan.part_steps * STEP));
  Pipeline<false> pipeline;
  for (int64_t row = 0; row < task.rows; row += plan.strips * ROWS)
    for (int64_t part = 0; part < plan.parts; ++part) {
      const int64_t first = part * plan.part_steps, steps = plan.steps_of(part);
      const int64_t rows = task.rows - row, strips = rows < plan.strips * ROWS ? whole(rows, ROWS) / ROWS : plan.strips;
      if (!task.x_tiles)
        for (int64_t s = 0; s < strips; ++s)
          copy_strip(task.x + (row + s * ROWS) * task.x_stride + first * 64, task.x_stride, rows - s * ROWS, task.inner - first * INNER, steps,
                     memory + s * steps * STEP);
      const char* panels = static_cast<const char*>(task.panels) + first * STEP;
      pipeline.run({
          .task = &task,
          .row = row,
          .strips = task.x_tiles ? task.x + row * task.x_stride + first * STEP : memory,
          .strip_bytes = task.x_tiles ? ROWS * task.x_stride : steps * STEP,
          .count = strips,
          .panels = panels,
          .panel_bytes = plan.steps * STEP,
          .panel_count = plan.panels,
          .steps = steps,
          .sums = sums,
          .first = part == 0,
          .last = part + 1 == plan.parts,
          .after = part + 1 < plan.parts ? panels + plan.part_steps * STEP : static_cast<const char*>(task.panels),
      });
    }
  pipeline.flush();
}

struct Places {  // of an attention's memory, in bytes; two blocks of weights
  int64_t tokens, dim, keys, values, queries, weights, sums, size;
  explicit Places(const Head& head)
      : tokens(whole(head.tokens, COLUMNS)), dim(whole(head.dim, COLUMNS)), keys(0), values(keys + tokens * dim * 2),
        queries(values + tokens * dim * 2), weights(queries + ROWS * dim * 2), sums(weights + 2 * ROWS * tokens * 2), size(sums + SUMS * 4) {}
};

int64_t attention_memory(const Head& head) { return Places(head).size; }

// A panel of 32 values of v: for every 32 tokens two tiles of 16 values, pairs of tokens beside each other; zeros fill up.
inline void pack_values(const Head& head, int64_t d, int64_t tokens, bfloat16* out) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2,
                                         17, 1, 16, 0);
  const char* strip = head.v;
  for (int64_t token = 0; token < tokens; token += 32, strip += head.at.strip)
    for (int64_t half = d; half < d + COLUMNS; half += 16) {
      const int64_t left = head.dim - half;
      const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
      for (int64_t pair = token; pair < token + 32; pair += 2, out += 32) {
        const char* from = strip + (pair - token) * head.at.row + half / 32 * head.at.step + half % 32 * 2;
        const __m256i first = _mm256_maskz_loadu_epi16(pair < head.tokens ? mask : 0, from);
        const __m256i second = _mm256_maskz_loadu_epi16(pair + 1 < head.tokens ? mask : 0, from + head.at.row);
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, both));
      }
    }
}

// Blocks of 32 queries: the weights of one are multiplied with the values after the logits of the next. Its results are written during the first tile
// of the block after that, which makes its reciprocals with the last.
void attention(const Head& head, char* memory) {
  const Setup setup;
  const Places at(head);
  char *keys = memory + at.keys, *values = memory + at.values, *queries = memory + at.queries;
  float* sums = reinterpret_cast<float*>(memory + at.sums);
  for (int64_t token = 0; token < at.tokens; token += COLUMNS)
    pack_panel(head.k + token / COLUMNS * head.at.strip, head.at.row, head.at.step, head.tokens - token, head.dim, keys + token * at.dim * 2);
  for (int64_t d = 0; d < at.dim; d += COLUMNS) pack_values(head, d, at.tokens, reinterpret_cast<bfloat16*>(values + d * at.tokens * 2));
  Linear result = {};
  result.out = head.out;
  result.out_stride = head.out_at.strip / ROWS;
  result.out_tiles = head.out_at.step == STEP;
  result.rows = head.tokens;
  result.columns = head.dim;
  const int64_t blocks = at.tokens / ROWS, dim_steps = at.dim / INNER, token_steps = at.tokens / INNER;
  Softmax softmaxes[2];
  Pipeline<true> pipeline;
  const auto weigh_keys = [&](int64_t block, Softmax& softmax) {
    const char* strip = head.q + block * head.at.strip;
    if (!head.tiles) {
      copy_strip(strip, head.at.row, head.tokens - block * ROWS, head.dim, dim_steps, queries);
      strip = queries;
    }
    pipeline.run({
        .softmax = &softmax,
        .strips = strip,
        .panels = keys,
        .panel_bytes = at.dim * COLUMNS * 2,
        .panel_count = blocks,
        .steps = dim_steps,
        .sums = sums,
    });
  };
  for (int64_t block = 0; block <= blocks; ++block) {
    if (block < blocks) {
      Softmax& softmax = softmaxes[block % 2];
      softmax.begin(head, memory + at.weights + block % 2 * ROWS * at.tokens * 2);
      weigh_keys(block, softmax);
    } else {
      pipeline.flush();
    }
    if (block == 0) continue;
    Softmax& softmax = softmaxes[(block - 1) % 2];
    if (!softmax.fits)
      for (int pass = 0; pass < 2; ++pass) {
        softmax.finds_offsets = pass == 0;
        weigh_keys(block - 1, softmax);
        pipeline.flush();
      }
    pipeline.run({
        .task = &result,
        .factors = softmax.reciprocals,
        .row = (block - 1) * ROWS,
        .strips = softmax.weights,
        .panels = values,
        .panel_bytes = at.tokens * COLUMNS * 2,
        .panel_count = dim_steps,
        .steps = token_steps,
        .sums = sums,
    });
  }
  pipeline.flush();
}

constexpr Products PRODUCTS = {ROWS, true, pack, linear_memory, linear, attention_memory, attention};

}  // namespace

const Products* amx_products() { return &PRODUCTS; }
#else
const Products* amx_products() { return nullptr; }
#endif
