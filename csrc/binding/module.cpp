// fastfs._C. fastfs/_core/ops.py calls its entry points, always behind torch's dispatcher: outside of it, fake tensors
// and lazy views would arrive as raw pointers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/measure.h"
#ifdef FASTFS_WITH_CUDA
#include "../cuda/launch.h"
#endif

namespace fastfs {

namespace py = pybind11;

void bind_measurements(py::module_& m);  // measurements.cpp
void bind_rows(py::module_& m);          // rows.cpp
void bind_record(py::module_& m);        // record.cpp
void bind_bench(py::module_& m);         // ../bench/binding.cpp

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
