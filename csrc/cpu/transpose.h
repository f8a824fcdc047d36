// A transposed copy of 32-bit values with AVX-512. Included inside an anonymous namespace.

// to[column][row] = from[row][column] for up to 16 rows and columns; strides in values. A row of `to` is 16 long: zeros after the last row.
inline void transpose(const void* from, int64_t stride, int64_t rows, int64_t columns, void* to, int64_t to_stride) {
  const __mmask16 mask = static_cast<__mmask16>((1u << columns) - 1);
  const char* source = static_cast<const char*>(from);
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = i < rows ? _mm512_maskz_loadu_epi32(mask, source + i * stride * 4) : _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // a[i + j]: column 4*lane + j of the rows i .. i + 3
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i even = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), even2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    const __m512i odd = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd), odd2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    b[j] = _mm512_shuffle_i32x4(even, even2, 0x88);
    b[4 + j] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
    b[8 + j] = _mm512_shuffle_i32x4(even, even2, 0xdd);
    b[12 + j] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
  int32_t* out = static_cast<int32_t*>(to);
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j)
    if (j < columns) _mm512_storeu_si512(out + j * to_stride, b[j]);
}
