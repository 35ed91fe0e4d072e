// Python lists of tensors -> checked Layers, through DLPack's C exchange API (about 30 ns a tensor, no torch needed).
//
// The checks here are the last guard before raw pointers: they are complete, and their texts short. The texts that
// users see come from fastfs/_core/checks.py, which runs when one of these fails.
#pragma once

#include <dlpack/dlpack.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "../layers.h"
#include "../strides.h"

namespace fastfs {

namespace py = pybind11;

[[noreturn]] inline void refuse(size_t layer, const std::string& why) {
  throw py::value_error("layer " + std::to_string(layer) + ": " + why);
}

// The exchange API of one tensor type at a time: a call's tensors nearly always have one type.
class Exchange {
 public:
  DLTensor view(PyObject* o) {
    if (Py_TYPE(o) != type_) load(o);
    DLTensor t;
    if (api_->dltensor_from_py_object_no_sync(o, &t) != 0) throw py::error_already_set();
    return t;
  }
  void* current_stream(DLDevice device) const {
    void* stream = nullptr;
    if (api_->current_work_stream(device.device_type, device.device_id, &stream) != 0) throw py::error_already_set();
    return stream;
  }

 private:
  void load(PyObject* o) {
    py::object capsule = py::getattr(reinterpret_cast<PyObject*>(Py_TYPE(o)), "__dlpack_c_exchange_api__", py::none());
    if (capsule.is_none()) {
      throw py::type_error(std::string("expected tensors with a DLPack C exchange API, got ") + Py_TYPE(o)->tp_name);
    }
    auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) throw py::error_already_set();
    if (api->header.version.major != DLPACK_MAJOR_VERSION) {
      throw std::runtime_error("this torch speaks DLPack " + std::to_string(api->header.version.major) +
                               ", fastfs was built for " + std::to_string(DLPACK_MAJOR_VERSION));
    }
    type_ = Py_TYPE(o);
    api_ = api;
  }
  PyTypeObject* type_ = nullptr;
  const DLPackExchangeAPI* api_ = nullptr;
};

inline DType dtype_of(const DLTensor& t, size_t layer) {
  if (t.dtype.lanes == 1) {
    if (t.dtype.code == kDLFloat && t.dtype.bits == 32) return DType::f32;
    if (t.dtype.code == kDLBfloat && t.dtype.bits == 16) return DType::bf16;
    if (t.dtype.code == kDLFloat && t.dtype.bits == 16) return DType::f16;
    if (t.dtype.code == kDLFloat && t.dtype.bits == 64) return DType::f64;
  }
  refuse(layer, "expected float16, bfloat16, float32 or float64");
}

inline bool is_contiguous(const DLTensor& t) {
  if (t.strides == nullptr) return true;
  int64_t expected = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] != 1 && t.strides[d] != expected) return false;
    expected *= t.shape[d];
  }
  return true;
}

// A tensor that has elements and no memory, as after resize_(0) of its storage.
inline bool is_freed(const DLTensor& t) {
  return t.data == nullptr && std::find(t.shape, t.shape + t.ndim, 0) == t.shape + t.ndim;
}

// The memory of a float64 tensor of `rows` x `columns` without gaps, or a complaint about `what`.
inline double* doubles(const DLTensor& t, int64_t rows, int64_t columns, const char* what) {
  if (t.ndim != 2 || t.shape[0] != rows || t.shape[1] != columns || dtype_of(t, 0) != DType::f64 || !is_contiguous(t)) {
    throw py::value_error(std::string("expected ") + what + ": contiguous float64 of " + std::to_string(rows) + " x " +
                          std::to_string(columns));
  }
  if (is_freed(t)) throw py::value_error(std::string("expected ") + what + " whose memory has not been freed");
  return reinterpret_cast<double*>(static_cast<char*>(t.data) + t.byte_offset);
}

// OpenMP takes no other numbers.
inline int checked_threads(int threads) {
  if (threads < 1) throw py::value_error("expected at least 1 thread, got " + std::to_string(threads));
  return threads;
}

inline bool same_device(DLDevice a, DLDevice b) { return a.device_type == b.device_type && a.device_id == b.device_id; }

struct LayerList {
  std::vector<Layer> layers;
  DLDevice device{kDLCPU, 0};
  int64_t segments = 0;
};

// `inputs`: one list of tensors per input, all of one length. Checks dtypes, shapes and devices.
inline LayerList read_layers(Exchange& exchange, const py::list* lists, int inputs, bool per_row) {
  LayerList result;
  const size_t count = lists[0].size();
  for (int i = 1; i < inputs; ++i) {
    if (lists[i].size() != count) throw py::value_error("expected the same number of layers in every argument");
  }
  result.layers.resize(count);
  for (size_t n = 0; n < count; ++n) {
    Layer& l = result.layers[n];
    DLTensor t[kMaxInputs] = {};
    int64_t elements = 1;
    bool all_contiguous = true;
    for (int i = 0; i < inputs; ++i) {
      t[i] = exchange.view(PyList_GET_ITEM(lists[i].ptr(), n));
      if (t[i].ndim != t[0].ndim || !std::equal(t[i].shape, t[i].shape + t[i].ndim, t[0].shape)) {
        refuse(n, "expected tensors of one shape");
      }
      if (n == 0 && i == 0) result.device = t[0].device;
      if (!same_device(t[i].device, result.device)) {
        refuse(n, "expected all tensors on one device");
      }
      if (is_freed(t[i])) {
        refuse(n, "expected tensors whose memory has not been freed");
      }
      l.data[i] = static_cast<const char*>(t[i].data) + t[i].byte_offset;
      const DType d = dtype_of(t[i], n);
      if (result.device.device_type == kDLCUDA && reinterpret_cast<uintptr_t>(l.data[i]) % item_size(d) != 0) {
        refuse(n, "expected data aligned to its element size");  // a GPU cannot load it, and would fault
      }
      if (i == 0) l.first = d;
      if (i == inputs - 1) {
        l.last = d;
      } else if (d != l.first) {
        refuse(n, "expected before and after of one dtype");
      }
      l.contiguous[i] = is_contiguous(t[i]);
      all_contiguous = all_contiguous && l.contiguous[i];
    }
    for (int d = 0; d < t[0].ndim; ++d) elements *= t[0].shape[d];
    l.dims = 0;
    l.segments = 1;
    l.width = elements;
    if (per_row && t[0].ndim > 0) {
      l.width = t[0].shape[t[0].ndim - 1];
      l.segments = 1;
      for (int d = 0; d + 1 < t[0].ndim; ++d) l.segments *= t[0].shape[d];
    }
    if (!all_contiguous && elements > 0) {
      const int64_t* strides[kMaxInputs] = {};
      for (int i = 0; i < inputs; ++i) strides[i] = t[i].strides;
      if (!merge_dims(l, inputs, per_row, t[0].ndim, t[0].shape, strides)) {
        refuse(n, "expected at most " + std::to_string(kMaxDims) +
                      " dimensions that cannot be merged, got a layout of " + std::to_string(t[0].ndim) +
                      " dimensions; pass contiguous tensors");
      }
    }
    result.segments += l.segments;
  }
  return result;
}

// The N lists of a call, on a device of this type.
template <int N>
LayerList read_inputs(Exchange& exchange, const py::tuple& inputs, bool per_row, DLDeviceType type) {
  if (inputs.size() != N) throw py::value_error("expected " + std::to_string(N) + " lists of tensors");
  py::list lists[N];
  for (int i = 0; i < N; ++i) lists[i] = py::cast<py::list>(inputs[i]);
  LayerList list = read_layers(exchange, lists, N, per_row);
  if (list.device.device_type != type) {
    throw py::value_error(type == kDLCUDA ? "expected tensors on a CUDA device" : "expected tensors on the CPU");
  }
  return list;
}

// The memory of `out`, which has to be `rows` x `columns` float64 on `device`.
inline double* output(Exchange& exchange, const py::object& out, int64_t rows, int64_t columns, DLDevice device) {
  const DLTensor t = exchange.view(out.ptr());
  double* const p = doubles(t, rows, columns, "an output");
  if (rows > 0 && !same_device(t.device, device)) throw py::value_error("expected an output on the inputs' device");
  return p;
}

}  // namespace fastfs
