// A vector of W floats in the compiler's own vector type, and loads and stores of float32 and bfloat16 rows, whole or in part.
// Included once for each instruction set, inside an anonymous namespace: no inline function may be shared between them, or the linker could
// keep the copy that an older processor cannot run. That is also why nothing of the C++ library is used here. Set beforehand, as the compiler's
// own macros do not follow its pragmas: VECTOR_WIDTH (16: with immintrin.h), ROUNDS_BFLOAT16 (AVX512-BF16), NARROW_RESULTS.

template <int W> struct Vectors {
  typedef float Float __attribute__((vector_size(4 * W)));
  typedef int32_t Int __attribute__((vector_size(4 * W)));
  typedef uint32_t Word __attribute__((vector_size(4 * W)));
  typedef uint16_t Half __attribute__((vector_size(2 * W)));
};

constexpr int WIDTH = VECTOR_WIDTH;
using Float = Vectors<WIDTH>::Float;
using Int = Vectors<WIDTH>::Int;
using Word = Vectors<WIDTH>::Word;
using Half = Vectors<WIDTH>::Half;

typedef uint16_t bfloat16;  // the upper half of a float32

inline Float widen(Half h) {
#if VECTOR_WIDTH == 16
  return reinterpret_cast<Float>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(h)), 16));  // one shuffle where GCC makes four
#else
  return reinterpret_cast<Float>(__builtin_convertvector(h, Word) << 16);
#endif
}

// To the nearest, ties to even; NaN stays NaN. The instruction makes 0 of denormal numbers.
inline Half narrow(Float f) {
#ifdef ROUNDS_BFLOAT16
  return reinterpret_cast<Half>(_mm512_cvtneps_pbh(f));
#else
  Word bits = reinterpret_cast<Word>(f);
  Word rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Word nan = reinterpret_cast<Word>(f != f);
  return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Half);
#endif
}

inline Float load(const float* p) {
  Float f;
  __builtin_memcpy(&f, p, sizeof f);
  return f;
}

inline Float load(const bfloat16* p) {
  Half h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen(h);
}

inline void store(float* p, Float f) { __builtin_memcpy(p, &f, sizeof f); }

inline void store(bfloat16* p, Float f) {
  Half h = narrow(f);
  __builtin_memcpy(p, &h, sizeof h);
}

// The first `count` values, 0 in the other lanes.
template <typename T> inline Float load(const T* p, int64_t count) {
  T values[WIDTH] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = p[i];
  return load(values);
}

template <typename T> inline void store(T* p, Float f, int64_t count) {
  T values[WIDTH];
  store(values, f);
  for (int64_t i = 0; i < count; ++i) p[i] = values[i];
}

inline float sum(Float f) {
#if VECTOR_WIDTH == 16
  return _mm512_reduce_add_ps(f);
#else
  float values[WIDTH];
  store(values, f);
  for (int half = WIDTH / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) values[i] += values[i + half];
  return values[0];
#endif
}

inline Float splat(float value) { return Float{} + value; }

// The larger and the smaller one; a where either is not a number.
inline Float larger(Float a, Float b) {
#if VECTOR_WIDTH == 16
  return __builtin_ia32_maxps512_mask(b, a, a, -1, 4);
#else
  return b > a ? b : a;
#endif
}

inline Float smaller(Float a, Float b) {
#if VECTOR_WIDTH == 16
  return __builtin_ia32_minps512_mask(b, a, a, -1, 4);
#else
  return b < a ? b : a;
#endif
}

#ifdef NARROW_RESULTS
// 2^y within 8e-5 of its value (rounding to bfloat16 takes up to 2e-3); 0 and infinity at the ends. It is 2^floor(y) times a polynomial of the
// rest, the best one of degree 3 on [0, 1]; the rest of an infinite y is 0.
inline Float power_of_2(Float y) {
  Float f = _mm512_reduce_ps(y, 1);
  Float p = splat(7.802449e-2f);
  p = p * f + 2.2606727e-1f;
  p = p * f + 6.9583346e-1f;
  p = p * f + 9.9992523e-1f;
  return _mm512_scalef_ps(p, y);
}
#else
// exp of a finite number, below 2 units in the last place from -87.3 to 88.7, constant beyond; NaN gives NaN.
inline Float exponential(Float x) {
  x = smaller(larger(x, splat(-87.3f)), splat(88.3f));
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, which then stands in the low bits
  Float shifted = x * 1.44269504088896341f + magic;
  Float n = shifted - magic;
  Float r = x - n * 0.693359375f;  // ln 2 in two parts: n times the first is exact
  r = r + n * 2.12194440e-4f;
  Float p = splat(1.9875691500e-4f);  // Cephes' expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Int power = (reinterpret_cast<Int>(shifted) << 23) + (127 << 23);  // the magic number's own bits are shifted out
  return p * reinterpret_cast<Float>(power);
}
#endif

// x/(1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3): the tanh form of GELU without its cancellation for negative x.
inline Float gelu(Float x) {
  constexpr float factor = -2 * 0.7978845608028654f, cubic = factor * 0.044715f;
#ifdef NARROW_RESULTS
  constexpr float log2_e = 1.44269504088896341f;  // the reciprocal within 2^-14: a division takes as long as all the rest
  return x * _mm512_rcp14_ps(1.0f + power_of_2(x * (x * x * (cubic * log2_e) + factor * log2_e)));
#else
  return x / (1.0f + exponential(x * (x * x * cubic + factor)));
#endif
}
