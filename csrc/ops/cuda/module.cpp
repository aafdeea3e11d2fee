// The module peftops._C_cuda: registers the CUDA implementations of torch.ops.peftops. It is linked with libtorch_cuda,
// so it is a module of its own, loaded only where torch has CUDA.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C_cuda, m) { m.doc() = "Registers the CUDA implementations of torch.ops.peftops."; }
