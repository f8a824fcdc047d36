// Rows of a softmax in float32. Included after vec.h, inside an anonymous namespace, for the same reason.

// out = exp(scale*(x - max x)), not yet divided by its sum, whose reciprocal is returned. x, readable up to a whole vector. scale > 0.
template <typename T> inline float exponentials(const float* x, int64_t count, float scale, T* out) {
  const int64_t whole_part = count / WIDTH * WIDTH;
  Float most = splat(-__builtin_inff()), most2 = most, total = {}, total2 = {};
  int64_t i = 0;
  for (; i + 2 * WIDTH <= count; i += 2 * WIDTH) {
    Float a = load(x + i), b = load(x + i + WIDTH);
    most = a > most ? a : most;
    most2 = b > most2 ? b : most2;
  }
  for (; i < whole_part; i += WIDTH) {
    Float a = load(x + i);
    most = a > most ? a : most;
  }
  most = most > most2 ? most : most2;
  float top = most[0];
  for (int lane = 1; lane < WIDTH; ++lane) top = most[lane] > top ? most[lane] : top;
  for (; i < count; ++i) top = x[i] > top ? x[i] : top;
  const float offset = -top * scale;
  for (i = 0; i + 2 * WIDTH <= count; i += 2 * WIDTH) {
    Float a = exponential(load(x + i) * scale + offset), b = exponential(load(x + i + WIDTH) * scale + offset);
    store(out + i, a);
    store(out + i + WIDTH, b);
    total += a;
    total2 += b;
  }
  for (; i < count; i += WIDTH) {
    const int64_t left = count - i < WIDTH ? count - i : WIDTH;
    Float a = {};
    store(out + i, exponential(load(x + i, left) * scale + offset), left);
    a = load(out + i, left);
    total += a;
  }
  return 1.0f / sum(total + total2);
}
