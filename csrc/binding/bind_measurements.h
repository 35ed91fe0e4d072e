// The entry points of the measurements, for every line of measurements.h: name_cpu, name_cuda where CUDA is built, and
// an entry of measurements(). Each reads the tensors, releases the GIL and runs the kernel.
#pragma once

#include "../measurements.h"

#include <pybind11/pybind11.h>

#include "../cpu/measure.h"
#include "tensors.h"
#ifdef FASTFS_WITH_CUDA
#include "../cuda/launch.h"
#endif

namespace fastfs {
namespace {

// The second argument of a call: the coefficients of all layers, or else whether there is a row of sums per row.
template <class Sums>
using Option = std::conditional_t<(Sums::kCoefficients > 0), py::object, bool>;

// Reads the coefficients, one row for each layer. From the CPU they are copied into the layers. On the device of the
// layers they stay where they are, and the result is a pointer for the kernel.
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

// Reads all arguments of a call but the output. Returns the coefficients that are in device memory, or null.
template <class Sums>
const double* read(Exchange& exchange, const py::tuple& inputs, const Option<Sums>& option, DLDeviceType device,
                   LayerList& list) {
  if constexpr (Sums::kCoefficients > 0) {
    list = read_inputs<Sums::kInputs>(exchange, inputs, false, device);
    return read_coefficients<Sums>(exchange, option, list);
  } else {
    list = read_inputs<Sums::kInputs>(exchange, inputs, option, device);
    return nullptr;
  }
}

template <class Sums>
void measure_cpu(const py::tuple& inputs, const Option<Sums>& option, const py::object& out, int threads) {
  Exchange exchange;
  LayerList list;
  read<Sums>(exchange, inputs, option, kDLCPU, list);
  checked_threads(threads);
  double* const to = output(exchange, out, list.segments, Sums::kSums + 2, list.device);
  const py::gil_scoped_release released;
  cpu::measure<Sums>(list.layers, to, threads);
}

// The rows of all tensors of a list together: the products of all dimensions but the last.
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

#ifdef FASTFS_WITH_CUDA
// A call on a CUDA device, in two steps: the constructor sizes the memory, which torch allocates, and launch() uses it.
template <class Sums>
class CudaCall {
 public:
  // Coefficients have to live until the launch.
  CudaCall(const py::tuple& inputs, const Option<Sums>& option) {
    coefficients_ = read<Sums>(exchange_, inputs, option, kDLCUDA, list_);
    workspace_ = cuda::workspace<Sums>(list_.layers);
    stream_ = exchange_.current_stream(list_.device);
  }
  int64_t rows() const { return list_.segments; }
  int64_t partial_bytes() const { return workspace_.partial_bytes; }
  int64_t tickets() const { return workspace_.tickets; }
  uintptr_t stream() const { return reinterpret_cast<uintptr_t>(stream_); }
  bool capturing() const { return cuda::capturing(list_.device.device_id, stream_); }
  // Queues the work on the stream that was current on the inputs' device when the call was made.
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
inline void bind_cuda(py::module_& m, const char* name) {
  py::class_<CudaCall<Sums>>(m, name)
      .def(py::init<const py::tuple&, const Option<Sums>&>())
      .def_property_readonly("rows", &CudaCall<Sums>::rows)
      .def_property_readonly("partial_bytes", &CudaCall<Sums>::partial_bytes)
      .def_property_readonly("tickets", &CudaCall<Sums>::tickets)
      .def_property_readonly("stream", &CudaCall<Sums>::stream)
      .def_property_readonly("capturing", &CudaCall<Sums>::capturing)
      .def("launch", &CudaCall<Sums>::launch);
}
#endif

// What Python compares with its own declarations: name -> (inputs, sums, coefficients, takes 16-bit dtypes).
py::dict measurements() {
  py::dict result;
#define FASTFS_DESCRIBE(name, Sums) \
  result[#name] = py::make_tuple(Sums::kInputs, Sums::kSums, Sums::kCoefficients, Sums::kSixteenBit);
  FASTFS_MEASUREMENTS(FASTFS_DESCRIBE)
#undef FASTFS_DESCRIBE
  return result;
}

}  // namespace

inline void bind_measurements(py::module_& m) {
  m.def("measurements", &measurements);
  m.def("count_rows", &count_rows);
#define FASTFS_BIND(name, Sums) m.def(#name "_cpu", &measure_cpu<Sums>);
  FASTFS_MEASUREMENTS(FASTFS_BIND)
#undef FASTFS_BIND
#ifdef FASTFS_WITH_CUDA
#define FASTFS_BIND(name, Sums) bind_cuda<Sums>(m, #name "_cuda");
  FASTFS_MEASUREMENTS(FASTFS_BIND)
#undef FASTFS_BIND
#endif
}

}  // namespace fastfs
