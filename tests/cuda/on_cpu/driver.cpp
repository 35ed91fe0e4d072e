// Runs cases through the real launchers and kernels: driver CASES RESULTS. Both files are written and read by
// harness.py.
//
// A case:    op (a place in the list of measurements.h, or -1: stream_read), multiprocessors, large parameters,
// repeats,
//            coefficients in device memory, layers;
//            per layer first, last, segments, width, per row, coefficients (their number and bits), dims, shape[dims];
//            per input contiguous, stride[dims], misalignment, bytes, data
// A result:  launches, tickets that are not zero, doubles; doubles
// Shape and strides are those of the tensors: they are merged here by the code that the module uses.
// All numbers are int64. Every buffer has its exact size, so that a sanitizer sees a read beyond it.
#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "shim.h"

namespace {                    // internal linkage: the address sanitizer guards only such shared arrays
#if defined(DRIVER_BF16_ONLY)  // a quick build: feature_stats of bfloat16 features
#include "submit.cuh"
namespace fastfs::cuda {
template <class Sums>
constexpr bool kTakes<Sums, F16> = false;
template <class Sums>
constexpr bool kTakes<Sums, BF16> = std::is_same_v<Sums, FeatureSums>;
template <class Sums>
constexpr bool kTakes<Sums, F32> = false;
template <class Sums>
constexpr bool kTakes<Sums, F64> = false;
template <class Sums>
constexpr bool kTakes<Sums, Any> = std::is_same_v<Sums, FeatureSums>;
}  // namespace fastfs::cuda
#endif
#include "../strides.h"
#include "launch.cu"
//
#include "../bench/stream_read.cu"

FILE* in;

int64_t number() {
  int64_t v;
  if (fread(&v, sizeof v, 1, in) != 1) throw std::runtime_error("the file of cases ends too soon");
  return v;
}

template <class Sums>
std::vector<double> measure(const std::vector<fastfs::Layer>& layers, bool far, int64_t repeats, int64_t& dirty) {
  namespace cuda = fastfs::cuda;
  const cuda::Plan need = cuda::plan<Sums>(layers);
  int64_t rows = 0;
  for (const auto& layer : layers) rows += layer.segments;
  std::unique_ptr<double[]> coefficients(new double[layers.size() * Sums::kCoefficients]);
  for (size_t i = 0; i < layers.size(); ++i) {
    std::copy_n(layers[i].coefficients, Sums::kCoefficients, coefficients.get() + i * Sums::kCoefficients);
  }
  // Exact sizes, and contents that would be noticed.
  std::unique_ptr<double[]> out(new double[rows * (Sums::kSums + 2)]), partials(new double[need.partial_bytes / 8]);
  std::unique_ptr<uint32_t[]> tickets(new uint32_t[need.tickets]);
  std::fill_n(out.get(), rows * (Sums::kSums + 2), -12345.0);
  std::fill_n(partials.get(), need.partial_bytes / 8, -1e300);
  std::fill_n(tickets.get(), need.tickets, 0u);
  for (int64_t i = 0; i < repeats; ++i) {
    cuda::launch<Sums>(layers, need, far ? coefficients.get() : nullptr, out.get(), partials.get(), tickets.get(), 0,
                       nullptr);
  }
  dirty = need.tickets - std::count(tickets.get(), tickets.get() + need.tickets, 0u);
  return {out.get(), out.get() + rows * (Sums::kSums + 2)};
}

void run_case(FILE* results) {
  const int64_t op = number();
  fastfs::cuda::fake_multiprocessors = static_cast<int>(number());
  fastfs::cuda::fake_large_parameters = number() != 0;
  const int64_t repeats = number();
  const bool far = number() != 0;
  std::vector<fastfs::Layer> layers(number());
#define DRIVER_INPUTS(name, Sums) fastfs::Sums::kInputs,
  constexpr int kInputs[] = {FASTFS_MEASUREMENTS(DRIVER_INPUTS)};
  const int inputs = op < 0 ? 3 : kInputs[op];
  std::vector<std::unique_ptr<char[]>> buffers;
  for (auto& layer : layers) {
    layer = fastfs::Layer{};
    layer.first = static_cast<fastfs::DType>(number());
    layer.last = static_cast<fastfs::DType>(number());
    layer.segments = number();
    layer.width = number();
    const bool per_row = number() != 0;
    const int64_t coefficients = number();
    for (int64_t i = 0; i < coefficients; ++i) {
      const int64_t bits = number();
      std::memcpy(&layer.coefficients[i], &bits, sizeof bits);
    }
    std::vector<int64_t> shape(number()), strides[fastfs::kMaxInputs];
    for (int64_t& n : shape) n = number();
    const int64_t* all_strides[fastfs::kMaxInputs] = {};
    bool dense = true;
    for (int j = 0; j < inputs; ++j) {
      layer.contiguous[j] = number() != 0;
      dense = dense && layer.contiguous[j];
      strides[j].resize(shape.size());
      for (int64_t& n : strides[j]) n = number();
      all_strides[j] = strides[j].data();
      const int64_t offset = number(), bytes = number();
      buffers.emplace_back(new char[offset + bytes]);
      char* p = buffers.back().get() + offset;
      if (bytes > 0 && fread(p, 1, bytes, in) != static_cast<size_t>(bytes)) throw std::runtime_error("no data");
      layer.data[j] = p;
    }
    if (!dense && layer.segments * layer.width > 0 &&
        !fastfs::merge_dims(layer, inputs, per_row, static_cast<int>(shape.size()), shape.data(), all_strides)) {
      throw std::runtime_error("too many dimensions");
    }
  }
  fastfs::cuda::launches = 0;
  int64_t dirty = 0;
  std::vector<double> out;
  int64_t place = 0;
#define DRIVER_MEASURE(name, Sums) \
  if (op == place++) out = measure<fastfs::Sums>(layers, far, repeats, dirty);
  FASTFS_MEASUREMENTS(DRIVER_MEASURE)
  if (op < 0) {
    out.resize(1);
    fastfs::bench::stream_read_cuda(layers, inputs, out.data(), 0, nullptr);
  }
  const int64_t head[3] = {fastfs::cuda::launches, dirty, static_cast<int64_t>(out.size())};
  fwrite(head, sizeof head, 1, results);
  fwrite(out.data(), sizeof(double), out.size(), results);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 || !(in = fopen(argv[1], "rb"))) return 2;
  FILE* results = fopen(argv[2], "wb");
  if (!results) return 2;
  for (int64_t cases = number(); cases > 0; --cases) run_case(results);
  return fclose(results) == 0 ? 0 : 2;
}
