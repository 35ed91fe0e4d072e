#include "gather_rows.h"

#include "gather_rows.cuh"

namespace fastfs::cuda {
namespace {

int blocks_for(int64_t teams_needed, int teams_of_block, int blocks_of_device) {
  return static_cast<int>(min64(ceil_div(teams_needed, teams_of_block), blocks_of_device));
}

template <class F>
void start_rows(const RowJob& job, int multiprocessors, void* stream) {
  const int blocks = blocks_for(job.kept * job.chunks, kRowThreads / job.team, kRowBlocks<F> * multiprocessors);
  start(gather_rows_kernel<F, kRowThreads>, job, blocks, kRowThreads, stream);
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
  job.team = job.width <= kWarpRow ? 32 : kRowThreads;
  job.contiguous = x.row.contiguous[0];
  job.row.dims = x.dims;
  for (int d = 0; d < x.dims; ++d) job.row.shape[d] = x.shape[d], job.row.stride[d] = x.stride[d];
  job.within.dims = x.row.dims;
  for (int d = 0; d < x.row.dims; ++d) {
    job.within.shape[d] = x.row.shape[d];
    job.within.stride[d] = x.row.stride[0][d];
  }

  const DeviceGuard guard(device);
  const int sms = multiprocessors(device);
  switch (x.dtype) {
    case DType::f16:
      start_rows<F16>(job, sms, stream);
      break;
    case DType::bf16:
      start_rows<BF16>(job, sms, stream);
      break;
    case DType::f32:
      start_rows<F32>(job, sms, stream);
      break;
    case DType::f64:
      start_rows<F64>(job, sms, stream);
      break;
  }
  if (job.chunks > 1) {
    const MergeJob merge{partials, q.squares, job.kept, job.chunks};
    start(merge_rows_kernel<kRowThreads>, merge, blocks_for(job.kept, kRowThreads / 32, 8 * sms), kRowThreads, stream);
  }
}

}  // namespace fastfs::cuda
