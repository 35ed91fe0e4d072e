// Runs cases through the real launcher and kernels of the row ops: rows_driver CASES RESULTS, written and read by
// row_cases.py.
//
// A case:    multiprocessors, dtype, row_dims, dims, shape[dims], strides[dims], misalignment, bytes, data;
//            kept, stride of the index, index[kept * stride]; dtype of the copy (-1: none), misalignment of the copy
// A result:  launches, bytes of the copy, copy; kept, squares
// All numbers are int64. Every buffer has its exact size, so that a sanitizer sees what goes beyond it.
#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "shim.h"

namespace {  // internal linkage: the address sanitizer guards only such shared arrays
#include "gather_rows.cu"

FILE* in;

int64_t number() {
  int64_t v;
  if (fread(&v, sizeof v, 1, in) != 1) throw std::runtime_error("the file of cases ends too soon");
  return v;
}
std::vector<int64_t> numbers(int64_t n) {
  std::vector<int64_t> v(n);
  for (int64_t& x : v) x = number();
  return v;
}

void run_case(FILE* results) {
  namespace cuda = fastfs::cuda;
  cuda::fake_multiprocessors = static_cast<int>(number());
  fastfs::RowTensor x{};
  x.dtype = static_cast<fastfs::DType>(number());
  const int row_dims = static_cast<int>(number());
  const int64_t dims = number();
  const std::vector<int64_t> shape = numbers(dims), strides = numbers(dims);
  const int64_t offset = number(), bytes = number();
  const std::unique_ptr<char[]> data(new char[offset + bytes]);
  if (bytes > 0 && fread(data.get() + offset, 1, bytes, in) != static_cast<size_t>(bytes)) {
    throw std::runtime_error("no data");
  }
  x.data = data.get() + offset;
  if (!fastfs::split_rows(x, row_dims, static_cast<int>(dims), shape.data(), strides.data())) {
    throw std::runtime_error("too many dimensions");
  }
  fastfs::RowRequest q{};
  q.kept = number();
  q.index_stride = number();
  const std::vector<int64_t> index = numbers(q.kept * q.index_stride);
  q.index = index.data();
  const int64_t to = number(), to_offset = number();
  q.to_dtype = to < 0 ? x.dtype : static_cast<fastfs::DType>(to);
  const int64_t to_bytes = to < 0 ? 0 : q.kept * x.row.width * fastfs::item_size(q.to_dtype);
  const std::unique_ptr<char[]> out(new char[to_offset + to_bytes]);
  std::fill_n(out.get(), to_offset + to_bytes, char(0x5a));
  if (to_bytes > 0) q.to = out.get() + to_offset;
  const int64_t partials = cuda::row_partials(q.kept, x.row.width);
  const std::unique_ptr<double[]> scratch(new double[partials]), squares(new double[q.kept]);
  std::fill_n(scratch.get(), partials, -1e300);
  std::fill_n(squares.get(), q.kept, -12345.0);
  q.squares = squares.get();

  cuda::launches = 0;
  cuda::gather_rows(x, q, scratch.get(), 0, nullptr);
  const int64_t head[2] = {cuda::launches, to_bytes};
  fwrite(head, sizeof head, 1, results);
  fwrite(out.get() + to_offset, 1, to_bytes, results);
  fwrite(&q.kept, sizeof q.kept, 1, results);
  fwrite(squares.get(), sizeof(double), q.kept, results);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 || !(in = fopen(argv[1], "rb"))) return 2;
  FILE* results = fopen(argv[2], "wb");
  if (!results) return 2;
  for (int64_t cases = number(); cases > 0; --cases) run_case(results);
  return fclose(results) == 0 ? 0 : 2;
}
