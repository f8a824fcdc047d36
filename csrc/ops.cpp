// Schemas of the native operators; cpu/ and cuda/ register what they implement. odelt_fast/engine/native/ says what each one computes.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(odelt_native, m) {
  m.def("cpu_level() -> int");  // of processor.h
  m.def("cpu_width() -> int");  // floats in a vector
  // The results overwrite out_x, out_vr and out, which may be inputs: fresh memory costs more than the arithmetic.
  m.def(
      "gated_residual(Tensor x, Tensor y, Tensor? bias, Tensor gates, int gate_column, Tensor modulation, int shift_column, "
      "int scale_column, float eps, Tensor(a!) out_x, Tensor(b!) out) -> ()");
  m.def(
      "group_end(Tensor x, Tensor y, Tensor? bias, Tensor? xr, Tensor? vr, Tensor gates, int gate_column, Tensor modulation, "
      "int shift_column, int scale_column, Tensor? steps, float eps, Tensor(a!)? out_xr, Tensor(b!) out_vr, Tensor(c!) out) -> ()");
  m.def("bias_gelu_(Tensor(a!) x, Tensor? bias) -> ()");
  m.def("has_products(Tensor like) -> bool");
  m.def("pack_weight(Tensor weight, Tensor(a!) out) -> ()");
  m.def("linear(Tensor x, Tensor packed, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("mlp(Tensor x, Tensor packed_in, Tensor bias_in, Tensor packed_out, Tensor(a!) out) -> ()");
  m.def("attention(Tensor qkv, int heads, float scale, Tensor(a!) out) -> ()");
  // Graphs, executables and streams are CUDA's own handles as numbers; flag is the address of an int32 on the device.
  m.def("while_graph_versions() -> (int, int)");
  m.def("while_graph_create(int device, int first, int body, int flag) -> (int, int)");
  m.def("while_graph_launch(int device, int executable, int stream) -> ()");
  m.def("while_graph_destroy(int device, int graph, int executable) -> ()");
}
