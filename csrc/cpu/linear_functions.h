// The packed linear layer out of tiles of ROWS x 32 sums. Included inside an anonymous namespace that has Value, ROWS, BLOCK_INNER, STRIP, Setup,
// copy_strip and tile.
//
// The rows of x of a task are copied into strips, which stay in the second-level cache while the panels of the weight stream past them; a part
// of a panel stays in the first level. Sums of sums over parts of K also round less than one long sum.
inline int64_t inner_block(int64_t inner) {
  return inner ? whole((inner + (inner + BLOCK_INNER - 1) / BLOCK_INNER - 1) / ((inner + BLOCK_INNER - 1) / BLOCK_INNER), INNER) : INNER;
}

// Of K in strips at a time: all of it where that is short, or else the sums of all columns are kept between the parts.
constexpr int64_t chunk_inner(int64_t inner) { return inner <= 1152 ? inner : 576; }

constexpr int64_t CACHE_BYTES = 1280 * 1024;  // of strips and sums of a task: they stay in a second-level cache of 2 MiB

int64_t rows_at_once(int64_t columns, int64_t inner) {
  inner = whole(inner, INNER);
  const int64_t held = chunk_inner(inner);
  const int64_t row = (held * sizeof(Value) + 4 * (inner > held ? whole(columns, COLUMNS) : COLUMNS)) * ROWS;
  return row < CACHE_BYTES ? CACHE_BYTES / row * ROWS : ROWS;
}

struct Plan {
  int64_t block, blocks, chunk, strips, sums;  // sums: floats of one panel
  bool many;                                   // chunks: sums of all panels are kept

  explicit Plan(const Linear& task) {
    block = inner_block(task.inner);
    blocks = task.inner ? (task.inner + block - 1) / block : 1;
    const int64_t held = chunk_inner(task.inner);
    chunk = held == task.inner ? blocks : held / block;
    strips = (task.rows + ROWS - 1) / ROWS;
    sums = strips * ROWS * COLUMNS;
    many = chunk < blocks;
  }
};

int64_t linear_memory(const Linear& task) {
  const Plan plan(task);
  return plan.chunk * plan.strips * STRIP * sizeof(Value) + plan.sums * 4 * (plan.many ? whole(task.columns, COLUMNS) / COLUMNS : 1);
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
  const float* bias = task.bias ? task.bias + tile.column : nullptr;
  for (int64_t i = begin; i < end; ++i) {
    Value* out = reinterpret_cast<Value*>(task.out + (tile.row + i) * task.out_stride) + tile.column;
    for (int64_t half = 0; half < COLUMNS && half < left; half += WIDTH) {
      const bool full = left - half >= WIDTH;
      Float value = load(tile.sums + i * COLUMNS + half);
      if (bias) value += full ? load(bias + half) : load(bias + half, left - half);
      if (task.gelu) value = gelu(value);
      full ? store(out + half, value) : store(out + half, value, left - half);
    }
  }
}

void linear(const Linear& task, char* memory) {
  const Setup setup;
  const Plan plan(task);
  const int64_t panel_size = whole(task.inner, INNER) * COLUMNS;
  const Value* panels = static_cast<const Value*>(task.panels);
  Value* strips = reinterpret_cast<Value*>(memory);
  float* all_sums = reinterpret_cast<float*>(strips + plan.chunk * plan.strips * STRIP);
  Finished finished;
  for (int64_t first = 0; first < plan.blocks; first += plan.chunk) {
    const int64_t count = plan.blocks - first < plan.chunk ? plan.blocks - first : plan.chunk;
    auto inner_of = [&](int64_t b) {
      const int64_t left = task.inner - (first + b) * plan.block;
      return left < plan.block ? left : plan.block;
    };
    for (int64_t s = 0; s < plan.strips; ++s)
      for (int64_t b = 0; b < count; ++b) {
        const char* from = task.x + s * ROWS * task.x_stride + (first + b) * plan.block * sizeof(Value);
        copy_strip(from, task.x_stride, task.rows - s * ROWS, inner_of(b), strips + (b * plan.strips + s) * STRIP);
      }
    for (int64_t n = 0; n < task.columns; n += COLUMNS) {
      float* sums = all_sums + (plan.many ? n / COLUMNS * plan.sums : 0);
      for (int64_t b = 0; b < count; ++b) {
        const Value* part = panels + n / COLUMNS * panel_size + (first + b) * plan.block * COLUMNS;
        const Value* next = b + 1 < count ? part + plan.block * COLUMNS : panels + (n / COLUMNS + 1) * panel_size + first * plan.block * COLUMNS;
        const int64_t lines = (plan.block * COLUMNS * sizeof(Value) / 64 + plan.strips - 1) / plan.strips;  // to be fetched during a tile
        const bool last = first + b + 1 == plan.blocks;
        for (int64_t s = 0; s < plan.strips; ++s) {
          const char* ahead = reinterpret_cast<const char*>(next) + s * lines * 64;
          const char* out = task.out + s * ROWS * task.out_stride + n * sizeof(Value);
          float* to = sums + s * ROWS * COLUMNS;
          // Step by step, what the vector and load units do beside the tile's products.
          auto meanwhile = [&](int64_t step, int64_t steps) __attribute__((always_inline)) {
            const int64_t fetched = (lines + steps - 1) / steps, share = (ROWS + steps - 1) / steps;
            for (int64_t i = step * fetched; i < (step + 1) * fetched && i < lines; ++i) __builtin_prefetch(ahead + i * 64, 0, 2);
            const int64_t begin = step * share, end = begin + share < ROWS ? begin + share : ROWS;
            if (last)
              for (int64_t i = begin; i < end; ++i) {
                __builtin_prefetch(out + i * task.out_stride, 1);
                if (sizeof(Value) == 4) __builtin_prefetch(out + i * task.out_stride + 64, 1);
              }
            if (first)
              for (int64_t i = begin; i < end; ++i) {
                __builtin_prefetch(to + (ROWS + i) * COLUMNS);
                __builtin_prefetch(to + (ROWS + i) * COLUMNS + 16);
              }
            if (finished.sums) finish(task, finished, begin, end);
          };
          tile(strips + (b * plan.strips + s) * STRIP, task.rows - s * ROWS, part, inner_of(b), to, first + b > 0, meanwhile);
          finished = last ? Finished{to, s * ROWS, n} : Finished{};
        }
      }
    }
  }
  if (finished.sums) finish(task, finished, 0, ROWS);
}
