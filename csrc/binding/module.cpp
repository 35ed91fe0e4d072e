// fastfs._C. fastfs/_core/ops.py calls its entry points, always behind torch's dispatcher: outside of it, fake tensors
// and lazy views would arrive as raw pointers.
//
// All bindings are one file to compile: what each has of pybind11 costs more than the binding itself.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../bench/bind_bench.h"
#include "../cpu/measure.h"
#include "bind_measurements.h"
#include "bind_record.h"
#include "bind_rows.h"
#ifdef FASTFS_WITH_CUDA
#include "../cuda/launch.h"
#endif

namespace fastfs {
namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = FASTFS_VERSION;
  info["compiler"] = __VERSION__;
  info["openmp"] = cpu::has_openmp();
  info["instruction_sets"] = cpu::instruction_sets(false);
  info["usable_instruction_sets"] = cpu::instruction_sets(true);
  info["instruction_set"] = cpu::instruction_set();
#ifdef FASTFS_WITH_CUDA
  py::dict c;
  c["architectures"] = cuda::architectures();
  c["runtime"] = cuda::runtime_version();
  c["driver"] = cuda::driver_version();
  info["cuda"] = c;
#else
  info["cuda"] = py::none();
#endif
  return info;
}

}  // namespace
}  // namespace fastfs

PYBIND11_MODULE(_C, m) {
  using namespace fastfs;
  m.doc() = "fastfs native core: called through fastfs._core.ops, never directly";
  m.def("build_info", &build_info);
  bind_measurements(m);
  bind_rows(m);
  bind_record(m);
  bind_bench(m);
}
