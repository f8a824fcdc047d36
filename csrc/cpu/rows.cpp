// The CPU operators: what they accept, which instruction set runs, and rows shared out between torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>

#include "processor.h"
#include "rows.h"
#include "samples.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::optional<Tensor>;

constexpr int64_t GRAIN = 1 << 15;  // values below which a thread of its own costs more than it gains, as in PyTorch

// The widest vectors that may be used.
const RowFunctions& functions() {
  const Level level = cpu_level();
  static const RowFunctions* chosen = level >= AVX512 && rounds_bfloat16() && avx512_bf16_functions() ? avx512_bf16_functions()
                                      : level >= AVX512 && avx512_functions()                          ? avx512_functions()
                                      : level >= AVX2 && avx2_functions()                              ? avx2_functions()
                                                                                                       : baseline_functions();
  return *chosen;
}

int64_t cpu_width() { return functions().width; }

int64_t level() { return cpu_level(); }

int index_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16, name, " must be float32 or bfloat16");
  return x.scalar_type() == ScalarType::BFloat16;
}

// (B, N, D) of x's shape and dtype with any strides, or in tiles where they are allowed.
struct Tokens {
  std::optional<Tensor> tensor;
  const char* data = nullptr;
  int64_t sample = 0, step = INNER;  // bytes; of a row, values from 32 to the next
  Layout at = {};

  Tokens(const Tensors& given, const Tensor& like, const char* name, bool may_be_tiles = false) {
    if (!given) return;
    index_of(*given, name);
    tensor = given->dim() == 3 && given->stride(2) != 1 ? torch::stable::contiguous(*given) : *given;
    const Samples x(*tensor, name);
    const bool fits = (may_be_tiles || !x.tiles) && given->scalar_type() == like.scalar_type() && x.batch == like.size(0) &&
                      x.tokens == like.size(1) && x.size == like.size(2);
    STD_TORCH_CHECK(fits, name, " must have the shape (B, N, D)", may_be_tiles ? ", or that in tiles," : "", " and the dtype of x");
    data = static_cast<const char*>(tensor->const_data_ptr());
    sample = x.sample;
    at = x.at;
    step = at.step / static_cast<int64_t>(given->element_size());
  }

  const void* row(int64_t b, int64_t n) const { return data ? data + b * sample + n / COLUMNS * at.strip + n % COLUMNS * at.row : nullptr; }
};

// A packed table (B or 1, K) as float32: small, so that it is cheaper to convert once than in every row.
struct Table {
  std::optional<Tensor> tensor;
  const float* data = nullptr;
  int64_t stride = 0;

  Table(const Tensors& given, int64_t batch, int64_t size, const char* name, std::initializer_list<int64_t> columns) {
    if (!given) return;
    index_of(*given, name);
    STD_TORCH_CHECK(given->dim() == 2 && (given->size(0) == 1 || given->size(0) == batch), name, " must be (B or 1, K)");
    for (int64_t column : columns) {
      STD_TORCH_CHECK(column >= 0 && column + size <= given->size(1), "column ", column, " of ", name, ": ", size,
                      " values from there do not lie in its ", given->size(1), " columns");
    }
    tensor = torch::stable::contiguous(torch::stable::to(*given, ScalarType::Float));
    data = static_cast<const float*>(tensor->const_data_ptr());
    stride = given->size(0) > 1 ? given->size(1) : 0;
  }

  const float* row(int64_t b, int64_t column = 0) const { return data ? data + b * stride + column : nullptr; }
};

Tensors as_row(const Tensors& vector) {
  if (!vector) return vector;
  STD_TORCH_CHECK(vector->dim() == 1, "bias must have one dimension");
  return torch::stable::unsqueeze(*vector, 0);
}

// Memory for a result of x's shape and dtype; null if there is none.
char* result(const Tensors& out, const Tensor& x, const char* name) {
  if (!out) return nullptr;
  const bool fits = out->dim() == x.dim() && out->scalar_type() == x.scalar_type() && out->is_contiguous() && out->is_cpu() &&
                    out->numel() == x.numel() && out->size(0) == x.size(0) && out->size(out->dim() - 1) == x.size(x.dim() - 1);
  STD_TORCH_CHECK(fits, name, " must be contiguous and have the shape and the dtype of x");
  return static_cast<char*>(out->mutable_data_ptr());
}

struct Gated {
  Tensor y;
  Tensors bias, xr, vr, steps;
  Tensor gates;
  int64_t gate_column;
};

void norm_rows(const Tensor& x, const Gated& given, const Tensor& modulation, int64_t shift_column, int64_t scale_column, double eps,
               const Tensors& out_x, const Tensors& out_vr, const Tensor& out) {
  const int kind = index_of(x, "x");
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) > 0 && x.size(2) <= MAX_SIZE, "x must be (B, N, D) with D from 1 to ", MAX_SIZE);
  const int64_t batch = x.size(0), tokens = x.size(1), size = x.size(2);
  const Tokens in_x(x, x, "x"), in_y(given.y, x, "y", true), in_xr(given.xr, x, "xr"), in_vr(given.vr, x, "vr");
  const Table table(modulation, batch, size, "modulation", {shift_column, scale_column});
  const Table gate(given.gates, batch, size, "gates", {given.gate_column});
  const Table offset(as_row(given.bias), 1, size, "bias", {0});
  const Table step(given.steps ? Tensors(torch::stable::unsqueeze(*given.steps, 1)) : Tensors(), batch, 1, "steps", {0});
  char *to_x = result(out_x, x, "out_x"), *to_vr = result(out_vr, x, "out_vr");
  const Tokens to_h(out, x, "out", true);
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
  const int64_t row_bytes = size * static_cast<int64_t>(x.element_size());
  const auto run = functions().gated[kind];
  torch::stable::parallel_for(0, batch * tokens, std::max<int64_t>(1, GRAIN / size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tokens, n = i % tokens, o = i * row_bytes;
      run(Row{in_x.row(b, n), in_y.row(b, n), in_xr.row(b, n), in_vr.row(b, n), offset.data, gate.row(b, given.gate_column),
              table.row(b, shift_column), table.row(b, scale_column), step.data ? *step.row(b) : 1.0f, static_cast<float>(eps),
              to_x ? to_x + o : nullptr, to_vr ? to_vr + o : nullptr, const_cast<void*>(to_h.row(b, n)), size, in_y.step, to_h.step});
    }
  });
}

void gated_residual(const Tensor& x, const Tensor& y, const Tensors& bias, const Tensor& gates, int64_t gate_column,
                    const Tensor& modulation, int64_t shift_column, int64_t scale_column, double eps, Tensor out_x, Tensor out) {
  norm_rows(x, Gated{y, bias, {}, {}, {}, gates, gate_column}, modulation, shift_column, scale_column, eps, out_x, {}, out);
}

void group_end(const Tensor& x, const Tensor& y, const Tensors& bias, const Tensors& xr, const Tensors& vr, const Tensor& gates,
               int64_t gate_column, const Tensor& modulation, int64_t shift_column, int64_t scale_column, const Tensors& steps, double eps,
               const Tensors& out_xr, Tensor out_vr, Tensor out) {
  STD_TORCH_CHECK(xr.has_value() == out_xr.has_value(), "xr and out_xr come together");
  const Gated gated{y, bias, xr, vr, steps, gates, gate_column};
  norm_rows(x, gated, modulation, shift_column, scale_column, eps, out_xr, out_vr, out);
}

void bias_gelu_(Tensor x, const Tensors& bias) {
  const int kind = index_of(x, "x");
  STD_TORCH_CHECK(x.is_contiguous() && x.dim() > 0, "x must be contiguous: it is overwritten");
  const int64_t size = x.size(x.dim() - 1), count = size ? x.numel() / size : 0, row_bytes = size * static_cast<int64_t>(x.element_size());
  const Table offset(as_row(bias), 1, size, "bias", {0});
  char* data = static_cast<char*>(x.mutable_data_ptr());
  const auto run = functions().bias_gelu[kind];
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, GRAIN / std::max<int64_t>(size, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(data + i * row_bytes, offset.data, size);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(odelt_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&level));
  m.impl("cpu_width", TORCH_BOX(&cpu_width));
}

STABLE_TORCH_LIBRARY_IMPL(odelt_native, CPU, m) {
  m.impl("gated_residual", TORCH_BOX(&gated_residual));
  m.impl("group_end", TORCH_BOX(&group_end));
  m.impl("bias_gelu_", TORCH_BOX(&bias_gelu_));
}
