"""C++ and CUDA operators (csrc/)."""
