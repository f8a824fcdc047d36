// Packed linear layers and attention: what they accept, whether the processor has the instructions, and the work shared out between threads.
#include "products.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <memory>
#include <new>
#include <optional>
#include <tuple>

#include "processor.h"
#include "samples.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Products* products(const Tensor& x) {
  static const Products* float32 = cpu_level() >= AVX512 ? avx512_products() : nullptr;
  static const Products* bfloat16 = cpu_level() >= AMX ? amx_products() : nullptr;
  STD_TORCH_CHECK(x.is_cpu(), "tensors must be on the CPU");
  return x.scalar_type() == ScalarType::Float ? float32 : x.scalar_type() == ScalarType::BFloat16 ? bfloat16 : nullptr;
}

const Products& required(const Tensor& x) {
  const Products* found = products(x);
  STD_TORCH_CHECK(found, "this processor has no instructions for products of this dtype");
  return *found;
}

bool has_products(const Tensor& like) { return products(like) != nullptr; }

// Memory of one thread, aligned to a cache line.
class Memory {
 public:
  char* of(int64_t size) {
    if (size > size_) {
      data_.reset(static_cast<char*>(::operator new(size, std::align_val_t(64))));
      size_ = size;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t size_ = 0;
};

// A matrix whose rows are contiguous; those of bfloat16 hold pairs.
void check_matrix(const Tensor& x, const Tensor& like, const char* name) {
  const bool fits = x.dim() == 2 && x.stride(1) == 1 && x.is_cpu() && x.scalar_type() == like.scalar_type();
  STD_TORCH_CHECK(fits, name, " must be a matrix of the dtype of x whose rows are contiguous");
}

void pack_weight(const Tensor& weight, Tensor out) {
  const Products& run = required(weight);
  check_matrix(weight, weight, "weight");
  const int64_t columns = weight.size(0), inner = weight.size(1), bytes = static_cast<int64_t>(weight.element_size());
  STD_TORCH_CHECK(bytes == 4 || (inner % 2 == 0 && weight.stride(0) % 2 == 0), "a weight of bfloat16 must have an even number of columns");
  check_matrix(out, weight, "out");
  STD_TORCH_CHECK(out.is_contiguous() && out.size(0) == whole(columns, COLUMNS) && out.size(1) == whole(inner, INNER),
                  "out must be contiguous, and the weight's shape filled up to multiples of 32");
  const char* from = static_cast<const char*>(weight.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t stride = weight.stride(0), panel = out.size(1) * COLUMNS * bytes;
  torch::stable::parallel_for(0, out.size(0) / COLUMNS, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      run.pack(from + i * COLUMNS * stride * bytes, stride, std::min(COLUMNS, columns - i * COLUMNS), inner, to + i * panel);
  });
}

// A matrix in rows, or in tiles: (rows/32, columns/32, 32, 32), where the instruction set takes them.
struct Matrix {
  int64_t rows, columns, stride;  // bytes from row to row; in tiles, a strip's bytes over its rows
  bool tiles;

  Matrix(const Tensor& x, const Tensor& like, const Products& products, const char* name) : tiles(x.dim() == 4) {
    const int64_t bytes = static_cast<int64_t>(x.element_size());
    if (!tiles) {
      check_matrix(x, like, name);
      rows = x.size(0), columns = x.size(1), stride = x.stride(0) * bytes;
      return;
    }
    STD_TORCH_CHECK(products.tiles, "this dtype has no tiles here");
    const bool fits = x.size(2) == COLUMNS && x.size(3) == COLUMNS && x.is_contiguous() && x.is_cpu() && x.scalar_type() == like.scalar_type();
    STD_TORCH_CHECK(fits, name, " in tiles must be (rows/32, columns/32, 32, 32), contiguous, of the dtype of x");
    rows = x.size(0) * COLUMNS, columns = x.size(1) * COLUMNS, stride = columns * bytes;
  }
};

// x, packed, bias and out in the form that the work takes.
class Layer {
 public:
  Layer(const Tensor& packed, const std::optional<Tensor>& bias, int64_t columns, int64_t inner, const Tensor& like) {
    check_matrix(packed, like, "packed");
    STD_TORCH_CHECK(packed.is_contiguous() && packed.size(0) == whole(columns, COLUMNS) && packed.size(1) == whole(inner, INNER),
                    "packed must be what pack_weight made of a weight (", columns, ", ", inner, ")");
    STD_TORCH_CHECK(inner > 0 && columns > 0, "a layer must have columns");
    if (bias) {
      STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == columns && bias->is_cpu(), "bias must have the shape (", columns, ")");
      bias_ = torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
    }
    all.panels = packed.const_data_ptr();
    all.bias = bias_ ? static_cast<const float*>(bias_->const_data_ptr()) : nullptr;
    all.columns = columns;
    all.inner = inner;
    bytes_ = static_cast<int64_t>(packed.element_size());
  }

  void read(const Tensor& x, const Matrix& matrix) {
    all.x = static_cast<const char*>(x.const_data_ptr());
    all.x_stride = matrix.stride;
    all.rows = matrix.rows;
    all.x_tiles = matrix.tiles;
  }

  void write(Tensor& out, const Matrix& matrix) {
    all.out = static_cast<char*>(out.mutable_data_ptr());
    all.out_stride = matrix.stride;
    all.out_tiles = matrix.tiles;
  }

  // Whole strips and panels, shared out evenly, so that no thread is without work.
  void run(const Products& products) const {
    const int64_t strips = (all.rows + products.rows - 1) / products.rows, panels = whole(all.columns, COLUMNS) / COLUMNS;
    const int64_t threads = torch::stable::get_num_threads(), down = std::min(strips, threads);
    const int64_t across = down ? std::min((threads + down - 1) / down, panels) : 0;
    torch::stable::parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
      static thread_local Memory memory;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t column = i / down * panels / across * COLUMNS;
        const int64_t column_end = std::min((i / down + 1) * panels / across * COLUMNS, all.columns);
        const int64_t row = i % down * strips / down * products.rows;
        const int64_t row_end = std::min((i % down + 1) * strips / down * products.rows, all.rows);
        Linear task = all;
        task.x += row * all.x_stride;
        task.panels = static_cast<const char*>(all.panels) + column * whole(all.inner, INNER) * bytes_;
        if (task.bias) task.bias += column;
        task.out += row * all.out_stride + column * bytes_ * (all.out_tiles ? products.rows : 1);
        task.rows = row_end - row;
        task.columns = column_end - column;
        products.linear(task, memory.of(products.linear_memory(task)));
      }
    });
  }

  Linear all = {};

 private:
  std::optional<Tensor> bias_;
  int64_t bytes_;
};

void linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, Tensor out) {
  const Products& products = required(x);
  const Matrix from(x, x, products, "x"), to(out, x, products, "out");
  STD_TORCH_CHECK(from.rows == to.rows, "out must have as many rows as x");
  Layer layer(packed, bias, to.columns, from.columns, x);
  layer.read(x, from);
  layer.write(out, to);
  layer.run(products);
}

void mlp(const Tensor& x, const Tensor& packed_in, const Tensor& bias_in, const Tensor& packed_out, Tensor out) {
  const Products& products = required(x);
  const Matrix from(x, x, products, "x"), to(out, x, products, "out");
  STD_TORCH_CHECK(from.rows == to.rows, "out must have as many rows as x");
  const int64_t hidden = bias_in.numel();
  Layer in(packed_in, bias_in, hidden, from.columns, x), back(packed_out, std::nullopt, to.columns, hidden, x);
  in.read(x, from);
  in.all.gelu = true;
  back.write(out, to);
  static thread_local Memory memory;
  const int64_t row = whole(hidden, INNER) * static_cast<int64_t>(x.element_size());
  in.all.out = memory.of(whole(from.rows, products.rows) * row);
  in.all.out_stride = row;
  in.all.out_tiles = back.all.x_tiles = products.tiles;
  in.run(products);
  back.all.x = in.all.out;
  back.all.x_stride = row;
  back.all.rows = from.rows;
  back.run(products);
}

void attention(const Tensor& qkv, int64_t heads, double scale, Tensor out) {
  const Products& run = required(qkv);
  const Samples from(qkv, "qkv"), to(out, "out");
  const bool fits = out.is_contiguous() && heads > 0 && from.size % (3 * heads) == 0 && to.batch == from.batch && to.tokens == from.tokens &&
                    3 * to.size == from.size;
  STD_TORCH_CHECK(fits, "qkv must be (B, N, 3*D) with D a multiple of the number of heads, out (B, N, D) and contiguous");
  STD_TORCH_CHECK(out.scalar_type() == qkv.scalar_type() && out.is_cpu(), "out must have the dtype of qkv");
  STD_TORCH_CHECK(scale > 0, "scale must be positive");
  const int64_t bytes = static_cast<int64_t>(qkv.element_size()), dim = to.size / heads;
  STD_TORCH_CHECK(from.tokens <= MAX_TOKENS && dim <= MAX_DIM, "at most ", MAX_TOKENS, " tokens, and heads of ", MAX_DIM, " values");
  STD_TORCH_CHECK(bytes == 4 || (dim % 2 == 0 && from.at.row % 4 == 0), "a head of bfloat16 must have an even number of values");
  STD_TORCH_CHECK(!(from.tiles || to.tiles) || (run.tiles && dim % COLUMNS == 0), "tiles are for bfloat16 and heads of a multiple of 32 values");
  const char* data = static_cast<const char*>(qkv.const_data_ptr());
  char* results = static_cast<char*>(out.mutable_data_ptr());
  // Columns before the first of a head are whole steps in tiles.
  const auto column = [&](const Samples& x, int64_t index) { return x.tiles ? index / COLUMNS * x.at.step : index * bytes; };
  torch::stable::parallel_for(0, from.batch * heads, 1, [&](int64_t begin, int64_t end) {
    static thread_local Memory memory;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % heads * dim;
      const char* sample = data + i / heads * from.sample;
      Head head = {};
      head.q = sample + column(from, first);
      head.k = sample + column(from, to.size + first);
      head.v = sample + column(from, 2 * to.size + first);
      head.out = results + i / heads * to.sample + column(to, first);
      head.at = from.at;
      head.out_at = to.at;
      head.tiles = from.tiles;
      head.tokens = from.tokens;
      head.dim = dim;
      head.scale = static_cast<float>(scale);
      run.attention(head, memory.of(run.attention_memory(head)));
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(odelt_native, CPU, m) {
  m.impl("has_products", TORCH_BOX(&has_products));
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("mlp", TORCH_BOX(&mlp));
  m.impl("attention", TORCH_BOX(&attention));
}
