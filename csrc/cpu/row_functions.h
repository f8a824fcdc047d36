// The row functions for vectors of VECTOR_WIDTH floats; FUNCTIONS names the table that they are put in. No include guard on purpose.
namespace {
#include "vec.h"

// Where the value i of a row lies.
inline int64_t at(int64_t i, int64_t step) { return (i >> 5) * step + (i & 31); }

// Base of the norm, kept in float32: x + gate*(y + bias); or at a group's end xr + v, vr + v with v = step*(x + gate*(y + bias)).
template <typename T> __attribute__((always_inline)) inline Float base(const Row& row, int64_t i, int64_t left) {
  const bool whole = left >= WIDTH;
  auto read_at = [&](const auto* p) { return whole ? load(p) : load(p, left); };
  auto read = [&](const auto* p) { return read_at(p + i); };
  auto write = [&](void* p, Float f) { whole ? store(static_cast<T*>(p) + i, f) : store(static_cast<T*>(p) + i, f, left); };
  Float value = read(static_cast<const T*>(row.x));
  Float y = read_at(static_cast<const T*>(row.y) + at(i, row.y_step));
  if (row.bias) y += read(row.bias);
  value += read(row.gate) * y;
  if (row.out_vr) {
    Float velocity = value * row.step;
    value = row.vr ? velocity + read(static_cast<const T*>(row.vr)) : velocity;
    write(row.out_vr, value);
    if (row.xr) value = velocity + read(static_cast<const T*>(row.xr));
  }
  if (row.out_x) write(row.out_x, value);
  return value;
}

template <typename T> void gated_row(const Row& row) {
  alignas(64) float values[MAX_SIZE + WIDTH];
  const int64_t size = row.size, whole = size / WIDTH * WIDTH;
  Float total = {}, total2 = {}, squares = {}, squares2 = {};
  int64_t i = 0;
  for (; i + 2 * WIDTH <= size; i += 2 * WIDTH) {
    Float a = base<T>(row, i, 2 * WIDTH), b = base<T>(row, i + WIDTH, WIDTH);
    store(values + i, a);
    store(values + i + WIDTH, b);
    total += a;
    total2 += b;
  }
  for (; i < size; i += WIDTH) {
    Float a = base<T>(row, i, size - i);
    store(values + i, a);
    total += a;
  }
  const float mean = sum(total + total2) / size;
  for (i = 0; i + 2 * WIDTH <= size; i += 2 * WIDTH) {
    Float a = load(values + i) - mean, b = load(values + i + WIDTH) - mean;
    squares += a * a;
    squares2 += b * b;
  }
  for (; i < whole; i += WIDTH) {
    Float a = load(values + i) - mean;
    squares += a * a;
  }
  float rest = 0;
  for (; i < size; ++i) rest += (values[i] - mean) * (values[i] - mean);
  const float rstd = 1.0f / __builtin_sqrtf((sum(squares + squares2) + rest) / size + row.eps);
  T* out = static_cast<T*>(row.out);
  for (i = 0; i < whole; i += WIDTH) {
    store(out + at(i, row.out_step), (load(values + i) - mean) * rstd * (1.0f + load(row.scale + i)) + load(row.shift + i));
  }
  if (i < size) {
    const int64_t left = size - i;
    Float normalized = (load(values + i, left) - mean) * rstd;
    store(out + at(i, row.out_step), normalized * (1.0f + load(row.scale + i, left)) + load(row.shift + i, left), left);
  }
}

template <typename T> void bias_gelu(void* data, const float* bias, int64_t size) {
  T* x = static_cast<T*>(data);
  int64_t i = 0;
  for (; i + WIDTH <= size; i += WIDTH) store(x + i, gelu(bias ? load(x + i) + load(bias + i) : load(x + i)));
  if (i < size) {
    const int64_t left = size - i;
    store(x + i, gelu(bias ? load(x + i, left) + load(bias + i, left) : load(x + i, left)), left);
  }
}

}  // namespace

const RowFunctions* FUNCTIONS() {
  static constexpr RowFunctions table = {
      WIDTH, {gated_row<float>, gated_row<bfloat16>}, {bias_gelu<float>, bias_gelu<bfloat16>}};
  return &table;
}
