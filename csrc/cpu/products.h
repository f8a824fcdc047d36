// Matrix products with packed weights, and attention, for one instruction set: what one thread does at a time. Sums are float32.
//
// A packed weight (N, K) lies in panels of COLUMNS of its rows, each panel K long, both filled up with zeros to whole multiples of 32. A panel
// of float32 is [K][32]. A panel of bfloat16 is, for every 32 of K, two tiles of 16 columns, each [16][16][2]: pairs of K beside each other.
#pragma once
#include <cstdint>

constexpr int64_t COLUMNS = 32, INNER = 32;
constexpr int64_t MAX_TOKENS = 1024, MAX_DIM = 192;  // of attention, which holds all logits of a few tokens at a time

constexpr int64_t whole(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// out = x W^T (+ bias) (and its GELU), for some of the rows of x and some of the panels of W.
struct Linear {
  const char* x;       // the first row
  const void* panels;  // the first panel
  const float* bias;   // of the first column, or null
  char* out;           // the first row and column
  int64_t x_stride, out_stride;  // bytes from row to row
  int64_t rows, columns, inner;
  // tiles of 32 rows and 32 values, those of a strip of 32 rows beside each other, filled up to whole strips
  bool gelu, x_tiles, out_tiles;
};

// Bytes from 32 rows to the next, from row to row, and from 32 values of a row to the next.
struct Layout {
  int64_t strip, row, step;
};

// One head of one sample: out = softmax(scale q k^T) v.
struct Head {
  const char *q, *k, *v;  // the first token
  char* out;
  Layout at, out_at;
  bool tiles;  // whether q, k and v are in tiles
  int64_t tokens, dim;
  float scale;
};

struct Products {
  int64_t rows;  // of a tile
  bool tiles;    // whether the functions take tiles
  void (*pack)(const void* weight, int64_t stride, int64_t columns, int64_t inner, void* panel);  // one panel; stride in values
  int64_t (*linear_memory)(const Linear&);  // bytes that `linear` needs, aligned to 64
  void (*linear)(const Linear&, char* memory);
  int64_t (*attention_memory)(const Head&);
  void (*attention)(const Head&, char* memory);
};

const Products* avx512_products();  // of float32; null where the compiler cannot make them
const Products* amx_products();     // of bfloat16
