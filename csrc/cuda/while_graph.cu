// A CUDA graph that repeats another one while a flag on the device is not 0: [first] -> [read flag] -> while ([body] -> [read flag]).
//
// Only the CUDA runtime is used, linked in statically, so that this builds and loads next to any torch: graphs and streams are handles of the
// driver, which all runtimes in a process share.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#if CUDART_VERSION < 12040
#error "while nodes of CUDA graphs need CUDA 12.4 or newer"
#endif

namespace {

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it once more
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
}
#define CHECK(call) check(call, #call)

// A device as the current one, until the end of a scope.
class Device {
 public:
  explicit Device(int64_t device) {
    CHECK(cudaGetDevice(&before_));
    if (device != before_) CHECK(cudaSetDevice(static_cast<int>(device)));
    changed_ = device != before_;
  }
  ~Device() {
    if (changed_) cudaSetDevice(before_);
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

__global__ void read_flag(cudaGraphConditionalHandle handle, const int32_t* flag) { cudaGraphSetConditional(handle, *flag != 0); }

cudaGraphNode_t add_read_flag(cudaGraph_t graph, const cudaGraphNode_t* after, cudaGraphConditionalHandle handle, const int32_t* flag) {
  void* arguments[] = {&handle, &flag};
  cudaKernelNodeParams kernel = {};
  kernel.func = reinterpret_cast<void*>(read_flag);
  kernel.gridDim = kernel.blockDim = dim3(1);
  kernel.kernelParams = arguments;
  cudaGraphNode_t node;
  CHECK(cudaGraphAddKernelNode(&node, graph, after, after ? 1 : 0, &kernel));
  return node;
}

std::tuple<int64_t, int64_t> create(int64_t device, int64_t first, int64_t body, int64_t flag_address) {
  const Device current(device);
  const auto* flag = reinterpret_cast<const int32_t*>(flag_address);
  cudaGraph_t graph;
  CHECK(cudaGraphCreate(&graph, 0));
  try {
    cudaGraphConditionalHandle handle;
    CHECK(cudaGraphConditionalHandleCreate(&handle, graph, 0, 0));
    cudaGraphNode_t before;
    if (first) CHECK(cudaGraphAddChildGraphNode(&before, graph, nullptr, 0, reinterpret_cast<cudaGraph_t>(first)));
    cudaGraphNode_t entry = add_read_flag(graph, first ? &before : nullptr, handle, flag);
    cudaGraphNodeParams loop = {};
    loop.type = cudaGraphNodeTypeConditional;
    loop.conditional.handle = handle;
    loop.conditional.type = cudaGraphCondTypeWhile;
    loop.conditional.size = 1;
    cudaGraphNode_t node;
#if CUDART_VERSION >= 13000
    CHECK(cudaGraphAddNode(&node, graph, &entry, nullptr, 1, &loop));
#else
    CHECK(cudaGraphAddNode(&node, graph, &entry, 1, &loop));
#endif
    cudaGraph_t inside = loop.conditional.phGraph_out[0];
    cudaGraphNode_t step;
    CHECK(cudaGraphAddChildGraphNode(&step, inside, nullptr, 0, reinterpret_cast<cudaGraph_t>(body)));
    add_read_flag(inside, &step, handle, flag);
    cudaGraphExec_t executable;
    CHECK(cudaGraphInstantiate(&executable, graph, 0));
    return {reinterpret_cast<int64_t>(graph), reinterpret_cast<int64_t>(executable)};
  } catch (...) {
    cudaGraphDestroy(graph);
    throw;
  }
}

void launch(int64_t device, int64_t executable, int64_t stream) {
  const Device current(device);
  CHECK(cudaGraphLaunch(reinterpret_cast<cudaGraphExec_t>(executable), reinterpret_cast<cudaStream_t>(stream)));
}

void destroy(int64_t device, int64_t graph, int64_t executable) {
  const Device current(device);
  CHECK(cudaGraphExecDestroy(reinterpret_cast<cudaGraphExec_t>(executable)));
  CHECK(cudaGraphDestroy(reinterpret_cast<cudaGraph_t>(graph)));
}

// What the driver supports and what this was built with, as 1000*major + 10*minor; a driver of 0: there is none.
std::tuple<int64_t, int64_t> versions() {
  int driver = 0, runtime = 0;
  CHECK(cudaDriverGetVersion(&driver));
  CHECK(cudaRuntimeGetVersion(&runtime));
  return {driver, runtime};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(odelt_native, CompositeExplicitAutograd, m) {
  m.impl("while_graph_versions", TORCH_BOX(&versions));
  m.impl("while_graph_create", TORCH_BOX(&create));
  m.impl("while_graph_launch", TORCH_BOX(&launch));
  m.impl("while_graph_destroy", TORCH_BOX(&destroy));
}
