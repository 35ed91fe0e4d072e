// Reads the measured and predicted lines of a record into typed columns.
//
// The reader accepts lines as the sink writes them: plain JSON, one value for each layer and group in every column,
// strings of ASCII without escapes. It leaves every other line to fastfs/_record/schema.py, which defines the format:
// what is accepted here has to be accepted there, with the same values, but not vice versa. Names and types of columns
// come from fastfs/_record/columns.py through the constructor.
#pragma once

#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace fastfs {

enum class ValueKind : int { number = 0, integer = 1, boolean = 2, text = 3 };

// A column of layers (a value per row) or of whole steps (a value per record). Numbers that are null or absent are NaN;
// flags and codes of strings are then -1.
struct RecordColumn {
  std::string name;
  ValueKind kind;
  bool used = false;  // by a line that was taken
  uint64_t line = 0;  // the last one that has this column: to see a name that comes twice
  std::vector<double> numbers;
  std::vector<int32_t> codes;

  bool coded() const { return kind == ValueKind::boolean || kind == ValueKind::text; }
  void resize(size_t size) {
    if (coded()) {
      codes.resize(size, -1);
    } else {
      numbers.resize(size, std::numeric_limits<double>::quiet_NaN());
    }
  }
};

class RecordLines {
 public:
  static constexpr int64_t kMostSteps = int64_t{1} << 53;

  std::vector<RecordColumn> columns, scalars;
  std::vector<std::string> strings;
  std::vector<int32_t> kinds, runs, lengths;
  std::vector<int64_t> steps;
  std::vector<double> times;

  void refuse(const std::string& name) { refused_.insert(name); }
  void expect(const std::string& run, int32_t code, int32_t length) { expected_[run] = {code, length}; }
  size_t rows() const { return rows_; }
  uint64_t taken() const { return taken_; }  // lines, in all

  // Takes complete lines from `start` on; returns where the first one begins that is not taken, or the incomplete last.
  size_t read(std::string_view data, size_t start) {
    while (start < data.size()) {
      const auto* newline = static_cast<const char*>(std::memchr(data.data() + start, '\n', data.size() - start));
      if (newline == nullptr) break;
      p_ = data.data() + start;
      end_ = newline;
      ++line_;
      if (!line()) {
        for (RecordColumn& c : columns) c.resize(rows_);
        for (RecordColumn& c : scalars) c.resize(steps.size());
        break;
      }
      start = static_cast<size_t>(newline - data.data()) + 1;
      ++taken_;
    }
    return start;
  }

  void clear() {
    rows_ = 0;
    for (RecordColumn& c : columns) c.resize(0);
    for (RecordColumn& c : scalars) c.resize(0);
    kinds.clear();
    runs.clear();
    lengths.clear();
    steps.clear();
    times.clear();
  }

 private:
  struct Run {
    int32_t code, length;
  };

  bool at(char c) {
    while (p_ < end_ && *p_ == ' ') ++p_;
    return p_ < end_ && *p_ == c;
  }
  bool take(char c) {
    if (!at(c)) return false;
    ++p_;
    return true;
  }
  bool take(std::string_view word) {
    if (static_cast<size_t>(end_ - p_) < word.size() || std::memcmp(p_, word.data(), word.size()) != 0) return false;
    p_ += word.size();
    return true;
  }

  // A string of plain ASCII.
  bool text(std::string_view& out) {
    if (!take('"')) return false;
    const char* const begin = p_;
    while (p_ < end_ && *p_ != '"') {
      if (*p_ == '\\' || static_cast<unsigned char>(*p_) < 0x20 || static_cast<unsigned char>(*p_) > 0x7e) return false;
      ++p_;
    }
    if (p_ == end_) return false;
    out = std::string_view(begin, static_cast<size_t>(p_ - begin));
    ++p_;
    return true;
  }

  // A finite number as JSON writes it. `plain`: without fraction and exponent.
  bool number(double& out, bool& plain) {
#if defined(__cpp_lib_to_chars) && __cpp_lib_to_chars >= 201611L
    const auto digit = [this](const char* q) { return q < end_ && *q >= '0' && *q <= '9'; };
    const char* const first = p_ + (p_ < end_ && *p_ == '-' ? 1 : 0);
    if (!digit(first) || (*first == '0' && digit(first + 1))) return false;
    const auto [stop, error] = std::from_chars(p_, end_, out);
    if (error != std::errc() || !digit(stop - 1)) return false;  // also what overflows or underflows
    // What from_chars takes and JSON does not have: a point without digits after it.
    const auto size = static_cast<size_t>(stop - p_);
    const auto* const point = static_cast<const char*>(std::memchr(p_, '.', size));
    if (point != nullptr && !digit(point + 1)) return false;
    plain = point == nullptr && std::memchr(p_, 'e', size) == nullptr && std::memchr(p_, 'E', size) == nullptr;
    if (plain && out == 0.0) out = 0.0;  // the integer -0 has no sign
    p_ = stop;
    return true;
#else
    return false;  // this compiler's library has no exact conversion: all lines are read in Python
#endif
  }

  bool count(int64_t& out) {
    double value;
    bool plain;
    if (at('-') || !number(value, plain) || !plain || !(value < static_cast<double>(kMostSteps))) return false;
    out = static_cast<int64_t>(value);
    return true;
  }

  int32_t intern(std::string_view value) {
    if (last_code_ >= 0 && strings[static_cast<size_t>(last_code_)] == value) return last_code_;
    const auto [at, added] = codes_.try_emplace(std::string(value), static_cast<int32_t>(strings.size()));
    if (added) strings.emplace_back(value);
    return last_code_ = at->second;
  }

  // One value or null, appended to its column.
  bool value(RecordColumn& c) {
    while (p_ < end_ && *p_ == ' ') ++p_;
    if (p_ == end_) return false;
    if (*p_ == 'n') {
      if (!take("null")) return false;
      if (c.coded()) {
        c.codes.push_back(-1);
      } else {
        c.numbers.push_back(std::numeric_limits<double>::quiet_NaN());
      }
      return true;
    }
    if (c.kind == ValueKind::boolean) {
      const bool yes = *p_ == 't';
      if (!(yes ? take("true") : take("false"))) return false;
      c.codes.push_back(yes ? 1 : 0);
      return true;
    }
    if (c.kind == ValueKind::text) {
      std::string_view found;
      if (!text(found)) return false;
      c.codes.push_back(intern(found));
      return true;
    }
    double x;
    bool plain;
    if (!number(x, plain)) return false;
    if (c.kind == ValueKind::integer && !(x >= 0.0 && x == std::floor(x))) return false;
    c.numbers.push_back(x);
    return true;
  }

  // The column of this name, most often the one after the last; a new one of numbers if there is none.
  RecordColumn* find(std::vector<RecordColumn>& among, size_t& hint, std::string_view name, size_t size) {
    size_t i = hint;
    if (i >= among.size() || among[i].name != name) {
      for (i = 0; i < among.size() && among[i].name != name; ++i) {
      }
    }
    if (i == among.size()) {
      if (name.empty() || refused_.count(std::string(name)) != 0) return nullptr;
      among.push_back({std::string(name), ValueKind::number, false, 0, {}, {}});
      among.back().resize(size);
    }
    hint = i + 1;
    if (among[i].line == line_) return nullptr;  // twice
    among[i].line = line_;
    return &among[i];
  }

  bool layers(size_t length) {
    if (!take('{')) return false;
    size_t hint = 0;
    do {
      std::string_view name;
      if (!text(name) || !take(':')) return false;
      RecordColumn* const c = find(columns, hint, name, rows_);
      if (c == nullptr || !take('[')) return false;
      for (size_t i = 0; i < length; ++i) {
        if ((i > 0 && !take(',')) || !value(*c)) return false;
      }
      if (!take(']')) return false;
    } while (take(','));
    return take('}');
  }

  bool line() {
    const Run* run = nullptr;
    bool kind = false, step = false, time = false, body = false;
    int32_t which = 0;
    int64_t steps_before = 0;
    double when = 0.0;
    size_t hint = 0;
    if (!take('{')) return false;
    do {
      std::string_view name;
      if (!text(name) || !take(':')) return false;
      if (name == "kind") {
        std::string_view found;
        if (kind || !text(found) || (found != "measured" && found != "predicted")) return false;
        which = found == "predicted" ? 1 : 0;
        kind = true;
      } else if (name == "run") {
        std::string_view found;
        if (run != nullptr || !text(found)) return false;
        const auto at = expected_.find(std::string(found));
        if (at == expected_.end() || at->second.length < 1) return false;
        run = &at->second;
      } else if (name == "step") {
        if (step || !count(steps_before)) return false;
        step = true;
      } else if (name == "time") {
        bool plain;
        while (p_ < end_ && *p_ == ' ') ++p_;
        if (time || !number(when, plain)) return false;
        time = true;
      } else if (name == "layers") {
        if (body || run == nullptr || !layers(static_cast<size_t>(run->length))) return false;
        body = true;
      } else {
        RecordColumn* const c = find(scalars, hint, name, steps.size());
        if (c == nullptr || !value(*c)) return false;
      }
    } while (take(','));
    if (!take('}')) return false;
    while (p_ < end_ && (*p_ == ' ' || *p_ == '\r')) ++p_;
    if (p_ != end_ || !kind || run == nullptr || !step || !time || !body) return false;
    commit(*run, which, steps_before, when);
    return true;
  }

  void commit(const Run& run, int32_t which, int64_t step, double time) {
    rows_ += static_cast<size_t>(run.length);
    kinds.push_back(which);
    runs.push_back(run.code);
    lengths.push_back(run.length);
    steps.push_back(step);
    times.push_back(time);
    for (RecordColumn& c : columns) {
      c.used = c.used || c.line == line_;
      c.resize(rows_);
    }
    for (RecordColumn& c : scalars) {
      c.used = c.used || c.line == line_;
      c.resize(steps.size());
    }
  }

  std::unordered_map<std::string, Run> expected_;
  std::unordered_map<std::string, int32_t> codes_;
  std::unordered_set<std::string> refused_;
  int32_t last_code_ = -1;
  uint64_t line_ = 0, taken_ = 0;
  size_t rows_ = 0;
  const char* p_ = nullptr;
  const char* end_ = nullptr;
};

}  // namespace fastfs
