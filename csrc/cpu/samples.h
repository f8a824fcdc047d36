// How the tokens of some samples lie in memory.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include "products.h"

// (B, N, D) with rows that are contiguous, or in tiles, (B, N/32, D/32, 32, 32), what matrix products read and write fastest.
struct Samples {
  int64_t batch, tokens, size, sample;  // bytes from sample to sample
  Layout at;
  bool tiles;

  Samples(const torch::stable::Tensor& x, const char* name) : tiles(x.dim() == 5) {
    const int64_t bytes = static_cast<int64_t>(x.element_size());
    const bool fits = tiles ? x.size(3) == COLUMNS && x.size(4) == COLUMNS && x.is_contiguous() : x.dim() == 3 && (x.stride(2) == 1 || x.size(2) == 1);
    STD_TORCH_CHECK(fits, name, " must be (B, N, D) with contiguous rows, or in tiles (B, N/32, D/32, 32, 32) and contiguous");
    batch = x.size(0);
    tokens = x.size(1) * (tiles ? COLUMNS : 1);
    size = x.size(2) * (tiles ? COLUMNS : 1);
    sample = x.stride(0) * bytes;
    at.row = tiles ? COLUMNS * bytes : x.stride(1) * bytes;
    at.strip = COLUMNS * (tiles ? size * bytes : at.row);
    at.step = COLUMNS * (tiles ? at.row : bytes);
  }
};
