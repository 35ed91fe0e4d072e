// fastfs._C: one entry point per measurement and device. Reads the tensors, lets go of the GIL, runs the kernel. Called
// by fastfs/ops.py alone, behind the dispatcher: out of it, fake tensors and lazy views would come through as raw
// pointers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/measure.h"
#include "tensors.h"
#ifdef FASTFS_WITH_CUDA
#include "cuda/launch.h"
#endif

namespace fastfs {

void bind_rows(py::module_& m);  // rows_module.cpp

namespace {

// The lists of a call: one per input.
template <int N>
LayerList read(Exchange& exchange, const py::tuple& inputs, bool per_row) {
  if (inputs.size() != N) throw py::value_error("expected " + std::to_string(N) + " lists of tensors");
  py::list lists[N];
  for (int i = 0; i < N; ++i) lists[i] = py::cast<py::list>(inputs[i]);
  return read_layers(exchange, lists, N, per_row);
}

// The memory of `out`, which has to be `rows` x `columns` float64 on `device`.
double* output(Exchange& exchange, const py::object& out, int64_t rows, int64_t columns, DLDevice device) {
  const DLTensor t = exchange.view(out.ptr());
  if (t.ndim != 2 || t.shape[0] != rows || t.shape[1] != columns || dtype_of(t, 0) != DType::f64 || !is_contiguous(t) ||
      (rows > 0 && (t.device.device_type != device.device_type || t.device.device_id != device.device_id))) {
    throw py::value_error("expected a contiguous float64 output of " + std::to_string(rows) + " x " +
                          std::to_string(columns) + " on the device of the inputs");
  }
  return reinterpret_cast<double*>(static_cast<char*>(t.data) + t.byte_offset);
}

template <class Sums>
void measure_cpu(const py::tuple& inputs, bool per_row, const py::object& out, int threads) {
  Exchange exchange;
  const LayerList list = read<Sums::kInputs>(exchange, inputs, per_row);
  if (list.device.device_type != kDLCPU) throw py::value_error("expected tensors on the CPU");
  double* const to = output(exchange, out, list.segments, Sums::kSums + 2, list.device);
  const py::gil_scoped_release released;
  cpu::measure<Sums>(list.layers, to, threads);
}

// Feature inputs of any dtype, contiguous: what the ceiling of the benchmarks reads.
uint64_t stream_read_cpu(const py::tuple& inputs, int threads) {
  Exchange exchange;
  const LayerList list = read<3>(exchange, inputs, false);
  if (list.device.device_type != kDLCPU) throw py::value_error("expected tensors on the CPU");
  const py::gil_scoped_release released;
  return cpu::stream_read(list.layers, 3, threads);
}

#ifdef FASTFS_WITH_CUDA
// A call on a CUDA device in two steps, because torch allocates the memory that the first one sizes.
template <class Sums>
class CudaCall {
 public:
  CudaCall(const py::tuple& inputs, bool per_row) : list_(read<Sums::kInputs>(exchange_, inputs, per_row)) {
    if (list_.device.device_type != kDLCUDA) throw py::value_error("expected tensors on a CUDA device");
    workspace_ = cuda::workspace<Sums>(list_.layers);
  }
  int64_t partial_bytes() const { return workspace_.partial_bytes; }
  int64_t tickets() const { return workspace_.tickets; }
  // Queues the work on torch's current stream of the inputs' device.
  void launch(const py::object& out, uintptr_t partials, uintptr_t tickets) {
    double* const to = output(exchange_, out, list_.segments, Sums::kSums + 2, list_.device);
    void* const stream = exchange_.current_stream(list_.device);
    const py::gil_scoped_release released;
    cuda::launch<Sums>(list_.layers, to, reinterpret_cast<void*>(partials), reinterpret_cast<uint32_t*>(tickets),
                       list_.device.device_id, stream);
  }

 private:
  Exchange exchange_;
  LayerList list_;
  cuda::Workspace workspace_{};
};

template <class Sums>
void bind_cuda(py::module_& m, const char* name) {
  py::class_<CudaCall<Sums>>(m, name)
      .def(py::init<const py::tuple&, bool>())
      .def_property_readonly("partial_bytes", &CudaCall<Sums>::partial_bytes)
      .def_property_readonly("tickets", &CudaCall<Sums>::tickets)
      .def("launch", &CudaCall<Sums>::launch);
}

void stream_read_cuda(const py::tuple& inputs, const py::object& sink) {
  Exchange exchange;
  const LayerList list = read<3>(exchange, inputs, false);
  if (list.device.device_type != kDLCUDA) throw py::value_error("expected tensors on a CUDA device");
  double* const to = output(exchange, sink, 1, 1, list.device);
  void* const stream = exchange.current_stream(list.device);
  const py::gil_scoped_release released;
  cuda::stream_read(list.layers, 3, to, list.device.device_id, stream);
}
#endif

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
  m.doc() = "fastfs native core: called through fastfs.ops, never directly";
  m.def("feature_stats_cpu", &measure_cpu<FeatureSums>);
  m.def("update_stats_cpu", &measure_cpu<UpdateSums>);
  m.def("stream_read_cpu", &stream_read_cpu);
  bind_rows(m);
#ifdef FASTFS_WITH_CUDA
  bind_cuda<FeatureSums>(m, "FeatureStatsCuda");
  bind_cuda<UpdateSums>(m, "UpdateStatsCuda");
  m.def("stream_read_cuda", &stream_read_cuda);
#endif
  m.def("build_info", &build_info);
}
