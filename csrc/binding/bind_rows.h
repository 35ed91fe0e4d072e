// The entry points of the row ops. Each reads the tensors, releases the GIL and runs the kernel.
#pragma once

#include "../cpu/gather_rows.h"
#include "tensors.h"
#ifdef FASTFS_WITH_CUDA
#include "../cuda/gather_rows.h"
#endif

namespace fastfs {
namespace {

char* data_of(const DLTensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

DType dtype_of_rows(const DLTensor& t, const char* name) {
  try {
    return dtype_of(t, 0);
  } catch (const py::value_error&) {
    throw py::value_error(std::string(name) + ": expected float16, bfloat16, float32 or float64");
  }
}

// The arguments of a call, checked. `out` is None for squares alone.
struct RowCall {
  RowTensor x{};
  RowRequest request{};
  DLDevice device{};

  RowCall(Exchange& exchange, DLDeviceType type, const py::object& tensor, const py::object& rows, int64_t row_dims,
          const py::object& out, const py::object& squares) {
    const DLTensor t = exchange.view(tensor.ptr());
    device = t.device;
    if (device.device_type != type) throw py::value_error("expected x on the device of the op");
    x.dtype = dtype_of_rows(t, "x");
    x.data = data_of(t);
    if (row_dims < 0 || row_dims > t.ndim) throw py::value_error("expected row_dims from 0 to the dimensions of x");
    if (!split_rows(x, static_cast<int>(row_dims), t.ndim, t.shape, t.strides)) {
      throw py::value_error("expected at most " + std::to_string(kMaxDims) +
                            " dimensions that cannot be merged in the rows and in the width of x");
    }
    if (is_freed(t)) throw py::value_error("expected x with its memory");
    if (type == kDLCUDA && reinterpret_cast<uintptr_t>(x.data) % item_size(x.dtype) != 0) {
      throw py::value_error("expected data aligned to its element size");  // a GPU cannot load it, and would fault
    }

    const DLTensor index = exchange.view(rows.ptr());
    if (index.ndim != 1 || index.dtype.code != kDLInt || index.dtype.bits != 64 || index.dtype.lanes != 1 ||
        !same_device(index.device, t.device)) {
      throw py::value_error("expected rows of int64 with one dimension on the device of x");
    }
    if (is_freed(index)) throw py::value_error("expected rows with their memory");
    request.index = reinterpret_cast<const int64_t*>(data_of(index));
    request.index_stride = index.strides == nullptr ? 1 : index.strides[0];
    request.kept = index.shape[0];

    const DLTensor norms = exchange.view(squares.ptr());
    if (norms.ndim != 1 || norms.shape[0] != request.kept || dtype_of_rows(norms, "squares") != DType::f64 ||
        !is_contiguous(norms) || !same_device(norms.device, t.device)) {
      throw py::value_error("expected contiguous float64 squares, one for each of rows");
    }
    if (is_freed(norms)) throw py::value_error("expected squares with their memory");
    request.squares = reinterpret_cast<double*>(data_of(norms));
    request.to_dtype = x.dtype;
    if (out.is_none()) return;
    const DLTensor to = exchange.view(out.ptr());
    request.to_dtype = dtype_of_rows(to, "out");
    const int64_t elements = request.kept * x.row.width;
    if (to.ndim != 2 || to.shape[0] != request.kept || to.shape[1] != x.row.width ||
        !same_device(to.device, t.device) || (elements > 0 && !is_contiguous(to))) {
      throw py::value_error("expected a contiguous output of rows x width on the device of x");
    }
    if (is_freed(to)) throw py::value_error("expected out with its memory");
    if (elements > 0) request.to = data_of(to);
  }
};

void gather_rows_cpu(const py::object& x, const py::object& rows, int64_t row_dims, const py::object& out,
                     const py::object& squares, int threads) {
  Exchange exchange;
  const RowCall call(exchange, kDLCPU, x, rows, row_dims, out, squares);
  checked_threads(threads);
  const py::gil_scoped_release released;
  cpu::gather_rows(call.x, call.request, threads);  // its std::out_of_range is an IndexError in Python
}

#ifdef FASTFS_WITH_CUDA
// `partials`: float64 of row_partials(kept, width) elements, at least; None where that is 0.
void gather_rows_cuda(const py::object& x, const py::object& rows, int64_t row_dims, const py::object& out,
                      const py::object& squares, const py::object& partials) {
  Exchange exchange;
  const RowCall call(exchange, kDLCUDA, x, rows, row_dims, out, squares);
  const int64_t needed = cuda::row_partials(call.request.kept, call.x.row.width);
  double* scratch = nullptr;
  if (needed > 0) {
    const DLTensor t = exchange.view(partials.ptr());
    if (t.ndim != 1 || t.shape[0] < needed || dtype_of_rows(t, "partials") != DType::f64 ||
        !same_device(t.device, call.device) || is_freed(t)) {
      throw py::value_error("expected float64 partials of row_partials(kept, width) elements on the device of x");
    }
    scratch = reinterpret_cast<double*>(data_of(t));
  }
  void* const stream = exchange.current_stream(call.device);
  const py::gil_scoped_release released;
  cuda::gather_rows(call.x, call.request, scratch, call.device.device_id, stream);
}
#endif

}  // namespace

inline void bind_rows(py::module_& m) {
  m.def("gather_rows_cpu", &gather_rows_cpu);
#ifdef FASTFS_WITH_CUDA
  m.def("gather_rows_cuda", &gather_rows_cuda);
  m.def("row_partials", &cuda::row_partials);
#endif
}

}  // namespace fastfs
