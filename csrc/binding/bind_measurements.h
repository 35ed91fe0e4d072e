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

// The second argument of a call: the coefficients of every row of sums, or else whether there is one per row of a
// layer.
template <class Sums>
using Option = std::conditional_t<(Sums::kCoefficients > 0), py::object, bool>;

// Reads the coefficients, one row for each layer (or piece). From the CPU they are copied into the layers. On the
// device of the layers they stay where they are, and the result is a pointer for the kernel.
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

// The parts of the layers that `pieces` names, as layers of their own. A row of pieces has the index of a layer, a
// first element and a number of elements. Elements are counted in the order of memory, so only contiguous layers can be
// cut.
LayerList cut(Exchange& exchange, const py::object& pieces, const LayerList& whole, int inputs) {
  const DLTensor t = exchange.view(pieces.ptr());
  if (t.device.device_type != kDLCPU || t.dtype.code != kDLInt || t.dtype.bits != 64 || t.dtype.lanes != 1 ||
      t.ndim != 2 || t.shape[1] != 3 || !is_contiguous(t) || is_freed(t)) {
    throw py::value_error("expected pieces: contiguous int64 of P x 3 on the CPU");
  }
  const auto* row = reinterpret_cast<const int64_t*>(static_cast<const char*>(t.data) + t.byte_offset);
  const auto layers = static_cast<int64_t>(whole.layers.size());
  LayerList parts;
  parts.device = whole.device;
  parts.segments = t.shape[0];
  parts.layers.reserve(static_cast<size_t>(t.shape[0]));
  for (int64_t n = 0; n < t.shape[0]; ++n, row += 3) {
    const int64_t index = row[0], begin = row[1], count = row[2];
    if (index < 0 || index >= layers) {
      throw py::value_error("piece " + std::to_string(n) + ": expected the index of a layer, got " +
                            std::to_string(index));
    }
    const Layer& layer = whole.layers[static_cast<size_t>(index)];
    if (begin < 0 || count < 0 || begin > layer.width || count > layer.width - begin) {
      throw py::value_error("piece " + std::to_string(n) + ": expected elements within the " +
                            std::to_string(layer.width) + " of layer " + std::to_string(index));
    }
    Layer& part = parts.layers.emplace_back(layer);
    if (count == layer.width) continue;
    for (int i = 0; i < inputs; ++i) {
      if (!layer.contiguous[i]) {
        throw py::value_error("piece " + std::to_string(n) +
                              ": expected a contiguous layer, or all elements of layer " + std::to_string(index));
      }
      part.data[i] += begin * item_size(i == inputs - 1 ? layer.last : layer.first);
    }
    part.width = count;
    part.dims = 0;
  }
  return parts;
}

// Reads all arguments of a call but the output. Returns the coefficients that are in device memory, or null.
template <class Sums>
const double* read(Exchange& exchange, const py::tuple& inputs, const Option<Sums>& option, const py::object& pieces,
                   DLDeviceType device, LayerList& list) {
  if constexpr (Sums::kCoefficients > 0) {
    list = read_inputs<Sums::kInputs>(exchange, inputs, false, device);
    if (!pieces.is_none()) list = cut(exchange, pieces, list, Sums::kInputs);
    return read_coefficients<Sums>(exchange, option, list);
  } else {
    if (!pieces.is_none()) throw py::value_error("expected no pieces: they are for measurements with coefficients");
    list = read_inputs<Sums::kInputs>(exchange, inputs, option, device);
    return nullptr;
  }
}

template <class Sums>
void measure_cpu(const py::tuple& inputs, const Option<Sums>& option, const py::object& out, int threads,
                 const py::object& pieces) {
  Exchange exchange;
  LayerList list;
  read<Sums>(exchange, inputs, option, pieces, kDLCPU, list);
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
  CudaCall(const py::tuple& inputs, const Option<Sums>& option, const py::object& pieces) {
    coefficients_ = read<Sums>(exchange_, inputs, option, pieces, kDLCUDA, list_);
    plan_ = cuda::plan<Sums>(list_.layers);
    stream_ = exchange_.current_stream(list_.device);
  }
  int64_t rows() const { return list_.segments; }
  int64_t partial_bytes() const { return plan_.partial_bytes; }
  int64_t tickets() const { return plan_.tickets; }
  uintptr_t stream() const { return reinterpret_cast<uintptr_t>(stream_); }
  bool capturing() const { return cuda::capturing(list_.device.device_id, stream_); }
  // Queues the work on the stream that was current on the inputs' device when the call was made.
  void launch(const py::object& out, uintptr_t partials, uintptr_t tickets) {
    double* const to = output(exchange_, out, list_.segments, Sums::kSums + 2, list_.device);
    if ((plan_.partial_bytes > 0 && partials == 0) || (plan_.tickets > 0 && tickets == 0)) {
      throw py::value_error("expected the memory of partial sums and tickets");
    }
    const py::gil_scoped_release released;
    cuda::launch<Sums>(list_.layers, plan_, coefficients_, to, reinterpret_cast<void*>(partials),
                       reinterpret_cast<uint32_t*>(tickets), list_.device.device_id, stream_);
  }

 private:
  Exchange exchange_;
  LayerList list_;
  cuda::Plan plan_{};
  void* stream_ = nullptr;
  const double* coefficients_ = nullptr;
};

template <class Sums>
inline void bind_cuda(py::module_& m, const char* name) {
  py::class_<CudaCall<Sums>>(m, name)
      .def(py::init<const py::tuple&, const Option<Sums>&, const py::object&>(), py::arg("inputs"), py::arg("option"),
           py::arg("pieces") = py::none())
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
#define FASTFS_BIND(name, Sums)                                                                                     \
  m.def(#name "_cpu", &measure_cpu<Sums>, py::arg("inputs"), py::arg("option"), py::arg("out"), py::arg("threads"), \
        py::arg("pieces") = py::none());
  FASTFS_MEASUREMENTS(FASTFS_BIND)
#undef FASTFS_BIND
#ifdef FASTFS_WITH_CUDA
#define FASTFS_BIND(name, Sums) bind_cuda<Sums>(m, #name "_cuda");
  FASTFS_MEASUREMENTS(FASTFS_BIND)
#undef FASTFS_BIND
#endif
}

}  // namespace fastfs
