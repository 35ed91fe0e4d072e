// Binding of the reader of record lines, for fastfs/_record/reading/jsonl_reader.py.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../record_lines.h"

namespace fastfs {
namespace {

namespace py = pybind11;

using Spec = std::vector<std::pair<std::string, int>>;

void add_columns(std::vector<RecordColumn>& to, const Spec& spec) {
  for (const auto& [name, kind] : spec) {
    if (kind < 0 || kind > 3) throw py::value_error("expected kinds of values from 0 to 3");
    to.push_back({name, static_cast<ValueKind>(kind), false, 0, {}, {}});
  }
}

template <class T>
py::bytes memory(const std::vector<T>& values) {
  return py::bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

py::dict drained(std::vector<RecordColumn>& columns) {
  py::dict result;
  for (RecordColumn& c : columns) {
    if (c.used)
      result[py::str(c.name)] =
          py::make_tuple(static_cast<int>(c.kind), c.coded() ? memory(c.codes) : memory(c.numbers));
  }
  return result;
}

// What has been read, as the memory of arrays (float64; int32 for codes; int64 for steps); starts afresh.
py::dict drain(RecordLines& lines) {
  py::dict result;
  result["rows"] = lines.rows();
  result["kinds"] = memory(lines.kinds);
  result["runs"] = memory(lines.runs);
  result["lengths"] = memory(lines.lengths);
  result["steps"] = memory(lines.steps);
  result["times"] = memory(lines.times);
  result["columns"] = drained(lines.columns);
  result["scalars"] = drained(lines.scalars);
  lines.clear();
  return result;
}

size_t read_lines(RecordLines& lines, const py::bytes& data, size_t start) {
  char* text = nullptr;
  py::ssize_t size = 0;
  if (PyBytes_AsStringAndSize(data.ptr(), &text, &size) != 0) throw py::error_already_set();
  if (start > static_cast<size_t>(size)) throw py::value_error("expected a start within the data");
  return lines.read({text, static_cast<size_t>(size)}, start);
}

void expect(RecordLines& lines, const std::string& run, int32_t code, int32_t length) {
  if (code < 0 || length < 0) throw py::value_error("expected a code and a length >= 0");
  lines.expect(run, code, length);
}

// The strings that codes are of, from one on.
std::vector<std::string> strings(const RecordLines& lines, size_t start) {
  if (start > lines.strings.size()) throw py::value_error("expected a start among the strings");
  return {lines.strings.begin() + static_cast<std::ptrdiff_t>(start), lines.strings.end()};
}

}  // namespace

inline void bind_record(py::module_& m) {
  py::class_<RecordLines>(m, "RecordLines")
      .def(py::init([](const Spec& columns, const Spec& scalars, const std::vector<std::string>& refused) {
        auto lines = std::make_unique<RecordLines>();
        add_columns(lines->columns, columns);
        add_columns(lines->scalars, scalars);
        for (const std::string& name : refused) lines->refuse(name);
        return lines;
      }))
      .def("expect", &expect)
      .def("read", &read_lines)
      .def("drain", &drain)
      .def_property_readonly("rows", &RecordLines::rows)
      .def_property_readonly("taken", &RecordLines::taken)
      .def("strings", &strings);
}

}  // namespace fastfs
