#include "gather_rows.h"

#include "gather_rows.cuh"

namespace fastfs::cuda {
namespace {

constexpr int kThreads = Policies::Order::kGatherThreads;

// The device of a call.
struct Device {
  int multiprocessors, architecture;
};

Grid grid_for(int64_t teams, int teams_of_block, int blocks_of_device) {
  return Grid{static_cast<int>(min64(ceil_div(teams, teams_of_block), blocks_of_device)), kThreads};
}

template <class F>
void start_rows(const RowJob& job, const Device& device, void* stream) {
  const int blocks = Policies::visit(
      device.architecture, [](auto policy) { return decltype(policy)::template GatherRows<F>::kBlocksPerSm; });
  const Grid grid = grid_for(job.kept * job.chunks, kThreads / job.team, blocks * device.multiprocessors);
  start(gather_rows_kernel<F, Policies>, job, grid, stream);
}

void start_merge(const MergeJob& job, const Device& device, void* stream) {
  const int blocks =
      Policies::visit(device.architecture, [](auto policy) { return decltype(policy)::MergeRows::kBlocksPerSm; });
  start(merge_rows_kernel<Policies>, job, grid_for(job.kept, kThreads / 32, blocks * device.multiprocessors), stream);
}

}  // namespace

int64_t row_partials(int64_t kept, int64_t width) { return width <= kChunk ? 0 : kept * chunks_of_row(width); }

void gather_rows(const RowTensor& x, const RowRequest& q, double* partials, int device, void* stream) {
  if (q.kept == 0) return;
  RowJob job{};
  job.data = x.data;
  job.index = q.index;
  job.index_stride = q.index_stride;
  job.rows = x.rows;
  job.width = x.row.width;
  job.kept = q.kept;
  job.chunks = chunks_of_row(job.width);
  job.to = q.to;
  job.to_dtype = q.to_dtype;
  job.squares = job.chunks > 1 ? partials : q.squares;
  job.team = job.width <= Policies::Order::kGatherWarpRow ? 32 : kThreads;
  job.contiguous = x.row.contiguous[0];
  job.row.dims = x.dims;
  for (int d = 0; d < x.dims; ++d) job.row.shape[d] = x.shape[d], job.row.stride[d] = x.stride[d];
  job.within.dims = x.row.dims;
  for (int d = 0; d < x.row.dims; ++d) {
    job.within.shape[d] = x.row.shape[d];
    job.within.stride[d] = x.row.stride[0][d];
  }

  const DeviceGuard guard(device);
  const Device at{multiprocessors(device), architecture(device)};
  switch (x.dtype) {
    case DType::f16:
      start_rows<F16>(job, at, stream);
      break;
    case DType::bf16:
      start_rows<BF16>(job, at, stream);
      break;
    case DType::f32:
      start_rows<F32>(job, at, stream);
      break;
    case DType::f64:
      start_rows<F64>(job, at, stream);
      break;
  }
  if (job.chunks > 1) {
    start_merge(MergeJob{partials, q.squares, job.kept, job.chunks}, at, stream);
  }
}

}  // namespace fastfs::cuda
