// fastfs._C: one entry point per measurement and device. Reads the tensors, lets go of the GIL, runs the kernel. Called
// by fastfs/_core/ops.py alone, behind the dispatcher: out of it, fake tensors and lazy views would come through as raw
// pointers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/measure.h"
#include "tensors.h"
#ifdef FASTFS_WITH_CUDA
#include "cuda/launch.h"
#endif

namespace fastfs {

void bind_rows(py::module_& m);    // rows_module.cpp
void bind_record(py::module_& m);  // record_module.cpp

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
  double* const p = doubles(t, rows, columns, "an output");
  if (rows > 0 && !same_device(t.device, device)) throw py::value_error("expected an output on the inputs' device");
  return p;
}

// Reads the coefficients of a measurement that has some: one row for each layer. On the CPU they go into the layers;
// on the layers' own device they stay where they are, and come back as a pointer for the kernel.
template <class Sums>
const double* read_coefficients(Exchange& exchange, const py::object& coefficients, LayerList& list) {
  for (size_t n = 0; n < list.layers.size(); ++n) {
    const Layer& l = list.layers[n];
    if (l.first != l.last) refuse(n, "expected tensors of one dtype");
    if (!Sums::kSixteenBit && item_size(l.first) == 2) refuse(n, "expected float32 or float64");
  }
  const DLTensor t = exchange.view(coefficients.ptr());
  const auto rows = static_cast<int64_t>(list.layers.size());
  const double* const p = doubles(t, rows, Sums::kCoefficients, "coefficients");
  if (rows == 0) return nullptr;
  if (t.device.device_type == kDLCPU) {
    for (size_t n = 0; n < list.layers.size(); ++n) {
      std::copy_n(p + n * Sums::kCoefficients, Sums::kCoefficients, list.layers[n].coefficients);
    }
    return nullptr;
  }
  if (!same_device(t.device, list.device)) {
    throw py::value_error("expected coefficients on the CPU or on the device of the tensors");
  }
  return p;
}

template <class Sums>
void measure_cpu(const py::tuple& inputs, bool per_row, const py::object& out, int threads) {
  Exchange exchange;
  const LayerList list = read<Sums::kInputs>(exchange, inputs, per_row);
  if (list.device.device_type != kDLCPU) throw py::value_error("expected tensors on the CPU");
  checked_threads(threads);
  double* const to = output(exchange, out, list.segments, Sums::kSums + 2, list.device);
  const py::gil_scoped_release released;
  cpu::measure<Sums>(list.layers, to, threads);
}

template <class Sums>
void measure_optimizer_cpu(const py::tuple& inputs, const py::object& coefficients, const py::object& out,
                           int threads) {
  Exchange exchange;
  LayerList list = read<Sums::kInputs>(exchange, inputs, false);
  if (list.device.device_type != kDLCPU) throw py::value_error("expected tensors on the CPU");
  read_coefficients<Sums>(exchange, coefficients, list);
  checked_threads(threads);
  double* const to = output(exchange, out, list.segments, Sums::kSums + 2, list.device);
  const py::gil_scoped_release released;
  cpu::measure<Sums>(list.layers, to, threads);
}

// Rows of all tensors of a list together: the elements of all dimensions but the last.
int64_t count_rows(const py::list& tensors) {
  Exchange exchange;
  int64_t all = 0;
  for (size_t n = 0; n < tensors.size(); ++n) {
    const DLTensor t = exchange.view(PyList_GET_ITEM(tensors.ptr(), n));
    int64_t rows = 1;
    for (int d = 0; d + 1 < t.ndim; ++d) rows *= t.shape[d];
    all += rows;
  }
  return all;
}

void check_contiguous(const LayerList& list) {
  for (size_t n = 0; n < list.layers.size(); ++n) {
    for (int i = 0; i < 3; ++i) {
      if (!list.layers[n].contiguous[i]) refuse(n, "expected contiguous tensors");
    }
  }
}

// Feature inputs of any dtype, contiguous: what the ceiling of the benchmarks reads.
uint64_t stream_read_cpu(const py::tuple& inputs, int threads) {
  Exchange exchange;
  const LayerList list = read<3>(exchange, inputs, false);
  if (list.device.device_type != kDLCPU) throw py::value_error("expected tensors on the CPU");
  check_contiguous(list);
  checked_threads(threads);
  const py::gil_scoped_release released;
  return cpu::stream_read(list.layers, 3, threads);
}

#ifdef FASTFS_WITH_CUDA
// A call on a CUDA device in two steps, because torch allocates the memory that the first one sizes. Where the second
// allocates nothing but the output, there is no workspace.
template <class Sums>
class CudaCall {
 public:
  CudaCall(const py::tuple& inputs, bool per_row) : list_(read<Sums::kInputs>(exchange_, inputs, per_row)) {
    if (list_.device.device_type != kDLCUDA) throw py::value_error("expected tensors on a CUDA device");
    workspace_ = cuda::workspace<Sums>(list_.layers);
    stream_ = exchange_.current_stream(list_.device);
  }
  // ... with coefficients, which have to live until the launch.
  CudaCall(const py::tuple& inputs, const py::object& coefficients) : CudaCall(inputs, false) {
    coefficients_ = read_coefficients<Sums>(exchange_, coefficients, list_);
  }
  int64_t rows() const { return list_.segments; }
  int64_t partial_bytes() const { return workspace_.partial_bytes; }
  int64_t tickets() const { return workspace_.tickets; }
  uintptr_t stream() const { return reinterpret_cast<uintptr_t>(stream_); }
  bool capturing() const { return cuda::capturing(list_.device.device_id, stream_); }
  // Queues the work on what was torch's current stream of the inputs' device.
  void launch(const py::object& out, uintptr_t partials, uintptr_t tickets) {
    double* const to = output(exchange_, out, list_.segments, Sums::kSums + 2, list_.device);
    if ((workspace_.partial_bytes > 0 && partials == 0) || (workspace_.tickets > 0 && tickets == 0)) {
      throw py::value_error("expected the memory of partial sums and tickets");
    }
    const py::gil_scoped_release released;
    cuda::launch<Sums>(list_.layers, coefficients_, to, reinterpret_cast<void*>(partials),
                       reinterpret_cast<uint32_t*>(tickets), list_.device.device_id, stream_);
  }

 private:
  Exchange exchange_;
  LayerList list_;
  cuda::Workspace workspace_{};
  void* stream_ = nullptr;
  const double* coefficients_ = nullptr;
};

template <class Sums>
void bind_cuda(py::module_& m, const char* name) {
  py::class_<CudaCall<Sums>> call(m, name);
  if constexpr (Sums::kCoefficients > 0) {
    call.def(py::init<const py::tuple&, const py::object&>());
  } else {
    call.def(py::init<const py::tuple&, bool>());
  }
  call.def_property_readonly("rows", &CudaCall<Sums>::rows)
      .def_property_readonly("partial_bytes", &CudaCall<Sums>::partial_bytes)
      .def_property_readonly("tickets", &CudaCall<Sums>::tickets)
      .def_property_readonly("stream", &CudaCall<Sums>::stream)
      .def_property_readonly("capturing", &CudaCall<Sums>::capturing)
      .def("launch", &CudaCall<Sums>::launch);
}

void stream_read_cuda(const py::tuple& inputs, const py::object& sink) {
  Exchange exchange;
  const LayerList list = read<3>(exchange, inputs, false);
  if (list.device.device_type != kDLCUDA) throw py::value_error("expected tensors on a CUDA device");
  check_contiguous(list);
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
  m.doc() = "fastfs native core: called through fastfs._core.ops, never directly";
  m.def("feature_stats_cpu", &measure_cpu<FeatureSums>);
  m.def("update_stats_cpu", &measure_cpu<UpdateSums>);
  m.def("linear_stats_cpu", &measure_optimizer_cpu<LinearSums>);
  m.def("adam_stats_cpu", &measure_optimizer_cpu<AdamSums>);
  m.def("adamax_stats_cpu", &measure_optimizer_cpu<AdamaxSums>);
  m.def("rmsprop_stats_cpu", &measure_optimizer_cpu<RmspropSums>);
  m.def("count_rows", &count_rows);
  m.def("stream_read_cpu", &stream_read_cpu);
  bind_rows(m);
  bind_record(m);
#ifdef FASTFS_WITH_CUDA
  bind_cuda<FeatureSums>(m, "FeatureStatsCuda");
  bind_cuda<UpdateSums>(m, "UpdateStatsCuda");
  bind_cuda<LinearSums>(m, "LinearStatsCuda");
  bind_cuda<AdamSums>(m, "AdamStatsCuda");
  bind_cuda<AdamaxSums>(m, "AdamaxStatsCuda");
  bind_cuda<RmspropSums>(m, "RmspropStatsCuda");
  m.def("stream_read_cuda", &stream_read_cuda);
#endif
  m.def("build_info", &build_info);
}
