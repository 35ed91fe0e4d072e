// The loops of the measurements. Included by one file per instruction set, inside its namespace, after its vectors
// (vectors_*.h) and kUnroll, the number of steps of the inner loop to unroll.

// Bytes ahead. Three streams of bfloat16 on one core of a Zen 5 EPYC: 26 GB/s at 1 KB, 36 from 3 KB on; float32: 32
// and 36.
constexpr int64_t kPrefetch = 3072;

template <class V, class F>
FASTFS_HD V load_at(const char* p, int64_t left) {
  if (left >= V::kLanes) return V::template load<F>(p);
  alignas(64) char padded[V::kLanes * kItemSize<F>] = {};
  __builtin_memcpy(padded, p, static_cast<size_t>(left * kItemSize<F>));
  return V::template load<F>(padded);
}

// One run of kChain * kLanes elements (fewer if Partial), lanes [half * V::kLanes, (half + 1) * V::kLanes).
template <class Sums, class F, class B, class V, bool Partial>
FASTFS_HD void run(const char* const* inputs, int64_t start, int64_t left, int half,
                   const Coefficients<V, Sums::kCoefficients>& coefficients, double (*total)[kLanes]) {
  constexpr int kIn = Sums::kInputs;
  V acc[Sums::kSums];
#pragma GCC unroll 16
  for (int k = 0; k < Sums::kSums; ++k) acc[k] = V::zero();
#pragma GCC unroll kUnroll
  for (int step = 0; step < kChain; ++step) {
    const int64_t at = step * kLanes + half * V::kLanes;
    if (Partial && at >= left) break;
    V x[kIn];
#pragma GCC unroll 4
    for (int i = 0; i < kIn; ++i) {
      const int64_t size = i + 1 < kIn ? kItemSize<F> : kItemSize<B>;
      const char* p = inputs[i] + (start + at) * size;
      if (!Partial && half == 0 && (step * kLanes * size) % 64 == 0) {
#pragma GCC unroll 2
        for (int64_t line = 0; line < kLanes * size; line += 64) __builtin_prefetch(p + kPrefetch + line);
      }
      if constexpr (Partial) {
        x[i] = i + 1 < kIn ? load_at<V, F>(p, left - at) : load_at<V, B>(p, left - at);
      } else {
        x[i] = i + 1 < kIn ? V::template load<F>(p) : V::template load<B>(p);
      }
    }
    Sums::template add_terms<F>(acc, x, coefficients);
  }
#pragma GCC unroll 16
  for (int k = 0; k < Sums::kSums; ++k) acc[k].add_to(total[k] + half * V::kLanes);
}

template <class Sums, class F, class B, class V>
void chunk(const char* const* inputs, int64_t n, const double* coefficients, double* sums) {
  constexpr int64_t kRun = kChain * kLanes;
  const auto c = coefficients_at<V, Sums::kCoefficients>(coefficients);
  alignas(64) double total[Sums::kSums][kLanes] = {};
  int64_t start = 0;
  for (; start + kRun <= n; start += kRun) {
#pragma GCC unroll 4
    for (int half = 0; half < kLanes / V::kLanes; ++half) {
      run<Sums, F, B, V, false>(inputs, start, kRun, half, c, total);
    }
  }
  for (int half = 0; start < n && half < kLanes / V::kLanes; ++half) {
    run<Sums, F, B, V, true>(inputs, start, n - start, half, c, total);
  }
  for (int k = 0; k < Sums::kSums; ++k) {
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) total[k][i] += total[k][i + width];
    }
    sums[k] = total[k][0] * Sums::template factor<F, V>(k);
  }
}

template <class Sums, class V>
constexpr void fill(ChunkFunction (&f)[4][4]) {
  // Order of DType: f16, bf16, f32, f64.
  if constexpr (Sums::kOneDtype) {
    if constexpr (Sums::kSixteenBit) {
      f[0][0] = &chunk<Sums, F16, F16, V>;
      f[1][1] = &chunk<Sums, BF16, BF16, V>;
    }
    f[2][2] = &chunk<Sums, F32, F32, V>;
    f[3][3] = is_single<V>::value ? nullptr : &chunk<Sums, F64, F64, Double>;
    return;
  } else {
#define FASTFS_ROW(i, F)              \
  f[i][0] = &chunk<Sums, F, F16, V>;  \
  f[i][1] = &chunk<Sums, F, BF16, V>; \
  f[i][2] = &chunk<Sums, F, F32, V>;  \
  f[i][3] = is_single<V>::value ? nullptr : &chunk<Sums, F, F64, Double>
    FASTFS_ROW(0, F16);
    FASTFS_ROW(1, BF16);
    FASTFS_ROW(2, F32);
#undef FASTFS_ROW
    f[3][0] = is_single<V>::value ? nullptr : &chunk<Sums, F64, F16, Double>;
    f[3][1] = is_single<V>::value ? nullptr : &chunk<Sums, F64, BF16, Double>;
    f[3][2] = is_single<V>::value ? nullptr : &chunk<Sums, F64, F32, Double>;
    f[3][3] = is_single<V>::value ? nullptr : &chunk<Sums, F64, F64, Double>;
  }
}

template <class Sums>
constexpr ChunkTable<Sums> make_table() {
  ChunkTable<Sums> t{};
  fill<Sums, Single>(t.single);
  fill<Sums, Double>(t.dbl);
  return t;
}
#define FASTFS_TABLE(name, Sums) , make_table<Sums>()
constexpr SumLoops kSumLoops{{} FASTFS_MEASUREMENTS(FASTFS_TABLE)};
#undef FASTFS_TABLE
